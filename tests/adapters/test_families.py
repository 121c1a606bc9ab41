"""What single families have otherwise: scaled embeddings, capped logits, windows, dense layers, learned positions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.models import MODELS, build
from tests.support import CACHE_ARGUMENT, tokens
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.loading.info import cache_memory, layout_in_words, model_info
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, adapter_for
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter


def test_gemma_embeddings_are_scaled_where_the_first_block_reads_them() -> None:
    model, ids = build("gemma"), tokens()
    _, cache = TransformerBridge(model).run_with_cache(ids, names_filter=["hook_embed", "blocks.0.hook_resid_pre"])
    scale = torch.tensor(model.config.hidden_size**0.5)
    assert torch.equal(cache["embed"], nn.functional.embedding(ids, model.model.embed_tokens.weight) * scale)
    assert torch.equal(cache["embed"], cache["resid_pre", 0])
    assert adapter_for(model.config).logit_cap() is None


def test_gemma_norms_multiply_by_one_plus_their_weight() -> None:
    norm = TransformerBridge(build("gemma")).blocks[0].ln1
    weight: Any = norm.original_component.weight
    before = weight.detach().clone()
    assert torch.equal(norm.w, 1 + weight)
    norm.w = norm.w.detach().clone()
    assert torch.equal(weight, before)
    norm.w = torch.full_like(before, 3.0)
    assert torch.equal(weight, torch.full_like(before, 2.0))


@pytest.mark.parametrize("name", ["gemma2", "gemma2, uncapped"])
def test_gemma2_caps_its_scores_and_its_logits(name: str) -> None:
    model, ids = build(name), tokens()
    bridge = TransformerBridge(model)
    logits, cache = bridge.run_with_cache(ids)
    cap, within = model.config.final_logit_softcapping, model.config.attn_logit_softcapping
    head = cache["unembed.hook_out"]
    assert bridge.adapter.logit_cap() == cap
    assert torch.equal(logits, head if cap is None else torch.tanh(head / cap) * cap)
    q, k = (cache[f"rot_{part}", 1].transpose(1, 2) for part in "qk")
    scores = q @ k.repeat_interleave(2, 1).mT * model.config.query_pre_attn_scalar**-0.5
    scores = scores if within is None else torch.tanh(scores / within) * within
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(cache["attn_scores", 1][..., seen], scores[..., seen], rtol=1e-4, atol=1e-5)
    if cap is None:
        with bridge.center_unembed():
            assert float(bridge(ids).detach().mean(-1).abs().max()) < 1e-3
    else:
        with pytest.raises(ValueError, match=r"caps its logits softly at 3\.0"):
            bridge.center_unembed()


@pytest.mark.parametrize(
    "name, windows",
    [
        ("llama", (None, None)),
        ("mistral", (4, 4)),
        ("qwen2", (None, 4)),
        ("gemma2", (4, None)),
        ("qwen3_moe", (4, 4)),
        ("gpt_neo", (None, 4)),
    ],
)
def test_patterns_and_memory_go_by_the_window_of_each_layer(name: str, windows: tuple[int | None, ...]) -> None:
    bridge = TransformerBridge(build(name, "eager"))
    _, cache = bridge.run_with_cache(tokens())
    assert tuple(map(bridge.adapter.window, (0, 1))) == windows
    for layer, window in enumerate(windows):
        seen = torch.ones(7, 7, dtype=torch.bool).tril().triu(-(window or 7) + 1)
        assert torch.equal(cache["pattern", layer] > 0, seen.expand(2, 8, 7, 7))
    heads, d_head = bridge.cfg.n_key_value_heads, bridge.cfg.d_head
    memory = cache_memory(bridge.adapter, 50, torch.bfloat16)
    assert memory.needed == 4 * heads * d_head * sum(50 if window is None else 3 for window in windows)
    held = sum(50 if window is None or name == "gpt_neo" else 4 for window in windows)
    assert memory.allocated == 4 * heads * d_head * held
    words = layout_in_words(bridge.adapter)
    where = {(None, 4): " in layer 1", (4, None): " in layer 0"}.get(windows, "")
    assert words.endswith(f"each token attends to the last 4{where}" if any(windows) else "RoPE")


@pytest.mark.parametrize("name", ["lfm2", "jamba", "gpt_neo", "falcon_h1"])
def test_memory_is_what_the_cache_of_transformers_holds(name: str) -> None:
    if name not in MODELS:
        pytest.skip("this release of transformers has other modules for it")
    model = build(name)
    out = model(tokens(1, 12), use_cache=True)
    held = [vars(layer).get(kind) for layer in out[CACHE_ARGUMENT].layers for kind in ("keys", "values")]
    memory = cache_memory(adapter_for(model.config), 12, torch.float32)
    assert memory.allocated == 4 * sum(kept.numel() for kept in held if kept is not None) > 0


@pytest.mark.parametrize(
    "name, options",
    [
        ("jamba", {"num_experts": 1, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 0}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1], "num_experts": 2}),
    ],
)
def test_a_mixture_of_dense_layers_alone_may_choose_more_experts_than_it_has(
    name: str, options: dict[str, Any]
) -> None:
    if name not in MODELS:
        pytest.skip("this release of transformers has other modules for it")
    model, ids = build(name, **options), tokens()
    assert torch.equal(model(ids).logits, TransformerBridge(model)(ids))


def test_gptj_says_how_it_rotates() -> None:
    if "gptj" in MODELS:
        cfg = adapter_for(build("gptj").config).cfg
        assert (cfg.rotary_dim, cfg.rotary_base) == (4, 10000.0)


@pytest.mark.parametrize("name", sorted({"granite", "falcon_h1"} & {*MODELS}))
def test_given_embeddings_are_shown_as_the_first_block_reads_them_or_not_at_all(name: str) -> None:
    bridge, x = TransformerBridge(build(name)), torch.randn(1, 5, 32)
    if name == "falcon_h1":
        with pytest.raises(ValueError, match="never fired: 'hook_embed'"):
            bridge.run_with_cache(x)
        return
    _, cache = bridge.run_with_cache(x)
    assert torch.equal(cache["embed"], cache["resid_pre", 0])


def test_each_layer_of_a_mixture_with_dense_layers_has_its_own_width() -> None:
    for name, dense, sparse in (("qwen3_moe, dense first", 0, 1), ("qwen3_moe, every other", 0, 1)):
        table = TransformerBridge(build(name)).hook_table()
        assert table.row(f"blocks.{dense}.mlp.hook_post").shape == ("batch", "pos", 24)
        assert table.row(f"blocks.{sparse}.mlp.hook_post").shape == ("batch", "pos", 3, 16)


def test_left_padded_texts_have_positions_of_their_own() -> None:
    # Then GPT-2 looks up positions for each row, and the write still has to fit.
    model, ids = build("gpt2"), tokens()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    _, cache = TransformerBridge(model).run_with_cache(ids, attention_mask=mask, names_filter="hook_pos_embed")
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    assert torch.equal(cache["pos_embed"], model.transformer.wpe(positions))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_gpt2_shows_the_softmax_that_it_computes_itself(attn: str) -> None:
    model, ids = build("gpt2, scaled", attn), tokens()
    bridge = TransformerBridge(model)
    _, cache = bridge.run_with_cache(ids)
    for layer in (0, 1):
        q, k = (cache[part, layer].transpose(1, 2) for part in "qk")
        scores = (q @ k.mT) * 4**-0.5 / (layer + 1)
        pattern = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        torch.testing.assert_close(cache["pattern", layer], pattern, rtol=1e-4, atol=1e-6)
    alone = torch.zeros(2, 8, 7, 7)
    alone[..., 0] = 1
    with bridge.hooks([("blocks.1.attn.hook_pattern", lambda x, hook: alone)]):
        _, written = bridge.run_with_cache(ids, names_filter=["blocks.1.attn.hook_z", "blocks.1.attn.hook_v"])
    assert torch.equal(written["z", 1], written["v", 1][:, :1].expand(2, 7, 8, 4))


def test_what_the_adapters_do_not_describe_is_refused() -> None:
    with pytest.raises(ValueError, match="GPT2Config: add_cross_attention=True, expected False: the adapter of 'gpt2'"):
        adapter_for(build("gpt2").config.__class__(add_cross_attention=True))
    with pytest.raises(ValueError, match="8 query heads do not fall into 3 equal key-value groups"):
        adapter_for(build("llama").config.__class__(hidden_size=32, num_attention_heads=8, num_key_value_heads=3))


def test_parameters_of_gpt2s_linear_layers_are_counted() -> None:
    info = model_info("gpt2")
    assert info.parameters == 124_439_808
    blocks = 12 * 12 * 768**2  # four matrices of width 768: 3 + 1 + 4 + 4
    eight_bits = next(weights for weights in info.weights if weights.precision == "8-bit")
    rows = 12 * (3 * 768 + 768 + 4 * 768 + 768)
    assert eight_bits.bytes == 2 * (info.parameters - blocks) + blocks + 4 * rows


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_gpt_oss_opens_experts_with_biases_whose_layers_lie_entry_by_entry(experts: str) -> None:
    model, ids = build("gpt_oss"), tokens()
    model.config._experts_implementation = experts
    bridge = TransformerBridge(model)
    mlp: Any = model.model.layers[1].mlp
    own = mlp.experts
    _, cache = bridge.run_with_cache(ids)
    short = ("in", "expert_indices", "expert_weights", "pre", "pre_linear", "post", "expert_out")
    entering, chosen, weights, pre, linear, post, out = (cache[f"blocks.1.mlp.hook_{name}"] for name in short)
    both = torch.einsum("bpm,bpkmh->bpkh", entering, own.gate_up_proj[chosen]) + own.gate_up_proj_bias[chosen]

    def neurons(both: torch.Tensor) -> torch.Tensor:
        gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2].clamp(-1.0, 1.0)
        return gate * torch.sigmoid(gate * own.alpha) * (up + 1)

    def added(neurons: torch.Tensor) -> torch.Tensor:
        outs = torch.einsum("bpkh,bpkhm->bpkm", neurons, own.down_proj[chosen]) + own.down_proj_bias[chosen]
        return (outs * weights[..., None]).sum(2)

    close = {"rtol": 1e-4, "atol": 1e-5}
    for got, expected in ((pre, both[..., ::2]), (linear, both[..., 1::2]), (post, neurons(both))):
        torch.testing.assert_close(got, expected, **close)
    torch.testing.assert_close((out * weights[..., None]).sum(2), added(post), **close)

    def after(hook: str, new: Any) -> torch.Tensor:
        with bridge.hooks([(f"blocks.1.mlp.{hook}", lambda x, hook: new(x))]):
            return bridge.run_with_cache(ids, names_filter="blocks.1.hook_mlp_out")[1]["mlp_out", 1]

    changed = torch.stack([both[..., ::2].sin(), both[..., 1::2]], -1).flatten(-2)
    torch.testing.assert_close(after("hook_pre", torch.sin), added(neurons(changed)), **close)
    torch.testing.assert_close(after("hook_post", lambda x: x / 2), added(post / 2), **close)
    torch.testing.assert_close(after("hook_expert_out", lambda x: x / 2), added(post) / 2, **close)


def test_weights_of_gpt_oss_experts_are_read_and_written_as_they_lie() -> None:
    model = build("gpt_oss")
    mlp, own = TransformerBridge(model).blocks[0].mlp, model.model.layers[0].mlp.experts
    for name, weight, start in (("W_gate", own.gate_up_proj, 0), ("b_in", own.gate_up_proj_bias, 1)):
        assert torch.equal(getattr(mlp, name), weight[..., start::2])
        before = weight.detach().clone()
        setattr(mlp, name, torch.zeros_like(getattr(mlp, name)))
        assert not weight[..., start::2].any() and torch.equal(weight[..., 1 - start :: 2], before[..., 1 - start :: 2])
    assert torch.equal(mlp.b_out, own.down_proj_bias) and torch.equal(mlp.W_out, own.down_proj)


def test_halves_of_one_matmul_are_weights_of_their_own() -> None:
    model = build("phi3")
    mlp, fused = TransformerBridge(model).blocks[0].mlp, model.model.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(mlp.W_gate, fused[:24].T) and torch.equal(mlp.W_in, fused[24:].T)
    mlp.W_in = torch.ones(32, 24)
    assert bool((fused[24:] == 1).all()) and not bool((fused[:24] == 1).any())
    assert not mlp.b_gate.any() and mlp.b_in.shape == (24,)


def test_weights_are_those_that_the_module_multiplies() -> None:
    model = build("falcon_h1")
    bridge, layer = TransformerBridge(model), model.model.layers[0]
    block = next(iter(bridge.blocks))
    torch.testing.assert_close(
        block.attn.W_K, 0.6 * layer.self_attn.k_proj.weight.T.unflatten(-1, (4, 4)).movedim(1, 0)
    )
    torch.testing.assert_close(block.mlp.W_gate, 0.8 * layer.feed_forward.gate_proj.weight.T)
    torch.testing.assert_close(block.mlp.W_out, 1.4 * layer.feed_forward.down_proj.weight.T)
    new = torch.randn(1, 3, 4, 4)
    with bridge.hooks([("blocks.0.attn.hook_k", lambda x, hook: new.expand(*x.shape[:2], 4, 4))]):
        _, cache = bridge.run_with_cache(tokens(1, 3), names_filter="blocks.0.attn.hook_k")
    assert torch.equal(cache["k", 0], new)


def test_a_norm_without_weights_reads_as_ones_and_zeros() -> None:
    norm = TransformerBridge(build("olmo")).blocks[0].ln1
    assert torch.equal(norm.w, torch.ones(32)) and torch.equal(norm.b, torch.zeros(32))
    with pytest.raises(ValueError, match=r"blocks\.0\.ln1\.w cannot be written: .* no such parameter .* read as ones"):
        norm.w = torch.zeros(32)


def test_nemotrons_norms_multiply_by_one_plus_their_weight() -> None:
    norm = TransformerBridge(build("nemotron")).blocks[0].ln1
    assert torch.equal(norm.w, 1 + norm.original_component.weight)


def test_an_adapter_that_is_a_row_can_be_copied_and_pickled() -> None:
    adapter = adapter_for(build("arcee").config)
    for again in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert again.model_type == "arcee" and again.cfg == adapter.cfg and type(again) is type(adapter)


def test_modules_of_another_release_are_refused() -> None:
    class Later(LlamaArchitectureAdapter):
        since = "99.0"

    with pytest.raises(ValueError, match=r"'llama' has other modules .* describes those of 99\.0 and newer"):
        Later(build("llama").config)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("qwen2_moe", {"num_experts_per_tok": 9}, "it chooses 9 experts for each token and has 5"),
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv=3.0, expected None: the adapter of 'olmoe' does not know"),
    ],
)
def test_configs_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], sentence: str) -> None:
    family, options = MODELS[name]
    with pytest.raises(ValueError, match=sentence):
        adapter_for(getattr(transformers, f"{family}Config")(**{**options, **changes}))


def test_a_shared_experts_share_is_added_to_the_chosen_ones() -> None:
    model, ids = build("qwen2_moe"), tokens()
    bridge = TransformerBridge(model)
    _, cache = bridge.run_with_cache(ids)
    mlp = "blocks.1.mlp"
    chosen = (cache[f"{mlp}.hook_expert_out"] * cache[f"{mlp}.hook_expert_weights"][..., None]).sum(2)
    shared = cache[f"{mlp}.shared.hook_out"] * cache[f"{mlp}.shared.hook_gate"].sigmoid()
    torch.testing.assert_close(cache["mlp_out", 1], chosen + shared, rtol=1e-4, atol=1e-5)
    with bridge.hooks([(f"{mlp}.shared.hook_post", lambda x, hook: torch.zeros_like(x))]):
        _, silent = bridge.run_with_cache(ids, names_filter="blocks.1.hook_mlp_out")
    torch.testing.assert_close(silent["mlp_out", 1], chosen, rtol=1e-4, atol=1e-5)


PARTIAL = ("deepseek_v2", "dots1", "lfm2_moe", "nemotron")
"""Families whose config leaves numbers out that their model class cannot do without."""


def test_every_layer_of_a_familys_own_defaults_is_described() -> None:
    for name in sorted(set(ADAPTERS) & set(CONFIG_MAPPING) - set(PARTIAL)):
        adapter = adapter_for(CONFIG_MAPPING[name]())
        assert all(adapter.block(layer).stages for layer in range(adapter.cfg.n_layers)), name
        assert adapter.cfg.d_head * adapter.cfg.n_heads > 0 and layout_in_words(adapter), name
