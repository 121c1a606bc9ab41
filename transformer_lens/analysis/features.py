"""Activations of many texts at one place each: what steering vectors and probes are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.checks import is_whole, whole_numbers
from transformer_lens.model_bridge import InputAndMask

Texts = Sequence[str] | Int[Tensor, "batch pos"]
"""Texts, or token ids."""
Position = int | Sequence[int] | Literal["mean"]
"""A token of each text, padding not counted: one number for all, one for each text, or the mean over all of them."""


def place_name(bridge: TransformerBridge, at: str | int) -> str:
    """
    >>> place_name(bridge, -1), place_name(bridge, "blocks.0.hook_in")
    ('blocks.3.hook_resid_post', 'blocks.0.hook_resid_pre')

    A hook's name; a layer stands for the stream that leaves it, and negative layers count from the end.
    Raises `KeyError` for an unknown hook and `ValueError` for a layer that is not there.
    """
    if isinstance(at, str):
        return bridge.canonical_name(at)
    layers = bridge.cfg.n_layers
    if isinstance(at, bool) or not isinstance(at, int):
        raise TypeError(f"at: got {at!r}, expected a hook's name or a layer")
    if not -layers <= at < layers:
        raise ValueError(f"at: got layer {at}, expected {-layers} to {layers - 1} in a model of {layers} layers")
    return f"blocks.{at % layers}.hook_resid_post"


def check_texts(texts: Texts) -> None:
    """
    >>> check_texts("Mary and John")
    Traceback (most recent call last):
    TypeError: texts: got str, expected a list of texts, or token ids [batch, pos]

    Raise `TypeError` for one text, whose letters would pass for texts, and for tensors that hold no ids of texts.
    """
    if isinstance(texts, Tensor):
        got, suits = f"a {texts.dtype} tensor of shape {list(texts.shape)}", texts.ndim == 2
        suits = suits and not texts.is_floating_point()
    else:
        got, suits = type(texts).__name__, isinstance(texts, Sequence) and not isinstance(texts, (str, bytes))
    if not suits:
        raise TypeError(f"texts: got {got}, expected a list of texts, or token ids [batch, pos]")


def batches_of(bridge: TransformerBridge, texts: Texts) -> Callable[[Sequence[int]], InputAndMask]:
    """
    >>> some = batches_of(bridge, ["Mary", "Mary and John", "John"])
    >>> some([0, 1]).mask.sum(-1)
    tensor([3, 5])

    Gives any of the texts as a batch. Which ids of a batch are padding is told once, by all of its rows together.
    """
    if not isinstance(texts, Tensor):
        return lambda some: bridge.input_and_mask([texts[number] for number in some])
    ids, mask, _ = bridge.input_and_mask(texts)
    return lambda some: InputAndMask(ids[list(some)], mask[list(some)], mask[list(some)].long())


@torch.no_grad()
def activations_at(
    bridge: TransformerBridge,
    texts: Texts,
    places: Sequence[str | int],
    position: Position = -1,
    *,
    batch_size: int = 16,
    verbose: bool = False,
) -> dict[str, Float[Tensor, "text features"]]:
    """
    >>> found = activations_at(bridge, ["Mary and John", "Mary"], [0, "blocks.1.attn.hook_z"])
    >>> {name: tuple(x.shape) for name, x in found.items()}
    {'blocks.0.hook_resid_post': (2, 128), 'blocks.1.attn.hook_z': (2, 128)}

    What each text has at each place, at `position`, by hook name: on the CPU, in float32 (float64 stays), axes after
    the position flattened into one. Only the wanted positions of `batch_size` texts are kept at a time, and no layer
    above the places runs.

    Raises `ValueError` for no texts, for a text without that position and for hooks without a position axis.
    """
    names = list(dict.fromkeys(place_name(bridge, place) for place in places))
    for name in names:
        if bridge.hook_dict[name].axes.split()[:2] != ["batch", "pos"]:
            raise ValueError(f"{name!r} has the axes {bridge.hook_dict[name].axes!r}, expected batch and pos in front")
    check_texts(texts)
    if not len(texts) or not names or batch_size < 1:
        raise ValueError(
            f"got {len(texts)} texts, {len(names)} places and batch_size {batch_size}, expected one or more"
        )
    if not isinstance(position, str):
        position = position if is_whole(position) else whole_numbers("position", position)
        if isinstance(position, list) and len(position) != len(texts):
            raise ValueError(f"position: got {len(position)} numbers for {len(texts)} texts")
    layers = [int(name.split(".")[1]) if name.startswith("blocks.") else bridge.cfg.n_layers for name in names]
    stop = max(layers) + 1 if max(layers) + 1 < bridge.cfg.n_layers else None
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    batch_of = batches_of(bridge, texts)
    for start in tqdm(range(0, len(texts), batch_size), disable=not verbose, desc="activations", leave=False):
        tokens, mask, attention_mask = batch_of(range(start, min(start + batch_size, len(texts))))
        wanted = position if isinstance(position, (int, str)) else position[start : start + batch_size]
        weights = _weights(mask, wanted, start)

        def keep(x: Tensor, hook: HookPoint, weights: Tensor = weights, mean: bool = position == "mean") -> None:
            wide = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
            # One position is taken as it is; a product would mix in what padding holds.
            one = weights.argmax(-1).to(x.device)
            if mean:
                each = wide.masked_fill(~weights.bool().to(x.device)[..., None], 0)
                kept = each.sum(1) / weights.sum(-1, keepdim=True).to(x.device, wide.dtype)
            else:
                kept = wide[torch.arange(len(x), device=x.device), one]
            found[str(hook.name)].append(kept.cpu())

        bridge.run_with_hooks(
            tokens, fwd_hooks=[(names, keep)], return_type=None, stop_at_layer=stop, attention_mask=attention_mask
        )
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def _weights(mask: Bool[Tensor, "batch pos"], position: Position, start: int) -> Int[Tensor, "batch pos"]:
    """1 at the tokens that are wanted of each text, 0 elsewhere."""
    if isinstance(position, str):
        if position != "mean":
            raise ValueError(f"position: got {position!r}, expected an int, one for each text, or 'mean'")
        return mask.long()
    wanted = torch.zeros_like(mask, dtype=torch.long)
    numbers = [position] * len(mask) if isinstance(position, int) else position
    for row, number in enumerate(numbers):
        real = mask[row].nonzero().flatten()
        if not -len(real) <= number < len(real):
            raise ValueError(f"position: got {number} for text {start + row}, which has {len(real)} tokens")
        wanted[row, real[number]] = 1
    return wanted


def tokens_at(bridge: TransformerBridge, texts: Texts, position: int | Sequence[int]) -> list[int]:
    """
    >>> tokens_at(bridge, [" Mary and John"], -1) == [bridge.to_single_token(" John")]
    True

    The token of each text at a position.
    """
    tokens, mask, _ = bridge.input_and_mask(texts)
    return [int(token) for token in tokens[_weights(mask, position, 0).bool()]]
