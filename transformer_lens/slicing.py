"""`Slice`: which positions of an axis to keep, written the ways people write it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SliceInput = int | slice | tuple[int | None, ...] | Sequence[int] | Tensor | None


class Slice:
    """A choice along one axis: an int (drops the axis), a `(start, stop[, step])` tuple, a list or None.

    >>> Slice((1, 3)).apply(torch.arange(5), dim=0)
    tensor([1, 2])
    >>> Slice(-1).apply(torch.arange(5), dim=0)
    tensor(4)
    """

    def __init__(self, input_slice: SliceInput | Slice = None) -> None:
        if isinstance(input_slice, Slice):
            input_slice = input_slice.raw
        self.raw: SliceInput = input_slice
        self.index: int | slice | Tensor
        given: object = input_slice
        if isinstance(given, (bool, str)):
            raise TypeError(f"slice: got {given!r}, expected an int, slice, tuple, list or None")
        if input_slice is None:
            self.index = slice(None)
        elif isinstance(input_slice, (int, slice)):
            self.index = input_slice
        elif isinstance(input_slice, tuple):
            self.index = slice(*input_slice)
        elif isinstance(input_slice, (Sequence, Tensor)):
            self.index = torch.as_tensor(input_slice, dtype=torch.long)
        else:
            raise TypeError(f"slice: got {input_slice!r}, expected an int, slice, tuple, list or None")

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Keep the chosen entries of axis `dim`."""
        axis = dim % tensor.ndim
        index = self.index.to(tensor.device) if isinstance(self.index, Tensor) else self.index
        return tensor[(slice(None),) * axis + (index,)]

    def __repr__(self) -> str:
        return f"Slice({self.raw!r})"
