"""Activations of texts at one token each, and steering vectors: the mean difference between two sets of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Texts, check_texts, columns, place_name
from transformer_lens.checks import is_whole, one_of, whole_numbers
from transformer_lens.factored_matrix import wide
from transformer_lens.model_bridge import InputAndMask

__all__ = ["steering_vector"]
Position = int | Sequence[int] | Literal["mean"]
"""A token of each text, padding excluded: one number for all, one for each text, or the mean over all tokens."""


def batches_of(bridge: TransformerBridge, texts: Texts) -> Callable[[Sequence[int]], InputAndMask]:
    """A function that returns any of the texts as a batch; padding is inferred once, from all texts together.

    >>> some = batches_of(bridge, ["Mary", "Mary and John", "John"])
    >>> some([0, 1]).mask.sum(-1)
    tensor([3, 5])
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
    """Each text's activation at each place and one position, by hook name: on the CPU, in float32 (float64 stays), with
    later axes flattened. Only the wanted positions are kept, and no layer above the places runs.

    >>> found = activations_at(bridge, ["Mary and John", "Mary"], [0, "blocks.1.attn.hook_z"])
    >>> {name: tuple(x.shape) for name, x in found.items()}
    {'blocks.0.hook_resid_post': (2, 128), 'blocks.1.attn.hook_z': (2, 128)}

    Raises `ValueError` for no texts, for a text without that position and for hooks without a position axis.
    """
    names = list(dict.fromkeys(place_name(bridge, place) for place in places))
    for name in names:
        if bridge.hook_dict[name].axes.split()[:2] != ["batch", "pos"]:
            raise ValueError(f"{name!r} has the axes {bridge.hook_dict[name].axes!r}, expected batch and pos in front")
    check_texts(texts)
    if not len(texts) or not names or batch_size < 1:
        got = f"{len(texts)} texts, {len(names)} places and batch_size {batch_size}"
        raise ValueError(f"got {got}, expected one or more")
    if isinstance(position, str) and position != "mean":
        raise ValueError(f"position: got {position!r}, expected an int, one for each text, or 'mean'")
    each = None if isinstance(position, str) or is_whole(position) else whole_numbers("position", position)
    if each is not None and len(each) != len(texts):
        raise ValueError(f"position: got {len(each)} numbers for {len(texts)} texts")
    layers = [int(name.split(".")[1]) if name.startswith("blocks.") else bridge.cfg.n_layers for name in names]
    stop = max(layers) + 1 if max(layers) + 1 < bridge.cfg.n_layers else None
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    batch_of = batches_of(bridge, texts)
    for start in tqdm(range(0, len(texts), batch_size), disable=not verbose, desc="activations", leave=False):
        tokens, mask, attention_mask = batch_of(range(start, min(start + batch_size, len(texts))))
        wanted = position if each is None else each[start : start + batch_size]
        one = None if isinstance(position, str) else columns(mask, wanted, start)

        def keep(x: Tensor, hook: HookPoint, mask: Tensor = mask, one: Tensor | None = one) -> None:
            flat = wide(x.flatten(2))
            if one is None:
                # Padding is dropped before the sum: it may hold anything, and times zero need not be zero.
                each = flat.masked_fill(~mask.bool().to(x.device)[..., None], 0)
                kept = each.sum(1) / mask.sum(-1, keepdim=True).to(x.device, flat.dtype)
            else:
                kept = flat[torch.arange(len(x), device=x.device), one.to(x.device)]
            found[str(hook.name)].append(kept.cpu())

        bridge.run_with_hooks(
            tokens, fwd_hooks=[(names, keep)], return_type=None, stop_at_layer=stop, attention_mask=attention_mask
        )
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def tokens_at(bridge: TransformerBridge, texts: Texts, position: int | Sequence[int]) -> list[int]:
    """The token id of each text at a position.

    >>> tokens_at(bridge, [" Mary and John"], -1) == [bridge.to_single_token(" John")]
    True
    """
    tokens, mask, _ = bridge.input_and_mask(texts)
    return tokens.gather(1, columns(mask, position).to(tokens.device)[:, None])[:, 0].tolist()


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
    """The mean activation of the positive texts minus that of the negative ones, at `position` of each text: shaped for
    `bridge.steer(vector, at)`, float32, on the bridge's device.

    >>> place = " went to the store,"
    >>> vector = steering_vector(bridge, [f"When Mary{place}"], [f"When John{place}"], at=1)
    >>> with bridge.steer(vector, 1, scale=2.0):
    ...     bridge("When Tom went to the store,").shape
    torch.Size([1, 8, 735])

    `at` is a hook or a layer (the stream that leaves it). `normalize` None keeps the difference, "unit" scales it to
    length one, "stream" to the mean length of the activations there, so that a scale means the same in every layer.
    Source: difference of means, Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation Addition"; Marks and
    Tegmark 2023. Raises `ValueError` for no texts, a missing position, and normalising a zero difference.
    """
    one_of("normalize", normalize, (None, "unit", "stream"))
    name = place_name(bridge, at)
    both = (activations_at(bridge, texts, [name], position, batch_size=batch_size) for texts in (positive, negative))
    sides = [side[name] for side in both]
    difference = sides[0].mean(0) - sides[1].mean(0)
    if normalize is not None:
        length = difference.norm()
        if float(length) == 0:
            raise ValueError(f"steering_vector: both sets of texts have the same mean at {name!r}")
        difference = difference / length
    if normalize == "stream":
        difference = difference * torch.cat(sides).norm(dim=-1).mean()
    heads = {"head": bridge.cfg.n_heads, "kv_head": bridge.cfg.n_key_value_heads}
    first = bridge.hook_dict[name].axes.split()[2]
    return difference.reshape([heads[first], -1] if first in heads else [-1]).to(bridge.cfg.device)
