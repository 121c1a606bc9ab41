"""Text to tokens and back, with BOS and padding as the caller asks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transformer_lens.checks import one_of
from transformer_lens.model_bridge.calls.padding import SIDES, not_padding
from transformer_lens.model_bridge.upstream import TOKENS, Word

BEFORE = ("\n", "a", ".")
"""Texts that stand for what comes before; the first that does not merge with what follows is used."""
UNFINISHED = "\ufffd"
"""What decoding shows for a character of which some bytes are still to come."""
CHARACTER = 4
"""The most bytes, and so the most tokens, of a character."""
Token = TypeVar("Token", int, str)
Messages = Sequence[Mapping[str, Any]]
"""A conversation for the tokenizer's chat template: `{"role": ..., "content": ...}` for each message."""
Texts = str | Sequence[str] | Messages | Sequence[Messages]
"""A text, several, a conversation, or several conversations."""


@dataclass(frozen=True)
class Reading:
    """An input as a tensor for the model."""

    word: Word
    """Which argument of the model it is."""
    value: Tensor
    """Token ids [batch, pos], or embeddings [batch, pos, d_model]."""
    seen: Bool[Tensor, "batch pos"] | None
    """Which positions are not padding; `None` if none is known to be."""
    texts: list[str] | None = None
    """The texts it came from, if any: conversations as their template writes them."""
    several: bool = False
    """Whether they were a list."""

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """`seen`, written out."""
        if self.seen is None:
            return torch.ones(self.value.shape[:2], dtype=torch.bool, device=self.value.device)
        return self.seen.to(self.value.device)


