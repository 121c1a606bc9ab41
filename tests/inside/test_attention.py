"""What is captured inside attention is what explicit float64 attention computes, whatever kernel the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inside.cases import ATTENTIONS, DTYPES, FAMILIES, ROTATED, assert_close, make, window_of, wrap
from tests.inside.oracles import Steps, allowed_keys, attention, attention_weights, layer_of, positions_of
from tests.support import tokens
from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.core

NAMES = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")


def attention_names(bridge: TransformerBridge, layer: int) -> dict[str, str]:
    """Short name -> hook of this model."""
    names = {short: f"blocks.{layer}.attn.hook_{short}" for short in NAMES}
    names |= {"attn_out": f"blocks.{layer}.hook_attn_out", "in": f"blocks.{layer}.attn.hook_in"}
    return {short: name for short, name in names.items() if name in bridge.hook_dict}


def assert_scores(got: Tensor, expected: Tensor, allowed: Tensor, dtype: torch.dtype, read: Tensor) -> None:
    """Equal where a real token may look; so low that nothing passes where none may."""
    allowed, read = allowed.expand(expected.shape), read.expand(expected.shape)
    assert_close(got[read], expected[read], dtype, "attn_scores")
    # Half the lowest number: what is left after a score was added to it and rounded.
    assert (got[~allowed] < torch.finfo(dtype).min / 2).all()


def compare(model: Any, cache: Any, names: dict[str, str], mask: Tensor, layer: int, **options: Any) -> Steps:
    """Every captured value against the oracle run on what entered attention."""
    rows = allowed_keys(mask, mask.shape[1], window_of(model))
    x = cache[names["in"]]
    expected = attention(attention_weights(model, layer), x, positions_of(mask), rows, **options)
    # A padding query sees nothing: kernels differ in what they make of it, and nobody reads it.
    real = mask.bool()
    for short, name in names.items():
        if short == "attn_scores":
            read = real[:, None, :, None] & rows
            assert_scores(cache[name], expected[short], rows, model.dtype, read)
        elif short != "in":
            got, wanted = cache[name], expected[short]
            if short == "pattern":
                got, wanted = got.transpose(1, 2), wanted.transpose(1, 2)
            assert got.shape == wanted.shape
            assert_close(got[real], wanted[real], model.dtype, short)
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_values_are_the_oracles(family: str, attn: str, dtype: str) -> None:
    model, ids = make(family, attn, DTYPES[dtype]), tokens()
    with torch.no_grad():
        bare = model(ids).logits
        bridge = wrap(model)
        names = [attention_names(bridge, layer) for layer in range(2)]
        logits, cache = bridge.run_with_cache(ids, names_filter=[n for layer in names for n in layer.values()])
    assert torch.equal(logits, bare)
    for layer in range(2):
        compare(model, cache, names[layer], torch.ones_like(ids), layer)
        assert cache[names[layer]["pattern"]].dtype == model.dtype


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_values_with_padding(family: str, attn: str, side: str) -> None:
    """Every real token sees what the oracle lets it see."""
    model, ids = make(family, attn), tokens(3, 7)
    mask = torch.ones_like(ids)
    mask[1, :2], mask[2, :5] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    bridge = wrap(model)
    names = attention_names(bridge, 1)
    with torch.no_grad():
        bare = bridge(ids, attention_mask=mask)
        logits, cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=list(names.values()))
    assert torch.equal(logits, bare)
    compare(model, cache, names, mask, 1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("family", ROTATED)
def test_the_pattern_is_what_an_eager_model_returns(family: str, dtype: str) -> None:
    model, ids = make(family, "eager", DTYPES[dtype]), tokens()
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
        _, cache = wrap(model).run_with_cache(ids)
    for layer, expected in enumerate(attentions):
        assert torch.equal(cache["pattern", layer], expected)


def test_eager_alibi_adds_its_bias_twice_in_transformers() -> None:
    """An upstream fault, pinned: when this fails transformers has mended it, and the caution can go."""
    model, ids = make("rw", "eager"), tokens()
    with torch.no_grad():
        returned = model(ids, output_attentions=True).attentions[0]
        bridge = wrap(model)
        names = attention_names(bridge, 0)
        _, cache = bridge.run_with_cache(ids, names_filter=list(names.values()))
    assert torch.equal(cache[names["pattern"]], returned)
    weights, mask = attention_weights(model), torch.ones_like(ids)
    assert weights.alibi == 2
    compare(model, cache, names, mask, 0)
    weights.alibi = 1
    right = attention(weights, cache[names["in"]], positions_of(mask), allowed_keys(mask, 7))
    # Not a matter of rounding: the published formula gives another pattern.
    assert (right["pattern"] - returned.double()).abs().max() > 0.01


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_inside_eager_attention_leaves_the_output_bitwise(family: str, dtype: str) -> None:
    """A hook that edits nothing opens the layer, and nothing moves.

    With six dimensions in a head, whose root is not a power of two: how the scores are scaled shows.
    """
    model, ids = make(family, "eager", DTYPES[dtype], hidden_size=48), tokens()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    bridge = wrap(model)
    with torch.no_grad():
        for given in (None, mask):
            bare = bridge(ids, attention_mask=given)
            for name in ("rot_q", "rot_k", "attn_scores", "pattern", "result"):
                hook = f"blocks.0.attn.hook_{name}"
                if hook in bridge.hook_dict:
                    neutral = [(hook, lambda value, hook: None)]
                    assert torch.equal(bridge.run_with_hooks(ids, attention_mask=given, fwd_hooks=neutral), bare), name


def test_an_alibi_attention_called_by_itself_takes_the_bias_of_all_rows_in_one_axis() -> None:
    """`FalconAttention` takes `[batch * head, 1, key]`, though Falcon's own forward of today gives four axes."""
    model, ids = make("rw", "eager"), tokens()
    attn, heads = layer_of(model, 0).self_attention, model.config.num_attention_heads
    x = torch.randn(*ids.shape, model.config.hidden_size)
    given = {
        "alibi": torch.randn(len(ids) * heads, 1, ids.shape[1]),
        "attention_mask": torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1]),
    }
    bridge = wrap(model)
    with torch.no_grad():
        bare = attn(x, **given)[0]
        with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_attn_scores", lambda scores, hook: scores.clone())]):
            assert torch.equal(attn(x, **given)[0], bare)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_inside_sdpa_leaves_the_output_within_rounding(family: str, dtype: str) -> None:
    """On the layer that was asked for alone: what enters it, and the other layer's own code, stay."""
    model, ids = make(family, "sdpa", DTYPES[dtype]), tokens()
    bridge = wrap(model)
    names = [f"blocks.{i}.hook_{what}" for i in range(2) for what in ("resid_pre", "attn_out")]
    with torch.no_grad():
        _, plain = bridge.run_with_cache(ids, names_filter=names)
        with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: None)]):
            _, through = bridge.run_with_cache(ids, names_filter=names)
    for name in names[:3]:
        assert torch.equal(plain[name], through[name]), name
    assert_close(through[names[3]], plain[names[3]].double(), model.dtype, "attn_out")


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", ["rw", "mixtral", "7b"])
def test_dropout_is_the_modules_own(family: str, attn: str) -> None:
    """In training: same seed, same dropped entries where the kernel is eager; Falcon with RoPE drops none."""
    model, ids = make(family, "eager", attention_dropout=0.4).train(), tokens()
    model.config._attn_implementation = attn
    bridge = wrap(model)
    hooks = [("blocks.0.attn.hook_pattern", lambda value, hook: None)]
    outputs = []
    with torch.no_grad():
        for fwd_hooks in ([], hooks, hooks):
            torch.manual_seed(len(outputs) // 2)
            outputs.append(bridge.run_with_hooks(ids, fwd_hooks=fwd_hooks))
        pattern = bridge.run_with_cache(ids)[1]["pattern", 0]
    # The hook sees probabilities from before dropout.
    assert_close(pattern.sum(-1), torch.ones(2, 8, 7).double(), torch.float32)
    if attn == "eager":
        assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2]) == (family == "7b")
    assert layer_of(model, 0).training


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", ["7b", "40b", "rw", "mixtral"])
def test_a_padding_query_reads_what_the_kernel_lets_it_read(family: str, attn: str) -> None:
    """Nothing, under sdpa with a boolean mask; everything alike, under a mask that is added."""
    model, ids = make(family, attn), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    bridge = wrap(model)
    names = attention_names(bridge, 0)
    neutral = [(names["pattern"], lambda value, hook: None)]
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids, attention_mask=mask)
        through = bridge.run_with_hooks(ids, attention_mask=mask, fwd_hooks=neutral)
    # Logits of size ten after two layers of float32.
    torch.testing.assert_close(through, logits, rtol=0, atol=2e-4)
    pattern, values = cache[names["pattern"]].double(), cache[names["v"]].double()
    values = values.repeat_interleave(8 // values.shape[2], dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    assert_close(cache[names["z"]], z, model.dtype, "z")
    boolean = attn == "sdpa" and family != "rw"
    # Sevenths, in float32.
    assert (pattern[0, :, :3].sum(-1) - (0 if boolean else 1)).abs().max() < 1e-6
