"""What single families have otherwise: scaled embeddings, capped logits, windows, dense layers, learned positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.families.models import build
from tests.support import tokens
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.info import cache_memory, layout_in_words, model_info
from transformer_lens.model_bridge.supported_architectures import adapter_for


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
    [("llama", (None, None)), ("mistral", (4, 4)), ("qwen2", (None, 4)), ("gemma2", (4, None)), ("qwen3_moe", (4, 4))],
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
    assert memory.allocated == 4 * heads * d_head * sum(50 if window is None else 4 for window in windows)
    words = layout_in_words(bridge.adapter)
    where = {(None, 4): " in layer 1", (4, None): " in layer 0"}.get(windows, "")
    assert words.endswith(f"each token attends to the last 4{where}" if any(windows) else "RoPE")


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
