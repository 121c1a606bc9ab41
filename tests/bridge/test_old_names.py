"""Older scripts flip switches; with or without, the same hooks fire and the logits are the same."""

import pytest
import torch

from tests.support import falcon, tokens
from transformer_lens import TransformerBridge

SWITCHES = ("attn_result", "attn_in", "split_qkv_input", "hook_mlp_in")


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_noted_and_changes_nothing(name):
    bridge, x = TransformerBridge(falcon(new_decoder_architecture=True, num_kv_heads=2)), tokens()
    with torch.no_grad():
        before, cache = bridge.run_with_cache(x, names_filter=lambda _: True)
        getattr(bridge, f"set_use_{name}")(True)
        after, again = bridge.run_with_cache(x, names_filter=lambda _: True)
    assert bridge.cfg.to_dict()[f"use_{name}"] is True
    assert torch.equal(before, after)
    assert list(cache) == list(again)
    assert all(torch.equal(cache[key], again[key]) for key in cache)
