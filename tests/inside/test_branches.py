"""The stream as each query head's q, k and v read it: an edit there does what explicit attention predicts.

The oracle norms each head's stream by hand and projects it with that head's, or its group's, weight.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inside.cases import (
    ATTENTIONS,
    DTYPES,
    FAMILIES,
    assert_close,
    grouped,
    make,
    ramp,
    run_edited,
    window_of,
    wrap,
)
from tests.inside.oracles import Edit, Steps, allowed_keys, attention, attention_weights, groups_of, layer_of, norm
from tests.inside.test_attention_cache import CACHED, CACHES, CHUNKS, LONG
from tests.support import tokens
from transformer_lens.model_bridge import TransformerBridge

LAYER = 1
BRANCHES = {"attn_in": "qkv", "q_input": "q", "k_input": "k", "v_input": "v"}
Z, OUT, PRE = f"blocks.{LAYER}.attn.hook_z", f"blocks.{LAYER}.hook_attn_out", f"blocks.{LAYER}.hook_resid_pre"


def branch(short: str) -> str:
    return f"blocks.{LAYER}.hook_{short}"


def first_norm(model: Any) -> Any:
    layer = layer_of(model, LAYER)
    return layer.ln_attn if hasattr(layer, "ln_attn") else layer.input_layernorm


def predict(model: Any, stream: Tensor, edits: dict[str, Edit], **options: Any) -> Steps:
    """`edits` by short branch name, on the stream as [batch pos head d_model]."""
    heads = stream[:, :, None].double().expand(-1, -1, 8, -1)
    entering = edits["attn_in"](heads) if "attn_in" in edits else heads
    read = {part: edits.get(f"{part}_input", lambda value: value)(entering) for part in "qkv"}
    normed = {part: norm(first_norm(model), value)["out"] for part, value in read.items()}
    pos = stream.shape[1]
    allowed = allowed_keys(torch.ones(stream.shape[0], pos), pos, window_of(model))
    positions = torch.arange(pos).expand(stream.shape[:2])
    return attention(attention_weights(model, LAYER), normed, positions, allowed, **options)


def one_head(head: int) -> Edit:
    """Another stream for one query head alone."""

    def edit(stream: Tensor) -> Tensor:
        changed = stream.clone()
        changed[:, :, head] = stream[:, :, head].roll(1, -1) * 0.8 + ramp(stream[:, :, head])
        return changed

    return edit


def each_head(stream: Tensor) -> Tensor:
    return stream * 0.8 + 0.5 * ramp(stream)


def all_alike(stream: Tensor) -> Tensor:
    """The same edit of the shared stream for every head."""
    return (stream[:, :, :1].roll(1, -1) + 0.3 * ramp(stream[:, :, :1])).expand_as(stream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_has_the_predicted_effect(family: str, attn: str, dtype: str) -> None:
    """For one head, for each head another edit, for all heads alike, and on several branches at once."""
    model, ids = make(family, attn, DTYPES[dtype]), tokens()
    bridge = wrap(model)
    tries: list[dict[str, Edit]] = [{short: edit} for short in BRANCHES for edit in (one_head(3), each_head, all_alike)]
    tries.append({"attn_in": each_head, "k_input": one_head(6), "v_input": all_alike})
    with torch.no_grad():
        for edits in tries:
            _, found = run_edited(bridge, ids, {branch(s): e for s, e in edits.items()}, [PRE, Z, OUT])
            expected = predict(model, found[PRE], edits)
            for name, short in ((Z, "z"), (OUT, "attn_out")):
                assert_close(found[name], expected[short], model.dtype, f"{short} after {list(edits)}")


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_query_heads_key_and_value_are_its_own(family: str, attn: str) -> None:
    """Also where a group shares them: the other heads of the group are bitwise what they were."""
    model, ids, head = make(family, attn), tokens(), 5
    bridge = wrap(model)
    others = [h for h in range(8) if h != head]
    with torch.no_grad():
        for short in BRANCHES:
            _, neutral = run_edited(bridge, ids, {branch(short): lambda value: value.clone()}, [Z])
            _, found = run_edited(bridge, ids, {branch(short): one_head(head)}, [Z])
            assert torch.equal(found[Z][:, :, others], neutral[Z][:, :, others]), short
            # The first position sees itself alone, so that only its value can change what it reads.
            assert (found[Z][:, 1:, head] - neutral[Z][:, 1:, head]).abs().max() > 0.05, short
    assert grouped(model) == (groups_of(model.config) < 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_shows_the_stream_to_every_head(family: str) -> None:
    model, ids = make(family), tokens()
    bridge = wrap(model)
    names = [branch(short) for short in BRANCHES]
    with torch.no_grad():
        bare = model(ids).logits
        logits, cache = bridge.run_with_cache(ids, names_filter=[PRE, *names])
        assert torch.equal(logits, bare)
        assert not set(names) & set(bridge.run_with_cache(ids)[1])  # taken on request alone
    for name in names:
        assert torch.equal(cache[name], cache[PRE][:, :, None].expand(-1, -1, 8, -1)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_editing_the_value_branch_is_editing_the_values(family: str) -> None:
    """By another door: the port at v, where each group's value is written by hand."""
    model, ids = make(family, dtype=torch.float64), tokens()
    bridge = wrap(model)
    w = attention_weights(model, LAYER)
    with torch.no_grad():
        _, found = run_edited(bridge, ids, {branch("v_input"): all_alike}, [PRE, OUT])
        stream = all_alike(found[PRE][:, :, None].expand(-1, -1, 8, -1))[:, :, 0]
        v = torch.einsum("bpm,gdm->bpgd", norm(first_norm(model), stream)["out"], w.v_GDM) + w.v_bias
        _, by_port = run_edited(bridge, ids, {f"blocks.{LAYER}.attn.hook_v": lambda value: v}, [OUT])
    assert_close(found[OUT], by_port[OUT], model.dtype)


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family, kind", CACHED)
def test_an_edit_with_a_cache_is_of_the_new_positions(family: str, kind: str, attn: str) -> None:
    """The chunk itself is as in a whole run edited there. What a group shares is cached unedited."""
    model, ids = make(family, attn), tokens(2, LONG)
    bridge = wrap(model)
    with torch.no_grad():
        for short in BRANCHES:
            cache = CACHES[kind](model)
            for start, end in CHUNKS:

                def whole(value: Tensor, start: int = start, end: int = end) -> Tensor:
                    here = value[:, start:end]
                    return torch.cat([value[:, :start], here.roll(1, 2) * 0.8 + ramp(here), value[:, end:]], dim=1)

                def chunk(value: Tensor) -> Tensor:
                    return value.roll(1, 2) * 0.8 + ramp(value)

                _, full = bridge.run_with_cache(ids, names_filter=PRE)
                expected = predict(model, full[PRE], {short: whole})
                new = ids[:, start:end]
                options = {"past_key_values": cache}
                _, found = run_edited(bridge, new, {branch(short): chunk}, [OUT], **options)
                assert_close(found[OUT], expected["attn_out"][:, start:end], model.dtype, f"{short} {start}:{end}")


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_explicit_formula(family: str, attn: str) -> None:
    """Of a loss on attn_out, by each head's own stream."""
    model, ids = make(family, attn, torch.float64), tokens()
    bridge = wrap(model)
    weights = torch.randn(2, 7, 32, dtype=torch.float64)
    stream = bridge.run_with_cache(ids, names_filter=PRE)[1][PRE].detach()
    for short in BRANCHES:
        leaf = stream[:, :, None].expand(-1, -1, 8, -1).clone().requires_grad_()
        loss = (predict(model, stream, {short: lambda value: leaf})["attn_out"] * weights).sum()
        loss.backward()
        assert leaf.grad is not None
        live: list[Tensor] = []
        found: list[Tensor] = []
        bridge.run_with_hooks(
            ids,
            fwd_hooks=[(OUT, lambda value, hook: live.append(value))],
            bwd_hooks=[(branch(short), lambda gradient, hook: found.append(gradient))],
        )
        (live[0] * weights).sum().backward()
        (gradient,) = found
        assert_close(gradient, leaf.grad, model.dtype, short)
        assert leaf.grad.abs().max() > 0


