"""What a caller means by an answer, a layer, an expert and positions: checked, and as numbers or a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.checks import in_words, whole_numbers

Answer = str | int | Sequence[str | int] | Int[Tensor, " batch"]
"""One token for all texts or one for each: an id, a text of one token, or several of these."""
Layers = int | Sequence[int] | None
"""A layer, several, or `None` for all of them; negative ones count from the end."""
Pairs = Sequence[tuple[int | None, int]]
"""Layers, each with one of its experts; `None` for all layers."""
Positions = int | Sequence[int] | slice | Bool[Tensor, "batch pos"] | None
"""A position, several, a slice, a mask over batch and positions, or `None` for all of them."""


def answer_ids(bridge: TransformerBridge, what: str, answer: Answer, batch: int) -> Int[Tensor, " batch"]:
    """The token meant in each of `batch` texts. Raises `ValueError` for a text of several, and for another number."""
    ids = bridge.token_ids(answer, what).reshape(-1)
    if len(ids) not in (1, batch):
        raise ValueError(f"{what}: got {len(ids)}, expected one, or one for each of the {batch} texts")
    return ids.expand(batch)


def need_experts(bridge: TransformerBridge, what: str) -> int:
    """How many experts a layer has. Raises `ValueError`, on behalf of `what`, for a dense model."""
    if not bridge.cfg.num_experts:
        raise ValueError(
            f"{what} needs a mixture of experts, and {bridge.cfg.model_name} ({bridge.cfg.architecture}) has dense MLPs"
        )
    return bridge.cfg.num_experts


def layer_numbers(bridge: TransformerBridge, layer: Layers) -> list[int]:
    """The layers meant, from 0. Raises `ValueError` for one that is not there, and for one named twice."""
    n_layers = bridge.cfg.n_layers
    where = f" in a model of {n_layers} layers"
    wanted = range(n_layers) if layer is None else whole_numbers("layer", layer, -n_layers, n_layers - 1, where)
    numbers = [number % n_layers for number in wanted]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"layer: got {list(wanted)}, expected each layer once")
    return numbers


def expert_numbers(bridge: TransformerBridge, experts: int | Sequence[int]) -> list[int]:
    """The experts meant. Raises `ValueError` for one that is not there, and for one named twice."""
    n_experts = bridge.cfg.num_experts or 0
    wanted = whole_numbers("expert", experts, 0, n_experts - 1, f" in a model of {n_experts} experts a layer")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"experts: got {wanted}, expected each expert once")
    return wanted


def experts_by_layer(
    bridge: TransformerBridge, layer: Layers | Pairs, expert: int | Sequence[int] | None
) -> dict[int, list[int]]:
    """The experts meant in each layer, from pairs or from layers that all have the same ones.

    Raises `ValueError` for one that is not there, for one named twice, and unless experts are given just once.
    """
    layers: Any = layer
    several: list[Any] = list(layer) if isinstance(layer, (list, tuple, range)) else []
    pairs = [pair for pair in several if isinstance(pair, (list, tuple)) and len(pair) == 2]
    if len(pairs) < len(several) if pairs else expert is None:
        raise ValueError(
            f"experts: got layer={layer} and expert={expert}, expected layers and an expert, or pairs (layer, expert)"
        )
    if not pairs:
        numbers = [] if expert is None else expert_numbers(bridge, expert)
        return dict.fromkeys(layer_numbers(bridge, layers), numbers)
    if expert is not None:
        raise ValueError(f"expert: got {expert} beside pairs (layer, expert), which name the experts already")
    found: dict[int, list[int]] = {}
    for where, number in pairs:
        for i in layer_numbers(bridge, where):
            found[i] = expert_numbers(bridge, [*found.get(i, []), number])
    return dict(sorted(found.items()))


def check_positions(positions: Positions) -> None:
    """Raise `TypeError` for what cannot mean positions, before any model runs."""
    if isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.ndim == 2:
        return
    expected = "ints, a slice, a boolean mask [batch, pos] or None"
    if isinstance(positions, Tensor) or not (positions is None or isinstance(positions, slice)):
        try:
            whole_numbers("positions", positions)
        except TypeError as error:
            raise TypeError(f"positions: got {in_words(positions)}, expected {expected}") from error


def position_mask(positions: Positions, like: Tensor) -> Bool[Tensor, "batch pos"]:
    """The positions as a mask over the first two axes of `like`. Raises `ValueError` for one beyond them."""
    batch, pos = like.shape[:2]
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if list(positions.shape) != [batch, pos]:
            raise ValueError(f"positions: got a mask of shape {list(positions.shape)}, expected {[batch, pos]}")
        return positions.to(like.device)
    mask = torch.zeros(batch, pos, dtype=torch.bool, device=like.device)
    if positions is None or isinstance(positions, slice):
        mask[:, positions or slice(None)] = True
        return mask
    mask[:, whole_numbers("positions", positions, -pos, pos - 1, f" in a run of {pos} positions")] = True
    return mask
