"""Logits that are computed when read, since most metrics read one position.

Any operation but indexing positions computes the rest first, so they behave as the full logits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

METHODS = ("size", "dim", "numel", "__len__", "element_size", "is_floating_point")
ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
KNOWN_WITHOUT_VALUES = {
    *(getattr(Tensor, name) for name in METHODS),
    *(getattr(Tensor, name).__get__ for name in ATTRIBUTES),
}
"""What can be asked of a tensor before its values are computed."""


class LazyLogits(Tensor):
    """A tensor [batch pos d_vocab] whose positions are computed when first read; operations on it return plain tensors.

    >>> full = torch.arange(6.0).reshape(1, 3, 2)
    >>> nothing = full.new_full((1, 3, 2), torch.nan)
    >>> logits = LazyLogits.of(nothing, torch.zeros(3).bool(), lambda wanted: full[:, wanted])
    >>> logits[0, -1, 0], logits.sum()
    (tensor(4.), tensor(15.))
    """

    there: Bool[Tensor, " pos"]
    read: Bool[Tensor, " pos"]
    compute: Callable[[Bool[Tensor, " pos"]], Float[Tensor, "batch wanted d_vocab"]]

    @classmethod
    def of(cls, values: Tensor, there: Tensor, compute: Callable[[Tensor], Tensor]) -> Self:
        """`values` hold the logits at the positions marked in `there`; `compute` gives the others."""
        made: Self = values.as_subclass(cls)
        made.there = there.clone()
        made.read = torch.zeros_like(there)
        made.compute = compute
        return made

    def plain(self, positions: Bool[Tensor, " pos"]) -> Tensor:
        """The values, correct at least at these positions."""
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            values = self.as_subclass(Tensor)
            missing = positions & ~self.there
            if missing.any():
                values[:, missing.to(values.device)] = self.compute(missing)
            self.there |= missing
            self.read |= positions
            return values

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def plainly(value: Any) -> Any:
            if isinstance(value, LazyLogits):
                return value.plain(_positions_used(func, args, value))
            if isinstance(value, (list, tuple)) and any(isinstance(one, LazyLogits) for one in value):
                return type(value)([plainly(one) for one in value])
            return value

        arguments = [plainly(value) for value in args]
        return func(*arguments, **{name: plainly(value) for name, value in (kwargs or {}).items()})


def _positions_used(func: Any, args: tuple[Any, ...], logits: LazyLogits) -> Bool[Tensor, " pos"]:
    """The positions a function may read: all of them, unless it is known to index some."""
    positions = torch.ones_like(logits.there)
    if func in KNOWN_WITHOUT_VALUES:
        return ~positions
    if func is not Tensor.__getitem__ or args[0] is not logits or not isinstance(args[1], tuple):
        return positions
    index = args[1]
    if len(index) < 2 or not ((index[0] is Ellipsis and len(index) == 3) or _picks_one_axis(index[0])):
        return positions
    where, chosen = index[1], ~positions
    if not _picks_one_axis(where) or (isinstance(where, Tensor) and where.dtype == torch.uint8):
        return positions
    chosen[where if isinstance(where, (slice, Tensor)) else operator.index(where)] = True
    return chosen


def _picks_one_axis(index: Any) -> bool:
    """Whether an index covers one axis and is no mask over several."""
    if isinstance(index, Tensor):
        of_one = not index.is_floating_point() and (index.dtype != torch.bool or index.ndim == 1)
        return of_one and index.device.type == "cpu"
    return isinstance(index, slice) or (hasattr(index, "__index__") and not isinstance(index, bool))
