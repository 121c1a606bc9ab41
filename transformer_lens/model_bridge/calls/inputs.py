"""A call of the bridge as a call of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens.checks import a_tensor
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.calls.padding import (
    Columns,
    cached_length,
    checked_mask,
    columns_of_call,
    keep_mask,
    kept_mask,
    needs_mask,
    remember,
)
from transformer_lens.model_bridge.calls.text_methods import TokenMethods
from transformer_lens.model_bridge.calls.tokens import Reading, Texts, check_text
from transformer_lens.model_bridge.upstream import (
    CACHE,
    EMBEDDINGS,
    MASK,
    POSITIONS,
    TOKENS,
    Arguments,
    Word,
    attribute,
)

ModelInput = Texts | Tensor
RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Tensor
    loss: Tensor


def main_output(output: Any) -> Tensor:
    """The logits; the start and end logits of question answering side by side; or the final stream."""
    if "logits" in output:
        return output.logits  # type: ignore[no-any-return]
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return attribute(output, "last_hidden_state")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Call:
    """Keyword arguments for the Hugging Face model, and what loss and KV cache need to know."""

    kwargs: dict[str, Any]
    tokens: Int[Tensor, "batch pos"] | None
    columns: Columns | None
    """`None` where no cached or new position is padding."""
    cache: Any

    @property
    def loss_mask(self) -> Bool[Tensor, "batch pos"] | None:
        """Which tokens the loss counts."""
        return None if self.columns is None or self.tokens is None else self.columns.mask[:, -self.tokens.shape[1] :]

    def done(self) -> None:
        """After the run: tell the KV cache which of its positions are padding."""
        remember(self.cache, self.columns)


def batched_ids(ids: Int[Tensor, "batch pos"], d_vocab: int) -> Int[Tensor, "batch pos"]:
    """Token ids with a batch axis; raises `ValueError` for another shape, for booleans and for invalid ids.

    Ids on a GPU are not checked, which would wait for it, nor are those that `torch.compile` traces.
    """
    batched = ids[None] if ids.ndim == 1 else ids
    if batched.ndim != 2 or ids.dtype == torch.bool or ids.is_complex() or 0 in batched.shape:
        raise ValueError(
            f"input: got a {ids.dtype} tensor of shape {list(ids.shape)}, expected token ids [batch, pos] "
            "with at least one row and one position"
        )
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = (int(end) for end in ids.aminmax())
        if least < 0 or most >= d_vocab:
            raise ValueError(f"input: got token {least if least < 0 else most}, expected 0 to {d_vocab - 1}")
    return batched


class InputAndMask(NamedTuple):
    """An input as a batch, and which of its positions are padding."""

    input: Tensor
    """Token ids on the CPU, or embeddings."""
    mask: Bool[Tensor, "batch pos"]
    """False at padding. On the CPU."""
    attention_mask: Int[Tensor, "batch pos"] | None
    """The mask that a run of `input` needs; `None` where it makes no difference."""


class InputMethods(TokenMethods):
    """How a bridge reads its input."""

    arguments: Arguments
    adapter: ArchitectureAdapter

    def input_and_mask(
        self,
        input: ModelInput,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
    ) -> InputAndMask:
        """An input as a batch, and which of its positions are padding, as `forward` takes them.

        >>> ids, mask, _ = bridge.input_and_mask(["Mary", "Mary and John"], padding_side="left")
        >>> mask.sum(-1), ids.shape
        (tensor([3, 5]), torch.Size([2, 5]))

        For texts and for ids from `to_tokens` this is known. Other ids are judged by the pad token: one that occurs in
        no text is padding at either end of a row. One that is also BOS or EOS, or stands in for a missing pad token, is
        padding at `padding_side` (`None`: the tokenizer's) as far as a row has more of it than the row with fewest, so
        a single row has none. A given `attention_mask` always wins.
        """
        reading = self._read(input, prepend_bos, padding_side)
        value, mask = reading.value, reading.mask.to("cpu", copy=True)
        if attention_mask is not None:
            mask = checked_mask(attention_mask, len(value), value.shape[1], mask.device)
        if reading.word is TOKENS and attention_mask is None and value is not input:
            value = keep_mask(value.cpu(), mask)
        elif reading.word is TOKENS:
            value = value.cpu()
        return InputAndMask(value, mask, mask.long() if attention_mask is not None or needs_mask(mask) else None)

    def _read(
        self,
        input: ModelInput,
        prepend_bos: bool | None,
        side: str | None,
        *,
        sides: Sequence[str] = (),
        truncate: bool = True,
        after: bool = False,
        what: str = "input",
    ) -> Reading:
        """Text, ids or embeddings, and which of their positions are padding.

        Texts are padded at `side` (`None`: the tokenizer's); a pad token that occurs in texts counts as padding at
        `sides`. `after`: they continue texts that were read before.
        """
        adapter = self.token_adapter
        if isinstance(input, Tensor) and not (input.is_meta and self.input_device().type == "meta"):
            a_tensor(what, input)
        if isinstance(input, Tensor) and input.is_floating_point():
            embeddings, d_model = input[None] if input.ndim == 2 else input, self.cfg.d_model
            if embeddings.ndim != 3 or embeddings.shape[-1] != d_model:
                raise ValueError(f"{what}: got shape {list(embeddings.shape)}, expected [batch, pos, {d_model}]")
            return Reading(EMBEDDINGS, embeddings, None)
        if isinstance(input, Tensor):
            ids, seen = batched_ids(input, self.cfg.d_vocab), kept_mask(input)
            if seen is None and adapter is not None:
                seen = adapter.mask_of(ids, sides or (adapter.side(side),))
            return Reading(TOKENS, ids, seen)
        check_text(input)
        if adapter is None:
            raise ValueError(
                "input: got text, and this bridge has no tokenizer; pass token ids, or one to "
                "TransformerBridge(model, tokenizer)"
            )
        return adapter.encode(input, prepend_bos=prepend_bos, padding_side=side, truncate=truncate, after=after)

    def _call(
        self,
        input: ModelInput,
        start_at_layer: int | None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Call:
        """Text, token ids or embeddings as the model's own arguments, with nothing added unless padding requires it."""
        what = "input" if start_at_layer is None else "start_at_layer takes the residual stream, and the input"
        if start_at_layer is not None and not (isinstance(input, Tensor) and input.is_floating_point()):
            got = f"a {input.dtype} Tensor" if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(
                f"start_at_layer={start_at_layer}: got {got}, expected the residual stream that "
                f"enters that layer, a float tensor [batch, pos, {self.cfg.d_model}]"
            )
        device = self.input_device()
        after = cached_length(past_key_values) > 0
        reading = self._read(input, prepend_bos, padding_side, what=what, after=after)
        rows, new = reading.value.shape[:2]
        columns = columns_of_call(
            rows, new, given=attention_mask, seen=reading.seen, cache=past_key_values, device=device
        )
        value = reading.value.to(device)
        kwargs: dict[Word, Any] = {reading.word: value}
        if columns is not None:
            if attention_mask is not None or needs_mask(columns.mask):
                kwargs[MASK] = columns.mask.long()
            positions = columns.positions(new)
            if positions is not None and self.adapter.takes_positions:
                kwargs[POSITIONS] = positions
        if past_key_values is not None:
            kwargs[CACHE] = past_key_values
        tokens = value if reading.word is TOKENS else None
        return Call(self.arguments.named(kwargs), tokens, columns, past_key_values)
