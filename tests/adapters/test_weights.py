"""Weights by name: what is computed with them is what the model computes, on every layout; what is a view, and writes.

Which rows of the fused weight belong to which head is taken from transformers' own `_split_heads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.equivalence.grid import each_layout
from tests.support import FAMILIES, falcon, family, mixtral, tokens
from transformer_lens.factored_matrix import FactoredMatrix
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import ComponentBridge
from transformer_lens.model_bridge.generalized_components.weights import Weight, weights_of

F64 = torch.float64
EXPERTS = {"experts": "eager"}  # grouped_mm has no float64
MIXTRALS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral, one key": {"num_key_value_heads": 1},
    "mixtral, a key for each head": {"num_key_value_heads": 8, "head_dim": 6},
    "mixtral, wide heads": {"head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 1},
}
EVERY = [
    *(pytest.param("falcon", *point.values, id=point.id, marks=point.marks) for point in each_layout(turn=0)),
    *(pytest.param("mixtral", {**changes, **EXPERTS}, id=name) for name, changes in MIXTRALS.items()),
]


def close(got: Tensor, expected: Tensor) -> None:
    # Float64 sums of at most 48 products of size one.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def build(kind: str, changes: dict[str, Any]) -> TransformerBridge:
    model = falcon(dtype=F64, **changes) if kind == "falcon" else mixtral(dtype=F64, **changes)
    return TransformerBridge(model)


def named(name: str, dtype: torch.dtype = F64, **changes: Any) -> TransformerBridge:
    """A layout by name; with biases where it can have them."""
    options = EXPERTS if name == "mixtral" else {"bias": True}
    return TransformerBridge(family(name, dtype=dtype, **options, **changes))


def run(bridge: TransformerBridge, ids: Tensor | None = None) -> tuple[Tensor, Any]:
    with torch.no_grad():
        return bridge.run_with_cache(tokens() if ids is None else ids, names_filter=lambda name: True)


def rows_of(bridge: TransformerBridge) -> Iterator[tuple[ComponentBridge, Weight]]:
    """Every weight of the first block and of the two ends."""
    for component in bridge.components():
        if not component.name.startswith("blocks.") or component.name.startswith("blocks.0"):
            yield from ((component, weight) for weight in weights_of(type(component)))


def owner_of(bridge: TransformerBridge, tensor: Tensor) -> str | None:
    """The parameter whose memory a tensor shows."""
    at = tensor.untyped_storage().data_ptr()
    return next((n for n, p in bridge.named_parameters() if p.untyped_storage().data_ptr() == at), None)


def belongs(component: ComponentBridge, parameter: str) -> bool:
    """Whether a parameter is the component's own. Falcon's unembedding is its embedding."""
    tied = component.name == "unembed" and parameter == "transformer.word_embeddings.weight"
    return tied or parameter.startswith(component.path + ".")


# -- the forward, from weights by name ---------------------------------------------------------------------


@pytest.mark.parametrize("kind, changes", EVERY)
def test_every_activation_follows_from_the_weights(kind: str, changes: dict[str, Any]) -> None:
    bridge = build(kind, changes)
    ids = tokens()
    logits, cache = run(bridge, ids)
    assert torch.equal(cache["hook_embed"], bridge.W_E[ids])
    for layer, block in enumerate(bridge.blocks):
        attn, x = block.attn, cache[f"blocks.{layer}.attn.hook_in"]
        close(cache["normalized", layer, "ln1"] * block.ln1.w + block.ln1.b, x)
        for part, W, b in (("q", attn.W_Q, attn.b_Q), ("k", attn.W_K, attn.b_K), ("v", attn.W_V, attn.b_V)):
            close(torch.einsum("bpm,hmd->bphd", x, W) + b, cache[part, layer])
        grouped = torch.einsum("bpm,gimd->bpgid", x, attn.W_Q_grouped) + attn.b_Q_grouped
        close(grouped.flatten(2, 3), cache["q", layer])
        result = torch.einsum("bphd,hdm->bphm", cache["z", layer], attn.W_O)
        close(result, cache["result", layer])
        close(result.sum(2) + attn.b_O, cache["attn_out", layer])
        close(mlp_by_hand(bridge, layer, cache), cache["mlp_out", layer])
    close(cache["ln_final.hook_normalized"] * bridge.ln_final.w + bridge.ln_final.b, cache["ln_final.hook_out"])
    close(cache["ln_final.hook_out"] @ bridge.W_U + bridge.b_U, logits)


def mlp_by_hand(bridge: TransformerBridge, layer: int, cache: Any) -> Tensor:
    mlp, x = bridge.blocks[layer].mlp, cache[f"blocks.{layer}.mlp.hook_in"]
    if bridge.cfg.num_experts is None:
        pre = x @ mlp.W_in + mlp.b_in
        close(pre, cache["pre", layer])
        return nn.functional.gelu(pre) @ mlp.W_out + mlp.b_out
    close(x @ mlp.W_router, cache["router_logits", layer])
    total = torch.zeros_like(x)
    for expert in range(bridge.cfg.num_experts):
        hidden = nn.functional.silu(x @ mlp.W_gate[expert]) * (x @ mlp.W_in[expert])
        chosen = cache["expert_indices", layer] == expert
        weight = (cache["expert_weights", layer] * chosen).sum(-1, keepdim=True)
        total = total + weight * (hidden @ mlp.W_out[expert])
    return total


@pytest.mark.parametrize("kind, changes", EVERY)
def test_circuits_are_products_of_each_query_head_with_its_own_group(kind: str, changes: dict[str, Any]) -> None:
    bridge = build(kind, changes)
    for layer, block in enumerate(bridge.blocks):
        module: Any = block.attn.original_component
        if kind == "falcon":
            heads = module._split_heads(module.query_key_value.weight.T[None])
            q, k, v = (part[0].movedim(1, 0).expand(8, -1, -1) for part in heads)
            out = module.dense.weight
        else:
            d_head = bridge.cfg.d_head
            q, k, v = (
                linear.weight.reshape(-1, d_head, 32).repeat_interleave(8 // (len(linear.weight) // d_head), 0).mT
                for linear in (module.q_proj, module.k_proj, module.v_proj)
            )
            out = module.o_proj.weight
        o = out.reshape(32, 8, -1)
        for head in range(8):
            QK, OV = q[head] @ k[head].T, v[head] @ o[:, head].T
            close(block.attn.QK[head].AB, QK)
            close(block.attn.OV[head].AB, OV)
            close(bridge.QK[layer, head].AB, QK)
            close(bridge.OV[layer, head].AB, OV)
    assert isinstance(bridge.QK, FactoredMatrix) and bridge.QK.shape == (2, 8, 32, 32)
    assert bridge.QK.mdim == bridge.cfg.d_head


# -- views and copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, changes", EVERY)
def test_reading_a_block_copies_nothing_but_the_flattened_heads_of_several_groups(
    kind: str, changes: dict[str, Any]
) -> None:
    bridge = build(kind, changes)
    bytes_before = sum(p.untyped_storage().nbytes() for p in bridge.parameters())
    groups = bridge.cfg.n_key_value_heads
    copies = set()
    for component, weight in rows_of(bridge):
        read = getattr(component, weight.name)
        owner = owner_of(bridge, read)
        if owner is None and not read.any():
            assert read.untyped_storage().nbytes() == read.element_size(), f"{weight.name}: missing biases take memory"
        elif owner is None:
            copies.add(weight.name)
        else:
            assert belongs(component, owner), f"{weight.name} shows {owner}"
    fused, several = kind == "falcon", 1 < groups < 8
    assert copies == ({"W_Q", *(["b_Q"] if changes["bias"] else [])} if fused and several else set())
    attn = bridge.blocks[0].attn
    for grouped in (attn.W_K_grouped, attn.W_V_grouped):
        assert owner_of(bridge, grouped) is not None
    assert sum(p.untyped_storage().nbytes() for p in bridge.parameters()) == bytes_before


@pytest.mark.parametrize("name", FAMILIES)
def test_axes_are_those_of_the_table(name: str) -> None:
    bridge = named(name)
    cfg = bridge.cfg
    sizes = {
        "head": 8,
        "kv_head": cfg.n_key_value_heads,
        "kv_group": cfg.n_key_value_heads,
        "heads_per_group": 8 // cfg.n_key_value_heads,
        "d_model": 32,
        "d_head": cfg.d_head,
        "d_mlp": 24 if name == "mixtral" else 48,
        "d_vocab": 61,
        "expert": 4,
    }
    found = list(rows_of(bridge))
    assert {weight.name for _, weight in found} >= {"W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "w"}
    for component, weight in found:
        assert getattr(component, weight.name).shape == tuple(sizes[axis] for axis in weight.axes.split()), weight.name


def stacks(name: str) -> tuple[str, ...]:
    attention = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
    return (*attention, "W_in", "W_out", "b_in", "b_out", *(("W_gate",) if name == "mixtral" else ()))


@pytest.mark.parametrize("name", FAMILIES)
def test_stacks_are_copies_of_every_layer(name: str) -> None:
    bridge = named(name)
    before = {n: p.detach().clone() for n, p in bridge.named_parameters()}
    for weight in stacks(name):
        stacked = getattr(bridge, weight)
        role = "attn" if weight[-1] in "QKVO" else "mlp"
        assert len(stacked) == 2
        for layer in range(2):
            assert torch.equal(stacked[layer], getattr(getattr(bridge.blocks[layer], role), weight)), weight
        with torch.no_grad():
            stacked.fill_(7)
        with pytest.raises(AttributeError, match="no setter"):
            setattr(bridge, weight, stacked)
    assert all(torch.equal(p, before[n]) for n, p in bridge.named_parameters())


# -- writes ------------------------------------------------------------------------------------------------------


def weight_names(name: str) -> list[str]:
    return [f"{component.name}:{weight.name}" for component, weight in rows_of(named(name))]


WRITES = [(name, at) for name in FAMILIES for at in weight_names(name)]


@pytest.mark.parametrize("name, at", WRITES)
def test_assigning_writes_into_the_model_whatever_reading_does(name: str, at: str) -> None:
    """The whole forward, computed from the weights, is again what the model computes; other weights stay."""
    bridge, (path, weight) = named(name), at.split(":")
    component: Any = bridge.get_submodule(path)
    missing = weight == "b_U" or (name == "mixtral" and weight.startswith("b"))
    new = torch.randn_like(getattr(component, weight)) if not missing else torch.ones(getattr(component, weight).shape)
    before, _ = run(bridge)
    kept = {n: p.detach().clone() for n, p in bridge.named_parameters()}
    if missing:
        with pytest.raises(ValueError, match="has no bias in this model, and is read as zeros"):
            setattr(component, weight, new)
        assert all(torch.equal(p, kept[n]) for n, p in bridge.named_parameters())
        return
    setattr(component, weight, new)
    changed = [n for n, p in bridge.named_parameters() if not torch.equal(p, kept[n])]
    assert len(changed) == 1
    parameter = dict(bridge.named_parameters())[changed[0]]
    assert int((parameter != kept[changed[0]]).sum()) == new.numel()
    assert type(parameter) is nn.Parameter and parameter.requires_grad
    after, cache = run(bridge)
    assert torch.isfinite(after).all() and not torch.equal(after, before)
    assert torch.equal(getattr(component, weight), new)
    x, attn = cache["blocks.0.attn.hook_in"], bridge.blocks[0].attn
    by_part = {"Q": ("q", attn.W_Q, attn.b_Q), "K": ("k", attn.W_K, attn.b_K), "V": ("v", attn.W_V, attn.b_V)}
    if path == "blocks.0.attn" and weight[2] in by_part and weight[2] != "O":
        part, W, b = by_part[weight[2]]
        given = new.reshape(W.shape if weight[0] == "W" else b.shape)
        W, b = (given, b) if weight[0] == "W" else (W, given)
        close(torch.einsum("bpm,hmd->bphd", x, W) + b, cache[part, 0])
    close(mlp_by_hand(bridge, 0, cache), cache["mlp_out", 0])
    close(torch.einsum("bphd,hdm->bpm", cache["z", 0], attn.W_O) + attn.b_O, cache["attn_out", 0])
    close(cache["ln_final.hook_out"] @ bridge.W_U + bridge.b_U, after)


@pytest.mark.parametrize("name", FAMILIES)
def test_writing_in_place_into_a_view_changes_the_logits_as_changing_the_parameter_does(name: str) -> None:
    bridge, other = named(name), named(name)
    other.load_state_dict(bridge.state_dict())
    with torch.no_grad():
        bridge.blocks[1].attn.W_K[0] *= 2
        bridge.blocks[1].attn.W_Q_grouped[-1, -1] = 0.5
        bridge.blocks[1].attn.W_O[3] = 0
        model: Any = other.original_model
        if name == "mixtral":
            attention = model.model.layers[1].self_attn
            attention.k_proj.weight[:4] *= 2
            attention.q_proj.weight[-4:] = 0.5
            attention.o_proj.weight[:, 12:16] = 0
        else:
            attention = model.transformer.h[1].self_attention
            fused, group = attention.query_key_value.weight, 8 // bridge.cfg.n_key_value_heads + 2
            fused[4 * (group - 2) : 4 * (group - 1)] *= 2
            fused[-12:-8] = 0.5
            attention.dense.weight[:, 12:16] = 0
    ids = tokens()
    assert torch.equal(bridge(ids), other(ids))
    assert not torch.equal(bridge(ids), named(name)(ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_expanded_keys_and_missing_biases_refuse_to_be_written_in_place(name: str) -> None:
    bridge = named(name) if name == "mixtral" else TransformerBridge(family(name, bias=False))
    attn = bridge.blocks[0].attn
    refusing = [attn.b_Q, attn.b_K, attn.b_V, attn.b_O, bridge.b_U]
    if bridge.cfg.n_key_value_heads < 8:
        refusing += [attn.W_K_grouped, attn.W_V_grouped]
    for tensor in refusing:
        with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
            tensor[:] = 1


def test_times_equals_writes_once() -> None:
    bridge = named("40b")
    before = bridge.blocks[0].attn.W_Q.detach().clone()
    with torch.no_grad():
        bridge.blocks[0].attn.W_Q *= 2
        bridge.blocks[0].attn.W_Q_grouped *= 2
    assert torch.equal(bridge.blocks[0].attn.W_Q, 4 * before)


def test_a_weight_of_its_own_memory_is_written_as_it_was_read() -> None:
    """The value may be a view of the parameter it goes into."""
    bridge = named("7b")
    W_Q = bridge.blocks[0].attn.W_Q
    turned = W_Q.detach().flip(0).clone()
    bridge.blocks[0].attn.W_Q = torch.stack(list(W_Q)[::-1])
    assert torch.equal(bridge.blocks[0].attn.W_Q, turned)
    bridge.embed.W_E = bridge.embed.W_E.detach()[:, torch.arange(31, -1, -1)]
    square = named("7b").blocks[0].attn
    expected = square.W_O.detach().flatten(0, 1).T.clone()
    square.W_O = square.W_O.detach().flatten(0, 1).T.unflatten(0, (8, 4))
    assert torch.equal(square.W_O.flatten(0, 1), expected)


@pytest.mark.parametrize(
    "value, text",
    [
        (torch.ones(8, 32, 5), "blocks.0.attn.W_Q: got [8, 32, 5], expected a tensor of shape [8, 32, 4]"),
        (torch.ones(32, 4), "blocks.0.attn.W_Q: got [32, 4], expected a tensor of shape [8, 32, 4]"),
        (0.0, "blocks.0.attn.W_Q: got 0.0, expected a tensor of shape [8, 32, 4]"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(value: Any, text: str) -> None:
    bridge = named("40b")
    before = bridge.blocks[0].attn.W_Q.detach().clone()
    with pytest.raises(ValueError) as caught:
        bridge.blocks[0].attn.W_Q = value
    assert str(caught.value) == text
    assert torch.equal(bridge.blocks[0].attn.W_Q, before)


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_arrive_at_the_models_own_parameters(name: str) -> None:
    """The gradient of a weight's sum is one at its entries and zero elsewhere, copied or not."""
    bridge = named(name)
    for component, weight in rows_of(bridge):
        read = getattr(component, weight.name)
        if not read.requires_grad:
            assert not read.any()
            continue
        bridge.original_model.zero_grad()
        factor = torch.randn_like(read)
        (read * factor).sum().backward()
        grads = {n: p.grad for n, p in bridge.named_parameters() if p.grad is not None and p.grad.any()}
        assert len(grads) == 1
        ((at, grad),) = grads.items()
        assert belongs(component, at)
        with torch.no_grad():
            assert int((grad != 0).sum()) == read.numel()
            parameter = dict(bridge.named_parameters())[at]
            parameter.copy_(grad)
        assert torch.equal(getattr(component, weight.name), factor), weight.name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loss_has_the_same_gradient_through_circuits_and_parameters(name: str) -> None:
    bridge = named(name)
    bridge.QK.norm().sum().backward()
    changed = {n for n, p in bridge.named_parameters() if p.grad is not None and p.grad.any()}
    ends = ("q_proj.weight", "k_proj.weight", "query_key_value.weight")
    assert changed == {n for n, _ in bridge.named_parameters() if n.endswith(ends)}


# -- precision -----------------------------------------------------------------------------------------------------


def test_weights_follow_the_dtype_of_the_model() -> None:
    bridge = TransformerBridge(family("rw", dtype=torch.bfloat16, bias=False))
    attn = bridge.blocks[0].attn
    assert attn.W_Q.dtype == attn.b_Q.dtype == bridge.b_U.dtype == torch.bfloat16
    bridge.to(torch.float32)
    assert attn.W_Q.dtype == attn.b_Q.dtype == torch.float32
