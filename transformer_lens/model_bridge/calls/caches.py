"""`GroupedCache`: a KV cache that keeps one key and value per group, and returns one per query head."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from transformer_lens.model_bridge.calls.padding import BITS, inherit
from transformer_lens.model_bridge.generalized_components.attention_run import repeat_groups
from transformer_lens.model_bridge.supported_architectures import adapter_for

FEW = 2**19
"""Up to so many numbers, selecting by index is faster than repeating: 2 and 5 µs for a few, 40 and 30 ms for many."""


class GroupedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache: takes and returns a key for each query head, and keeps one per group.

    >>> layer = GroupedLayer(groups=2)
    >>> shared = torch.randn(1, 2, 1, 5, 8).expand(1, 2, 3, 5, 8).reshape(1, 6, 5, 8)
    >>> keys, _ = layer.update(shared, shared)
    >>> torch.equal(keys, shared), layer.keys.shape
    (True, torch.Size([1, 2, 5, 8]))

    `keys` and `values` are `[batch, kv_group, pos, d_head]`; reordering, cropping and so on are those of
    `DynamicLayer`.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.group_of_head: Tensor | None = None

    def update(
        self,
        key_states: Float[Tensor, "batch head new d_head"],
        value_states: Float[Tensor, "batch head new d_head"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch head pos d_head"], Float[Tensor, "batch head pos d_head"]]:
        """Add new positions; returns all of them, for each query head.

        Heads that cannot be grouped (in a shard of a model) are kept as they are. Raises `ValueError` if the first keys
        or values it is given differ within a group.
        """
        heads = key_states.shape[1]
        share = heads // self.groups if heads % self.groups == 0 else 1
        if not self.is_initialized:
            # Only the first ones are compared, since every comparison makes the host wait for the device.
            for name, states in (("keys", key_states), ("values", value_states)):
                each = states.detach().view(BITS[states.element_size()]).unflatten(1, (-1, share))
                if not bool(torch.eq(each, each[:, :, :1]).all()):
                    raise ValueError(
                        f"GroupedCache: the {name} of {heads} heads differ within their {self.groups} groups, so one "
                        "for each group would lose some; use transformers' DynamicCache with this model"
                    )
            self.group_of_head = torch.arange(heads, device=key_states.device) // share
        keys, values = super().update(key_states[:, ::share], value_states[:, ::share])
        # Contiguous, as what DynamicLayer returns, so that the same kernels with the same rounding follow.
        if keys.numel() * share <= FEW:
            return keys.index_select(1, self.group_of_head), values.index_select(1, self.group_of_head)
        return repeat_groups(keys, heads).contiguous(), repeat_groups(values, heads).contiguous()


class GroupedCache(Cache):  # type: ignore[misc]
    """A transformers cache for any supported model that never holds a key twice.

    Falcon's new decoder architecture gives shared keys to every query head before it caches them, so
    transformers' own cache is 16 times what the keys of a 40B model need, and 29 times for 180B.

    >>> grouped = GroupedCache(model.config)
    >>> ids = model.generate(torch.tensor([[1, 2, 3]]), cache=grouped, max_new_tokens=4, do_sample=False)
    >>> grouped.layers[0].keys.shape  # batch kv_group pos d_head
    torch.Size([1, 2, 6, 32])

    Logits and tokens are bitwise those of `DynamicCache`, whose own layers it has where transformers repeats no key
    (Falcon-7B and RW, Mixtral). While a layer runs, its keys and values are also there for every query head. `config`
    is the Hugging Face config. Raises `ValueError` for an unsupported family.
    """

    def __init__(self, config: Any) -> None:
        adapter = adapter_for(config)
        groups, count = adapter.cfg.n_key_value_heads, adapter.cfg.n_layers
        if adapter.cached_heads() > groups:
            super().__init__(layers=[GroupedLayer(groups) for _ in range(count)])
        else:
            super().__init__(layers=DynamicCache(config=config).layers)

    @property
    def saves(self) -> bool:
        """Whether it holds less than `DynamicCache` would."""
        return any(isinstance(layer, GroupedLayer) for layer in self.layers)


class PrefixCache(DynamicCache):  # type: ignore[misc]
    """A throw-away copy of the first positions of a KV cache, with which a run may start above layer 0.

    >>> from transformers import DynamicCache
    >>> tokens, whole = bridge.to_tokens("When Mary and John went"), DynamicCache()
    >>> logits, cache = bridge.run_with_cache(tokens, past_key_values=whole)
    >>> stream = cache["resid_pre", 2][:, 4:]
    >>> rest = bridge(stream, start_at_layer=2, past_key_values=PrefixCache(whole, length=4))
    >>> torch.allclose(rest, logits[:, 4:], atol=1e-4)
    True

    `copies` repeats the batch: row `i * batch + b` continues row `b`. With `layer` only that one is repeated,
    which is enough for a run of that layer alone. What such a run adds is lost with this cache; `whole` stays
    as it is, and what is known of its padding goes along. Raises `ValueError` for a `whole` that does not hold
    `length` positions in full.
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
