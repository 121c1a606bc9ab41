"""Hooks on rows of the batch: what they edit, what they leave alone, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import FAMILIES, family, tokens
from transformer_lens import HookPoint, TransformerBridge, on_each, on_rows

NAMES = ("hook_resid_pre", "attn.hook_q", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_mlp_out")
EXPERTS = ("mlp.hook_expert_out", "mlp.hook_router_logits", "mlp.hook_expert_weights")


def bridge_of(name: str, **changes: Any) -> TransformerBridge:
    torch.manual_seed(0)
    return TransformerBridge(family(name, **changes))


def hooked(point: HookPoint, x: torch.Tensor, hook: Any) -> torch.Tensor:
    entry = point.add_hook(hook)
    try:
        return point(x)
    finally:
        point.remove(entry)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("layout", FAMILIES)
def test_each_row_is_as_if_it_ran_alone(layout, in_place):
    bridge = bridge_of(layout, **({"experts": "eager"} if layout == "mixtral" else {}))
    bridge.original_model.double()
    x = tokens(4, 6)
    for slot in (*NAMES, *(EXPERTS if layout == "mixtral" else ())):
        name = f"blocks.1.{slot}"

        def scale(tensor, hook):
            if in_place:
                tensor.mul_(1.5)
                return None
            return tensor * 1.5

        with torch.no_grad():
            plain = bridge(x)
            everywhere = bridge.run_with_hooks(x, fwd_hooks=[(name, scale)])
            got = bridge.run_with_hooks(x, fwd_hooks=[(name, on_rows([3, 1], scale))])
        assert not torch.allclose(everywhere, plain, atol=1e-3), name
        torch.testing.assert_close(got[[1, 3]], everywhere[[1, 3]], rtol=0, atol=1e-5)
        torch.testing.assert_close(got[[0, 2]], plain[[0, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (2, [2]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([3, 0], [3, 0]),
        (range(2), [0, 1]),
        (torch.tensor([-4, 2]), [0, 2]),
        (torch.tensor([True, False, False, True]), [0, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_place", [True, False])
def test_rows_of_every_kind(rows, chosen, in_place):
    x = torch.arange(8.0).reshape(4, 2)
    seen = []

    def negate(part, hook):
        seen.append(part.clone())
        return part.neg_() if in_place else -part

    got = hooked(HookPoint("p"), x, on_rows(rows, negate))
    expected = x.clone()
    expected[chosen] *= -1
    assert torch.equal(got, expected) and torch.equal(seen[0], x[chosen])
    assert torch.equal(x, torch.arange(8.0).reshape(4, 2))


@pytest.mark.parametrize("rows", [slice(1, 2), [1]], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_editing_in_place_without_an_answer(rows, mode):
    with mode():
        x = torch.zeros(3, 2)
        got = hooked(HookPoint("p"), x, on_rows(rows, lambda part, hook: _add(part)))
        assert got.tolist() == [[0, 0], [1, 1], [0, 0]] and not x.any()


def _add(part: torch.Tensor) -> None:
    part.add_(1)


def test_looking_changes_nothing():
    x = torch.randn(3, 2)
    point = HookPoint("p", read_only="it is a record")
    for rows in (slice(0, 2), [0, 2]):
        assert hooked(point, x, on_rows(rows, lambda part, hook: None)) is x
        for edit in (lambda part, hook: _add(part), lambda part, hook: part * 2):
            with pytest.raises(ValueError, match="hook 'p' cannot be written: it is a record"):
                hooked(point, x, on_rows(rows, edit))


def test_hooks_on_the_same_point_follow_one_another():
    x = torch.ones(3, 1)
    point = HookPoint("p")
    point.add_hook(on_rows([0, 1], lambda part, hook: part * 2))
    point.add_hook(on_rows([1, 2], lambda part, hook: part + 5))
    assert point(x).flatten().tolist() == [2, 7, 6]


def test_gradients_pass_through_and_can_be_edited_by_row():
    x = torch.ones(3, 2, requires_grad=True)
    point = HookPoint("p")
    point.add_hook(on_rows([2], lambda part, hook: part * 3))
    point.add_hook(on_rows(0, lambda grad, hook: grad * 10), dir="bwd")
    point.add_hook(on_rows([1], lambda grad, hook: (grad * 100,)), dir="bwd")
    (point(x) * torch.tensor([1.0, 2.0])).sum().backward()
    assert x.grad.tolist() == [[10, 20], [100, 200], [3, 6]]


def test_each_function_has_rows_of_its_own():
    x = torch.zeros(6, 1)
    seen = []

    def adding(by):
        def add(part, hook):
            seen.append((by, len(part), hook.name))
            return part + by if by % 2 else _add_by(part, by)

        return add

    got = hooked(HookPoint("p"), x, on_each([adding(1), adding(2), adding(3)], rows_each=2))
    assert got.flatten().tolist() == [1, 1, 2, 2, 3, 3]
    assert seen == [(1, 2, "p"), (2, 2, "p"), (3, 2, "p")]
    nested = on_rows(slice(2, None), on_each([adding(1), adding(2), adding(3), adding(4)]))
    assert hooked(HookPoint("p"), x, nested).flatten().tolist() == [0, 0, 1, 2, 3, 4]


def _add_by(part: torch.Tensor, by: float) -> None:
    part.add_(by)


def test_wrong_rows_and_answers_are_refused():
    def keep(part, hook):
        return None

    x = torch.zeros(2, 3)
    point = HookPoint("p")
    for rows in ("0", 1.5, True, [0.5], [True, False], None, torch.zeros(2), torch.zeros(1, 1, dtype=torch.long)):
        with pytest.raises(TypeError, match="rows: got .*, expected an int, a slice, ints, or a boolean mask"):
            on_rows(rows, keep)
    for rows in ([], torch.tensor([False, False])):
        with pytest.raises(ValueError, match="rows: got none, expected at least one row"):
            on_rows(rows, keep)
    with pytest.raises(ValueError, match=r"rows: got \[1, 1\], expected each row once"):
        on_rows([1, 1], keep)
    with pytest.raises(TypeError, match="on_rows: got int, expected a function"):
        on_rows(0, 3)
    with pytest.raises(TypeError, match="on_each: got int, expected a function"):
        on_each([keep, 3])
    with pytest.raises(ValueError, match="on_each: got no functions with 1 rows each"):
        on_each([])
    with pytest.raises(ValueError, match="rows_each: got 0, expected 1 or more"):
        on_each([keep], rows_each=0)
    for rows in (2, -3, [0, 2], slice(5, 7), torch.tensor([-3])):
        with pytest.raises(ValueError, match="hook on rows at 'p': got a batch of 2, which has no rows"):
            hooked(point, x, on_rows(rows, keep))
    with pytest.raises(ValueError, match="got a batch of 2, and the mask of rows has 3 entries"):
        hooked(point, x, on_rows(torch.tensor([True, False, True]), keep))
    with pytest.raises(ValueError, match=r"in which the rows \[1, -1\] name one twice"):
        hooked(point, x, on_rows([1, -1], keep))
    with pytest.raises(ValueError, match="on_each at 'p': got a batch of 2, expected 3: 1 rows for each of 3"):
        hooked(point, x, on_each([keep, keep, keep]))
    with pytest.raises(TypeError, match="hook on rows at 'p': its function returned 1, expected a Tensor or None"):
        hooked(point, x, on_rows(0, lambda part, hook: 1))
    with pytest.raises(ValueError, match=r"got a replacement of shape \[3\] and torch.float32, expected \[1, 3\]"):
        hooked(point, x, on_rows(0, lambda part, hook: part[0]))
    with pytest.raises(ValueError, match="and torch.float64, expected"):
        hooked(point, x, on_rows(0, lambda part, hook: part.double()))
    assert not x.any()


def test_rows_given_as_a_tensor_are_remembered_as_they_were():
    rows = torch.tensor([0])
    hook = on_rows(rows, lambda part, hook: part + 1)
    rows[0] = 1
    assert hooked(HookPoint("p"), torch.zeros(2, 1), hook).flatten().tolist() == [1, 0]
