"""TransformerLens's names for a KV cache and a layer of one: here they are transformers' own."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, DynamicLayer

__all__ = ["HookedTransformerKeyValueCache", "HookedTransformerKeyValueCacheEntry"]
HookedTransformerKeyValueCacheEntry = DynamicLayer


class HookedTransformerKeyValueCache(DynamicCache):  # type: ignore[misc]
    """A KV cache: pass it as `past_key_values`.

    >>> cache = HookedTransformerKeyValueCache.init_cache(bridge.cfg)
    >>> _ = bridge("Mary and", past_key_values=cache)
    >>> cache.get_seq_length()
    4
    """

    @classmethod
    def init_cache(cls, *_: Any, **__: Any) -> HookedTransformerKeyValueCache:
        """An empty cache, whose sizes and device follow from what is put into it."""
        return cls()
