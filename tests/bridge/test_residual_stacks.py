"""The stream taken apart: the parts sum to the whole, and each is what its removal takes away."""

import copy

import numpy as np
import pytest
import torch
from transformers import FalconForSequenceClassification

from tests.support import FAMILIES, falcon_config, family, tokens
from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.analysis.attribution.direct_logits import direct_logit_attribution
from transformer_lens.analysis.lenses import TunedLens
from transformer_lens.analysis.svd import SVDInterpreter

SEQUENTIAL = ("rw", "rw-rope", "mixtral")
CLOSE = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(scope="module", params=FAMILIES)
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def bridge(layout) -> TransformerBridge:
    torch.manual_seed(1)
    # grouped_mm has no float64, so experts run eagerly.
    changes = {"experts": "eager"} if layout == "mixtral" else {}
    return TransformerBridge(family(layout, num_hidden_layers=3, dtype=torch.float64, **changes))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    torch.manual_seed(2)
    return tokens(batch=3, pos=5)


@pytest.fixture(scope="module")
def run(bridge, x) -> ActivationCache:
    return bridge.run_with_cache(x)[1]


@pytest.fixture
def cache(run) -> ActivationCache:
    """What the run left, without what other tests had computed from it."""
    found = copy.copy(run)
    found.cache_dict = dict(run.cache_dict)
    return found


def stream(cache: ActivationCache, layer: int | None) -> torch.Tensor:
    return cache["resid_post", -1] if layer in (None, 3, -1) else cache["resid_pre", layer]


# -- the stream --------------------------------------------------------------------------------------


def test_accumulated_resid_is_the_stream_of_each_layer(cache, layout):
    stack, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert stack.shape == (4, 3, 5, 32)
    for i in range(3):
        assert torch.equal(stack[i], cache["resid_pre", i])
    assert torch.equal(stack[3], cache["resid_post", 2])
    stack, labels = cache.accumulated_resid(layer=1, pos_slice=-1, return_labels=True)
    assert labels == ["0_pre", "1_pre"]
    assert torch.equal(stack[1], cache["resid_pre", 1][:, -1])


