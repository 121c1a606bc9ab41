"""What a compiled graph keeps and changes at its hooks: buffers for reads, and edits that are data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens.checks import as_numbers, one_of, whole
from transformer_lens.factored_matrix import wide
from transformer_lens.hooks.edits import OPERATIONS, Edit
from transformer_lens.hooks.point import HookPoint
from transformer_lens.hooks.root import NamesFilter
from transformer_lens.hooks.slicing import Slice, SliceInput

SUFFIXES = {None: "", "mean": "_mean", "norm": "_norm", "project": "_projection", "top_k": "_top_values _top_indices"}


@dataclass(frozen=True, eq=False)
class Read:
    """What a compiled graph keeps of some hooks: everything, some positions, or what it makes of them.

    >>> size = Read("ln_final.hook_out", pos_slice=-1, reduce="norm")
    >>> with bridge.compile(reads=[size, "blocks.0.attn.hook_q"], backend="eager") as runner:
    ...     logits, cache = runner.run_with_cache("Mary and John")
    >>> cache["q", 0].shape, cache["ln_final.hook_out_norm"].shape
    (torch.Size([1, 5, 4, 32]), torch.Size([1, 1]))

    `at` and `pos_slice` as in `run_with_cache` (an int keeps the axis, `Slice(-1)` drops it). `reduce` "mean" is over
    positions, without padding (`_mean` after the name); "norm" of the last axis (`_norm`) and "project" on the rows of
    `directions` (`_projection`) are in float32 at least; "top_k" keeps the `k` largest entries of the last axis
    (`_top_values`, `_top_indices`). Raises `ValueError` for another word, and unless `directions` and `k` fit it.
    """

    at: NamesFilter
    pos_slice: SliceInput = None
    reduce: Literal["mean", "norm", "project", "top_k"] | None = None
    directions: Float[Tensor, "several width"] | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        one_of("reduce", self.reduce, tuple(SUFFIXES))
        for field, given, user in (("directions", self.directions, "project"), ("k", self.k, "top_k")):
            if (given is not None) != (self.reduce == user):
                raise ValueError(f"Read: reduce={user!r} takes {field}, and nothing else does; got {self.reduce!r}")


class GraphRead:
    """One `Read` at one hook, with its buffers; `like` is the hook's value for one token."""

    buffers: tuple[Tensor, ...] = ()

    def __init__(self, read: Read, point: HookPoint, like: Tensor) -> None:
        self.reduce, self.point, self.like, width = read.reduce, point, like, like.shape[-1]
        self.keys = [f"{point.name}{suffix}" for suffix in SUFFIXES[read.reduce].split(" ")]
        self.axis, at = point.position_axis, read.pos_slice
        self.slice = Slice([at] if type(at) is int else at)
        index = None if at is None else self.slice.index
        # A graph cannot depend on the numbers in a tensor, so they are part of it.
        index = index.nonzero().flatten() if isinstance(index, Tensor) and index.dtype == torch.bool else index
        self.index: Any = index.tolist() if isinstance(index, Tensor) else index
        if read.reduce and (point.integer or (read.reduce == "mean" and isinstance(self.index, int))):
            why = "holds integers" if point.integer else "is one position; pass a pos_slice that keeps the axis"
            raise ValueError(f"Read at {point.name!r}: reduce={read.reduce!r} has no use, for it {why}")
        self.directions = None if read.directions is None else wide(read.directions.detach().to(like))
        got = [] if self.directions is None else list(self.directions.shape)
        if got and got[1:] != [width]:
            raise ValueError(f"Read at {point.name!r}: got directions of shape {got}, expected [several, {width}]")
        grows = point.axes.endswith("key_pos")
        most = None if grows else width
        self.k = 0 if read.k is None else whole("k", read.k, 1, most, f", the last axis of {point.name!r}")
        self.made: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def fit(self, shape: tuple[int, ...]) -> None:
        """Have buffers for a value of this shape: the same ones for the same shape, up to eight."""
        if shape not in self.made:
            rows_and_positions = shape[0], shape[self.axis]
            self.slice.apply(torch.empty(rows_and_positions), dim=1)  # raises for positions that are not there
            value = self.like.new_empty(shape, device="meta")
            parts = self.of(value, value.new_empty(rows_and_positions, dtype=torch.bool))
            self.made[shape] = tuple(_put(None, torch.zeros_like(part, device=self.like.device)) for part in parts)
            if len(self.made) > 8:
                del self.made[next(iter(self.made))]
        self.buffers = self.made[shape]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What steps of a generation kept, in one tensor: along the positions, or a step axis where there are none."""
        if self.reduce == "mean" or isinstance(self.index, int):
            return torch.stack(list(parts), self.axis)
        if self.reduce is None and any(part.shape[-1] != parts[0].shape[-1] for part in parts):
            raise ValueError(
                f"Read at {self.point.name!r}: a sliding window has other keys in each step; read them step by step, "
                "with generate_stream and runner.cache"
            )
        return torch.cat(list(parts), self.axis)

    def of(self, value: Tensor, text: Bool[Tensor, "batch pos"]) -> tuple[Tensor, ...]:
        """What is kept of a value, given which positions are no padding."""
        if self.index is not None:
            value = value[(slice(None),) * self.axis + (self.index,)]
        if self.reduce == "mean":
            counted = text if self.index is None else text[:, self.index]
            counted = counted[
                (slice(None), *[None] * (self.axis - 1), slice(None), *[None] * (value.ndim - self.axis - 1))
            ]
            return ((wide(value).where(counted, 0).sum(self.axis) / counted.sum(self.axis)).to(value.dtype),)
        if self.reduce == "norm":
            return (torch.linalg.vector_norm(wide(value), dim=-1),)
        if self.directions is not None:
            return (wide(value) @ self.directions.to(value.device).mT,)
        return tuple(value.topk(self.k, dim=-1)) if self.k else (value,)


class GraphEdit:
    """One edit of a compiled graph; another `Edit` of the same operation may take its place at any time, or none.

    >>> with bridge.compile(edits=[("blocks.1.hook_resid_post", Edit("scale", 2))], backend="eager") as runner:
    ...     doubled = runner("Mary and John")
    ...     runner.edits[0].set(Edit("scale", 1), on=[True])
    ...     torch.equal(runner("Mary and John"), bridge("Mary and John"))
    True
    """

    on: bool | Bool[Tensor, " batch"] = True
    places: Any = None  # where the graph writes, and what: tensors with the hook's axes
    value: Any = None
    _fitted: tuple[int, ...] | None = None

    def __init__(self, edit: Edit, point: HookPoint, like: Tensor) -> None:
        if point.read_only:
            raise ValueError(f"hook {point.name!r} cannot be written: {point.read_only}")
        self.point, self.like, self.edit, self.operation = point, like, edit, edit.operation

    def set(
        self, edit: Edit | None = None, *, on: bool | Sequence[bool] | Bool[Tensor, " batch"] | None = None
    ) -> None:
        """Put another edit in place, or switch it on or off, for all rows or for each row of the batch.

        A value with a batch axis differs from row to row. The first value with positions of its own, and the first that
        requires a gradient, make another graph. Raises `ValueError` for another operation.
        """
        if edit is not None:
            if not isinstance(edit, Edit) or edit.operation != self.operation:
                wanted = f"an Edit({self.operation!r}); declare both to bridge.compile, and switch one of them off"
                raise ValueError(f"edit at {self.point.name!r}: got {edit!r}, expected {wanted}")
            self.edit = edit
        if on is not None:
            self.on = on if isinstance(on, bool) else as_numbers("on", on)
            if isinstance(self.on, Tensor) and (self.on.dtype != torch.bool or self.on.ndim != 1):
                raise TypeError(f"edit at {self.point.name!r}: got on={on!r}, expected a bool, or one for each row")
        self._fitted = None

    @property
    def learns(self) -> bool:
        """Whether gradients flow to its value, so that each call needs it anew."""
        value = self.edit.value
        return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()

    @property
    def settled(self) -> bool:
        """Whether its places and value are those of the latest call's shape."""
        return self._fitted is not None and not self.learns

    def apply(self, x: Tensor) -> Tensor:
        return torch.where(self.places, OPERATIONS[self.operation](x, self.value), x)

    def fit(self, shape: tuple[int, ...]) -> None:
        """Have places and a value for a value of this shape, in the same memory where they fit."""
        given, axes, along = self.edit.value, self.like.ndim, self.point.position_axis
        learns = self.learns
        if not learns and self._fitted == shape:
            return
        ones, chosen = self.like.new_ones(shape), dict[str, Any](self.edit.chosen)
        self.edit(ones, self.point)  # raises what it raises eagerly
        if isinstance(self.on, Tensor) and len(self.on) != shape[0]:
            raise ValueError(f"edit at {self.point.name!r}: got on for {len(self.on)} rows, and a batch of {shape[0]}")
        places = Edit("zero", **chosen)(ones, self.point) == 0
        places = places if "expert" in self.point.axes else places[..., :1]  # the other last axes are never chosen from
        places &= torch.as_tensor(self.on, device=ones.device).reshape(-1, *[1] * (axes - 1))
        if not (isinstance(given, Tensor) and given.ndim >= axes - along and given.shape[along - axes] > 1):
            ones, chosen = ones.narrow(along, 0, 1), {**chosen, "positions": None}  # one value for all positions
        value = Edit("set", 0.0 if given is None else given, **chosen)(ones, self.point).contiguous()
        self.places, self.value = _put(self.places, places), value if learns else _put(self.value, value)
        self._fitted = None if learns else shape


def _put(buffer: Tensor | None, new: Tensor) -> Tensor:
    """The new numbers in the old tensor, where a graph finds them; in one that stays where it is if they do not fit."""
    if buffer is not None and buffer.shape == new.shape and not buffer.requires_grad:
        return buffer.copy_(new.detach())
    with torch.inference_mode(False):  # for calls in any mode
        torch._dynamo.mark_static_address(made := new.detach().clone(), guard=False)
    return made
