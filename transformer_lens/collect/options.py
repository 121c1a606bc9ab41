"""The options of a job, checked, and what they come to for one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from transformer_lens.checks import nearest
from transformer_lens.collect.plan import Layout

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

CONTEXT_SIZE = 1024


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that a job puts around texts and into padding."""

    bos: int | None
    eos: int | None
    pad: int


@dataclass(frozen=True)
class Options:
    """How `collect` reads, filters and stores; see there."""

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

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "shard_tokens": 1, "drop_first": 0, "max_tokens": 1, "context_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "context_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name}: got {value!r}, expected a whole number from {lowest} on")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"dtype: got {self.dtype!r}, expected a float dtype such as torch.bfloat16, or None")
        numbers = tuple(self.shard)
        if len(numbers) != 2 or not all(isinstance(n, int) for n in numbers) or not 0 <= numbers[0] < numbers[1]:
            raise ValueError(f"shard: got {self.shard!r}, expected (rank, world) with 0 <= rank < world")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options from keywords. Raises `TypeError` for one that does not exist, with the nearest that does."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"collect has no option {name!r}; the nearest is {nearest(name, known, most=1)}")
        return cls(**given)

    def special_tokens(self, bridge: TransformerBridge) -> SpecialTokens:
        """The special tokens of a model for this job. Raises `ValueError` for one that it does not have."""
        adapter: Any = bridge.token_adapter
        bos = adapter.bos if adapter is not None else None
        eos = adapter.eos if adapter is not None else None
        wanted = bool(bridge.cfg.default_prepend_bos) and bos is not None
        wanted = wanted if self.prepend_bos is None else self.prepend_bos
        if wanted and bos is None:
            raise ValueError("prepend_bos: this bridge knows no beginning-of-sequence token; pass prepend_bos=False")
        if self.append_eos and eos is None:
            raise ValueError("append_eos: this bridge knows no end-of-sequence token; pass append_eos=False")
        if self.drop_bos and bos is None:
            raise ValueError("drop_bos: this bridge knows no beginning-of-sequence token; pass drop_first=1")
        pad = adapter.pad if adapter is not None and adapter.pad is not None else 0
        return SpecialTokens(bos if wanted else None, eos if self.append_eos else None, pad)

    def layout(self, bridge: TransformerBridge, special: SpecialTokens) -> Layout:
        """How tokens go into contexts and shards. Raises `ValueError` for contexts the model cannot take."""
        longest = bridge.cfg.n_ctx
        context = min(longest, CONTEXT_SIZE) if self.context_size is None else self.context_size
        if context > longest:
            raise ValueError(f"context_size: got {context}, expected at most {longest}, the model's n_ctx")
        if self.drop_first >= context:
            raise ValueError(
                f"drop_first: got {self.drop_first} of contexts of {context} tokens, so none would be left"
            )
        # Whole batches, so that where a shard ends changes no batch.
        batches = max(1, round(self.shard_tokens / (context * self.batch_size)))
        bos = bridge.token_adapter.bos if bridge.token_adapter is not None else None
        kept = {name: getattr(self, name) for name in ("batch_size", "packing", "drop_bos", "drop_first", "max_tokens")}
        return Layout(
            context_size=context, contexts_per_shard=batches * self.batch_size, pad=special.pad, bos=bos, **kept
        )
