"""Gradient checkpointing: the same gradients as without it, and every hook is run once for each forward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import FAMILIES, family
from tests.support import tokens as token_ids
from transformer_lens import TransformerBridge

ROUNDING = 1e-6
"""Times the largest gradient: reentrant checkpointing adds the parts of a gradient in another order."""

both_ways = pytest.mark.parametrize("reentrant", [False, True])
every_family = pytest.mark.parametrize("name", FAMILIES)


def training(name: str, reentrant: bool | None, **changes: Any) -> TransformerBridge:
    torch.manual_seed(0)
    model = family(name, **changes).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return TransformerBridge(model)


def edited(value: Tensor, hook: Any) -> Tensor:
    return value + 0.3 * value.tanh()  # leaves masked scores as low as they are


def floats(bridge: TransformerBridge) -> list[str]:
    return [name for name, point in bridge.hook_dict.items() if not point.integer]


def learn(bridge: TransformerBridge, ids: Tensor, edits: list[str], watched: list[str]) -> dict[str, Tensor]:
    """Gradients of all parameters and of the watched hooks."""
    found: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def edit(value: Tensor, hook: Any) -> Tensor:
        calls[hook.name] += 1
        return edited(value, hook)

    def keep(gradient: Tensor, hook: Any) -> None:
        assert hook.name not in found, f"{hook.name} was given its gradient twice"
        found[hook.name] = gradient.clone()

    bridge.zero_grad()
    hooks = {"fwd_hooks": [(name, edit) for name in edits], "bwd_hooks": [(name, keep) for name in watched]}
    loss = bridge.run_with_hooks(ids, return_type="loss", **hooks)
    loss.backward()
    assert calls == Counter(edits)
    parameters = {name: p.grad.clone() for name, p in bridge.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found, **parameters}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], reentrant: bool) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        if reentrant:
            assert (got[name] - value).abs().max() <= ROUNDING * value.abs().max().clamp(min=1e-6), name
        else:
            assert torch.equal(got[name], value), name


@every_family
def test_gradients_with_every_hook_alone_edited(name: str) -> None:
    ids = token_ids()
    plain, checkpointed = training(name, None), {reentrant: training(name, reentrant) for reentrant in (False, True)}
    untouched = learn(plain, ids, [], [])
    for hook in (None, *floats(plain)):
        edits = [] if hook is None else [hook]
        expected = learn(plain, ids, edits, [])
        assert torch.equal(expected["loss"], untouched["loss"]) == (hook is None), hook
        for reentrant, bridge in checkpointed.items():
            assert_same(learn(bridge, ids, edits, []), expected, reentrant)


@both_ways
@every_family
def test_gradients_at_every_hook_and_with_several_edits(name: str, reentrant: bool) -> None:
    ids = token_ids()
    plain, checkpointed = training(name, None), training(name, reentrant)
    names = floats(plain)
    for edits in ([], [n for n in names if n.endswith(("hook_z", "hook_post", "hook_scale", "hook_resid_pre"))]):
        expected = learn(plain, ids, edits, names)
        assert_same(learn(checkpointed, ids, edits, names), expected, reentrant)


@both_ways
@every_family
def test_captures_are_those_of_the_forward_and_come_once(name: str, reentrant: bool) -> None:
    ids, bridge = token_ids(), training(name, reentrant)
    with torch.no_grad():
        _, expected = bridge.run_with_cache(ids, names_filter=lambda name: True)
    kept: dict[str, list[Tensor]] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept.setdefault(hook.name, []).append(value.detach())

    with bridge.hooks(fwd_hooks=[(lambda name: True, keep)]):  # still attached in the backward pass
        loss = bridge(ids, return_type="loss")
        loss.backward()
    assert set(kept) == set(expected)
    assert all(len(values) == 1 for values in kept.values())
    loss, cache = bridge.run_with_cache(ids, names_filter=lambda name: True, return_type="loss")
    before = {hook: value.clone() for hook, value in cache.items()}
    loss.backward()
    for hook, value in expected.items():
        assert torch.equal(before[hook], value) and torch.equal(cache[hook], value), hook


@both_ways
def test_a_trained_vector_and_random_noise(reentrant: bool) -> None:
    """A hook may use parameters of its own, and draw random numbers, before the model draws for its dropout."""
    found = []
    for way in (None, reentrant):
        bridge = training("rw", way, hidden_dropout=0.2, attention_dropout=0.2)
        vector = torch.nn.Parameter(torch.ones(32))

        def steer(value: Tensor, hook: Any, vector: nn.Parameter = vector) -> Tensor:
            return value + vector * torch.rand_like(value)

        torch.manual_seed(1)
        hooks = [("blocks.0.hook_attn_out", steer), ("blocks.1.attn.hook_z", lambda v, hook: v + torch.rand_like(v))]
        bridge.run_with_hooks(token_ids_fixed(), return_type="loss", fwd_hooks=hooks).backward()
        grads = {name: p.grad for name, p in bridge.named_parameters() if p.grad is not None}
        found.append({"vector": vector.grad, **grads})
    assert found[0]["vector"].abs().max() > 0
    assert_same(found[1], found[0], reentrant)


def token_ids_fixed() -> Tensor:
    return torch.arange(3, 17).reshape(2, 7)


@both_ways
def test_hooks_that_are_frozen_or_come_too_late(reentrant: bool) -> None:
    ids, plain, checkpointed = token_ids(), training("40b", None), training("40b", reentrant)
    late: list[Tensor] = []
    found = []
    for bridge in (plain, checkpointed):
        frozen = ["blocks.0.attn.hook_pattern", "blocks.1.hook_mlp_out"]
        hooks = [(name, lambda value, hook: value.detach()) for name in frozen]
        loss = bridge.run_with_hooks(ids, return_type="loss", fwd_hooks=hooks)
        bridge.add_hook("blocks.0.hook_mlp_out", lambda value, hook: late.append(value))
        loss.backward()
        bridge.reset_hooks()
        found.append({name: p.grad for name, p in bridge.named_parameters() if p.grad is not None})
    assert late == []
    assert_same(found[1], found[0], reentrant)


@both_ways
def test_part_of_the_layers(reentrant: bool) -> None:
    ids, found = token_ids(), []
    for way in (None, reentrant):
        bridge = training("mixtral", way)
        edits = [("blocks.0.attn.hook_z", edited)]
        stream = bridge.run_with_hooks(ids, stop_at_layer=1, fwd_hooks=edits)
        bridge.run_with_hooks(stream, start_at_layer=1, fwd_hooks=[("blocks.1.mlp.hook_post", edited)]).sum().backward()
        found.append({name: p.grad for name, p in bridge.named_parameters() if p.grad is not None})
    assert "model.layers.0.self_attn.v_proj.weight" in found[0]
    assert_same(found[1], found[0], reentrant)


@both_ways
def test_an_error_in_a_hook_leaves_the_model_as_it_was(reentrant: bool) -> None:
    bridge = training("7b", reentrant)
    blocks = bridge.original_model.transformer.h
    before = [dict(block.__dict__) for block in blocks]

    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("from the hook")

    with pytest.raises(RuntimeError, match="from the hook"):
        bridge.run_with_hooks(token_ids(), fwd_hooks=[("blocks.1.attn.hook_z", fail)])
    bridge.run_with_hooks(token_ids(), return_type="loss", fwd_hooks=[("blocks.1.attn.hook_z", edited)]).backward()
    assert [dict(block.__dict__) for block in blocks] == before
    assert all("forward" not in module.__dict__ for module in bridge.original_model.modules())


def test_two_backward_passes_through_one_forward() -> None:
    ids, found = token_ids(), []
    for way in (None, False):
        bridge = training("7b", way)
        loss = bridge.run_with_hooks(ids, return_type="loss", fwd_hooks=[("blocks.1.attn.hook_pattern", edited)])
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({name: p.grad for name, p in bridge.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0], False)


@both_ways
def test_a_hook_that_runs_the_model_itself(reentrant: bool) -> None:
    """What hooks of an inner forward did is no part of the record of the block they were called in."""
    ids, found = token_ids(), []
    for way in (None, reentrant):
        bridge = training("mixtral", way)

        def inner(value: Tensor, hook: Any, bridge: TransformerBridge = bridge) -> Tensor:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.attn.hook_z")
                negated = [("blocks.0.mlp.hook_post", lambda value, hook: -value)]
                shift = bridge.run_with_hooks(ids, fwd_hooks=negated).mean()
            return value + cache["blocks.1.attn.hook_z"] * shift

        hooks = [
            ("blocks.0.attn.hook_z", inner),
            ("blocks.0.mlp.hook_post", edited),
            ("blocks.1.mlp.hook_post", edited),
        ]
        bridge.run_with_hooks(ids, return_type="loss", fwd_hooks=hooks).backward()
        found.append({name: p.grad for name, p in bridge.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0], reentrant)


class Freeze(nn.Module):
    """Sits in a hook's place and stops the gradient there."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@both_ways
