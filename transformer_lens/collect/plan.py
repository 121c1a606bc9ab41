"""Which tokens go into which context, batch and shard: data and options alone decide, also when a job is resumed."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from transformer_lens.checks import in_words, nearest
from transformer_lens.collect.files import ABOUT_TOKENS
from transformer_lens.collect.sources import Encoder, Source, open_source
from transformer_lens.hook_points import HookedRootModule

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

TOGETHER = 32  # documents tokenised in one call


@dataclass(frozen=True)
class Cursor:
    """A position in the data: the next token to read."""

    document: int = 0
    offset: int = 0
    tokens: int = 0  # the number of tokens before it


@dataclass(frozen=True)
class Layout:
    """How tokens are laid out; the manifest records all of it."""

    context_size: int
    batch_size: int
    contexts_per_shard: int
    packing: bool
    pad: int
    bos: int | None
    drop_bos: bool
    drop_first: int
    max_tokens: int | None


CONTEXT_SIZE = 1024


@dataclass(frozen=True)
class Options:
    """How `collect` reads, filters and stores; documented there."""

    context_size: int | None = None
    batch_size: int = 8
    shard_tokens: int = 65536
    packing: bool = True
    prepend_bos: bool | None = None
    append_eos: bool = False
    drop_bos: bool = False
    drop_first: int = 0
    max_tokens: int | None = None
    dtype: torch.dtype | None = None
    text_key: str = "text"
    shard: tuple[int, int] = (0, 1)
    check: bool = False
    same_environment: bool = True
    progress: bool = True
    compiled: bool = False

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "shard_tokens": 1, "drop_first": 0, "max_tokens": 1, "context_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            optional = value is None and name in ("max_tokens", "context_size")
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise ValueError(f"{name}: got {value!r}, expected a whole number from {lowest} on")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"dtype: got {self.dtype!r}, expected a float dtype such as torch.bfloat16, or None")
        numbers = tuple(self.shard)
        if len(numbers) != 2 or not all(isinstance(n, int) for n in numbers) or not 0 <= numbers[0] < numbers[1]:
            raise ValueError(f"shard: got {self.shard!r}, expected (rank, world) with 0 <= rank < world")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Options from keywords. Raises `TypeError` for an unknown one, with the nearest known ones."""
        known = cls.__dataclass_fields__
        for name in given:
            if name not in known:
                raise TypeError(f"collect has no option {name!r}; the nearest is {nearest(name, known, most=1)}")
        return cls(**given)

    def frame(self, bridge: "TransformerBridge") -> tuple[int | None, int | None]:
        """What stands before and after each text: BOS, EOS or nothing. Raises `ValueError` for one the model lacks."""
        bos, eos, _ = special_tokens(bridge)
        by_default = bool(bridge.cfg.default_prepend_bos) and bos is not None
        wanted = by_default if self.prepend_bos is None else self.prepend_bos
        if wanted and bos is None:
            raise ValueError("prepend_bos: this bridge knows no beginning-of-sequence token; pass prepend_bos=False")
        if self.append_eos and eos is None:
            raise ValueError("append_eos: this bridge knows no end-of-sequence token; pass append_eos=False")
        if self.drop_bos and bos is None:
            raise ValueError("drop_bos: this bridge knows no beginning-of-sequence token; pass drop_first=1")
        return bos if wanted else None, eos if self.append_eos else None

    def layout(self, bridge: "TransformerBridge") -> Layout:
        """The layout of contexts and shards. Raises `ValueError` for contexts the model cannot take."""
        longest = bridge.cfg.n_ctx
        context = min(longest, CONTEXT_SIZE) if self.context_size is None else self.context_size
        if context > longest:
            raise ValueError(f"context_size: got {context}, expected at most {longest}, the model's n_ctx")
        if self.drop_first >= context:
            given = f"{self.drop_first} of contexts of {context} tokens"
            raise ValueError(f"drop_first: got {given}, so none would be left")
        # Whole batches, so that the end of a shard changes no batch.
        batches = max(1, round(self.shard_tokens / (context * self.batch_size)))
        bos, _, pad = special_tokens(bridge)
        kept = {name: getattr(self, name) for name in ("batch_size", "packing", "drop_bos", "drop_first", "max_tokens")}
        return Layout(context, contexts_per_shard=batches * self.batch_size, pad=pad or 0, bos=bos, **kept)


def special_tokens(bridge: "TransformerBridge") -> tuple[int | None, int | None, int | None]:
    """BOS, EOS and padding, as far as the model has them."""
    adapter: Any = bridge.token_adapter
    return (None, None, None) if adapter is None else (adapter.bos, adapter.eos, adapter.pad)


class Reading(NamedTuple):
    """A data set as contexts of tokens."""

    source: Source
    encoder: Encoder
    layout: Layout

    @classmethod
    def of(
        cls, what: str, bridge: "TransformerBridge", data: Any, options: Options, drop_padding: bool = False
    ) -> Self:
        """Raises `ValueError` and `TypeError` for a model, data or options that do not go together."""
        if not isinstance(bridge, HookedRootModule):
            raise TypeError(f"bridge: got {in_words(bridge)}, expected a TransformerBridge")
        if bridge.original_model.training:
            why = "the model is in training mode, where dropout is random"
            raise ValueError(f"{what}: {why}; call bridge.eval() first")
        source = open_source(data)
        *ends, pad = special_tokens(bridge)
        cut = pad if drop_padding and pad not in ends else None
        encoder = Encoder(bridge.tokenizer, options.text_key, *options.frame(bridge), bridge.cfg.d_vocab, cut)
        return cls(source, encoder, options.layout(bridge))

    def tokens(self, document: int) -> "TokenStream":
        """The data from a document on."""
        return TokenStream(self.source, self.encoder, document)


