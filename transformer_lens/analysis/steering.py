"""Steering vectors: the difference between the mean activations of two sets of texts. `bridge.steer` adds them."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.features import Position, activations_at
from transformer_lens.asking import Texts, place_name
from transformer_lens.checks import is_one_of

NORMALIZATIONS = (None, "unit", "stream")


@checked
def steering_vector(
    bridge: TransformerBridge,
    positive: Texts,
    negative: Texts,
    at: str | int,
    *,
    position: Position = -1,
    normalize: Literal["unit", "stream"] | None = None,
    batch_size: int = 16,
) -> Float[Tensor, "*heads width"]:
    """The mean of an activation over the positive texts less its mean over the negative ones, at `position` of each
    text: shaped as `bridge.steer(vector, at)` takes it, float32, on the bridge's device.

    >>> place = " went to the store,"
    >>> vector = steering_vector(bridge, [f"When Mary{place}"], [f"When John{place}"], at=1)
    >>> with bridge.steer(vector, 1, scale=2.0):
    ...     bridge("When Tom went to the store,").shape
    torch.Size([1, 8, 735])

    `at` is a hook or a layer (the stream that leaves it). `normalize` None keeps the difference as it is, "unit" makes
    it one long, "stream" as long as the activations are on average at this place, so that a scale means the same in
    every layer. Source: difference of means, Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation
    Addition"; Marks and Tegmark 2023.

    Raises `ValueError` for no texts, a position that a text has not, and a difference of zero that was to be
    normalised.
    """
    if not is_one_of(normalize, NORMALIZATIONS):
        raise ValueError(f"normalize: got {normalize!r}, expected None, 'unit' or 'stream'")
    name = place_name(bridge, at)
    sides = [
        activations_at(bridge, texts, [name], position, batch_size=batch_size)[name] for texts in (positive, negative)
    ]
    difference = sides[0].mean(0) - sides[1].mean(0)
    if normalize is not None:
        length = difference.norm()
        if float(length) == 0:
            raise ValueError(f"steering_vector: both sets of texts have the same mean at {name!r}")
        difference = difference / length
    if normalize == "stream":
        difference = difference * torch.cat(sides).norm(dim=-1).mean()
    axes = bridge.hook_dict[name].axes.split()[2:]
    heads = {"head": bridge.cfg.n_heads, "kv_head": bridge.cfg.n_key_value_heads}
    tail = [heads[axes[0]], -1] if axes[0] in heads else [-1]
    return difference.reshape(tail).to(bridge.cfg.device)
