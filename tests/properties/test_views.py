"""Views are lenses, for any number of groups, heads per group and head size.

put-get: what was put is what one gets. get-put: putting back changes nothing. put-put: the later put wins.
Independence: the parts of one tensor do not touch one another, and together they are all of it.
"""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import FalconConfig
from transformers.models.falcon.modeling_falcon import FalconAttention

from transformer_lens.model_bridge.access import views
from transformer_lens.model_bridge.access.views import (
    TRANSPOSED,
    EveryOther,
    ExpandedValues,
    FusedBlocks,
    FusedQKV,
    Groups,
    Half,
    Heads,
    Moved,
    Scaled,
    Shifted,
    Through,
    TokenRows,
    View,
    Whole,
    in_groups,
)

PARTS = ("q", "k", "v")
sizes = st.integers(1, 5)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
quickly = settings(deadline=None, max_examples=60, derandomize=True)


class Seen(NamedTuple):
    """A view, a tensor it fits, and the shape it has to give."""

    view: View
    whole: Tensor
    shape: tuple[int, ...]


def numbered(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every entry another number."""
    return torch.arange(prod(shape), dtype=dtype).reshape(shape)


@st.composite
def seen(draw: st.DrawFn) -> Seen:
    """Any view on a tensor of random shape and dtype."""
    groups, per, d, batch, pos = (draw(sizes) for _ in range(5))
    part, dtype = draw(st.sampled_from(PARTS)), draw(dtypes)
    heads = {"q": groups * per, "k": groups, "v": groups}[part]
    fused = torch.randn(batch, pos, groups * (per + 2) * d, dtype=dtype)
    flat = torch.randn(batch, pos, groups * per * d, dtype=dtype)
    options = [
        Seen(FusedQKV(groups, per, d, part), fused, (batch, pos, heads, d)),
        Seen(FusedBlocks(groups * per, groups, d, part), fused, (batch, pos, heads, d)),
        Seen(Heads(groups * per, d), flat, (batch, pos, groups * per, d)),
        Seen(TokenRows(batch, pos), torch.randn(batch * pos, d, dtype=dtype), (batch, pos, d)),
        Seen(Whole(), flat, tuple(flat.shape)),
        Seen(FusedQKV(groups, per, d, "q", grouped=True), fused, (batch, pos, groups, per, d)),
        Seen(Through(Heads(groups * per, d), Groups(groups)), flat, (batch, pos, groups, per, d)),
        Seen(Through(FusedBlocks(groups * per, groups, d, "q"), Groups(groups)), fused, (batch, pos, groups, per, d)),
        Seen(
            FusedQKV(groups, 0, d, "v"), torch.randn(batch, pos, groups * 2 * d, dtype=dtype), (batch, pos, groups, d)
        ),
        Seen(Half(1), torch.cat([flat, flat], -1), (batch, pos, groups * per * d)),
        Seen(EveryOther(1), torch.cat([flat, flat], -1), (batch, pos, groups * per * d)),
        Seen(
            ExpandedValues(groups, 2),
            torch.randn(batch, 1, pos, groups * (2 + d), dtype=dtype),
            (batch, pos, groups, d),
        ),
        Seen(Through(Heads(groups * per, d), Scaled(1.0)), flat, (batch, pos, groups * per, d)),
        Seen(TRANSPOSED, fused, (batch, fused.shape[-1], pos)),
        Seen(Through(Heads(groups * per, d), Moved(0, -1)), flat, (pos, groups * per, d, batch)),
        Seen(
            Through(Through(TRANSPOSED, Heads(groups * per, d)), Moved(1, -2)), flat.mT, (batch, groups * per, pos, d)
        ),
        Seen(
            Through(Through(TRANSPOSED, FusedQKV(groups, per, d, part)), Moved(1, -2)), fused.mT, (batch, heads, pos, d)
        ),
    ]
    return draw(st.sampled_from(options))


@quickly
@given(seen())
def test_put_get(case: Seen) -> None:
    value = torch.randn(case.shape).to(case.whole.dtype)
    assert case.view.get(case.whole).shape == case.shape
    assert torch.equal(case.view.get(case.view.put(case.whole, value)), value)


@quickly
@given(seen())
def test_get_put(case: Seen) -> None:
    again = case.view.put(case.whole, case.view.get(case.whole))
    assert again.shape == case.whole.shape and torch.equal(again, case.whole)


@quickly
@given(seen())
def test_put_put(case: Seen) -> None:
    first, second = (torch.randn(case.shape).to(case.whole.dtype) for _ in range(2))
    twice = case.view.put(case.view.put(case.whole, first), second)
    assert torch.equal(twice, case.view.put(case.whole, second))


@quickly
@given(seen())
def test_put_touches_neither_tensor_it_is_given(case: Seen) -> None:
    before, value = case.whole.clone(), torch.randn(case.shape).to(case.whole.dtype)
    kept = value.clone()
    case.view.put(case.whole, value)
    assert torch.equal(case.whole, before) and torch.equal(value, kept)


@quickly
@given(seen())
def test_gradients_go_through_get_and_put_once(case: Seen) -> None:
    """get's gradient is one where the part lies and zero elsewhere; put cuts what it replaced."""
    whole = case.whole.double().requires_grad_()
    value = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    (through_get,) = torch.autograd.grad(case.view.get(whole).sum(), whole)
    assert through_get.sum() == value.numel() and set(through_get.unique().tolist()) <= {0.0, 1.0}
    through_put, through_value = torch.autograd.grad(
        case.view.put(whole, value).sum(), [whole, value], allow_unused=True, materialize_grads=True
    )
    assert torch.equal(through_put, 1 - through_get)
    assert torch.equal(through_value, torch.ones_like(value))


@quickly
@given(st.sampled_from([0.22, 0.7, 1.3, 12.0]), dtypes, sizes)
def test_a_scaled_tensor_keeps_the_laws_within_a_rounding(scale: float, dtype: torch.dtype, width: int) -> None:
    view, x, value = Scaled(scale), torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype)
    assert torch.equal(view.get(x), x * scale)
    assert torch.equal(view.put(x, view.get(x)), x)  # bit for bit, though a division rounds
    torch.testing.assert_close(view.get(view.put(x, value)), value, rtol=2 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(view.put(view.put(x, x * 0), value), view.put(x, value), rtol=0, atol=0)
    wide, new = (one.double().clone().requires_grad_() for one in (x, x * scale))
    put, written = torch.autograd.grad(
        view.put(wide, new).sum(), [wide, new], allow_unused=True, materialize_grads=True
    )
    assert not put.any()
    torch.testing.assert_close(written, torch.full_like(written, 1 / scale))


def test_a_scaled_tensor_takes_what_is_not_finite() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    assert torch.equal(Scaled(3.0).put(x, Scaled(3.0).get(x)).nan_to_num(7.0), x.nan_to_num(7.0))


def fused_views(kind: type[Any], groups: int, per: int, d: int) -> dict[str, View]:
    heads = groups if kind is FusedQKV else groups * per
    return {part: kind(heads, per if kind is FusedQKV else groups, d, part) for part in PARTS}


@quickly
@given(st.sampled_from([FusedQKV, FusedBlocks]), sizes, sizes, sizes)
def test_parts_are_independent_and_complete(kind: type[Any], groups: int, per: int, d: int) -> None:
    """Putting one part leaves the others; q, k and v are every entry, each once."""
    views_of = fused_views(kind, groups, per, d)
    whole = numbered(2, 3, groups * (per + 2) * d)
    for part, view in views_of.items():
        changed = view.put(whole, -1 - view.get(whole))
        for other in set(PARTS) - {part}:
            assert torch.equal(views_of[other].get(changed), views_of[other].get(whole))
        assert (changed != whole).sum() == view.get(whole).numel()
    parts = torch.cat([view.get(whole).flatten(2) for view in views_of.values()], -1)
    assert torch.equal(parts.sort(-1).values, whole)


def falcon_attention(groups: int, per: int, d: int, layout: str) -> FalconAttention:
    """transformers' own attention in one of its three layouts; its config takes no odd head size above 4."""
    heads = groups * per
    config = FalconConfig(
        hidden_size=heads * d,
        num_attention_heads=heads,
        num_kv_heads=groups,
        new_decoder_architecture=layout == "grouped",
        multi_query=layout == "multi-query",
    )
    with torch.device("meta"):
        return FalconAttention(config, layer_idx=0)


@quickly
@given(sizes, sizes, st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from(["grouped", "multi-query", "per-head"]))
def test_fused_qkv_is_transformers_split_heads(groups: int, per: int, d: int, layout: str) -> None:
    """One formula for the three layouts; transformers repeats a group's k and v for each of its heads."""
    groups = {"multi-query": 1}.get(layout, groups)
    per = {"per-head": 1}.get(layout, per)
    attention = falcon_attention(groups, per, d, layout)
    whole = numbered(2, 3, groups * (per + 2) * d)
    q, k, v = attention._split_heads(whole)
    repeat = k.shape[2] // groups
    assert torch.equal(FusedQKV(groups, per, d, "q").get(whole), q)
    assert torch.equal(FusedQKV(groups, per, d, "k").get(whole).repeat_interleave(repeat, 2), k)
    assert torch.equal(FusedQKV(groups, per, d, "v").get(whole).repeat_interleave(repeat, 2), v)


@quickly
@given(sizes, sizes, sizes)
def test_a_weights_rows_are_seen_as_its_activations_are(groups: int, per: int, d: int) -> None:
    """`x @ weight[part].T` is the part of `x @ weight.T`: the view fits the weight's transposed rows as well."""
    weight = torch.randn(groups * (per + 2) * d, 6, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for part in PARTS:
        view = FusedQKV(groups, per, d, part)
        rows = view.get(weight.T)
        expected = torch.einsum("bpm,mhd->bphd", x, rows)
        # Float64 sums of six terms, maybe in another order.
        torch.testing.assert_close(view.get(x @ weight.T), expected, rtol=0, atol=1e-12)


def test_k_and_v_are_views_and_so_is_the_q_of_one_group() -> None:
    """What is said about memory: only the q of several groups is a copy."""
    whole = torch.zeros(1, 2, 2 * 5 * 4)
    start = whole.untyped_storage().data_ptr()
    for part in ("k", "v"):
        assert FusedQKV(2, 3, 4, part).get(whole).untyped_storage().data_ptr() == start
    assert FusedQKV(2, 3, 4, "q").get(whole).untyped_storage().data_ptr() != start
    assert FusedQKV(1, 8, 4, "q").get(whole).untyped_storage().data_ptr() == start
    assert Heads(8, 5).get(whole).untyped_storage().data_ptr() == start
    assert Whole().get(whole) is whole


@quickly
@given(sizes, sizes, sizes)
def test_query_heads_in_groups_are_the_same_heads_and_a_view(groups: int, per: int, d: int) -> None:
    for view, width in (
        (FusedQKV(groups, per, d, "q"), groups * (per + 2) * d),
        (FusedBlocks(groups * per, groups, d, "q"), groups * (per + 2) * d),
        (Heads(groups * per, d), groups * per * d),
    ):
        weight = numbered(width, 3)
        grouped = in_groups(view, groups).get(weight.T)
        assert grouped.shape == (3, groups, per, d)
        assert torch.equal(grouped.flatten(1, 2), view.get(weight.T))
        assert grouped.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_parts_by_hand() -> None:
    """Two groups of two heads of size one: q q k v, q q k v. And GPT-2's blocks: q q q q, k k, v v."""
    whole = torch.arange(8.0)
    grouped = {part: FusedQKV(2, 2, 1, part).get(whole).flatten().tolist() for part in PARTS}
    assert grouped == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    by_group = FusedQKV(2, 2, 1, "q", grouped=True).get(whole).flatten(1)
    assert by_group.tolist() == [[0, 1], [4, 5]]
    assert Through(TRANSPOSED, Half(1)).get(numbered(4, 2)).tolist() == [[4, 6], [5, 7]]
    both = torch.arange(6.0)
    assert [Half(which).get(both).tolist() for which in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert [EveryOther(start).get(both).tolist() for start in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    assert Through(Heads(2, 1), Moved(0, -2)).get(numbered(3, 2)).flatten(1).tolist() == [[0, 2, 4], [1, 3, 5]]
    blocks = {part: FusedBlocks(4, 2, 1, part).get(whole).flatten().tolist() for part in PARTS}
    assert blocks == {"q": [0, 1, 2, 3], "k": [4, 5], "v": [6, 7]}
    rows = TokenRows(2, 2).get(torch.arange(4.0)[:, None])
    assert rows.flatten(1).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "make, expected",
    [
        ("whole", Whole()),
        ("query_heads", Heads(8, -1)),
        ("key_value_heads", Heads(2, -1)),
        ("fused_q", FusedQKV(2, 4, 4, "q")),
        ("fused_k", FusedQKV(2, 4, 4, "k")),
        ("fused_v", FusedQKV(2, 4, 4, "v")),
    ],
)
def test_views_made_from_a_config(make: str, expected: View) -> None:
    cfg: Any = SimpleNamespace(n_heads=8, n_key_value_heads=2, d_head=4)
    assert getattr(views, make)(cfg) == expected


def test_a_value_of_another_shape_is_refused_and_nothing_is_broadcast() -> None:
    whole = torch.zeros(1, 2, 40)
    with pytest.raises(RuntimeError):
        FusedQKV(2, 3, 4, "q").put(whole, torch.zeros(1, 2, 5, 4))
    with pytest.raises(RuntimeError):
        FusedQKV(2, 3, 4, "k").get(torch.zeros(1, 2, 41))


@quickly
@given(by=st.sampled_from([1.0, -0.5, 3.0]), width=st.integers(1, 5))
def test_a_number_that_is_added_is_taken_off_again(by: float, width: int) -> None:
    view, x, value = Shifted(by), 1e-4 * torch.randn(3, width), torch.randn(3, width)
    kept = x.clone()
    assert torch.equal(view.put(x, view.get(x)), kept) and torch.equal(x, kept)
    torch.testing.assert_close(view.get(view.put(x, value)), value, rtol=1e-6, atol=1e-6)
    assert torch.equal(view.put(view.put(x, -value), value), view.put(x, value))
