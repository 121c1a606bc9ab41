"""`Slice`: which positions of an axis to keep, in any common spelling; and what may index one axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformer_lens.checks import in_words, is_tensor, is_whole

SliceInput = int | slice | tuple[int | None, ...] | Sequence[int] | np.ndarray | Tensor | None
AxisIndex = int | slice | Tensor
"""An index along one axis as torch takes it: an integer, a slice, integers or a mask."""
EXPECTED = "an int, slice, tuple, list or None"


def axis_index(what: str, entry: Any, expected: str = EXPECTED) -> AxisIndex:
    """Convert an integer, a slice, a list or an array to an index torch takes.

    >>> axis_index("rows", np.int64(2)), axis_index("rows", [True, False])
    (2, tensor([ True, False]))

    Raises `TypeError` for anything that cannot index an axis, and `ValueError` for a slice with a negative step.
    """
    if is_whole(entry):
        return int(entry)
    if isinstance(entry, slice):
        ends = (entry.start, entry.stop, entry.step)
        if not all(end is None or is_whole(end) for end in ends):
            raise TypeError(f"{what}: got {entry}, expected whole numbers in a slice")
        start, stop, step = (None if end is None else int(end) for end in ends)
        if step is not None and step < 1:
            raise ValueError(f"{what}: got {entry}, expected a step of one or more, as torch has it")
        return slice(start, stop, step)
    if isinstance(entry, (bool, str)) or not isinstance(entry, (Sequence, np.ndarray, Tensor)):
        raise TypeError(f"{what}: got {in_words(entry)}, expected {expected}")
    try:
        values = entry if is_tensor(entry) else torch.as_tensor(np.asarray(entry))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what}: got {in_words(entry)}, expected {expected}, of whole numbers") from error
    if not values.numel() and not isinstance(entry, (Tensor, np.ndarray)):
        return values.long()  # an empty list names nothing, whatever NumPy takes its type for
    if values.ndim < 1 or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{what}: got {in_words(entry)}, expected {expected}, of whole numbers")
    return values if values.dtype == torch.bool else values.long()


def check_within(what: str, index: AxisIndex, sizes: Sequence[int]) -> None:
    """Raise `IndexError` for an index out of range, or a mask whose shape differs from the axes it covers."""
    if isinstance(index, slice):
        return
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        if list(index.shape) != list(sizes):
            raise IndexError(f"{what}: got a mask of shape {list(index.shape)}, expected {list(sizes)}")
        return
    if isinstance(index, Tensor) and not index.numel():
        return
    size = sizes[0]
    least, most = (int(end) for end in index.aminmax()) if isinstance(index, Tensor) else (index, index)
    if least < -size or most >= size:
        beyond = most if most >= size else least
        expected = f"{-size} to {size - 1}" if size else "nothing, for the axis is empty"
        raise IndexError(f"{what}: got {beyond}, expected {expected}")


class Slice:
    """A choice along one axis: an int (drops the axis), a `(start, stop[, step])` tuple, a list, a mask or None.

    >>> Slice((1, 3)).apply(torch.arange(5), dim=0), Slice(-1).apply(torch.arange(5), dim=0)
    (tensor([1, 2]), tensor(4))

    Integers may be NumPy's or a tensor's; a mask has the length of the axis. Raises `TypeError` for anything else.
    """

    def __init__(self, input_slice: SliceInput | Slice = None) -> None:
        self.raw: SliceInput = input_slice.raw if isinstance(input_slice, Slice) else input_slice
        given: Any = slice(None) if self.raw is None else self.raw
        if isinstance(given, tuple):
            if not 1 <= len(given) <= 3:
                raise TypeError(f"slice: got {given!r}, expected (stop,), (start, stop) or (start, stop, step)")
            given = slice(*given)
        self.index = axis_index("slice", given)
        if isinstance(self.index, Tensor) and self.index.ndim != 1:
            raise TypeError(f"slice: got {in_words(given)}, expected one axis of numbers or truth values")

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Keep the chosen entries of axis `dim`. Raises `IndexError` for one that is out of range."""
        if not is_tensor(tensor) or not is_whole(dim) or not -tensor.ndim <= dim < tensor.ndim:
            raise ValueError(
                f"Slice.apply: got {in_words(tensor)} and dim {dim!r}, expected a tensor and one of its axes"
            )
        axis = dim % tensor.ndim
        check_within(f"slice {self.raw!r}", self.index, tensor.shape[axis : axis + 1])
        index = self.index.to(tensor.device) if isinstance(self.index, Tensor) else self.index
        return tensor[(slice(None),) * axis + (index,)]

    def __repr__(self) -> str:
        return f"Slice({self.raw!r})"
