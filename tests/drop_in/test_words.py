"""Sweeps that keep each text, and direct logit attribution, in TransformerLens's words."""

import pytest
import torch

from transformer_lens import TransformerBridge, patching
from transformer_lens.analysis.attribution import direct_logit_attribution as ours
from transformer_lens.tools.analysis import direct_logit_attribution

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"


@pytest.fixture(scope="module")
def sweep():
    model = TransformerBridge.boot_transformers("tiny-falcon")
    _, clean = model.run_with_cache(TEXT)
    mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")
    tokens = model.to_tokens([OTHER, OTHER.replace("store", "park")])
    return model, tokens, clean, lambda logits: logits[:, -1, mary] - logits[:, -1, john]


def test_each_text_of_a_sweep(sweep):
    model, tokens, clean, each = sweep
    found = patching.get_act_patch_mlp_out(model, tokens, clean, each, reduce="none", verbose=False)
    assert found.values.shape == (4, 15, 2) and found.axis_names == ("layer", "pos")
    for text in range(2):
        alone = patching.get_act_patch_mlp_out(
            model, tokens[text : text + 1], clean, lambda logits: each(logits)[0], verbose=False
        )
        torch.testing.assert_close(found.values[..., text], alone, atol=1e-4, rtol=1e-4)
    mean = patching.get_act_patch_mlp_out(model, tokens, clean, each, reduce="mean", verbose=False)
    torch.testing.assert_close(mean, found.mean())
    spread = (found.values[..., 0] - found.values[..., 1]).abs() / 2
    torch.testing.assert_close(found.stderr(), spread)
    rows = found.to_dicts()
    assert rows[3] == {"layer": 0, "pos": 1, "text": 1, "value": float(found.values[0, 1, 1])} and len(rows) == 120
    table = patching.generic_activation_patch(
        model, tokens, clean, each, patching.layer_pos_patch_setter, "mlp_out", index_df=[(0, 1), (3, -1)],
        reduce="none", verbose=False,
    )  # fmt: skip
    torch.testing.assert_close(table.values, found.values[[0, 3], [1, -1]])
    assert table.axis_names == () and table.to_dicts()[0] == {0: 0, 1: 1, "text": 0, "value": float(table.values[0, 0])}


def test_each_text_where_every_patch_is_a_run_of_its_own(sweep):
    model, tokens, clean, each = sweep
    usual = patching.get_act_patch_attn_out(model, tokens, clean, each, reduce="none", verbose=False).values
    with model.hooks([("blocks.0.hook_resid_pre", lambda value, hook: None)]):
        alone = patching.get_act_patch_attn_out(model, tokens, clean, each, reduce="none", verbose=False).values
    torch.testing.assert_close(usual, alone, atol=1e-4, rtol=1e-4)


def test_metrics_that_do_not_fit_how_they_are_reduced(sweep):
    model, tokens, clean, each = sweep
    with pytest.raises(TypeError, match=r"metric: it returned a tensor of shape \[2\], expected one number"):
        patching.get_act_patch_mlp_out(model, tokens, clean, each, verbose=False)
    with pytest.raises(TypeError, match=r"metric: it returned a tensor of shape \[\], expected \[2\]"):
        patching.get_act_patch_mlp_out(model, tokens, clean, lambda x: each(x).mean(), reduce="mean", verbose=False)
    with pytest.raises(ValueError, match="reduce: got 'sum', expected 'scalar', 'mean' or 'none'"):
        patching.get_act_patch_mlp_out(model, tokens, clean, each, reduce="sum", verbose=False)
    with pytest.raises(ValueError, match="reduce: got 'none', expected 'scalar' or 'mean'"):
        patching.get_act_patch_block_every(model, tokens, clean, each, reduce="none", verbose=False)


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_direct_logit_attribution(sweep, unit):
    model, *_ = sweep
    found = direct_logit_attribution(model, TEXT, answer_tokens=" Mary", incorrect_tokens=" John", unit=unit)
    _, cache = model.run_with_cache(TEXT)
    mine = ours(model, cache, " Mary", " John")
    assert found.attribution.shape == (len(found.labels), 1) and found.unit == unit
    without_biases = mine.logit - mine["final_bias"]
    whole = found.attribution[-1] if unit == "layer" else found.attribution.sum(0)
    torch.testing.assert_close(whole, without_biases, atol=1e-3, rtol=1e-4)
    again = direct_logit_attribution(model, None, " Mary", " John", unit=unit, cache=cache)
    assert torch.equal(again.attribution, found.attribution)
    assert found.top(1)[0] == (found.labels[int(found.attribution[:, 0].argmax())], float(found.attribution.max()))


def test_direct_logit_attribution_needs_an_answer_and_a_run(sweep):
    model, *_ = sweep
    for given in ({}, {"input": TEXT}, {"answer_tokens": 5}):
        with pytest.raises(ValueError, match="expected answer_tokens, and one of input and cache"):
            direct_logit_attribution(model, **given)
    with pytest.raises(ValueError, match="unit: got 'layers'"):
        direct_logit_attribution(model, TEXT, 5, unit="layers")