def test_the_middle_of_a_sequential_block_and_none_of_a_parallel_one(cache, layout):
    if layout not in SEQUENTIAL:
        with pytest.raises(KeyError, match="hook_resid_mid' is absent in this model"):
            cache.accumulated_resid(incl_mid=True)
        assert len(cache.accumulated_resid(layer=1, mlp_input=True)) == 2
        return
    stack, labels = cache.accumulated_resid(layer=1, incl_mid=True, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid"]
    assert torch.equal(stack[3], cache["resid_mid", 1])


@pytest.mark.parametrize("layer", [0, 1, 3, None, -1])
def test_what_was_written_sums_to_the_stream(cache, layer):
    stack, labels = cache.decompose_resid(layer, return_labels=True)
    n = 3 if layer in (None, -1) else layer
    assert labels == ["embed", *(f"{i}_{part}_out" for i in range(n) for part in ("attn", "mlp"))]
    torch.testing.assert_close(stack.sum(0), stream(cache, layer), **CLOSE)
    attn = cache.decompose_resid(layer, mode="attn", incl_embeds=False)
    mlp = cache.decompose_resid(layer, mode="mlp", incl_embeds=False)
    assert len(attn) == len(mlp) == n
    torch.testing.assert_close(attn.sum(0) + mlp.sum(0) + cache["embed"], stream(cache, layer), **CLOSE)


def test_the_mlps_input_holds_this_layers_attention_in_a_sequential_block_only(cache, layout):
    stack = cache.decompose_resid(1, mlp_input=True)
    expected = cache["resid_mid", 1] if layout in SEQUENTIAL else cache["resid_pre", 1]
    torch.testing.assert_close(stack.sum(0), expected, **CLOSE)


@pytest.mark.parametrize("mlp_input", [False, True])
@pytest.mark.parametrize("expand_neurons", [False, True])
@pytest.mark.parametrize("layer", [0, 2, None])
def test_the_full_decomposition_sums_to_the_stream(cache, layout, layer, mlp_input, expand_neurons):
    if mlp_input and layer is None:
        with pytest.raises(ValueError, match="no MLP reads the stream after the last block; name a layer"):
            cache.get_full_resid_decomposition(layer, mlp_input, expand_neurons=expand_neurons)
        return
    stack, labels = cache.get_full_resid_decomposition(
        layer, mlp_input, expand_neurons=expand_neurons, return_labels=True
    )
    assert len(labels) == len(stack) == len(set(labels))
    mid = mlp_input and layout in SEQUENTIAL
    torch.testing.assert_close(stack.sum(0), cache["resid_mid", layer] if mid else stream(cache, layer), **CLOSE)
    sliced = cache.get_full_resid_decomposition(layer, mlp_input, expand_neurons=expand_neurons, pos_slice=(1, 3))
    torch.testing.assert_close(sliced, stack[:, :, 1:3], **CLOSE)


# -- each part is what its removal takes away ----------------------------------------------------------


def test_a_heads_row_is_what_attention_loses_without_the_head(bridge, cache, x):
    stack, labels = cache.stack_head_results(return_labels=True)
    assert len(labels) == len(stack) == 3 * 8

    def remove(z, hook):
        z[:, :, 5] = 0

    for layer in range(3):
        with bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", remove)]):
            _, without = bridge.run_with_cache(x, names_filter=f"blocks.{layer}.hook_attn_out")
        lost = cache["attn_out", layer] - without["attn_out", layer]
        torch.testing.assert_close(stack[labels.index(f"L{layer}H5")], lost, **CLOSE)


def test_results_that_were_cached_and_results_that_are_computed_are_the_same(bridge, cache, x):
    _, with_results = bridge.run_with_cache(x, names_filter=lambda name: name.endswith(("result", "hook_z", "embed")))
    asked = with_results.stack_head_results(pos_slice=2)
    computed = cache.stack_head_results(pos_slice=2)
    torch.testing.assert_close(asked, computed, **CLOSE)
    assert ("result", 0) not in cache
    cache.compute_head_results()
    torch.testing.assert_close(cache["result", 1], with_results["result", 1], **CLOSE)


def test_a_neurons_row_is_what_the_mlp_loses_without_it(bridge, cache, x, layout):
    if layout == "mixtral":
        chosen = cache["expert_indices", 1]
        expert, neuron = int(chosen[0, 0, 0]), 7

        def remove(post, hook):
            post[..., neuron] = torch.where(chosen == expert, 0, post[..., neuron])

        label = f"L1E{expert}N{neuron}"
    else:
        neuron, label = 7, "L1N7"

        def remove(post, hook):
            post[..., neuron] = 0

    stack, labels = cache.stack_neuron_results(2, return_labels=True)
    with bridge.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", remove)]):
        _, without = bridge.run_with_cache(x, names_filter="blocks.1.hook_mlp_out")
    lost = cache["mlp_out", 1] - without["mlp_out", 1]
    assert lost.abs().max() > 1e-3
    torch.testing.assert_close(stack[labels.index(label)], lost, **CLOSE)


@pytest.mark.parametrize("neuron_slice", [(2, 5), [4, 1], 3])
def test_some_neurons_are_those_of_all(cache, neuron_slice, layout):
    every, labels = cache.stack_neuron_results(2, pos_slice=-1, return_labels=True)
    some, names = cache.stack_neuron_results(2, -1, neuron_slice, return_labels=True)
    wanted = {(2, 5): [2, 3, 4], (4, 1): [4, 1]}.get(tuple(neuron_slice) if neuron_slice != 3 else 3, [3])
    experts = range(4) if layout == "mixtral" else [None]
    expected = [f"L{i}{'' if e is None else f'E{e}'}N{n}" for i in range(2) for e in experts for n in wanted]
    assert names == expected
    assert torch.equal(some, every[[labels.index(name) for name in names]])


def test_an_experts_row_is_what_the_mlp_loses_without_it(bridge, cache, x, layout):
    if layout != "mixtral":
        with pytest.raises(ValueError, match="this model's MLPs are dense; use stack_neuron_results"):
            cache.stack_expert_results()
        return
    stack, labels = cache.stack_expert_results(return_labels=True)
    assert labels == [f"L{i}E{e}" for i in range(3) for e in range(4)]
    chosen = cache["expert_indices", 2]

    def remove(out, hook):
        out[chosen == 3] = 0

    with bridge.hooks(fwd_hooks=[("blocks.2.mlp.hook_expert_out", remove)]):
        _, without = bridge.run_with_cache(x, names_filter="blocks.2.hook_mlp_out")
    torch.testing.assert_close(stack[-1], cache["mlp_out", 2] - without["mlp_out", 2], **CLOSE)
    for layer in range(3):
        torch.testing.assert_close(stack[layer * 4 : layer * 4 + 4].sum(0), cache["mlp_out", layer], **CLOSE)


@pytest.mark.parametrize("stacked", ["stack_head_results", "stack_neuron_results"])
def test_a_remainder_completes_the_stream(cache, stacked):
    stack, labels = getattr(cache, stacked)(layer=2, incl_remainder=True, return_labels=True)
    assert labels[-1] == "remainder"
    torch.testing.assert_close(stack.sum(0), cache["resid_pre", 2], **CLOSE)
    final = getattr(cache, stacked)(layer=-1, incl_remainder=True, pos_slice=-1)
    torch.testing.assert_close(final.sum(0), cache["resid_post", -1][:, -1], **CLOSE)


# -- to logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer, mlp_input, reader", [(0, False, "attn"), (1, True, "mlp"), (None, False, None)])
def test_a_normed_stack_sums_to_what_the_reader_reads(bridge, cache, layer, mlp_input, reader):
    stack = cache.get_full_resid_decomposition(layer, mlp_input, expand_neurons=False)
    normed = cache.apply_ln_to_stack(stack, layer, mlp_input).sum(0)
    read = cache["ln_final.hook_out"] if reader is None else cache[f"blocks.{layer}.{reader}.hook_in"]
    second = "ln2" if mlp_input and "ln2" in bridge.blocks[0]._modules else "ln1"
    norm = bridge.ln_final if reader is None else bridge.get_submodule(f"blocks.{layer}.{second}")
    torch.testing.assert_close(
        normed + norm.b, read, rtol=0, atol=1e-6 if "RMS" in bridge.cfg.normalization_type else 1e-9
    )
    if layer is None:
        again = cache.get_full_resid_decomposition(expand_neurons=False, apply_ln=True)
        torch.testing.assert_close(again.sum(0), normed, **CLOSE)


def test_attributions_sum_to_the_logit(bridge, cache, x):
    logits = cache["unembed.hook_out"]
    stack = cache.get_full_resid_decomposition(expand_neurons=True)
    constant = bridge.ln_final.b @ bridge.unembed.W_U + bridge.unembed.b_U
    one = cache.logit_attrs(stack, 7)
    torch.testing.assert_close(one.sum(0) + constant[7], logits[..., 7], rtol=0, atol=1e-5)
    right, wrong = torch.tensor([3, 9, 11]), torch.tensor([5, 5, 8])
    of_texts = cache.logit_attrs(stack, right, wrong).sum(0)
    rows = torch.arange(3)
    expected = logits[rows, :, right] - logits[rows, :, wrong] - (constant[right] - constant[wrong])[:, None]
    torch.testing.assert_close(of_texts, expected, rtol=0, atol=1e-5)
    each = cache.logit_attrs(stack, x).sum(0)
    expected = logits.gather(-1, x[..., None])[..., 0] - constant[x]
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-5)
    last = cache.logit_attrs(stack[:, :, -1], right[1:], pos_slice=-1, batch_slice=(1, None))
    torch.testing.assert_close(last, cache.logit_attrs(stack, right)[:, 1:, -1], **CLOSE)


