"""A write inside attention has the effect that explicit float64 attention predicts, and that alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inside.cases import (
    ATTENTIONS,
    DTYPES,
    FAMILIES,
    ROTATED,
    assert_close,
    make,
    ramp,
    run_edited,
    window_of,
    wrap,
)
from tests.inside.oracles import Edit, Steps, allowed_keys, attention, attention_weights, layer_of, positions_of
from tests.support import tokens
from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.core

LAYER = 0
ORDER = ("rot_q", "rot_k", "attn_scores", "pattern", "result")

EDITS: dict[str, Edit] = {
    "rot_q": lambda q: q.roll(1, 2) * 0.7 + 0.3 * ramp(q),
    "rot_k": lambda k: k.roll(1, 0) * 0.7 + 0.3 * ramp(k),
    "attn_scores": lambda scores: 0.5 * scores + ramp(scores),
    # Each position reads half from the first one, which every position may see without a window.
    "pattern": lambda pattern: 0.5 * pattern + 0.5 * torch.eye(pattern.shape[-1], dtype=pattern.dtype)[0],
    "result": lambda result: result.roll(1, 2) * 1.5 + ramp(result),
}


def edited_at(short: str) -> str:
    return f"blocks.{LAYER}.attn.hook_{short}"


def predict(model: Any, x: Tensor, mask: Tensor, edits: dict[str, Edit]) -> Steps:
    allowed = allowed_keys(mask, mask.shape[1], window_of(model))
    lowest = torch.finfo(model.dtype).min
    return attention(attention_weights(model, LAYER), x, positions_of(mask), allowed, edits, lowest=lowest)


def captured(bridge: TransformerBridge, ids: Tensor, edits: dict[str, Edit], **kwargs: Any) -> Any:
    """The logits, and everything of that attention, in a run with those edits."""
    keep = [edited_at(n) for n in ("in", *ORDER, "z") if edited_at(n) in bridge.hook_dict]
    keep.append(f"blocks.{LAYER}.hook_attn_out")
    return run_edited(bridge, ids, {edited_at(n): edit for n, edit in edits.items()}, keep, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_write_changes_what_follows_as_predicted(family: str, attn: str, dtype: str) -> None:
    """One edit at a time, and all of them at once; everything after it, and nothing before it, changes."""
    model, ids = make(family, attn, DTYPES[dtype]), tokens()
    bridge = wrap(model)
    here = {short: edit for short, edit in EDITS.items() if edited_at(short) in bridge.hook_dict}
    out, mask = f"blocks.{LAYER}.hook_attn_out", torch.ones_like(ids)
    with torch.no_grad():
        bare, clean = captured(bridge, ids, {})
        for edits in [{short: edit} for short, edit in here.items()] + [here]:
            logits, found = captured(bridge, ids, edits)
            expected = predict(model, clean[edited_at("in")], mask, edits)
            for name in [n for n in (*ORDER, "z") if n in here or n == "z"]:
                got, wanted = found[edited_at(name)], expected[name]
                real = wanted.abs() < torch.finfo(model.dtype).min / -4
                assert_close(got[real], wanted[real], model.dtype, f"{name} after {list(edits)}")
            assert_close(found[out], expected["attn_out"], model.dtype, f"attn_out after {list(edits)}")
            assert not torch.equal(found[out], clean[out])
            # From there on the model goes on with the new output and nothing else.
            pushed = bridge.run_with_hooks(ids, fwd_hooks=[(out, lambda value, hook: found[out])])
            assert torch.equal(pushed, logits) and not torch.equal(logits, bare)


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_write_with_padding(family: str, attn: str) -> None:
    model, ids = make(family, attn), tokens(3, 7)
    mask = torch.ones_like(ids)
    mask[1, :2], mask[2, :4] = 0, 0
    bridge = wrap(model)
    out, real = f"blocks.{LAYER}.hook_attn_out", mask.bool()
    with torch.no_grad():
        for short, edit in EDITS.items():
            if edited_at(short) in bridge.hook_dict:
                _, found = captured(bridge, ids, {short: edit}, attention_mask=mask)
                expected = predict(model, found[edited_at("in")], mask, {short: edit})
                assert_close(found[out][real], expected["attn_out"][real], model.dtype, short)


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_pattern_reads_one_value(family: str, attn: str) -> None:
    """A head whose pattern is one key's reads that key's value exactly; the other heads stay."""
    model, ids = make(family, attn), tokens()
    bridge = wrap(model)
    head, key = 5, 2

    def force(pattern: Tensor, hook: Any) -> None:
        pattern[:, head] = 0
        pattern[:, head, :, key] = 1

    names = [edited_at("z"), edited_at("v")]
    with torch.no_grad():
        with bridge.hooks(fwd_hooks=[(edited_at("pattern"), lambda value, hook: None)]):
            _, clean = bridge.run_with_cache(ids, names_filter=names)
        with bridge.hooks(fwd_hooks=[(edited_at("pattern"), force)]):
            _, forced = bridge.run_with_cache(ids, names_filter=names)
    value = forced[names[1]]
    group = head * value.shape[2] // 8
    assert torch.equal(forced[names[0]][:, :, head], value[:, key, group][:, None].expand(-1, 7, -1))
    others = [h for h in range(8) if h != head]
    assert torch.equal(forced[names[0]][:, :, others], clean[names[0]][:, :, others])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silenced_result_is_an_ablated_head(family: str) -> None:
    """Zeroing one head's result is zeroing that head's columns of the output projection."""
    model, ids = make(family), tokens()
    bridge, head = wrap(model), 3
    d_head = bridge.cfg.d_head
    attention_module = getattr(layer_of(model, LAYER), "self_attn" if "mixtral" in family else "self_attention")
    weight = (attention_module.o_proj if "mixtral" in family else attention_module.dense).weight

    def silence(result: Tensor, hook: Any) -> None:
        result[:, :, head] = 0

    with torch.no_grad():
        silenced = bridge.run_with_hooks(ids, fwd_hooks=[(edited_at("result"), silence)])
        bare = bridge(ids)
        weight[:, head * d_head : (head + 1) * d_head] = 0
        # Float32 sums over heads in another order, then a second layer.
        torch.testing.assert_close(silenced, bridge(ids), rtol=0, atol=1e-4 * float(bare.abs().max()))
    assert (silenced - bare).abs().max() > 0.1


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_move_alike_or_are_masked_by_hand(family: str, attn: str) -> None:
    """A constant per row changes nothing; the lowest number at one key is a mask without that key."""
    model, ids = make(family, attn), tokens()
    bridge, out, key = wrap(model), f"blocks.{LAYER}.hook_attn_out", 1
    blocked = torch.zeros(7, 7, dtype=torch.bool)
    blocked[key + 1 :, key] = True  # a position always sees itself, or some row would be empty

    def shift(scores: Tensor) -> Tensor:
        return scores + torch.linspace(-3, 5, 7)[:, None]

    def block(scores: Tensor) -> Tensor:
        return scores.masked_fill(blocked, torch.finfo(scores.dtype).min)

    with torch.no_grad():
        _, clean = captured(bridge, ids, {})
        _, shifted = captured(bridge, ids, {"attn_scores": shift})
        _, found = captured(bridge, ids, {"attn_scores": block})
    assert_close(shifted[out], clean[out].double(), model.dtype, "shifted")
    mask = torch.ones_like(ids)
    allowed = allowed_keys(mask, 7, window_of(model)) & ~blocked
    expected = attention(attention_weights(model, LAYER), clean[edited_at("in")], positions_of(mask), allowed)
    assert_close(found[edited_at("pattern")], expected["pattern"], model.dtype, "pattern")
    assert_close(found[out], expected["attn_out"], model.dtype, "attn_out")
    assert (found[edited_at("pattern")].masked_select(blocked) == 0).all()
    assert (found[out] - clean[out]).abs().max() > 0.01


@pytest.mark.parametrize("family", ROTATED)
def test_rotation_depends_on_distance_alone(family: str) -> None:
    """Turning queries and keys by the same further angle leaves the pattern; a query alone changes it."""
    model, ids = make(family), tokens()
    bridge = wrap(model)
    theta = model.config.rope_parameters["rope_theta"]

    def further(x: Tensor, hook: Any) -> Tensor:
        half = x.shape[-1] // 2
        angle = 5.0 * theta ** (-torch.arange(half) / half)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(half), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    with torch.no_grad():
        _, clean = bridge.run_with_cache(ids)
        with bridge.hooks(fwd_hooks=[([edited_at("rot_q"), edited_at("rot_k")], further)]):
            _, both = bridge.run_with_cache(ids)
        with bridge.hooks(fwd_hooks=[(edited_at("rot_q"), further)]):
            _, one = bridge.run_with_cache(ids)
    assert_close(both["pattern", 0], clean["pattern", 0].double(), model.dtype)
    assert (one["pattern", 0] - clean["pattern", 0]).abs().max() > 0.01


@pytest.mark.parametrize("family, attn", [("7b", "sdpa"), ("rw", "eager"), ("mixtral", "eager")])
def test_the_mask_may_be_passed_by_its_position(family: str, attn: str) -> None:
    """Attention called on its own, once by names and once by positions: hidden states, positions or bias, mask."""
    model, ids = make(family, attn), tokens(2, 5)
    bridge = wrap(model)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    module = model.get_submodule(bridge.get_submodule("blocks.0.attn").path)
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        bridge(ids, attention_mask=mask)
    handle.remove()
    ((args, kwargs),) = calls
    named = dict(zip(["hidden_states"], args, strict=False)) | kwargs
    named = {
        name: None if name in ("past_key_values", "cache", "layer_past") else value for name, value in named.items()
    }
    first = ("hidden_states", "position_embeddings" if family == "mixtral" else "alibi", "attention_mask")
    others = {name: value for name, value in named.items() if name not in first}
    with torch.no_grad():
        bare = module(**named)[0]
        with bridge.hooks(fwd_hooks=[(edited_at("pattern"), lambda value, hook: value.clone())]):
            by_position = module(*(named[name] for name in first), **others)[0]
            by_name = module(**named)[0]
    assert torch.equal(by_position, by_name)
    real = mask.bool()
    assert_close(by_position[real], bare[real].double(), model.dtype)


def test_padding_that_sees_nothing_reads_nothing() -> None:
    """Under sdpa: its row of the pattern is zero, as is what it reads in the kernel; every other row sums to one."""
    model, ids = make("7b"), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        _, cache = wrap(model).run_with_cache(ids, attention_mask=mask)
    sums = cache["pattern", 0].double().sum(-1)
    assert_close(sums, mask[:, None].expand_as(sums).double(), torch.float32)
    assert (cache["z", 0][0, :2] == 0).all()
