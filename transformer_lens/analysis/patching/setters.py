"""Patch setters: which part of a corrupted activation becomes that of the clean run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

Index = Sequence[int]
PatchSetter = Callable[[Tensor, Index, Tensor], Any]


@dataclass(frozen=True)
class PartSetter:
    """Copies one part of the clean activation into the corrupted one, which it edits and returns.

    >>> layer_pos_patch_setter(torch.zeros(1, 3, 1), [0, 2], torch.ones(1, 3, 1)).flatten()
    tensor([0., 0., 1.])
    >>> layer_head_vector_patch_setter(torch.zeros(1, 2, 2, 1), [0, 1], torch.ones(1, 2, 2, 1)).flatten()
    tensor([0., 1., 0., 1.])
    >>> zeros, ones = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    >>> layer_head_dest_src_pos_pattern_patch_setter(zeros, [0, 0, 1, 0], ones).flatten()
    tensor([0., 0., 1., 0.])

    `index` is a row of the sweep's table. Raises `ValueError` for one of another length.
    """

    index_axis_names: tuple[str, ...]
    """What the numbers of an index are, the layer first."""
    first_axis: int = 1
    """The activation's axis that the number after the layer goes along; those after it take the next axes."""

    def __call__(
        self,
        corrupted_activation: Float[Tensor, "batch ..."],
        index: Index,
        clean_activation: Float[Tensor, "batch ..."],
    ) -> Float[Tensor, "batch ..."]:
        if len(index) != len(self.index_axis_names):
            raise ValueError(f"index: got {list(index)}, expected ({', '.join(self.index_axis_names)})")
        part = (slice(None),) * self.first_axis + tuple(index[1:])
        corrupted_activation[part] = clean_activation[part]
        return corrupted_activation


layer_pos_patch_setter = PartSetter(("layer", "pos"))
"""One position, of any activation `[batch pos ...]`."""
layer_pos_head_vector_patch_setter = PartSetter(("layer", "pos", "head"))
"""One head's vector at one position, of `[batch pos head d_head]`."""
layer_head_vector_patch_setter = PartSetter(("layer", "head"), first_axis=2)
"""One head's vectors at every position, of `[batch pos head d_head]`."""
layer_head_pattern_patch_setter = PartSetter(("layer", "head_index"))
"""One head's whole pattern, of `[batch head query_pos key_pos]`."""
layer_head_pos_pattern_patch_setter = PartSetter(("layer", "head_index", "dest_pos"))
"""The row of one head's pattern that belongs to one query."""
layer_head_dest_src_pos_pattern_patch_setter = PartSetter(("layer", "head_index", "dest_pos", "src_pos"))
"""One entry of one head's pattern."""
layer_expert_patch_setter = PartSetter(("layer", "expert"), first_axis=2)
"""One expert's entry at every position, of `[batch pos expert]`."""
