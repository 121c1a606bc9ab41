"""Older scripts flip switches: their caches then hold what these turn on, and the logits are the same."""

import pytest
import torch

from tests.support import falcon, family, tokens
from transformer_lens import TransformerBridge

SWITCHES = ("attn_result", "attn_in", "split_qkv_input", "hook_mlp_in")


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_noted_and_changes_no_number(name):
    bridge, x = TransformerBridge(falcon(new_decoder_architecture=True, num_kv_heads=2)), tokens()
    with torch.no_grad():
        before, cache = bridge.run_with_cache(x, names_filter=lambda _: True)
        getattr(bridge, f"set_use_{name}")(True)
        after, again = bridge.run_with_cache(x, names_filter=lambda _: True)
    assert bridge.cfg.to_dict()[f"use_{name}"] is True
    assert torch.equal(before, after)
    assert list(cache) == list(again)
    assert all(torch.equal(cache[key], again[key]) for key in cache)


@pytest.mark.parametrize("family_name", ["40b", "rw", "mixtral"])
@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("attn_result", ["attn.hook_result"]),
        ("attn_in", ["hook_attn_in"]),
        ("split_qkv_input", ["hook_q_input", "hook_k_input", "hook_v_input"]),
    ],
)
def test_after_a_switch_a_cache_of_everything_has_its_hooks(family_name, name, hooks):
    bridge, x = TransformerBridge(family(family_name)), tokens()
    with torch.no_grad():
        usual = list(bridge.run_with_cache(x)[1])
        getattr(bridge, f"set_use_{name}")(True)
        logits, cache = bridge.run_with_cache(x)
        assert torch.equal(logits, bridge.original_model(x).logits)
    new = [f"blocks.{layer}.{hook}" for layer in range(bridge.cfg.n_layers) for hook in hooks]
    assert sorted(set(cache) - set(usual)) == sorted(new)
    assert set(usual) < set(cache)
    for hook in new:
        if name == "attn_result":
            attn = bridge.blocks[int(hook.split(".")[1])].attn
            bias = attn.b_O if attn.b_O is not None else 0
            whole = cache[hook.replace("attn.hook_result", "hook_attn_out")]
            torch.testing.assert_close(cache[hook].sum(-2) + bias, whole, rtol=1e-4, atol=1e-4)
        else:  # each head reads the stream that enters the block
            stream = cache[f"blocks.{hook.split('.')[1]}.hook_resid_pre"]
            assert all(torch.equal(cache[hook][:, :, head], stream) for head in range(bridge.cfg.n_heads))
    getattr(bridge, f"set_use_{name}")(False)
    with torch.no_grad():
        assert list(bridge.run_with_cache(x)[1]) == usual


def test_a_filter_that_fits_nothing_gives_an_empty_cache():
    bridge, x = TransformerBridge(family("40b")), tokens()
    with torch.no_grad():
        for nothing in (lambda name: False, []):
            logits, cache = bridge.run_with_cache(x, names_filter=nothing)
            assert len(cache) == 0 and list(cache.keys()) == []
            assert torch.equal(logits, bridge.original_model(x).logits)
        text = bridge.generate(x, max_new_tokens=2, return_cache=True, names_filter=lambda name: False, verbose=False)
    assert len(text[1]) == 0
    with pytest.raises(KeyError, match="no hook is named 'nothing'"):
        bridge.run_with_cache(x, names_filter=["nothing"])