class TokenAdapter:
    """A Hugging Face tokenizer, unchanged, with the special tokens of the model's config.

    Everything is read when needed, so later settings of the tokenizer, the model or `owner.cfg` apply. `owner` is the
    bridge.
    """

    def __init__(self, tokenizer: Any, owner: Any) -> None:
        self.tokenizer = tokenizer
        self.owner = owner
        self.said_cut = False

    bos = property(lambda adapter: adapter._special("bos_token_id"))
    eos = property(lambda adapter: adapter._special("eos_token_id"))

    @property
    def pad(self) -> int | None:
        """The padding token, or where there is none EOS, or BOS."""
        named = (self.tokenizer.pad_token_id, self.eos, self.bos)
        return next((int(token) for token in named if token is not None), None)

    def _special(self, name: str) -> int | None:
        own = getattr(self.tokenizer, name)
        if own is not None:
            return int(own)
        declared = getattr(self.owner.original_model.config, name, None)
        declared = declared[0] if isinstance(declared, list) else declared
        # Published configs declare numbers that are ordinary words of another tokenizer.
        return declared if declared in special_tokens(self.tokenizer) else None

    def side(self, padding_side: str | None) -> str:
        side = self.tokenizer.padding_side if padding_side is None else padding_side
        one_of("padding_side", side, SIDES)
        return str(side)

    def encode(
        self,
        input: Texts,
        *,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        truncate: bool = True,
        after: bool = False,
    ) -> Reading:
        """Tokens of several texts, padded to the longest; arguments as in `rows`."""
        side = self.side(padding_side)
        rows, texts, several = self.rows(input, prepend_bos=prepend_bos, truncate=truncate, after=after)
        lengths = {len(row) for row in rows}
        if lengths == {0}:
            raise ValueError("texts: they hold no tokens; pass some text, or prepend_bos=True")
        if self.pad is None and len(lengths) > 1:
            raise ValueError("texts of different lengths need padding, and the tokenizer has no pad, eos or bos token")
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=self.pad or 0, padding_side=side)
        mask = pad_sequence([torch.ones_like(row).bool() for row in tensors], batch_first=True, padding_side=side)
        return Reading(TOKENS, ids, mask, texts, several)

    def rows(
        self, input: Texts, *, prepend_bos: bool | None = None, truncate: bool = True, after: bool = False
    ) -> tuple[list[list[int]], list[str], bool]:
        """The tokens of each text, not padded; the texts, as templates write conversations; whether they are several.

        A text that begins with BOS gets no other, and `prepend_bos=None` adds none to conversations. `after`: the texts
        continue others, so by default nothing is put in front of them.
        """
        texts, chat, several = self._texts(input)
        bos = self.bos
        if not isinstance(prepend_bos, (bool, type(None))):
            raise TypeError(f"prepend_bos: got {prepend_bos!r}, expected True, False or None")
        if prepend_bos and bos is None:
            raise ValueError(
                "prepend_bos: neither the tokenizer nor the model's config names a beginning-of-sequence token; "
                "pass prepend_bos=False"
            )
        if prepend_bos is None:
            prepend_bos = bool(self.owner.cfg.default_prepend_bos) and bos is not None and not (chat or after)
        read = ids_after if after and not prepend_bos else ids_of
        rows = [read(self.tokenizer, text) for text in texts]
        if prepend_bos and bos is not None:
            rows = [row if row[:1] == [bos] else [bos, *row] for row in rows]
        most = max((max(row, default=0) for row in rows), default=0)
        if most >= self.owner.cfg.d_vocab:
            raise ValueError(
                f"texts: the tokenizer makes token {most} of them, and the model has {self.owner.cfg.d_vocab} tokens; "
                "take the model's own tokenizer, or resize the model's embeddings"
            )
        return self.cut(rows) if truncate else rows, texts, several

    def _texts(self, input: Texts) -> tuple[list[str], bool, bool]:
        """The texts, whether a chat template wrote them, and whether they were a list."""
        check_text(input)
        if isinstance(input, str):
            return [input], False, False
        given: list[Any] = list(input)
        if not given:
            raise ValueError("texts: got an empty list, expected at least one string")
        if isinstance(given[0], Mapping):
            return [chat_text(self.tokenizer, given)], True, False
        if isinstance(given[0], (list, tuple)):
            return [chat_text(self.tokenizer, messages) for messages in given], True, True
        for text in given:
            if not isinstance(text, str):
                raise TypeError(f"texts: got {type(text).__name__} in the list, expected strings")
        return given, False, True

    def cut(self, rows: list[list[Token]]) -> list[list[Token]]:
        """The first `cfg.n_ctx` tokens of each; warns the first time that a text is cut."""
        most, longest = self.owner.cfg.n_ctx, max(map(len, rows))
        if longest > most and not self.said_cut:
            self.said_cut = True
            warnings.warn(
                f"text is cut to its first {most} tokens, cfg.n_ctx, of {longest}; for all of it pass "
                "bridge.to_tokens(text, truncate=False). This is said once",
                stacklevel=2,
            )
        return [row[:most] for row in rows]

    def mask_of(self, ids: Int[Tensor, "batch pos"], sides: Sequence[str]) -> Bool[Tensor, "batch pos"] | None:
        """Which ids are not padding, as `not_padding` judges; `None` where none can be."""
        pad, own = self.pad, self.tokenizer.pad_token_id
        in_texts = own is None or own in (self.bos, self.eos)
        if pad is None or (in_texts and len(ids) == 1) or not bool((ids[:, [0, -1]] == pad).any()):
            return None
        return not_padding(ids, pad, in_texts, sides)

    def known(self, ids: Sequence[int]) -> list[int]:
        """The ids themselves. Raises `ValueError` for one that neither the tokenizer nor the model has."""
        end = max(len(self.tokenizer), self.owner.cfg.d_vocab)
        for token in ids:
            if not 0 <= token < end:
                raise ValueError(f"tokens: got {token}, expected 0 to {end - 1}")
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return decoded(self.tokenizer, self.known(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return token_texts(self.tokenizer, self.known(ids))


def check_text(input: Any) -> None:
    """Raise `TypeError` for what is neither texts nor messages."""
    if isinstance(input, (Mapping, Tensor, np.ndarray, bytes)) or not isinstance(input, Iterable):
        raise TypeError(
            f"input: got {type(input).__name__}, expected a string, a list of strings, token ids or embeddings"
        )


# At its beginning and in its middle, a text's tokens differ where a tokenizer adds a space in front, as LLaMA's does.


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text from its beginning, without special tokens that are not in it."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def ids_after(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that follows another."""
    for before in BEFORE:
        head, whole = ids_of(tokenizer, before), ids_of(tokenizer, before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return ids_of(tokenizer, text)


def single_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is one token after another text. Raises `ValueError` if it is several, or none."""
    ids = ids_after(tokenizer, text)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens, {token_texts(tokenizer, ids)}, expected one")
    return ids[0]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token by its id: those with a role, such as BOS, and those only marked as special."""
    added = tokenizer.added_tokens_decoder  # where mistral-common reads the text, a method that only refuses
    marked = {int(i): str(token) for i, token in added.items() if token.special} if isinstance(added, Mapping) else {}
    return marked | dict(zip(map(int, tokenizer.all_special_ids), tokenizer.all_special_tokens, strict=True))


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The tokenizer's own text of token ids, special tokens included."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class TextReader:
    """The text that each token adds, one after the other, in the middle of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        self._before = ids_of(tokenizer, "a")[-1:]
        self._known = len(decoded(tokenizer, self._before))
        self._unfinished_written = ids_after(tokenizer, UNFINISHED)
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """What this token adds; a character comes with its last token, and its other tokens add nothing."""
        if token in self.special:
            return self.rest() + self.special[token]
        self._held.append(token)
        text = self._text()
        waits = text.endswith(UNFINISHED) and self._held[-len(self._unfinished_written) :] != self._unfinished_written
        if waits and len(self._held) < CHARACTER:
            return ""
        self._held.clear()
        return text

    def rest(self) -> str:
        """The rest of a character that never became whole."""
        text = self._text() if self._held else ""
        self._held.clear()
        return text

    def _text(self) -> str:
        return decoded(self.tokenizer, [*self._before, *self._held])[self._known :]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, in the middle of a text."""
    reader = TextReader(tokenizer)
    return [reader.add(token) + reader.rest() for token in ids]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each of these tokens adds, one after the other."""
    reader = TextReader(tokenizer)
    found = [reader.add(token) for token in ids]
    return [*found[:-1], found[-1] + reader.rest()] if found else []


def pieces_of(tokenizer: Any, text: str, ids: Sequence[int]) -> list[str]:
    """The text of each token of a text: joined, they are the text, without spaces of the tokenizer's own."""
    special = special_tokens(tokenizer)
    found: list[str] = []
    for written, group in groupby(zip(ids, pieces(tokenizer, ids), strict=True), lambda pair: pair[0] in special):
        segment = [piece for _, piece in group]
        whole = "".join(segment)
        if not written and whole.startswith(" ") and not text.startswith(whole) and text.startswith(whole[1:]):
            first = next(place for place, piece in enumerate(segment) if piece)
            segment[first], whole = segment[first][1:], whole[1:]
        text = text.removeprefix(whole)
        found += segment
    return found


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as the tokenizer's chat template writes them; after a user's, the beginning of the answer."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError(
            "messages: this tokenizer has no chat template; set bridge.tokenizer.chat_template, or pass their text"
        )
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages: got {messages!r}, expected a list of one message or more")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"messages: number {number} is {message!r}, expected {{'role': 'user', 'content': '...'}} and its like"
            )
    answered = messages[-1]["role"] == "assistant"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered))
    except TemplateError as error:
        raise ValueError(f"messages: the tokenizer's chat template refuses them: {error}") from error
