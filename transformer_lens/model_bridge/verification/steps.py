"""A text read piece by piece with a KV cache, as the bare model and as the bridge do it.

Every call is evidence of its own, which the checks on values read like that of a whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, StaticCache

from transformer_lens.model_bridge.verification.evidence import Evidence, OwnRun, Seen

SPARE = 2
"""Empty places that a cache of fixed size has behind the text."""


def chunks(length: int) -> list[range]:
    """How a text is read: a beginning, a chunk of two where it is long enough, and two single tokens.

    >>> chunks(8)
    [range(0, 4), range(4, 6), range(6, 7), range(7, 8)]
    """
    single = min(2, length - 1)
    ends = [length - single - 2] if length - single > 2 else []
    ends += range(length - single, length + 1)
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def growing(e: Evidence) -> Cache:
    """The cache that transformers makes by itself."""
    return DynamicCache(config=e.bridge.original_model.config)


def fixed(e: Evidence) -> Cache:
    """One whose size does not change."""
    return StaticCache(config=e.bridge.original_model.config, max_cache_len=e.tokens.shape[1] + SPARE)


@dataclass
class Step(Seen):
    """One call of a text that is read piece by piece."""

    whole: Evidence
    columns: range
    own: OwnRun
    captured: tuple[Tensor, dict[str, Tensor]]
    keys: Sequence[tuple[int, int]]
    """How many keys each layer attends to, and the column of the first, as transformers' own cache says."""
    before: Sequence[Step]

    def __post_init__(self) -> None:
        self.bridge = self.whole.bridge
        self.repeats_to = self.whole.repeats_to
        self.tokens = self.whole.tokens[:, self.columns.start : self.columns.stop]

    def __str__(self) -> str:
        return f"tokens {self.columns.start} to {self.columns.stop - 1} after {self.columns.start} cached ones"

    def attended_values(self, attention: str) -> Float[Tensor, "batch key kv_head d_head"] | None:
        """The values of the cached keys, then the new ones, then the empty places of a cache of fixed size."""
        pieces = [step.wide(f"{attention}.hook_v") for step in (*self.before, self)]
        found = [piece for piece in pieces if piece is not None]
        if len(found) < len(pieces):
            return None
        count, first = self.keys[int(attention.split(".")[1])]
        held = torch.cat(found, dim=1)[:, first : first + count]
        return F.pad(held, (0, 0, 0, 0, 0, count - held.shape[1]))


def _own_steps(
    e: Evidence, model: Any, cache: Cache, pieces: Sequence[range]
) -> Iterator[tuple[range, OwnRun, list[tuple[int, int]]]]:
    """The bare model's calls, each with the sizes of its layers' keys."""
    assert e.takes_cache is not None
    for columns in pieces:
        keys = [cache.get_mask_sizes(len(columns), layer) for layer in range(e.bridge.cfg.n_layers)]
        yield columns, e.watched(model, _tokens(e, columns), **{e.takes_cache: cache}), keys


def _tokens(e: Evidence, columns: range) -> Int[Tensor, "batch pos"]:
    return e.tokens[:, columns.start : columns.stop]


def steps(e: Evidence, make: Callable[[Evidence], Cache], pieces: Sequence[range]) -> list[Step]:
    """A text read piece by piece: what the bare model did, and what the bridge captured."""
    with e.bare() as model:
        own = list(_own_steps(e, model, make(e), pieces))
    cache, found = make(e), list[Step]()
    for columns, run, keys in own:
        captured = e.everything(_tokens(e, columns), past_key_values=cache)
        found.append(Step(e, columns, run, captured, keys, tuple(found)))
    return found


def decoded(e: Evidence) -> list[Step]:
    """The text read piece by piece with a cache that grows, once for all checks."""
    if "decoded" not in e.kept:
        e.kept["decoded"] = steps(e, growing, chunks(e.tokens.shape[1]))
    found: list[Step] = e.kept["decoded"]
    return found
