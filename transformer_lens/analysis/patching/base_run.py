"""The run that a sweep of interventions starts from: its logits, streams, activations, keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import DynamicCache

from transformer_lens import TransformerBridge

SweepInput = str | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"]
"""Text, token ids, or embeddings such as noised ones."""


@dataclass(frozen=True, eq=False)
class BaseRun:
    """One run without interventions, and what it takes to run its upper layers and later positions again."""

    bridge: TransformerBridge
    input: Tensor
    mask: Int[Tensor, "batch pos"] | None
    """Only where the padding is on the left, or the caller gave one: as in a plain call of the bridge."""
    seen: Bool[Tensor, "batch pos"]
    """Which positions are not padding."""
    logits: Float[Tensor, "batch pos d_vocab"]
    streams: dict[int, Float[Tensor, "batch pos d_model"]]
    """The stream that enters each layer in which something is changed."""
    activations: dict[str, Tensor]
    past: DynamicCache

    @classmethod
    def of(cls, bridge: TransformerBridge, input: SweepInput, mask: Tensor | None, names: Iterable[str]) -> BaseRun:
        """Run the model once; keeps the activations named and the streams below them."""
        input, seen, mask = bridge.input_and_mask(input, attention_mask=mask)
        wanted = list(dict.fromkeys(names))
        streams = {layer: f"blocks.{layer}.hook_resid_pre" for layer in layers_of(bridge, wanted)}
        past = DynamicCache()  # given no config, it keeps every position, also of a model with sliding windows
        logits, cache = bridge.run_with_cache(
            input,
            names_filter=[*wanted, *streams.values()],
            return_cache_object=False,
            attention_mask=mask,
            past_key_values=past,
        )
        kept = {layer: cache[name] for layer, name in streams.items()}
        return cls(bridge, input, mask, seen, logits, kept, {name: cache[name] for name in wanted}, past)

    def mask_of_copies(self, copies: int, start: int) -> Int[Tensor, "copies_batch pos"] | None:
        """What a run of as many copies from position `start` on is given; what lies before is in a KV cache.

        It attends to what the base run attended to: where that was given no mask, also behind the end of texts.
        """
        everything = start and self.mask is None and not bool(self.seen.all())
        mask = torch.ones_like(self.seen, dtype=torch.long) if everything else self.mask
        return None if mask is None else mask.repeat(copies, 1)

    @property
    def batch(self) -> int:
        return self.logits.shape[0]

    @property
    def pos(self) -> int:
        return self.logits.shape[1]


def layers_of(bridge: TransformerBridge, names: Iterable[str]) -> dict[int, None]:
    """The layers that hooks are in, each once. Raises `ValueError` for a hook outside the blocks."""
    return {bridge.hook_dict[name].layer(): None for name in names}


def position_axis(axes: str) -> int:
    """The axis along which an activation's positions are: of its queries, where it has two."""
    names = axes.split()
    return names.index("pos" if "pos" in names else "query_pos")


@dataclass(frozen=True, eq=False)
class Change:
    """One intervention on one activation: what it makes of it, at the positions where that is anything else."""

    number: int
    """Which of the interventions this is."""
    name: str
    layer: int
    axis: int
    positions: Int[Tensor, " changed"]
    values: Shaped[Tensor, "batch ..."]
    """The new values at those positions: [batch ... changed ...] along `axis`."""

    @property
    def first(self) -> int:
        """The first position that is changed; a causal model computes the ones before as it did."""
        return int(self.positions[0])

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def writer(self, start: int) -> Any:
        """A hook that writes the values, in a run that begins at position `start`."""

        def write(activation: Tensor, hook: Any) -> None:
            activation.index_copy_(self.axis, self.positions - start, self.values)

        return write


def change(base: BaseRun, number: int, name: str, fn: Any) -> Change | None:
    """What an intervention changes in the base run; `None` if that is nothing.

    `fn` is a hook function: it gets its own copy of the activation, and edits it or returns another.
    """
    point = base.bridge.hook_dict[name]
    before = base.activations[name]
    own = before.clone()
    result = fn(own, hook=point)
    after = own if result is None else result
    if not isinstance(after, Tensor):
        raise TypeError(f"intervention at {name!r}: got {type(after).__name__}, expected a Tensor or None")
    if after.shape != before.shape or after.dtype != before.dtype:
        raise ValueError(
            f"intervention at {name!r}: got shape {list(after.shape)} and {after.dtype}, "
            f"expected {list(before.shape)} and {before.dtype}"
        )
    axis = position_axis(point.axes)
    differs = (after != before).movedim(axis, 0).flatten(1).any(1)
    positions = differs.nonzero().flatten()
    if not len(positions):
        return None
    if point.read_only:
        raise ValueError(f"hook {name!r} cannot be written: {point.read_only}")
    return Change(number, name, point.layer(), axis, positions, after.detach().index_select(axis, positions))
