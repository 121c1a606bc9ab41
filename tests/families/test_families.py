"""Every shipped family against its bare Hugging Face model: names and values by the hook table, oracles by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families.models import ESSENCE, LINEARS, MODELS, build
from tests.families.oracles import attending, into_attention, places, recorded, softmaxed, torch_hooked, written
from tests.support import cache_of, tokens, torch_hooks, with_cache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.supported_architectures import ADAPTERS

every_model = pytest.mark.parametrize("name", MODELS)
each_kind = pytest.mark.parametrize("name", ESSENCE)
UNROTATED = {
    **dict.fromkeys(("smollm3", "cohere2", "exaone4", "exaone_moe", "jamba", "afmoe", "afmoe, without mup"), (1,)),
    **dict.fromkeys(("kolibri1", "flint", "cohere2_moe"), (1,)),
    **dict.fromkeys(("gpt2", "gpt2, scaled", "gpt_neo", "gpt_bigcode", "bloom"), (0, 1)),
}
"""The layers without position encoding."""
MIXER = "MixerBridge does not say which of its weights read the stream"
UNFOLDED = {
    **dict.fromkeys(("gpt_oss", "aria_text"), "its shape is"),
    "phimoe": "the norm in front has a bias, and this module has none",
    **dict.fromkeys(("lfm2", "lfm2, adjusted", "lfm2_moe", "jamba", "falcon_h1", "falcon_h1, plain", *LINEARS), MIXER),
}
"""Why the norms of some families cannot be folded into what reads them."""
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}
"""Sums of a few dozen float32 products in another order, at values of up to a few hundred."""


def test_every_family_of_the_registry_is_tested() -> None:
    shipped = {build(name).config.model_type for name in MODELS}
    assert shipped | {"falcon", "mixtral"} == set(ADAPTERS)


# -- looking -------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("attn, dtype", [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)])
@every_model
def test_the_model_is_untouched_and_every_hook_fires_once(name: str, attn: str, dtype: torch.dtype) -> None:
    model, ids = build(name, attn, dtype), tokens()
    bare = model(ids).logits
    bridge = TransformerBridge(model)
    table = bridge.hook_table()
    assert torch.equal(bridge(ids), bare)
    logits, cache = bridge.run_with_cache(ids)
    assert torch.equal(logits, bare) and set(cache) == set(bridge.default_names())
    seen: list[tuple[str, tuple[int, ...]]] = []

    def note(tensor: Tensor, hook: Any) -> None:
        seen.append((hook.name, tuple(tensor.shape)))

    looked, cache = bridge.run_with_cache(ids, names_filter=list(bridge.hook_dict))
    assert torch.equal(looked, bare) and set(cache) == set(bridge.hook_dict)
    bridge.run_with_hooks(ids, fwd_hooks=[(hook, note) for hook in bridge.hook_dict])
    assert sorted(hook for hook, _ in seen) == sorted(bridge.hook_dict)
    lengths = {"batch": 2, "pos": 7, "query_pos": 7, "key_pos": 7, "rows": 1, "1": 1}
    for hook, shape in seen:
        assert shape == tuple(lengths.get(str(size), size) for size in table.row(hook).shape), hook
    bridge.detach()
    assert torch_hooks(model) == 0 and torch.equal(model(ids).logits, bare)


@pytest.mark.core
@every_model
def test_captures_are_what_plain_torch_hooks_see(name: str) -> None:
    model, ids = build(name), tokens()
    _, cache = TransformerBridge(model).run_with_cache(ids)
    for hook, value in recorded(model, ids).items():
        assert torch.equal(cache[hook], value), hook


@pytest.mark.core
@every_model
def test_patterns_are_those_that_the_model_returns(name: str) -> None:
    model, ids = build(name, "eager"), tokens()
    patterns = model(ids, output_attentions=True).attentions
    _, cache = TransformerBridge(model).run_with_cache(ids)
    _, fused = TransformerBridge(build(name, "sdpa")).run_with_cache(ids)
    for layer, pattern in zip(attending(model), patterns, strict=True):
        assert torch.equal(cache["pattern", layer], pattern)
        assert torch.equal(softmaxed(model, layer, cache["attn_scores", layer]), pattern)
        torch.testing.assert_close(fused["pattern", layer], pattern, **ROUNDING)


@pytest.mark.core
@every_model
def test_rotated_queries_and_keys_are_what_enters_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = (
        build(name, "eager", reorder_and_upcast_attn=False) if "gpt2" in name else build(name, "eager"),
        tokens(),
    )
    entering = into_attention(model, monkeypatch, ids)
    bridge = TransformerBridge(model)
    _, cache = bridge.run_with_cache(ids)
    for layer, qk in zip(attending(model), entering, strict=True):
        attention = f"blocks.{layer}.attn"
        rotates = f"{attention}.hook_rot_q" in bridge.hook_dict
        for part in "qk":
            shown = [f"{attention}.hook_{kind}" for kind in (f"rot_{part}", f"{part}_normed", part)]
            assert torch.equal(next(cache[hook] for hook in shown if hook in cache), qk[part])
        if f"{attention}.hook_attended" in cache:
            assert torch.equal(cache[f"{attention}.hook_attended"], qk["out"])
        assert rotates == (layer not in UNROTATED.get(name, ()))
        if not rotates:
            with pytest.raises(KeyError, match="added to the embeddings|has no position encoding|rotates nothing"):
                bridge.run_with_cache(ids, names_filter=f"{attention}.hook_rot_q")


@pytest.mark.core
@every_model
def test_norms_and_sums(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    _, cache = bridge.run_with_cache(ids)
    centres = bridge.cfg.normalization_type == "LN"
    for block in bridge.blocks:
        for branch in (branch for branch in block.branches if branch.norm):
            norm, layer = block.role(branch.norm), f"{block.name}.{branch.norm}"
            stream = (
                cache[f"{block.name}.hook_mlp_in"] if branch.mixer == "mlp" else cache[f"{block.name}.hook_resid_pre"]
            )
            centred = stream.double() - (stream.double().mean(-1, keepdim=True) if centres else 0)
            scale = (centred.square().mean(-1, keepdim=True) + bridge.cfg.eps).sqrt()
            torch.testing.assert_close(cache[f"{layer}.hook_scale"].double(), scale, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                cache[f"{layer}.hook_normalized"].double(), centred / scale, rtol=1e-4, atol=1e-5
            )
            # `w` is what multiplies: one plus the weight in Gemma.
            read = cache[f"{layer}.hook_normalized"] * norm.w + norm.b
            entered = cache[f"{block.name}.{branch.mixer}.hook_in"]
            torch.testing.assert_close(entered, read * branch.scale_in, rtol=1e-5, atol=1e-5)
        i = int(block.name.split(".")[1])
        first = [cache[f"{branch.mixer}_out", i] for branch in block.branches if branch.mixer != "mlp"]
        pre, attn, mlp, post = cache["resid_pre", i], sum(first), cache["mlp_out", i], cache["resid_post", i]
        orders = (pre + attn + mlp, mlp + attn + pre) if bridge.cfg.parallel_attn_mlp else (pre + attn + mlp,)
        assert any(torch.equal(total, post) for total in orders)
    start = cache["embed"] + cache["pos_embed"] if "hook_pos_embed" in bridge.hook_dict else cache["embed"]
    assert torch.equal(cache["resid_pre", 0], start) and torch.equal(cache["resid_pre", 1], cache["resid_post", 0])


# -- writing -------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@every_model
def test_writing_what_is_there_changes_nothing(name: str, attn: str) -> None:
    model, ids = build(name, attn), tokens()
    bare = model(ids).logits
    bridge = TransformerBridge(model)
    table = bridge.hook_table()
    ports = [hook for hook in bridge.hook_dict if table.row(hook).kind == "port"]
    inside = [hook for hook in bridge.hook_dict if hook not in ports]
    assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(ports, lambda x, hook: x.clone())]), bare)
    for chosen in ([hook for hook in inside if f".{layer}." in hook] for layer in (0, 1)):
        logits = bridge.run_with_hooks(ids, fwd_hooks=[(chosen, lambda x, hook: x.clone())])
        torch.testing.assert_close(logits, bare, **ROUNDING)


@every_model
def test_a_write_at_any_hook_changes_the_logits(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    bare = bridge(ids)

    def disturb(tensor: Tensor, hook: Any) -> Tensor:
        return (tensor + 1) % bridge.cfg.num_experts if hook.integer else tensor + torch.randn_like(tensor)

    for hook in bridge.hook_dict:
        if not hook.startswith("blocks.1"):
            assert not torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(hook, disturb)]), bare), hook


@pytest.mark.core
@each_kind
def test_a_write_at_a_port_is_that_of_a_plain_torch_hook(name: str) -> None:
    model, ids = build(name), tokens()
    bridge = TransformerBridge(model)

    def change(x: Tensor) -> Tensor:
        return torch.sin(3 * x) + 0.5

    for hook in places(model):
        bare = written(model, hook, change, ids)
        if hook == "unembed.hook_out" and bridge.adapter.logit_cap() is not None:
            assert not torch.equal(bare, change(recorded(model, ids)[hook]))
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda x, hook: change(x))]), bare), hook


@pytest.mark.core
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@each_kind
def test_writes_inside_attention_come_to_what_they_are_on_paper(name: str, attn: str) -> None:
    bridge, ids = TransformerBridge(build(name, attn)), tokens()
    _, plain = bridge.run_with_cache(ids)
    values = plain["v", 1].repeat_interleave(bridge.cfg.n_heads // bridge.cfg.n_key_value_heads, 2)
    alone = torch.zeros_like(plain["pattern", 1])
    alone[..., 0] = 1  # every query reads the first key

    def z_after(hook: str, new: Any) -> Tensor:
        with bridge.hooks([(f"blocks.1.{hook}", lambda x, hook: new(x))]):
            return bridge.run_with_cache(ids)[1]["z", 1]

    torch.testing.assert_close(
        z_after("attn.hook_pattern", lambda x: alone), values[:, :1].expand_as(values), **ROUNDING
    )
    scores = torch.where(alone.bool(), 0.0, torch.finfo(torch.float32).min)
    torch.testing.assert_close(
        z_after("attn.hook_attn_scores", lambda x: scores), values[:, :1].expand_as(values), **ROUNDING
    )
    if "blocks.1.attn.hook_rot_q" in bridge.hook_dict:  # without a query every visible key counts alike
        pattern = plain["pattern", 1]
        alike = (pattern > 0).float() / (pattern > 0).sum(-1, keepdim=True)
        mean = torch.einsum("bhqk,bkhd->bqhd", alike, values)
        for hook in ("attn.hook_rot_q", "attn.hook_rot_k"):
            torch.testing.assert_close(z_after(hook, torch.zeros_like), mean, **ROUNDING)


@pytest.mark.core
@each_kind
def test_a_head_that_is_silenced_takes_its_result_along(name: str) -> None:
    model, ids = build(name), tokens()
    bridge = TransformerBridge(model)

    def silence(x: Tensor, hook: Any) -> Tensor:
        return torch.cat([x[:, :, :1] * 0, x[:, :, 1:]], 2)

    by_result = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_result", silence)])
    by_z = written(model, "blocks.0.attn.hook_z", lambda z: silence(z, None), ids)
    torch.testing.assert_close(by_result, by_z, **ROUNDING)
    _, cache = bridge.run_with_cache(ids, names_filter=["blocks.0.attn.hook_result", "blocks.0.attn.hook_z"])
    out = bridge.blocks[0].attn.module_of("o")(cache["z", 0].flatten(-2))
    torch.testing.assert_close(cache["result", 0].sum(2) + bridge.blocks[0].attn.b_O, out, **ROUNDING)


@pytest.mark.core
@each_kind
def test_another_stream_read_by_attention_is_another_input_of_attention(name: str) -> None:
    model, ids = build(name), tokens()
    bridge, stream = TransformerBridge(model), torch.randn(2, 7, build(name).config.hidden_size)
    block = bridge.blocks[1]
    entering = block.ln1.original_component(stream)
    bare = written(model, "blocks.1.attn.hook_in", lambda x: entering, ids)
    # Keys are the same for the query heads of a group, and those of changed streams are sums in another order.
    wide = stream[:, :, None].expand(-1, -1, bridge.cfg.n_heads, -1)
    got = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_attn_in", lambda x, hook: wide.clone())])
    torch.testing.assert_close(got, bare, rtol=1e-3, atol=1e-3)


@pytest.mark.core
@each_kind
def test_one_query_heads_view_of_a_shared_value_is_its_own(name: str) -> None:
    model, ids = build(name), tokens()
    bridge = TransformerBridge(model)
    _, plain = bridge.run_with_cache(ids)
    stream = torch.randn_like(plain["resid_pre", 1])
    entering = bridge.blocks[1].ln1.original_component(stream)
    place = places(model)["blocks.1.attn.hook_v"]
    new = place.split(place.module(entering))  # every value from that stream, queries and keys as they were
    z_of_all: dict[str, Tensor] = {}

    def see(hook: str, tensor: Tensor) -> Tensor | None:
        if hook.endswith("hook_v"):
            changed = tensor.clone()
            place.split(changed).copy_(new)
            return changed
        z_of_all["z"] = places(model)[hook].split(tensor.clone())
        return None

    wanted = {hook: places(model)[hook] for hook in ("blocks.1.attn.hook_v", "blocks.1.attn.hook_z")}
    with torch_hooked(wanted, see):
        model(ids)

    def edit(x: Tensor, hook: Any) -> Tensor:
        return torch.cat([x[:, :, :1], stream[:, :, None], x[:, :, 2:]], 2)

    with bridge.hooks([("blocks.1.hook_v_input", edit)]):
        _, cache = bridge.run_with_cache(ids)
    expected = plain["z", 1].clone()
    expected[:, :, 1] = z_of_all["z"][:, :, 1]
    torch.testing.assert_close(cache["z", 1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.core
@each_kind
def test_a_norm_goes_on_from_a_written_scale(name: str) -> None:
    model, ids = build(name), tokens()
    bridge = TransformerBridge(model)
    norm = bridge.blocks[1].ln1
    with bridge.hooks([("blocks.1.ln1.hook_scale", lambda x, hook: 2 * x)]):
        _, cache = bridge.run_with_cache(ids)
    _, plain = bridge.run_with_cache(ids)
    torch.testing.assert_close(cache[f"{norm.name}.hook_normalized"], plain[f"{norm.name}.hook_normalized"] / 2)
    expected = plain[f"{norm.name}.hook_normalized"] / 2 * norm.w + norm.b
    torch.testing.assert_close(cache["blocks.1.attn.hook_in"], expected, **ROUNDING)


@pytest.mark.core
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_writes_inside_experts_come_to_what_they_are_on_paper(experts: str) -> None:
    model, ids = build("qwen3_moe"), tokens()
    model.config._experts_implementation = experts
    bridge = TransformerBridge(model)
    mlp: Any = model.model.layers[1].mlp
    _, plain = bridge.run_with_cache(ids)
    names = ("in", "router_logits", "expert_indices", "expert_weights", "pre", "pre_linear", "post", "expert_out")
    get = {name: plain[f"blocks.1.mlp.hook_{name}"] for name in names}
    logits = get["in"] @ mlp.gate.weight.T
    torch.testing.assert_close(get["router_logits"], logits, **ROUNDING)
    top = logits.softmax(-1).topk(3, -1)
    assert torch.equal(get["expert_indices"], top.indices)
    torch.testing.assert_close(get["expert_weights"], top.values / top.values.sum(-1, keepdim=True), **ROUNDING)
    up = mlp.experts.gate_up_proj[get["expert_indices"]]
    down = mlp.experts.down_proj[get["expert_indices"]]
    gate, linear = torch.einsum("bpkhm,bpm->bpkh", up, get["in"]).chunk(2, -1)
    torch.testing.assert_close(get["pre"], gate, **ROUNDING)
    torch.testing.assert_close(get["pre_linear"], linear, **ROUNDING)
    torch.testing.assert_close(get["post"], F.silu(gate) * linear, **ROUNDING)

    def out(neurons: Tensor, weights: Tensor = get["expert_weights"]) -> Tensor:
        return (torch.einsum("bpkmh,bpkh->bpkm", down, neurons) * weights[..., None]).sum(2)

    def after(hook: str, new: Tensor) -> Tensor:
        with bridge.hooks([(f"blocks.1.mlp.{hook}", lambda x, hook: new)]):
            return bridge.run_with_cache(ids)[1]["mlp_out", 1]

    torch.testing.assert_close(after("hook_post", get["post"] * 2), out(get["post"] * 2), **ROUNDING)
    torch.testing.assert_close(after("hook_pre", gate.sin()), out(F.silu(gate.sin()) * linear), **ROUNDING)
    torch.testing.assert_close(after("hook_pre_linear", linear.sin()), out(F.silu(gate) * linear.sin()), **ROUNDING)
    halves = get["expert_out"] / 2
    torch.testing.assert_close(
        after("hook_expert_out", halves), (halves * get["expert_weights"][..., None]).sum(2), **ROUNDING
    )
    even = torch.full_like(get["expert_weights"], 1 / 3)
    torch.testing.assert_close(after("hook_expert_weights", even), out(get["post"], even), **ROUNDING)
    with bridge.hooks([("blocks.1.mlp.hook_router_logits", lambda x, hook: -x)]):
        _, cache = bridge.run_with_cache(ids)
    assert torch.equal(cache["blocks.1.mlp.hook_expert_indices"], (-logits).topk(3, -1).indices)


# -- gradients, caches, padding, generation ------------------------------------------------------------


@pytest.mark.core
@each_kind
def test_gradients_are_those_of_autograd(name: str) -> None:
    model, ids = build(name), tokens()
    wanted = {hook: place for hook, place in places(model).items() if "resid" in hook or hook.endswith(("_z", "_out"))}
    expected: dict[str, Tensor] = {}

    def see(hook: str, tensor: Tensor) -> None:
        tensor.register_hook(lambda gradient: expected.update({hook: wanted[hook].split(gradient).clone()}))

    with torch_hooked(wanted, see):
        logits = model(ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    model.zero_grad()
    with torch.enable_grad():
        _, cache = TransformerBridge(model).run_with_cache(ids, return_type="loss", incl_bwd=True)
    for hook, gradient in expected.items():
        # More hooks on one stream: autograd adds the gradients of its readers in another order.
        torch.testing.assert_close(cache[f"{hook}_grad"], gradient, rtol=1e-3, atol=1e-5)
    patterns = [hook for hook in cache if hook.endswith("hook_pattern_grad")]
    assert len(patterns) == 2 and all(bool(cache[hook].abs().sum() > 0) for hook in patterns)


@pytest.mark.core
@every_model
def test_decoding_with_a_cache_shows_the_new_positions(name: str) -> None:
    model, ids = build(name), tokens()
    bridge = TransformerBridge(model)
    _, full = bridge.run_with_cache(ids)
    prompt = model(ids[:, :5], use_cache=True)
    bare = model(ids[:, 5:6], **with_cache(cache_of(prompt))).logits
    cache = cache_of(model(ids[:, :5], use_cache=True))
    logits, seen = bridge.run_with_cache(ids[:, 5:6], past_key_values=cache)
    assert torch.equal(logits, bare)
    for hook in ("resid_post", "q", "z", "attn_out", "mlp_out"):
        torch.testing.assert_close(seen[hook, 1], full[hook, 1][:, 5:6], **ROUNDING)
    keys = seen["pattern", 1].shape[-1]
    torch.testing.assert_close(seen["pattern", 1], full["pattern", 1][:, :, 5:6, 6 - keys : 6], **ROUNDING)
    assert bool((full["pattern", 1][:, :, 5:6, : 6 - keys] == 0).all())


@pytest.mark.core
@every_model
def test_left_padding_changes_no_text(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 2, dtype=ids.dtype), ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    logits, plain = bridge.run_with_cache(ids)
    left, cache = bridge.run_with_cache(padded, attention_mask=mask)
    torch.testing.assert_close(left[:, 2:], logits, **ROUNDING)
    for layer in attending(bridge.original_model):
        torch.testing.assert_close(cache["pattern", layer][..., 2:, 2:], plain["pattern", layer], **ROUNDING)
        assert bool((cache["pattern", layer][..., 2:, :2] == 0).all())


@each_kind
def test_generation_is_hugging_faces(name: str) -> None:
    model, ids = build(name), tokens()
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    bridge = TransformerBridge(model)
    got = bridge.generate(ids, max_new_tokens=4, do_sample=False, return_type="tokens", verbose=False)
    assert torch.equal(got, expected)


# -- what is made of the captures ------------------------------------------------------------------------


@pytest.mark.core
@every_model
def test_the_stream_and_the_logits_come_apart(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    _, cache = bridge.run_with_cache(ids)
    for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition(expand_neurons=False)):
        torch.testing.assert_close(stack.sum(0), cache["resid_post", 1], rtol=1e-4, atol=1e-3)
    parts = cache.get_full_resid_decomposition(expand_neurons=True, pos_slice=-1)
    target = torch.tensor([5, 9])
    direct = cache.logit_attrs(parts, target, pos_slice=-1).sum(0)
    bias = bridge.ln_final.b @ bridge.W_U[:, target] + bridge.b_U[target]
    head = cache["unembed.hook_out"][torch.arange(2), -1, target]
    torch.testing.assert_close(direct + bias, head, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        cache.logit_lens(pos_slice=-1)[-1], cache["unembed.hook_out"][:, -1], rtol=1e-3, atol=1e-3
    )


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:center_writing_weights is left out", "ignore:center_unembed is left out")
@pytest.mark.filterwarnings("ignore:fold_value_biases is left out")
@every_model
def test_processed_weights_predict_the_same(name: str) -> None:
    model, ids = build(name), tokens()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bare = model(ids).logits.log_softmax(-1)
    bridge = TransformerBridge(model)
    if name in UNFOLDED:
        with pytest.raises(ValueError, match=UNFOLDED[name]):
            bridge.process_weights()
        return
    with bridge.process_weights() as changes:
        capped, centred = bridge.adapter.logit_cap() is not None, bridge.cfg.normalization_type == "LN"
        assert ("center_unembed" in changes.steps, "center_writing_weights" in changes.steps) == (not capped, centred)
        plain = "blocks.1.attn.hook_attended" not in bridge.hook_dict and not bridge.blocks[1].attn.sinks
        assert ("fold_value_biases" in changes.steps) == plain
        torch.testing.assert_close(bridge(ids).log_softmax(-1), bare, rtol=1e-4, atol=1e-4)
        for norm in (*(bridge.blocks[0].role(role) for role in bridge.blocks[0].feeds), bridge.ln_final):
            assert torch.equal(norm.w, torch.ones_like(norm.w))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.core
@every_model
def test_verify_has_a_reference_for_rotated_heads_shared_experts_and_states(name: str) -> None:
    bridge = TransformerBridge(build(name))
    judged = {one.hook for one in bridge.verify().results if one.check == "hugging face"}
    ends = ("hook_rot_q", "hook_rot_k", ".mixer.hook_in", ".shared.hook_out", ".shared.hook_post", "hook_logits")
    wanted = {full for full in bridge.hook_dict if full.endswith(ends)}
    assert wanted <= judged, wanted - judged


@each_kind
def test_verify_passes(name: str) -> None:
    report = TransformerBridge(build(name)).verify()
    assert report.passed, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("attn, dtype", [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)])
@every_model
def test_verify_passes_thoroughly(name: str, attn: str, dtype: torch.dtype) -> None:
    report = TransformerBridge(build(name, attn, dtype)).verify(thorough=True)
    assert report.passed, str(report)


@every_model
def test_scores_are_products_divided_by_what_the_config_says(name: str) -> None:
    bridge = TransformerBridge(build(name, attn="eager"))
    cfg, hooks = bridge.cfg, bridge.hook_dict
    _, cache = bridge.run_with_cache(tokens(1, 5))
    for block in (b for b in bridge.blocks if f"{b.name}.attn.hook_attn_scores" in hooks):
        q, k = (
            next(
                cache[f"{block.name}.attn.hook_{form}"]
                for form in (f"rot_{part}", f"{part}_normed", part)
                if f"{block.name}.attn.hook_{form}" in hooks
            )
            for part in "qk"
        )
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        products = (q * k)[0].sum(-1).T / cfg.attn_scale
        if "scaled" in name:  # by the layer's number, too
            products = products / (int(block.name.split(".")[1]) + 1)
        if name == "bloom":  # ALiBi: a slope for each head, times the key's position
            products = products + torch.outer(0.5 ** torch.arange(1, 9), torch.arange(5))
        if cfg.attn_scores_soft_cap > 0:
            products = cfg.attn_scores_soft_cap * torch.tanh(products / cfg.attn_scores_soft_cap)
        shown = cache[f"{block.name}.attn.hook_attn_scores"][0].diagonal(dim1=-2, dim2=-1)
        chosen = cache["pattern", int(block.name.split(".")[1])][0].diagonal(dim1=-2, dim2=-1) > 0
        assert bool(chosen.all()) or block.attn.chooses
        torch.testing.assert_close(shown[chosen], products[chosen], atol=1e-4, rtol=1e-4)
