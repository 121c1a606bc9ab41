"""Text to tokens and back, with the beginning-of-sequence token and padding as the caller asks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens.model_bridge.padding import SIDES, PadToken, keep_mask


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of several texts, and which of them are not padding."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]


class TokenAdapter:
    """A Hugging Face tokenizer, left as it is, with the special tokens of the model's config behind it."""

    def __init__(self, tokenizer: Any, config: Any, n_ctx: int) -> None:
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.said_cut = False
        self.bos = self._special("bos_token_id", config)
        self.eos = self._special("eos_token_id", config)
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else self.eos if self.eos is not None else self.bos

    def _special(self, name: str, config: Any) -> int | None:
        own = getattr(self.tokenizer, name)
        if own is not None:
            return int(own)
        declared = getattr(config, name, None)
        declared = declared[0] if isinstance(declared, list) else declared
        return declared if declared is not None and declared < len(self.tokenizer) else None

    def side(self, padding_side: str | None) -> str:
        side = self.tokenizer.padding_side if padding_side is None else padding_side
        if side not in SIDES:
            raise ValueError(f"padding_side: got {side!r}, expected 'left' or 'right'")
        return str(side)

    def encode(
        self, texts: Sequence[str], *, prepend_bos: bool, padding_side: str | None = None, truncate: bool = True
    ) -> TokenBatch:
        """Tokens of several texts, padded to the longest."""
        side = self.side(padding_side)
        if not texts:
            raise ValueError("texts: got an empty list, expected at least one string")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"texts: got {type(text).__name__} in the list, expected strings")
        if prepend_bos and self.bos is None:
            raise ValueError(
                "prepend_bos: neither the tokenizer nor the model's config names a beginning-of-sequence token; "
                "pass prepend_bos=False"
            )
        start = [self.bos] if prepend_bos and self.bos is not None else []
        rows = [start + list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        longest = max(map(len, rows))
        if truncate and longest > self.n_ctx:
            self._say_cut(longest)
            rows, longest = [row[: self.n_ctx] for row in rows], self.n_ctx
        if not longest:
            raise ValueError("texts: they hold no tokens; pass some text, or prepend_bos=True")
        if self.pad is None and any(len(row) < longest for row in rows):
            raise ValueError("texts of different lengths need padding, and the tokenizer has no pad, eos or bos token")
        ids = torch.full((len(rows), longest), self.pad if self.pad is not None else 0)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if side == "left" else slice(len(row))
            ids[i, where] = torch.tensor(row, dtype=torch.long)
            mask[i, where] = True
        return TokenBatch(ids, mask)

    def _say_cut(self, longest: int) -> None:
        """Warn that text is cut, the first time it is."""
        if not self.said_cut:
            self.said_cut = True
            warnings.warn(
                f"text is cut to its first {self.n_ctx} tokens, cfg.n_ctx, of {longest}; for all of it pass "
                "bridge.to_tokens(text, truncate=False). This is said once",
                stacklevel=2,
            )

    @property
    def pad_token(self) -> PadToken | None:
        """What fills up rows; `None` where the tokenizer has no special token for that."""
        own = self.tokenizer.pad_token_id
        return None if self.pad is None else PadToken(self.pad, own is None or own in (self.bos, self.eos))

    def mask_of(self, ids: Int[Tensor, "batch pos"], sides: Sequence[str]) -> Bool[Tensor, "batch pos"] | None:
        """Which ids are not padding, as `PadToken` judges; `None` where none can be."""
        pad = self.pad_token
        if pad is None or (pad.in_texts and len(ids) == 1) or not bool((ids[:, [0, -1]] == pad.id).any()):
            return None
        return pad.mask(ids, sides)

    def decode(self, ids: Any) -> str:
        """Text of a sequence of token ids, special tokens included."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class TokenMethods:
    """The text side of `TransformerBridge`."""

    token_adapter: TokenAdapter | None
    tokenizer: Any
    cfg: Any

    def _tokens(self) -> TokenAdapter:
        if self.token_adapter is None:
            raise ValueError(
                "this bridge has no tokenizer, so it takes token ids and not text; "
                "pass one: TransformerBridge(model, tokenizer=...)"
            )
        return self.token_adapter

    def _prepends(self, prepend_bos: bool | None) -> bool:
        if prepend_bos is not None:
            return prepend_bos
        return bool(self.cfg.default_prepend_bos) and self._tokens().bos is not None

    def input_device(self) -> torch.device:
        """Where token ids go in."""
        raise NotImplementedError

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of a text or several, padded to the longest.

        >>> bridge.to_tokens([" Mary", " Mary and John"]).shape
        torch.Size([2, 4])

        `prepend_bos=None` prepends the beginning-of-sequence token where the model has one
        (`cfg.default_prepend_bos`), `padding_side=None` pads where the tokenizer does, and `truncate`
        keeps the first `cfg.n_ctx` tokens of each, with a warning the first time that cuts a text. The ids keep
        their mask: as long as this tensor is passed on and not written to, its padding is known (else it is judged
        by the pad token; `tokens_and_mask` gives the mask itself). Raises `ValueError` without a tokenizer.
        """
        texts = [input] if isinstance(input, str) else list(input)
        batch = self._tokens().encode(
            texts, prepend_bos=self._prepends(prepend_bos), padding_side=padding_side, truncate=truncate
        )
        return keep_mask(batch.ids.to(self.input_device()) if move_to_device else batch.ids, batch.mask)

    def to_string(
        self, tokens: int | Sequence[int] | Tensor | np.ndarray | Sequence[Tensor]
    ) -> str | list[str] | list[list[str]]:
        """Text of token ids: one string for a sequence, a list of strings for a batch.

        >>> bridge.to_string(bridge.to_tokens("Mary and John", prepend_bos=False))
        ['Mary and John']
        """
        ids = torch.as_tensor(tokens) if not isinstance(tokens, (list, tuple)) else torch.tensor(np.array(tokens))
        if ids.ndim <= 1:
            return self._tokens().decode(ids.reshape(-1))
        if ids.ndim == 2:
            return [self._tokens().decode(row) for row in ids]
        raise ValueError(f"to_string: got token ids of shape {list(ids.shape)}, expected one or two axes")

    def to_str_tokens(
        self,
        input: str | Sequence[str] | Tensor | np.ndarray | Sequence[int],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> list[str] | list[list[str]]:
        """The text of each token: a list of strings, or one such list for each text of a list.

        >>> bridge.to_str_tokens(" Mary and John", prepend_bos=False)
        [' Mary', ' and', ' John']
        """
        if isinstance(input, str):
            return self._pieces(self._first_row(input, prepend_bos))
        if isinstance(input, (list, tuple)) and input and isinstance(input[0], str):
            return [self._pieces(self._first_row(str(text), prepend_bos)) for text in input]
        ids = torch.as_tensor(np.asarray(input)) if not isinstance(input, Tensor) else input
        ids = ids.squeeze(0) if ids.ndim == 2 else ids
        if ids.ndim != 1:
            raise ValueError(f"to_str_tokens: got token ids of shape {list(ids.shape)}, expected one sequence")
        return self._pieces(ids)

    def _first_row(self, text: str, prepend_bos: bool | None) -> Tensor:
        return self._tokens().encode([text], prepend_bos=self._prepends(prepend_bos)).ids[0]

    def _pieces(self, ids: Tensor) -> list[str]:
        return [self._tokens().decode([token]) for token in ids.tolist()]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        >>> bridge.to_string(bridge.to_single_token(" Mary"))
        ' Mary'

        Raises `ValueError` if it is several.
        """
        ids = self._first_row(string, prepend_bos=False)
        if len(ids) != 1:
            raise ValueError(f"{string!r} is {len(ids)} tokens, {self._pieces(ids)}, expected one")
        return int(ids[0])

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Tensor,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """Where a token stands in a text or in token ids; `mode` is "first" or "last".

        >>> bridge.get_token_position(" John", " Mary and John", prepend_bos=False)
        2

        Raises `ValueError` if it does not occur.
        """
        if mode not in ("first", "last"):
            raise ValueError(f"mode: got {mode!r}, expected 'first' or 'last'")
        ids = self._first_row(input, prepend_bos) if isinstance(input, str) else input
        ids = ids.squeeze(0) if ids.ndim == 2 else ids
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        found = (ids == wanted).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"token {single_token!r} does not occur in {self._pieces(ids)}")
        return int(found[0 if mode == "first" else -1])