def test_a_module_in_a_hooks_place(reentrant: bool) -> None:
    found = []
    for way in (None, reentrant):
        bridge = training("7b", way)
        bridge.blocks[0].mlp.hook_post = Freeze()  # type: ignore[index,union-attr]
        bridge(token_ids_fixed(), return_type="loss").backward()
        found.append({name: p.grad for name, p in bridge.named_parameters() if p.grad is not None})
    assert "transformer.h.0.mlp.dense_h_to_4h.weight" not in found[0]
    assert_same(found[1], found[0], reentrant)


@both_ways
def test_a_vector_added_where_the_model_has_no_gradient(reentrant: bool) -> None:
    found = []
    for way in (None, reentrant):
        bridge, vector = training("7b", way), nn.Parameter(torch.ones(48))
        bridge.original_model.requires_grad_(False)
        hooks = [
            ("hook_embed", lambda value, hook: value.requires_grad_()),
            ("blocks.0.mlp.hook_pre", lambda value, hook: value.detach()),
            ("blocks.0.mlp.hook_post", lambda value, hook, vector=vector: value + vector),
        ]
        bridge.run_with_hooks(token_ids_fixed(), return_type="loss", fwd_hooks=hooks).backward()
        assert vector.grad is not None
        found.append({"vector": vector.grad})
    assert_same(found[1], found[0], reentrant)
