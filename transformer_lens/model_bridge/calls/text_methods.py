"""The text side of `TransformerBridge`: text to tokens and back, and which token a caller means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from transformer_lens.checks import in_words, is_several, one_of
from transformer_lens.model_bridge.calls.padding import keep_mask
from transformer_lens.model_bridge.calls.tokens import (
    Texts,
    TokenAdapter,
    ids_after,
    ids_of,
    pieces_of,
    single_token,
    special_tokens,
)

Ids = Sequence[int] | np.ndarray | Int[Tensor, "..."]


class TokenMethods:
    cfg: Any
    _token_adapter: TokenAdapter | None

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or `None`; it may be replaced at any time. Raises `TypeError` for anything else.

        >>> bridge.tokenizer.padding_side = "left"
        """
        return None if self._token_adapter is None else self._token_adapter.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"tokenizer: got {type(tokenizer).__name__}, expected one of transformers' tokenizers "
                "(AutoTokenizer.from_pretrained(...), PreTrainedTokenizerFast(tokenizer_object=...)) or None"
            )
        self._token_adapter = None if tokenizer is None else TokenAdapter(tokenizer, self)
        self._name_tokenizer()

    def _name_tokenizer(self) -> None:
        if "cfg" in self.__dict__:
            self.cfg.tokenizer_name = None if self.tokenizer is None else str(self.tokenizer.name_or_path) or None

    @property
    def token_adapter(self) -> TokenAdapter | None:
        """The tokenizer with the model's special tokens; `None` without a tokenizer."""
        return self._token_adapter

    def _tokens(self) -> TokenAdapter:
        adapter = self.token_adapter
        if adapter is None:
            raise ValueError(
                "this bridge has no tokenizer, so it takes token ids and not text; "
                "pass one: TransformerBridge(model, tokenizer=...)"
            )
        return adapter

    def input_device(self) -> torch.device:
        """The device of the token ids."""
        raise NotImplementedError

    def to_tokens(
        self,
        input: Texts,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of a text or several, padded to the longest.

        >>> bridge.to_tokens([" Mary", " Mary and John"]).shape
        torch.Size([2, 4])

        `prepend_bos=None` prepends BOS where the model has one (`cfg.default_prepend_bos`), `padding_side=None` pads
        where the tokenizer does, and `truncate` keeps the first `cfg.n_ctx` tokens of each, with a warning the first
        time that cuts a text. A text that begins with BOS, as from a chat template, gets no second one. A list of
        messages, `[{"role": "user", "content": "..."}]`, goes through the tokenizer's chat template, with the beginning
        of an answer after a user's message.

        The padding of this tensor is known as long as nobody writes to it (else it is judged by the pad token;
        `input_and_mask` gives the mask itself). Raises `ValueError` without a tokenizer or a chat template, and for a
        token that the model does not have.
        """
        read = self._tokens().encode(input, prepend_bos=prepend_bos, padding_side=padding_side, truncate=truncate)
        return keep_mask(read.value.to(self.input_device()) if move_to_device else read.value, read.mask)

    def to_string(self, tokens: int | Ids | Sequence[Ids]) -> str | list[str]:
        """Text of token ids: one string for a sequence, a list of strings for a batch or a list of sequences.

        >>> bridge.to_string(bridge.to_tokens("Mary and John", prepend_bos=False))
        ['Mary and John']

        A sequence is decoded as by `tokenizer.decode`, special tokens included; a single number as by
        `to_single_str_token`. Raises `ValueError` for an unknown token.
        """
        if isinstance(tokens, (list, tuple)) and any(is_several(each) for each in tokens):
            return [self._tokens().decode(one_sequence("to_string", row)) for row in tokens]
        ids = as_ids("to_string", tokens)
        if ids.ndim == 0:
            return self.to_single_str_token(int(ids))
        if ids.ndim > 2:
            raise ValueError(f"to_string: got token ids of shape {list(ids.shape)}, expected one or two axes")
        if ids.ndim == 1:
            return self._tokens().decode(ids.tolist())
        return [self._tokens().decode(row) for row in ids.tolist()]

    def to_str_tokens(
        self, input: Texts | Ids, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """The text of each token: a list of strings, or one such list per text of a list.

        >>> bridge.to_str_tokens(" Mary and John", prepend_bos=False)
        [' Mary', ' and', ' John']

        The pieces of a text join to the text (after its BOS), as far as the tokenizer keeps it; a character of several
        tokens comes with the last of them, and the others are empty. Token ids show their text in the middle of a text:
        a LLaMA token has its space also in first place.
        """
        adapter, given = self._tokens(), cast(Any, input)
        adapter.side(padding_side)  # rows stand alone here, and have no padding
        if not _is_text(given):
            return adapter.pieces(one_sequence("to_str_tokens", given))
        rows, texts, several = adapter.rows(given, prepend_bos=prepend_bos, truncate=False)
        both = zip(texts, rows, strict=True)
        pieces = adapter.cut([pieces_of(adapter.tokenizer, text, row) for text, row in both])
        return pieces if several else pieces[0]

    def to_answer_tokens(self, text: str) -> list[int]:
        """The ids of a text in the middle of another, such as an answer after a prompt.

        >>> bridge.to_str_tokens(bridge.to_answer_tokens(" Mary and"))
        [' Mary', ' and']

        No space is added in front, as tokenizers like LLaMA's do for a text on its own. Raises `TypeError` for anything
        but a string and `ValueError` for a text without tokens.
        """
        if not isinstance(text, str):
            raise TypeError(f"got {type(text).__name__}, expected the text of a token, such as ' Mary'")
        ids = ids_after(self._tokens().tokenizer, text)
        if not ids:
            raise ValueError(f"{text!r} holds no token")
        return ids

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token in the middle of a text; raises `ValueError` if it is several.

        >>> bridge.to_string(bridge.to_single_token(" Mary"))
        ' Mary'
        """
        self.to_answer_tokens(string)
        return single_token(self._tokens().tokenizer, string)

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token in the middle of a text; raises `ValueError` for an unknown token.

        >>> bridge.to_single_str_token(bridge.to_single_token(" Mary"))
        ' Mary'
        """
        ids = as_ids("to_single_str_token", int_token)
        if ids.numel() != 1:
            raise ValueError(f"to_single_str_token: got {ids.numel()} token ids, expected one")
        return self._tokens().pieces([int(ids)])[0]

    def token_ids(self, tokens: str | int | Sequence[str | int] | Ids, what: str = "tokens") -> Int[Tensor, ...]:
        """Ids of answer tokens, each given by its id, or by a text that is one token.

        >>> bridge.to_str_tokens(bridge.token_ids([" Mary", " John"]))
        [' Mary', ' John']

        A tensor of ids keeps its shape. Raises `ValueError` for a text of several tokens and for an id outside the
        vocabulary, with `what` in front.
        """
        given: Any = tokens
        if isinstance(given, str):
            given = self.to_single_token(given)
        elif isinstance(given, (list, tuple)):
            given = [self.to_single_token(token) if isinstance(token, str) else token for token in given]
        ids, size = as_ids(what, given), self.cfg.d_vocab_out
        outside = ids[(ids < 0) | (ids >= size)]
        if outside.numel():
            raise ValueError(f"{what}: got token {int(outside[0])}, expected 0 to {size - 1}")
        return ids

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Ids,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> int:
        """The position of a token in a text or in token ids; `mode` is "first" or "last".

        >>> bridge.get_token_position(" John", " Mary and John", prepend_bos=False)
        2

        A text is the token that it is in the middle of a text, or at the beginning of `input` the one it is there.
        Raises `ValueError` if it does not occur.
        """
        one_of("mode", mode, ("first", "last"))
        if padding_side is not None:  # one row has no padding
            one_of("padding_side", padding_side, ("left", "right"))
        if isinstance(input, str):
            ids = self._tokens().rows(input, prepend_bos=prepend_bos)[0][0]
        else:
            ids = one_sequence("get_token_position", input)
        places = self._places(single_token, ids)
        if not places:
            text = input if isinstance(input, str) else ids
            shown = ids if self.token_adapter is None else self.to_str_tokens(text, prepend_bos)
            raise ValueError(f"token {single_token!r} does not occur in {shown}")
        return places[0 if mode == "first" else -1]

    def _places(self, token: str | int, ids: list[int]) -> list[int]:
        """The positions of a token among others; a text's token may differ at the very beginning."""
        if not isinstance(token, str):
            wanted = as_ids("single_token", token)
            if wanted.numel() != 1:
                raise ValueError(f"single_token: got {wanted.numel()} token ids, expected one")
            return [place for place, found in enumerate(ids) if found == int(wanted)]
        tokenizer = self._tokens().tokenizer
        special, inside = special_tokens(tokenizer), self.to_answer_tokens(token)
        begin = next((place for place, found in enumerate(ids) if found not in special), 0)
        in_front = ids[begin : begin + 1] == ids_of(tokenizer, token)
        places = [place for place, found in enumerate(ids) if [found] == inside or (in_front and place == begin)]
        if not places:
            single_token(tokenizer, token)
        return places


def as_ids(what: str, given: Any) -> Int[Tensor, ...]:
    """Token ids as a tensor, on the CPU. Raises `TypeError` for other things and `ValueError` for uneven rows."""
    try:
        array = np.asarray(_plain(given))
    except ValueError:
        raise ValueError(f"{what}: got rows of different lengths, expected token ids of one length") from None
    except (TypeError, RuntimeError):  # a sparse tensor, or one on "meta"
        raise TypeError(f"{what}: got {in_words(given)}, expected token ids") from None
    if array.dtype.kind not in "iu" and array.size:
        got = f"a list of {type(given[0]).__name__}" if isinstance(given, (list, tuple)) else type(given).__name__
        got = getattr(given, "dtype", got)
        raise TypeError(f"{what}: got {got}, expected token ids")
    return torch.from_numpy(array.astype(np.int64))


def one_sequence(what: str, given: Any) -> list[int]:
    """The ids of one text, also with a batch axis of one."""
    ids = as_ids(what, given)
    row = ids.squeeze(0) if ids.ndim == 2 else ids
    if row.ndim != 1:
        raise ValueError(f"{what}: got token ids of shape {list(ids.shape)}, expected one sequence")
    return row.tolist()


def _plain(given: Any) -> Any:
    """The same without tensors."""
    if isinstance(given, Tensor):
        return given.detach().float().cpu().numpy() if given.dtype == torch.bfloat16 else given.detach().cpu().numpy()
    return [_plain(each) for each in given] if isinstance(given, (list, tuple)) else given


def _is_text(input: Any) -> bool:
    while isinstance(input, (list, tuple)) and input:
        input = input[0]
    return isinstance(input, (str, Mapping))
