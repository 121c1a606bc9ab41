"""What a tokenizer makes of a text, and what each token says, at the beginning of a text and in the middle of one.

The two differ where a tokenizer puts a space in front of whatever it is given, as LLaMA's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

BEFORE = ("\n", "a", ".")
"""Texts that stand in for what comes before; the first that does not run together with what follows is taken."""
UNFINISHED = "\ufffd"
"""What decoding shows for a character of which some bytes are still to come."""
CHARACTER = 4
"""A character has at most so many bytes, so at most so many tokens."""


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text from its beginning, without special tokens that are not written in it."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def ids_after(tokenizer: Any, text: str) -> list[int]:
    """The token ids that a text adds where it follows another."""
    for before in BEFORE:
        head, whole = ids_of(tokenizer, before), ids_of(tokenizer, before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return ids_of(tokenizer, text)


def single_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is one token where it follows another. Raises `ValueError` if it is several, or none."""
    ids = ids_after(tokenizer, text)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens, {token_texts(tokenizer, ids)}, expected one")
    return ids[0]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token by its id: those with a role, such as BOS, and those that are only marked as special."""
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
        """What this token adds; a character comes with its last token, and the others before it add nothing."""
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
        """What is left of a character that never became whole."""
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
    """What each of the tokens adds to a text that they go on with, one after the other."""
    reader = TextReader(tokenizer)
    found = [reader.add(token) for token in ids]
    return [*found[:-1], found[-1] + reader.rest()] if found else []


def pieces_of(tokenizer: Any, text: str, ids: Sequence[int]) -> list[str]:
    """The text of each of a text's tokens: joined, they are the text, without the spaces of the tokenizer's own."""
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
    """What the tokenizer's chat template makes of messages; behind a user's, the beginning of the answer.

    Raises `ValueError` without a template, and for messages it refuses.
    """
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
