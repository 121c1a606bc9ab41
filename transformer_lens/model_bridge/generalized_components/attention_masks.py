"""Attention masks of every implementation as what eager attention adds to its scores.

Axes: B batch, H query heads, G key-value heads, Q query positions, K key positions, D d_head.
"""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def repeat_groups(x_BGKD: Float[Tensor, "B G K D"], n_heads: int) -> Float[Tensor, "B H K D"]:
    """Repeat each group's key or value for its query heads."""
    batch, groups, keys, d_head = x_BGKD.shape
    if groups == n_heads:
        return x_BGKD
    wide = x_BGKD[:, :, None].expand(batch, groups, n_heads // groups, keys, d_head)
    return wide.reshape(batch, n_heads, keys, d_head)


def entries(mask: Any, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """An attention mask as a tensor; a flex attention block mask is evaluated at every entry."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"attention mask: got {type(mask).__name__}, expected a tensor, a flex BlockMask or None; "
            "hooks inside attention need attn_implementation 'sdpa', 'eager', 'flex_attention' or 'flash_attention_2'"
        )
    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, queries, keys, device=str(device))


def additive_mask(
    mask: Tensor | None, queries: int, keys: int, first: int, dtype: torch.dtype, device: torch.device
) -> Shaped[Tensor, "#B #H Q K"] | None:
    """What to add to the scores: 0 where a query may attend, the lowest number elsewhere.

    `mask` is what `entries` returns: nothing (a causal kernel), booleans, numbers to add, or flash attention's padding
    mask `[batch, keys]`. `first` is the position of the first query among the keys.
    """
    lowest = torch.finfo(dtype).min
    if mask is None or mask.ndim == 2:
        if queries == 1 and mask is None:
            return None
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(first)[None, None]
        if mask is not None:
            allowed = allowed & mask[:, None, None, -keys:].bool()
    elif mask.dtype == torch.bool:
        allowed = mask[..., :keys]
    else:
        return mask[..., :keys]
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.where(allowed, zero, lowest)


def seeing_queries(mask: Tensor | None, queries: int) -> Tensor | None:
    """Which queries attend to any key, `[batch, #head, query, 1]`; `None` if all do, or for an additive mask."""
    if mask is None or mask.is_floating_point():
        return None
    if mask.ndim == 2:  # flash attention's padding mask: padding is taken out, and comes back as zeros
        sees = mask.bool()[:, None, -queries:, None]
    else:
        sees = mask.any(-1, keepdim=True)
    return None if bool(sees.all()) else sees
