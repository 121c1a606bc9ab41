"""Hooks that see and edit some rows of the batch, for many different interventions in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens.checks import in_words, is_tensor, listed, whole, whole_numbers
from transformer_lens.hooks.point import HookFunction, HookPoint, checked_hook

Rows = int | slice | Sequence[int] | Int[Tensor, " chosen"] | Bool[Tensor, " batch"]
"""Rows of the batch: one, a slice, several or a mask; negative numbers count from the end."""


def on_rows(rows: Rows, fn: HookFunction) -> HookFunction:
    """A hook that runs `fn` on some rows of the batch and leaves the others unchanged.

    >>> def without_head_0(z, hook):
    ...     z[:, :, 0] = 0
    >>> twice = bridge.to_tokens(["Mary and John", "Mary and John"])
    >>> logits = bridge.run_with_hooks(twice, fwd_hooks=[("blocks.0.attn.hook_z", on_rows(1, without_head_0))])
    >>> [torch.equal(row, plain) for row, plain in zip(logits, bridge(twice))]
    [True, False]

    `fn` gets `tensor[rows]`, batch axis included, in the order of the list, and may edit it in place or return a
    replacement of its shape, like any forward or backward hook. Raises `TypeError` or `ValueError` for rows that mean
    nothing or repeat and, in the run, for rows that the batch does not have.
    """
    return _OnRows([(_checked(rows), checked_hook("on_rows", fn))])


def on_each(fns: Sequence[HookFunction], rows_each: int = 1) -> HookFunction:
    """A hook that gives each function its own rows: the first `rows_each` rows, the next ones, and so on.

    >>> tokens = bridge.to_tokens("Mary and John")
    >>> def ablation(head):
    ...     return lambda z, hook: z.index_fill(2, torch.tensor(head), 0)
    >>> each_head = on_each([ablation(head) for head in range(bridge.cfg.n_heads)])
    >>> bridge.run_with_hooks(tokens.repeat(4, 1), fwd_hooks=[("blocks.0.attn.hook_z", each_head)]).shape
    torch.Size([4, 5, 735])

    It costs the same as one hook. Raises `ValueError` for no functions and, in the run, unless the batch has
    `len(fns) * rows_each` rows.
    """
    fns = listed("fns", fns)
    rows_each = whole("rows_each", rows_each, 1)
    if not fns:
        raise ValueError(f"on_each: got no functions with {rows_each} rows each, expected at least one of both")
    parts = [(slice(n * rows_each, (n + 1) * rows_each), checked_hook("on_each", fn)) for n, fn in enumerate(fns)]
    return _OnRows(parts, rows_each)


@dataclass(frozen=True, eq=False)
class _OnRows:
    """What `on_rows` and `on_each` make: an object, so that it can be copied and shown."""

    parts: Sequence[tuple[slice | Tensor, HookFunction]]
    rows_each: int | None = None
    """How many rows each function gets, where they are all of the batch."""

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor | None:
        batch, several = tensor.shape[0], len(self.parts)
        if self.rows_each is not None and batch != several * self.rows_each:
            raise ValueError(
                f"on_each at {hook.name!r}: got a batch of {batch}, expected {several * self.rows_each}: "
                f"{self.rows_each} rows for each of {several} functions"
            )
        replaced = [_run(fn, tensor, _within(rows, tensor, hook), hook) for rows, fn in self.parts]
        return tensor if any(replaced) else None


def _run(fn: HookFunction, tensor: Tensor, rows: slice | Tensor, hook: HookPoint) -> bool:
    """Let `fn` edit some rows of `tensor` in place; returns whether it returned something."""
    part = tensor[rows]  # a slice shares the tensor's memory, numbers make a copy
    before = None if part.is_inference() else part._version
    result: Any = fn(part, hook=hook)
    if isinstance(result, tuple) and len(result) == 1:  # as a backward hook may answer
        (result,) = result
    if result is None:
        edited = before is None or part._version != before
        if edited and isinstance(rows, Tensor):
            tensor[rows] = part
        return False
    if not is_tensor(result):
        raise TypeError(
            f"hook on rows at {hook.name!r}: its function returned {in_words(result)}, expected a Tensor or None"
        )
    got, expected = (list(result.shape), result.dtype), (list(part.shape), part.dtype)
    if got != expected:
        raise ValueError(
            f"hook on rows at {hook.name!r}: got a replacement of shape {got[0]} and {got[1]}, "
            f"expected {expected[0]} and {expected[1]}: the rows it was given"
        )
    tensor[rows] = result
    return True


def _checked(rows: Rows) -> slice | Tensor:
    """Rows as an index. Raises for invalid ones before any model runs."""
    if isinstance(rows, slice):
        return rows
    if isinstance(rows, int) and not isinstance(rows, bool):
        return slice(rows, rows + 1 or None)
    numbers = rows if is_tensor(rows) else list(rows) if isinstance(rows, (list, tuple, range)) else None
    if isinstance(numbers, list) and all(type(number) is int for number in numbers):
        numbers = torch.tensor(whole_numbers("rows", numbers), dtype=torch.long)
    if not isinstance(numbers, Tensor) or numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex():
        raise TypeError(f"rows: got {rows!r}, expected an int, a slice, ints, or a boolean mask over the batch")
    if not (numbers.any() if numbers.dtype == torch.bool else numbers.numel()):
        raise ValueError("rows: got none, expected at least one row")
    if numbers.dtype != torch.bool and numbers.unique().numel() < numbers.numel():
        raise ValueError(f"rows: got {numbers.tolist()}, expected each row once")
    return numbers.clone()


def _within(rows: slice | Tensor, tensor: Tensor, hook: HookPoint) -> slice | Tensor:
    """The rows as an index into this batch. Raises `ValueError` for rows it does not have."""
    batch = tensor.shape[0]
    where = f"hook on rows at {hook.name!r}: got a batch of {batch}"
    if isinstance(rows, slice):
        if not len(range(*rows.indices(batch))):
            raise ValueError(f"{where}, which has no rows {rows.start}:{rows.stop}")
        return rows
    if rows.dtype == torch.bool:
        if len(rows) != batch:
            raise ValueError(f"{where}, and the mask of rows has {len(rows)} entries")
        return rows.to(tensor.device)
    if int(rows.max()) >= batch or -int(rows.min()) > batch:
        raise ValueError(f"{where}, which has no rows {rows.tolist()}")
    numbers = rows.to(tensor.device) % batch
    if numbers.unique().numel() < numbers.numel():
        raise ValueError(f"{where}, in which the rows {rows.tolist()} name one twice")
    return numbers
