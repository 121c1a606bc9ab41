"""Which positions of a batch are padding, for texts, ids, masks and KV caches alike.

Padding is no token: it counts in no loss or statistic and has no position. A zero inside a text in a given mask hides a
token, which keeps its position. A given mask always wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache, GenerationConfig
from transformers.cache_utils import CacheLayerMixin

from transformer_lens.checks import in_words, is_tensor
from transformer_lens.model_bridge.upstream import attribute

SIDES = ("left", "right")
REMEMBERED = "transformer_lens_padding"
"""The attribute of a KV cache under which its padding is kept; copies of the cache have it too."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types for a number's bits, by its size in bytes; as bits a nan equals itself."""
MIXING = 0x1E3779B97F4A7C15
"""An odd multiplier for hashing; integers wrap around."""


def needs_mask(mask: Shaped[Tensor, "batch pos"]) -> bool:
    """Whether a token follows a masked position: only then does a causal model see the mask."""
    return bool((mask[:, 1:] > mask[:, :-1]).any())


def checked_mask(mask: Any, rows: int, columns: int, device: torch.device) -> Bool[Tensor, "batch columns"]:
    """A caller's mask. Raises `TypeError` and `ValueError` for an invalid one."""
    if not is_tensor(mask):
        raise TypeError(f"attention_mask: got {in_words(mask)}, expected a tensor {[rows, columns]} of ones and zeros")
    if list(mask.shape) != [rows, columns]:
        raise ValueError(
            f"attention_mask: got shape {list(mask.shape)}, expected {[rows, columns]}: one row "
            "per text, one column per cached and new token"
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask: got other numbers than 0 and 1, expected 1 at each token and 0 at padding")
    return mask.to(device, torch.bool, copy=True)


def leading(mask: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    return (~mask).cumprod(-1).bool()


def ends(mask: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The runs of masked positions at the beginning and end of each row."""
    return leading(mask) | leading(mask.flip(-1)).flip(-1)


_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep_mask(ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Ids whose padding is known from now on, as long as nobody writes to them."""
    _made[ids] = (ids.clone(), mask)
    return ids


def kept_mask(ids: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"] | None:
    """What `keep_mask` was told of a tensor; `None` for another tensor, or after a write."""
    if torch.compiler.is_compiling():  # a graph is traced for any ids
        return None
    before, mask = _made.get(ids, (None, None))
    return mask if before is not None and torch.equal(before, ids) else None


def not_padding(
    ids: Int[Tensor, "batch pos"], pad: int, in_texts: bool, sides: Sequence[str]
) -> Bool[Tensor, "batch pos"]:
    """Which ids are not padding.

    >>> not_padding(torch.tensor([[2, 2, 2, 5], [2, 6, 7, 8]]), 2, True, ["left"]).long()
    tensor([[0, 0, 1, 1],
            [1, 1, 1, 1]])

    A `pad` that occurs in no text is padding at either end of a row. One that is also the first or last token of texts
    (`in_texts`) is padding at `sides`, as far as a row has more of it there than the row with fewest, since the longest
    text of a batch is not padded; so a single row has none, and a row of nothing else keeps one.
    """
    other = ids != pad
    if not in_texts:
        return ~ends(other)
    mask = torch.ones_like(other)
    if "right" in sides:
        run = leading(other.flip(-1)).sum(-1, keepdim=True)
        # A row of nothing else is padded at one side.
        more = (run - run.min()) * (other.any(-1, keepdim=True) if "left" in sides else 1)
        mask &= ~_first(more, mask).flip(-1)
    if "left" in sides:
        run = leading(other).sum(-1, keepdim=True)
        mask &= ~_first(run - run.min(), mask)
    return mask


def _first(count: Int[Tensor, "batch 1"], like: Tensor) -> Bool[Tensor, "batch pos"]:
    """The first so many positions of each row, and never all of them."""
    width = like.shape[-1]
    return torch.arange(width, device=like.device) < count.clamp(max=width - 1)


def as_generate_infers(ids: Int[Tensor, "batch pos"], chosen: GenerationConfig) -> Bool[Tensor, "batch pos"]:
    """What Hugging Face's `generate` takes for text where it is given no mask, and there is no tokenizer to ask."""
    pad = _pad_alone(chosen)
    return torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad


def still_text(new: Int[Tensor, "batch new"], chosen: GenerationConfig) -> Bool[Tensor, "batch new"]:
    """Which of the tokens that `generate` appended are text: up to each end, and not what fills rows up behind."""
    ends_here = torch.isin(new, torch.tensor(_end_tokens(chosen), dtype=new.dtype, device=new.device))
    text = ends_here.cumsum(-1) - ends_here.long() == 0
    pad = _pad_alone(chosen)
    return text if pad is None else text & ~leading((new != pad).flip(-1)).flip(-1)


def _pad_alone(chosen: GenerationConfig) -> int | None:
    """The pad token, where it is none that ends texts."""
    return None if chosen.pad_token_id in _end_tokens(chosen) else chosen.pad_token_id


def _end_tokens(chosen: GenerationConfig) -> list[int]:
    end = chosen.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


@dataclass(frozen=True)
class Columns:
    """The cached and new positions of a call."""

    mask: Bool[Tensor, "batch total"]
    """Which of them are attended to."""
    padding: Bool[Tensor, "batch total"]
    """Which of the others are padding rather than hidden tokens."""

    def positions(self, new: int) -> Int[Tensor, "batch new"] | None:
        """Positions of the last `new` columns, counting the tokens of each row; `None` if a plain count is the same."""
        if not needs_mask(~self.padding):
            return None
        counted = (~self.padding).cumsum(-1) - 1
        return counted.masked_fill(self.padding, 0)[:, -new:]

    def rows(self, index: Int[Tensor, " row"], length: int) -> Columns:
        return Columns(self.mask[index, :length], self.padding[index, :length])

    def then(self, mask: Bool[Tensor, "batch new"], padding: Bool[Tensor, "batch new"]) -> Columns:
        return Columns(torch.cat([self.mask, mask], -1), torch.cat([self.padding, padding], -1))


def columns_of_call(
    rows: int, new: int, *, given: Any, seen: Bool[Tensor, "batch new"] | None, cache: Any, device: torch.device
) -> Columns | None:
    """What a call attends to: by the `given` mask, or by what is known of the new columns and of the cache.

    `None` if there is no padding. In a given mask, zeros at either end of a row are padding. Raises `ValueError` for a
    mask of another shape, and for a cache of padded texts whose rows were changed in a way that cannot be followed.
    """
    past = cached_length(cache)
    held = {len(layer.keys) for layer in attribute(cache, "layers") if _has_keys(layer)} if past else {rows}
    if held and rows not in held:
        raise ValueError(f"past_key_values: got a cache of {max(held)} texts, and {rows} to go on with")
    if given is not None:
        mask = checked_mask(given, rows, past + new, device)
        return Columns(mask, ends(mask))
    old = recall(cache, device)
    if old is None and (seen is None or bool(seen.all())):
        return None
    if old is None:
        tokens = torch.ones(rows, past, dtype=torch.bool, device=device)
        old = Columns(tokens, ~tokens)
    seen = torch.ones(rows, new, dtype=torch.bool, device=device) if seen is None else seen.to(device)
    return old.then(seen, ends(seen))


@dataclass(frozen=True)
class _Memory:
    """The padding of a cache, and how to recognise its rows after they were reordered or cropped."""

    columns: Columns
    layer: int
    marks: Int[Tensor, "batch held"] | None
    """A number for each key in the layer's last columns; `None` for keys that are not here."""


def cached_length(cache: Any) -> int:
    """How many positions a cache holds. Raises `TypeError` for what is no transformers cache."""
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values: got {type(cache).__name__}, expected a transformers Cache, such as DynamicCache()"
        )
    return int(cache.get_seq_length())


def remember(cache: Any, columns: Columns | None) -> None:
    """Let a cache know which of its positions are padding, unless it holds others (a run from a later layer)."""
    if cache is None:
        return
    if columns is None or bool(columns.mask.all()):
        vars(cache).pop(REMEMBERED, None)
        return
    length = cached_length(cache)
    if length != columns.mask.shape[1]:
        return
    layers = enumerate(attribute(cache, "layers"))
    layer = max((n for n, each in layers if _has_keys(each) and int(each.get_seq_length()) == length), default=0)
    setattr(cache, REMEMBERED, _Memory(columns, layer, _marks(cache.layers[layer])))


def recall(cache: Any, device: torch.device) -> Columns | None:
    """What is known of the positions that a cache holds; those that others added since count as tokens."""
    memory = None if cache is None else vars(cache).get(REMEMBERED)
    length = cached_length(cache)
    if memory is None or not length:
        return None
    columns: Columns | None = _found_again(memory, cache, length)
    if columns is None:
        raise ValueError(
            "past_key_values: this cache holds padded texts, and its rows are not those that the bridge put there; "
            "pass attention_mask, one column per cached and new token"
        )
    added = torch.ones(len(columns.mask), length - columns.mask.shape[1], dtype=torch.bool, device=columns.mask.device)
    columns = columns.then(added, ~added)
    return Columns(columns.mask.to(device), columns.padding.to(device))


def inherit(cache: Cache, whole: Cache, length: int, copies: int, layer: int | None) -> None:
    """`cache` holds the first positions of `whole`, `copies` times (in one `layer` alone, if one is named)."""
    memory = vars(whole).get(REMEMBERED)
    if memory is None:
        return
    columns = _found_again(memory, whole, cached_length(whole))
    if columns is None:  # nor will it be found again in `cache`, and `recall` says so
        setattr(cache, REMEMBERED, memory)
        return
    index = torch.arange(len(columns.mask), device=columns.mask.device).repeat(copies)
    number = memory.layer if layer is None else layer
    setattr(cache, REMEMBERED, _Memory(columns.rows(index, length), number, _marks(cache.layers[number])))


def _found_again(memory: _Memory, cache: Cache, length: int) -> Columns | None:
    """The remembered columns in the current order of the cache's rows."""
    old = memory.columns
    if memory.layer >= len(cache.layers) or int(cache.layers[memory.layer].get_seq_length()) != length:
        return None
    marks = _marks(cache.layers[memory.layer])
    if marks is None or memory.marks is None:  # keys on servers, whose rows beam search alone changes
        return old if length == old.mask.shape[1] else None
    # Both hold the keys of their last columns: compare those that both hold.
    first = max(length - marks.shape[1], old.mask.shape[1] - memory.marks.shape[1])
    last = min(length, old.mask.shape[1])
    if first >= last:
        return None
    now = marks[:, first - length + marks.shape[1] :][:, : last - first]
    then = memory.marks[:, first - old.mask.shape[1] + memory.marks.shape[1] :][:, : last - first].to(now.device)
    if now.shape == then.shape and torch.equal(now, then):
        return old.rows(torch.arange(len(now), device=old.mask.device), last)
    same = torch.stack([(row == then).all(-1) for row in now])
    return old.rows(same.long().argmax(-1).to(old.mask.device), last) if bool(same.any(-1).all()) else None


def _has_keys(layer: Any) -> bool:
    """Whether keys of a layer are here: not on servers, and not all of them compressed."""
    keys = attribute(layer, "keys") if isinstance(layer, CacheLayerMixin) else None
    return isinstance(keys, Tensor) and keys.ndim == 4


def _marks(layer: Any) -> Int[Tensor, "batch held"] | None:
    """A number for each key of a cache layer, made of its first head's bits."""
    if not _has_keys(layer):
        return None
    keys: Tensor = layer.keys.detach()[:, 0, : int(layer.get_seq_length())]
    bits = keys.view(BITS[keys.element_size()]).long()
    factors = (2 * torch.arange(bits.shape[-1], device=bits.device) + 1) * MIXING
    return (bits * factors).sum(-1)