@pytest.mark.parametrize("chosen", [[1, 0], [2, 0, 1], np.array([True, False, True]), np.int64(1), (1, None), -1])
def test_a_batch_slice_chooses_texts_of_stack_and_scale_alike(cache, chosen):
    stack = cache.get_full_resid_decomposition(expand_neurons=False)
    index = slice(*chosen) if isinstance(chosen, tuple) else chosen
    torch.testing.assert_close(
        cache.apply_ln_to_stack(stack, batch_slice=chosen), cache.apply_ln_to_stack(stack)[:, index], **CLOSE
    )
    right = torch.tensor([3, 9, 11])
    torch.testing.assert_close(
        cache.logit_attrs(stack, right[index], batch_slice=chosen), cache.logit_attrs(stack, right)[:, index], **CLOSE
    )
    recomputed = cache.apply_ln_to_stack(stack, batch_slice=chosen, recompute_ln=True)
    torch.testing.assert_close(recomputed, cache.apply_ln_to_stack(stack, recompute_ln=True)[:, index], **CLOSE)


def test_a_stack_of_one_text_takes_the_scale_of_that_text(cache):
    stack = cache.decompose_resid()
    found = cache.apply_ln_to_stack(stack[:, 2], batch_slice=2, has_batch_dim=False)
    torch.testing.assert_close(found, cache.apply_ln_to_stack(stack)[:, 2], **CLOSE)


def test_no_lens_on_a_model_without_an_unembedding(x):
    torch.manual_seed(0)
    model = FalconForSequenceClassification(falcon_config(num_labels=3, pad_token_id=0)).eval()
    bridge = TransformerBridge(model)
    _, cache = bridge.run_with_cache(x)
    told = "this model class has no unembedding; its output is that of 'score'"
    for lens in (
        cache.logit_lens,
        lambda: TunedLens(bridge),
        lambda: cache.logit_attrs(cache.decompose_resid(), 3),
        lambda: SVDInterpreter(bridge).get_singular_vectors("w_in", 0),
    ):
        with pytest.raises(ValueError, match=told):
            lens()
    with pytest.raises(KeyError, match=told):
        direct_logit_attribution(bridge, cache, 3)


