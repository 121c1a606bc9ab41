"""`PrefixCache`: the keys and values of the first positions of a run, for runs that continue from there."""

from __future__ import annotations

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from transformer_lens.model_bridge.padding import inherit


class PrefixCache(DynamicCache):  # type: ignore[misc]
    """A throw-away copy of the first positions of a KV cache, with which a run may start above layer 0.

    >>> from transformers import DynamicCache
    >>> tokens, whole = bridge.to_tokens("When Mary and John went"), DynamicCache()
    >>> logits, cache = bridge.run_with_cache(tokens, past_key_values=whole)
    >>> stream = cache["resid_pre", 2][:, 4:]
    >>> rest = bridge(stream, start_at_layer=2, past_key_values=PrefixCache(whole, length=4))
    >>> torch.allclose(rest, logits[:, 4:], atol=1e-4)
    True

    `copies` repeats the batch: row `i * batch + b` continues row `b`. With `layer` only that one is repeated, enough
    for a run of that layer. `whole` stays as it is, and its padding is known here too. Raises `ValueError` for a
    `whole` that does not hold `length` positions in full.
    """

    def __init__(self, whole: Cache, length: int, copies: int = 1, layer: int | None = None) -> None:
        super().__init__()
        held = min((int(part.get_seq_length()) for part in whole.layers), default=0)
        windowed = any(part.is_sliding for part in whole.layers)
        if not 0 < length <= held or windowed:
            raise ValueError(
                f"PrefixCache: got length={length} of a cache that holds {held} positions"
                + (" in sliding windows" if windowed else "")
                + ", expected 1 to as many as it holds, in a cache that keeps them all: DynamicCache()"
            )
        for number, part in enumerate(whole.layers):
            keys, values = part.keys[:, :, :length], part.values[:, :, :length]
            if copies > 1 and layer in (None, number):
                keys, values = (x[None].expand(copies, *x.shape).flatten(0, 1) for x in (keys, values))
            mine = DynamicLayer()
            mine.lazy_initialization(keys, values)
            mine.keys, mine.values = keys, values
            self.layers.append(mine)
        inherit(self, whole, length, copies, layer)
