"""What a call of the bridge becomes as a call of the model: the same one, wherever there is a choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from transformer_lens.model_bridge.tokens import TokenAdapter
from transformer_lens.model_bridge.upstream import (
    CACHE,
    EMBEDDINGS,
    MASK,
    POSITIONS,
    TOKENS,
    Arguments,
    Word,
)

ModelInput = str | Sequence[str] | Tensor


@dataclass(frozen=True)
class Call:
    """Keyword arguments for the Hugging Face model, and what the loss needs to know."""

    kwargs: dict[str, Any]
    tokens: Int[Tensor, "batch pos"] | None
    loss_mask: Int[Tensor, "batch pos"] | None


def positions_from_mask(mask: Shaped[Tensor, "batch total"], new: int) -> Int[Tensor, "batch new"]:
    """Positions counted from each row's first unmasked token, for the last `new` of them.

    >>> positions_from_mask(torch.tensor([[0, 0, 1, 1]]), new=4)
    tensor([[0, 0, 0, 1]])
    """
    positions = mask.long().cumsum(-1) - 1
    return positions.masked_fill(mask == 0, 0)[:, -new:]


def has_left_padding(mask: Shaped[Tensor, "batch total"]) -> bool:
    """Whether an unmasked token follows a masked one, so that positions are not simply counted."""
    return bool((mask[:, 1:] > mask[:, :-1]).any())


def batched_embeddings(
    embeddings: Float[Tensor, "batch pos d_model"], d_model: int, what: str
) -> Float[Tensor, "batch pos d_model"]:
    """Embeddings, or a residual stream, with a batch axis. Raises `ValueError` for another shape."""
    if embeddings.ndim == 2:
        embeddings = embeddings[None]
    if embeddings.ndim != 3 or embeddings.shape[-1] != d_model:
        raise ValueError(f"{what}: got shape {list(embeddings.shape)}, expected [batch, pos, {d_model}]")
    return embeddings


def prepare_call(
    input: ModelInput,
    *,
    arguments: Arguments,
    adapter: TokenAdapter | None,
    d_model: int,
    device: torch.device,
    prepend_bos: bool,
    padding_side: str | None,
    attention_mask: Tensor | None,
    past_key_values: Any,
    start_at_layer: int | None,
) -> Call:
    """Turn text, token ids or embeddings into the model's own arguments.

    Nothing is passed that the caller did not ask for or the padding does not require, so token ids
    without padding make the call `model(tokens)` makes.
    """
    tokens: Tensor | None = None
    loss_mask: Tensor | None = None
    kwargs: dict[Word, Any]
    if isinstance(input, Tensor) and input.is_floating_point():
        what = "input" if start_at_layer is None else "start_at_layer takes the residual stream, and the input"
        embeddings = batched_embeddings(input.to(device), d_model, what)
        kwargs = {EMBEDDINGS: embeddings}
        rows, new = embeddings.shape[:2]
    elif start_at_layer is not None:
        got = f"a {input.dtype} Tensor" if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(
            f"start_at_layer={start_at_layer}: got {got}, expected the residual stream that "
            f"enters that layer, a float tensor [batch, pos, {d_model}]"
        )
    else:
        tokens, loss_mask = _tokens(input, adapter, prepend_bos, padding_side)
        tokens = tokens.to(device)
        kwargs = {TOKENS: tokens}
        rows, new = tokens.shape
    mask = attention_mask if attention_mask is not None else loss_mask
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    if attention_mask is None and mask is not None and past:
        mask = torch.cat([mask.new_ones(rows, past), mask], dim=-1)
    if attention_mask is not None:
        if list(attention_mask.shape) != [rows, past + new]:
            raise ValueError(
                f"attention_mask: got shape {list(attention_mask.shape)}, expected {[rows, past + new]}: one row "
                "per text, one column per cached and new token"
            )
        loss_mask = attention_mask[:, -new:].to(device)
    if mask is not None:
        mask = mask.to(device)
        left = has_left_padding(mask)
        # Padding on the right changes nothing before it, so token ids keep the plain call.
        if attention_mask is not None or left or not isinstance(input, Tensor):
            kwargs[MASK] = mask
        if left:
            kwargs[POSITIONS] = positions_from_mask(mask, new)
    if past_key_values is not None:
        kwargs[CACHE] = past_key_values
    return Call(arguments.named(kwargs), tokens, None if loss_mask is None else loss_mask.to(device))


def _tokens(
    input: ModelInput, adapter: TokenAdapter | None, prepend_bos: bool, padding_side: str | None
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
    if isinstance(input, Tensor):
        ids = input[None] if input.ndim == 1 else input
        if ids.ndim != 2 or ids.dtype == torch.bool or 0 in ids.shape:
            raise ValueError(
                f"input: got a {input.dtype} tensor of shape {list(input.shape)}, expected token ids [batch, pos] "
                "with at least one row and one position"
            )
        if adapter is None:
            return ids, None
        mask = adapter.mask_of(ids, padding_side)
        return ids, None if bool(mask.all()) else mask
    texts = [input] if isinstance(input, str) else input
    if not isinstance(texts, Sequence):
        raise TypeError(
            f"input: got {type(input).__name__}, expected a string, a list of strings, token ids or embeddings"
        )
    if adapter is None:
        raise ValueError(
            "input: got text, and this bridge has no tokenizer; pass token ids, or one to "
            "TransformerBridge(model, tokenizer)"
        )
    batch = adapter.encode(texts, prepend_bos=prepend_bos, padding_side=padding_side)
    return batch.ids, batch.mask if batch.padded else None