def test_branches_are_declared_per_query_head() -> None:
    bridge: TransformerBridge = wrap(make("40b"))
    rows = {row.name: row.shape for row in bridge.hook_table()}
    for short in BRANCHES:
        assert rows[f"blocks.{{i}}.hook_{short}"] == ("batch", "pos", 8, 32)


@pytest.mark.parametrize("family", ["7b", "40b", "rw", "mixtral"])
def test_an_edit_of_what_enters_attention_counts_beside_an_edit_of_a_branch(family: str) -> None:
    """With nothing entering attention, only the head whose branch was edited has a query (biases aside)."""
    model, ids = make(family), tokens()
    bridge = wrap(model)

    def nothing(value, hook):
        return torch.zeros_like(value)

    def edit(stream, hook):
        stream[:, :, 2] += 1.5 * torch.arange(stream.shape[-1]) / stream.shape[-1]

    with torch.no_grad():
        hooks = [("blocks.1.attn.hook_in", nothing)]
        with bridge.hooks(hooks):
            _, without = bridge.run_with_cache(ids, names_filter="blocks.1.attn.hook_q")
        with bridge.hooks([*hooks, ("blocks.1.hook_q_input", edit)]):
            _, both = bridge.run_with_cache(ids, names_filter="blocks.1.attn.hook_q")
    change = (both["q", 1] - without["q", 1]).abs().amax((0, 1, 3))
    assert change[2] > 0.1
    assert change[[0, 1, 3, 4, 5, 6, 7]].max() == 0