class TokenStream:
    """The documents of a source as token ids, read forwards, a few at a time."""

    def __init__(self, source: Source, encoder: Encoder, start: int) -> None:
        self._encoder = encoder
        self._documents: Iterator[tuple[int, object]] = enumerate(source.read(start), start)
        self._held: deque[tuple[int, np.ndarray]] = deque()

    def at(self, document: int) -> tuple[int, np.ndarray] | None:
        """The first document from this number on with any tokens, or `None` at the end."""
        while True:
            while self._held and (self._held[0][0] < document or not len(self._held[0][1])):
                self._held.popleft()
            if self._held:
                return self._held[0]
            # Skipped documents are not tokenised.
            wanted = (pair for pair in self._documents if pair[0] >= document)
            some = list(islice(wanted, TOGETHER))
            if not some:
                return None
            self._held.extend(self._encoder.encode(some))


class Batch(NamedTuple):
    """Some contexts, padded on the right to the longest, and a mask of the stored positions."""

    ids: np.ndarray
    keep: np.ndarray
    tokens: int  # the number of tokens, padding excluded


@dataclass(frozen=True)
class ShardPlan:
    """The contexts of one shard: arrays of [context, pos]."""

    number: int
    begin: Cursor
    end: Cursor
    last: bool
    ids: np.ndarray
    documents: np.ndarray
    document_positions: np.ndarray
    lengths: np.ndarray
    keep: np.ndarray
    first_context: int

    def batches(self, size: int) -> Iterator[Batch]:
        """The batches in which the model reads the contexts."""
        for start in range(0, len(self.ids), size):
            rows = slice(start, start + size)
            longest = int(self.lengths[rows].max())
            tokens = int(self.lengths[rows].sum())
            yield Batch(self.ids[rows, :longest], self.keep[rows, :longest], tokens)

    def columns(self) -> dict[str, torch.Tensor]:
        """The columns stored about each kept token, in addition to its activations."""
        contexts, positions = np.broadcast_arrays(np.arange(len(self.ids))[:, None], np.arange(self.ids.shape[1]))
        values = contexts + self.first_context, self.documents, self.ids, positions, self.document_positions
        return {
            name: torch.from_numpy(value[self.keep]).to(column.dtype)
            for (name, column), value in zip(ABOUT_TOKENS.items(), values, strict=True)
        }

    def digest(self) -> str:
        """A checksum of the data read, by which a later run recognises it."""
        found = sha256()
        for array in (self.ids, self.documents, self.document_positions, self.lengths):
            found.update(np.ascontiguousarray(array, np.int64).tobytes())
        return found.hexdigest()


def plan_shard(stream: TokenStream, number: int, begin: Cursor, layout: Layout) -> ShardPlan | None:
    """The shard that begins at a cursor, or `None` if the data end there."""
    shape = (layout.contexts_per_shard, layout.context_size)
    ids = np.full(shape, layout.pad, np.int64)
    documents, document_positions = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    lengths = np.zeros(shape[0], np.int64)
    cursor, rows = begin, 0
    while rows < shape[0] and (found := _next(stream, cursor, layout)):
        document, offset, rest = found
        piece = rest[: layout.context_size - lengths[rows]]
        place = slice(lengths[rows], lengths[rows] + len(piece))
        ids[rows, place] = piece
        documents[rows, place] = document
        document_positions[rows, place] = np.arange(offset, offset + len(piece))
        lengths[rows] += len(piece)
        cursor = Cursor(document, offset + len(piece), cursor.tokens + len(piece))
        if not layout.packing or lengths[rows] == layout.context_size:
            rows += 1
    rows = int(np.count_nonzero(lengths))  # the last one may not be full
    if not rows:
        return None
    keep = np.arange(shape[1]) < lengths[:rows, None]
    keep &= np.arange(shape[1]) >= layout.drop_first
    if layout.drop_bos:
        keep &= ids[:rows] != layout.bos
    last, first_context = _next(stream, cursor, layout) is None, number * layout.contexts_per_shard
    read = ids[:rows], documents[:rows], document_positions[:rows], lengths[:rows]
    return ShardPlan(number, begin, cursor, last, *read, keep, first_context)


def _next(stream: TokenStream, cursor: Cursor, layout: Layout) -> tuple[int, int, np.ndarray] | None:
    """The document at a cursor, or the next one: its number, the position in it, and its tokens from there."""
    left = None if layout.max_tokens is None else layout.max_tokens - cursor.tokens
    if left == 0:
        return None
    found, offset = stream.at(cursor.document), 0
    if found is not None and found[0] == cursor.document:
        offset = cursor.offset
        if offset >= len(found[1]):  # at its end, or behind it where the data changed
            found, offset = stream.at(cursor.document + 1), 0
    return None if found is None else (found[0], offset, found[1][offset:][:left])
