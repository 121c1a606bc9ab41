"""Patch setters: which part of a corrupted activation becomes that of the clean run.

Each is `setter(corrupted_activation, index, clean_activation)`; it may edit the corrupted activation, and
returns it. `index` is a row of the sweep's table, the layer first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

Index = Sequence[int]
PatchSetter = Callable[[Tensor, Index, Tensor], Any]


def layer_pos_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos ..."], index: Index, clean_activation: Float[Tensor, "batch pos ..."]
) -> Float[Tensor, "batch pos ..."]:
    """
    >>> layer_pos_patch_setter(torch.zeros(1, 3, 1), [0, 2], torch.ones(1, 3, 1)).flatten()
    tensor([0., 0., 1.])

    One position; `index` is (layer, pos).
    """
    _, pos = index
    corrupted_activation[:, pos] = clean_activation[:, pos]
    return corrupted_activation


def layer_pos_head_vector_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos head d_head"],
    index: Index,
    clean_activation: Float[Tensor, "batch pos head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """
    >>> layer_pos_head_vector_patch_setter(torch.zeros(1, 2, 2, 1), [0, 1, 0], torch.ones(1, 2, 2, 1)).flatten()
    tensor([0., 0., 1., 0.])

    One head's vector at one position; `index` is (layer, pos, head).
    """
    _, pos, head = index
    corrupted_activation[:, pos, head] = clean_activation[:, pos, head]
    return corrupted_activation


def layer_head_vector_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos head d_head"],
    index: Index,
    clean_activation: Float[Tensor, "batch pos head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """
    >>> layer_head_vector_patch_setter(torch.zeros(1, 2, 2, 1), [0, 1], torch.ones(1, 2, 2, 1)).flatten()
    tensor([0., 1., 0., 1.])

    One head's vectors at every position; `index` is (layer, head).
    """
    _, head = index
    corrupted_activation[:, :, head] = clean_activation[:, :, head]
    return corrupted_activation


def layer_head_pattern_patch_setter(
    corrupted_activation: Float[Tensor, "batch head query_pos key_pos"],
    index: Index,
    clean_activation: Float[Tensor, "batch head query_pos key_pos"],
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """
    >>> layer_head_pattern_patch_setter(torch.zeros(1, 2, 1, 1), [0, 1], torch.ones(1, 2, 1, 1)).flatten()
    tensor([0., 1.])

    One head's whole pattern; `index` is (layer, head).
    """
    _, head = index
    corrupted_activation[:, head] = clean_activation[:, head]
    return corrupted_activation


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: Float[Tensor, "batch head query_pos key_pos"],
    index: Index,
    clean_activation: Float[Tensor, "batch head query_pos key_pos"],
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """
    >>> layer_head_pos_pattern_patch_setter(torch.zeros(1, 1, 2, 2), [0, 0, 1], torch.ones(1, 1, 2, 2)).flatten()
    tensor([0., 0., 1., 1.])

    The row of one head's pattern that belongs to one query; `index` is (layer, head, dest_pos).
    """
    _, head, dest_pos = index
    corrupted_activation[:, head, dest_pos] = clean_activation[:, head, dest_pos]
    return corrupted_activation


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Float[Tensor, "batch head query_pos key_pos"],
    index: Index,
    clean_activation: Float[Tensor, "batch head query_pos key_pos"],
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """
    >>> zeros, ones = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    >>> layer_head_dest_src_pos_pattern_patch_setter(zeros, [0, 0, 1, 0], ones).flatten()
    tensor([0., 0., 1., 0.])

    One entry of one head's pattern; `index` is (layer, head, dest_pos, src_pos).
    """
    _, head, dest_pos, src_pos = index
    corrupted_activation[:, head, dest_pos, src_pos] = clean_activation[:, head, dest_pos, src_pos]
    return corrupted_activation


def layer_expert_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos expert"],
    index: Index,
    clean_activation: Float[Tensor, "batch pos expert"],
) -> Float[Tensor, "batch pos expert"]:
    """
    >>> layer_expert_patch_setter(torch.zeros(1, 2, 2), [0, 1], torch.ones(1, 2, 2)).flatten()
    tensor([0., 1., 0., 1.])

    One expert's entry at every position; `index` is (layer, expert).
    """
    _, expert = index
    corrupted_activation[:, :, expert] = clean_activation[:, :, expert]
    return corrupted_activation