def test_the_lens_is_the_models_own_head_on_the_stream(bridge, cache, x):
    model = bridge.original_model
    norm, head = bridge.ln_final.original_component, bridge.unembed.original_component
    lens, labels = cache.logit_lens(return_labels=True)
    hidden = [*model(x, output_hidden_states=True).hidden_states[:3], cache["resid_post", 2]]
    assert len(lens) == len(labels) == len(hidden)
    for found, stream in zip(lens, hidden, strict=True):
        torch.testing.assert_close(found, head(norm(stream)), rtol=0, atol=1e-5)
    torch.testing.assert_close(lens[-1], model(x).logits, rtol=0, atol=1e-5)


def test_half_precision_attributes_in_single(x):
    bridge = TransformerBridge(family("40b", dtype=torch.bfloat16))
    _, cache = bridge.run_with_cache(x)
    stack = cache.decompose_resid()
    assert stack.dtype == torch.bfloat16
    assert cache.logit_attrs(stack, 4).dtype == torch.float32


# -- one text, some texts, and what does not fit -------------------------------------------------------


def test_a_cache_without_batch_axis(bridge, cache, x):
    _, single = bridge.run_with_cache(x[1:2], remove_batch_dim=True)
    stack = single.get_full_resid_decomposition(expand_neurons=False)
    torch.testing.assert_close(stack.sum(0), single["resid_post", -1], **CLOSE)
    assert stack.shape[1:] == (5, 32)
    both = cache.logit_attrs(cache.get_full_resid_decomposition(expand_neurons=False), 4)
    torch.testing.assert_close(single.logit_attrs(stack, 4), both[:, 1], rtol=0, atol=1e-6)


def test_some_texts_of_a_cache(cache):
    one = cache.apply_slice_to_batch_dim(1)
    assert not one.has_batch_dim and cache.has_batch_dim
    assert torch.equal(one["q", 0], cache["q", 0][1])
    with pytest.raises(ValueError, match="this cache has no batch axis"):
        one.apply_slice_to_batch_dim(0)
    some = cache.apply_slice_to_batch_dim([2, 0])
    assert some.has_batch_dim
    assert torch.equal(some["resid_post", -1], cache["resid_post", -1][[2, 0]])
    torch.testing.assert_close(some.stack_head_results(), cache.stack_head_results()[:, [2, 0]], **CLOSE)


def test_what_does_not_fit_is_refused(cache, x):
    stack = cache.decompose_resid()
    with pytest.raises(ValueError, match=r"layer: got 4, expected 0 to 3 .*, -1 or None for all"):
        cache.decompose_resid(4)
    with pytest.raises(ValueError, match="got mode='neurons', expected 'all', 'attn' or 'mlp'"):
        cache.decompose_resid(mode="neurons")
    with pytest.raises(ValueError, match=r"give the pos_slice that the stack was made with"):
        cache.logit_attrs(stack[:, :, -1], 4)
    with pytest.raises(ValueError, match=r"expected all 3 texts along its second axis, of which batch_slice chooses"):
        cache.logit_attrs(stack[:, 1:], 4, batch_slice=(1, None))
    with pytest.raises(ValueError, match=r"residual_stack: got a .* tensor of shape .*, expected \[component"):
        cache.apply_ln_to_stack(stack[..., :3])
    with pytest.raises(ValueError, match="batch_slice: got 0, and this cache has no batch axis"):
        cache.apply_slice_to_batch_dim(0).apply_ln_to_stack(stack[:, 0], batch_slice=0)
    with pytest.raises(ValueError, match=r"got tokens of \[2\], expected one for all, or as many .*: \[3, 5\]"):
        cache.logit_attrs(stack, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"got tokens of \[3\] and incorrect_tokens of \[3, 5\], expected equal"):
        cache.logit_attrs(stack, torch.tensor([3, 4, 5]), x)
    with pytest.raises(ValueError, match=r"got tokens of \[3\] and incorrect_tokens of \[1\], expected equal"):
        cache.logit_attrs(stack, torch.tensor([3, 4, 5]), torch.tensor([3]))
    with pytest.raises(KeyError, match="was not captured"):
        cache.apply_slice_to_batch_dim(0)["result", 0]


def test_a_cache_that_lacks_a_part_says_which(bridge, x):
    _, cache = bridge.run_with_cache(x, names_filter="hook_embed")
    with pytest.raises(KeyError, match="hook_attn_out' was not captured"):
        cache.decompose_resid()
