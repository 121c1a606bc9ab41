"""`PrefixCache`: runs that go on from the first positions of another one, at any layer."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.support import FAMILIES, family, mixtral, tokens, with_cache
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge import PrefixCache

pytestmark = pytest.mark.core


def bridge_of(layout: str) -> TransformerBridge:
    torch.manual_seed(0)
    return TransformerBridge(family(layout, **({"experts": "eager"} if layout == "mixtral" else {})).double())


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("layout", FAMILIES)
def test_the_rest_of_a_run_is_what_it_was(layout, start):
    bridge, x, whole = bridge_of(layout), tokens(2, 7), DynamicCache()
    logits, cache = bridge.run_with_cache(x, past_key_values=whole)
    streams = [cache["resid_pre", 0], cache["resid_pre", 1], cache["resid_post", 1]]
    held = [layer.keys.clone() for layer in whole.layers]
    stream = streams[start][:, 3:].repeat(3, 1, 1)
    for _ in range(2):  # whole is not used up
        prefix = PrefixCache(whole, 3, copies=3)
        rest = bridge(stream, start_at_layer=start, past_key_values=prefix)
        torch.testing.assert_close(rest, logits[:, 3:].repeat(3, 1, 1), rtol=0, atol=1e-6)
    assert all(torch.equal(layer.keys, before) for layer, before in zip(whole.layers, held, strict=True))
    if start < 2:
        one = PrefixCache(whole, 3, copies=3, layer=start)
        part = bridge(stream, start_at_layer=start, stop_at_layer=start + 1, past_key_values=one)
        torch.testing.assert_close(part, streams[start + 1][:, 3:].repeat(3, 1, 1), rtol=0, atol=1e-6)


def test_a_growing_cache_is_still_refused_above_layer_0():
    bridge, x, whole = bridge_of("7b"), tokens(1, 4), DynamicCache()
    _, cache = bridge.run_with_cache(x, past_key_values=whole)
    with pytest.raises(ValueError, match=r"start_at_layer=1 with past_key_values: .*or pass a PrefixCache of it"):
        bridge(cache["resid_pre", 1], start_at_layer=1, past_key_values=whole)


def test_what_is_not_held_is_refused():
    bridge, whole = bridge_of("40b"), DynamicCache()
    bridge(tokens(1, 4), past_key_values=whole)
    for length in (0, -1, 5):
        with pytest.raises(ValueError, match=f"got length={length} of a cache that holds 4 positions, expected 1 to"):
            PrefixCache(whole, length)
    with pytest.raises(ValueError, match="got length=1 of a cache that holds 0 positions"):
        PrefixCache(DynamicCache(), 1)
    windowed = mixtral(sliding_window=3)
    cache = DynamicCache(config=windowed.config)
    windowed(tokens(1, 6), **with_cache(cache))
    with pytest.raises(ValueError, match="in sliding windows, expected 1 to"):
        PrefixCache(cache, 1)
