"""Processing leaves the predictions, and changes every activation by exactly what its algebra says.

The oracle is the bare Hugging Face model and the cache of the unprocessed bridge: for each step it is said which hooks
change, and how; all others have to stay.
"""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import FalconForSequenceClassification, FalconModel

from tests.equivalence.grid import each_layout
from tests.support import FAMILIES, LAYOUTS, falcon, falcon_config, family, mixtral, perturbed, tokens
from transformer_lens import TransformerBridge

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
FOR_RMS = ("fold_ln", "center_unembed", "fold_value_biases")

CASES = [
    pytest.param({**point.values[0], "tie_word_embeddings": number % 3 == 0}, id=point.id, marks=point.marks)
    for number, point in enumerate(each_layout(turn=0, turns=2))
]


def log_probs(model, x):
    with torch.no_grad():
        return F.log_softmax(model(x).logits, -1)


def everything(bridge, x):
    """Every hook's value, those on request too."""
    with torch.no_grad():
        return bridge.run_with_cache(x, names_filter=lambda name: True)[1].cache_dict


def processed(model, dtype, **changes):
    """A bridge whose processing says nothing, and the steps it went through."""
    bridge = TransformerBridge(model.to(dtype))
    bridge.enable_compatibility_mode(disable_warnings=True, **changes)
    return bridge


# -- all layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.filterwarnings("ignore:Falcon with ALiBi under eager")
def test_predictions_stay_on_every_falcon_layout(changes):
    attn = "eager" if changes["num_kv_heads"] in (2, 4) else "sdpa"
    model, x = falcon(attn, **changes), tokens()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = model.to(dtype)
        before = log_probs(model, x)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        bridge = processed(model, dtype)
        assert bridge.processed == STEPS
        assert not torch.equal(model.transformer.h[1].mlp.dense_h_to_4h.weight, state[MLP_IN])
        assert (log_probs(model, x) - before).abs().max() < tolerance
        bridge.detach()
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], value) for name, value in state.items())
        assert torch.equal(log_probs(model, x), before)


MLP_IN = "transformer.h.1.mlp.dense_h_to_4h.weight"


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_a_trained_model_is_no_further_from_the_truth_than_it_was(name):
    """Float32 rounds log-probabilities of -30 by more than 1e-5, processed or not; float64 tells."""
    bridge = TransformerBridge.boot_transformers(name)
    model = bridge.original_model
    if name == "tiny-mixtral":
        model.set_experts_implementation("eager")  # grouped experts run in no float64
    x = bridge.to_tokens("When Mary and John went to the store, John gave a drink to")
    bare = log_probs(model, x)
    with bridge.enable_compatibility_mode(disable_warnings=True):
        after = log_probs(model, x)
    bridge.to(torch.float64)
    truth = log_probs(model, x)
    with bridge.enable_compatibility_mode(disable_warnings=True):
        assert (log_probs(model, x) - truth).abs().max() < 1e-12
    assert (after - truth).abs().max() < 1.5 * (bare - truth).abs().max()
    assert (after.exp() - bare.exp()).abs().max() < 1e-5


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kv", [1, 2, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_predictions_stay_on_mixtral(experts, kv, tied):
    model, x = mixtral(experts=experts, num_key_value_heads=kv, tie_word_embeddings=tied), tokens()
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # grouped_mm has no float64
    truth, before = log_probs(exact, x), log_probs(model, x)
    bridge = processed(model, torch.float32)
    assert bridge.processed == FOR_RMS
    # The bare models are off by 3e-6 to 1e-5 themselves, which one by how much depends on the processor.
    off, bare = (float((found - truth).abs().max()) for found in (log_probs(model, x), before))
    assert bare < 1.05e-5 and off < max(2 * bare, 1.05e-5)
    bridge.detach()
    assert torch.equal(log_probs(model, x), before)


@pytest.mark.parametrize("changes", CASES)
def test_each_step_changes_what_it_says_on_every_falcon_layout(changes):
    check_every_hook(falcon(dtype=torch.float64, **changes), STEPS, 1e-11)


def test_each_step_changes_what_it_says_on_mixtral():
    # Its norms round to float32 inside, whatever the dtype.
    check_every_hook(mixtral(experts="eager", dtype=torch.float64), FOR_RMS, 2e-5)


# -- what each step does to every hook -------------------------------------------------------------------


def mean_off(value):
    return value - value.mean(-1, keepdim=True)


STREAMS = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
STREAMS += ("hook_mlp_in", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


def value_bias(bridge, name):
    """b_V of a hook's layer, by transformers' own reading of the fused bias; zero where there is none."""
    attention = bridge.original_model.transformer.h[int(name.split(".")[1])].self_attention
    bias = attention.query_key_value.bias
    if bias is None:
        return torch.zeros((), dtype=torch.float64)
    v = attention._split_heads(bias[None, None])[2][0, 0]
    return v.detach().clone()


def expected(step, bridge, name, old, cache, biases):
    """The value of a hook after a step, from the values before it."""
    last = name.rpartition(".")[2]
    if step == "fold_ln" and name.endswith(("attn.hook_in", "mlp.hook_in")):
        block = name.rpartition(".")[0].rpartition(".")[0]
        norm = "ln1" if "attn" in name or f"{block}.ln2.hook_normalized" not in cache else "ln2"
        return cache[f"{block}.{norm}.hook_normalized"]
    if step == "fold_ln" and name == "ln_final.hook_out":
        return cache["ln_final.hook_normalized"]
    if step == "center_writing_weights" and last in STREAMS:
        return mean_off(old)
    if step == "center_writing_weights" and last == "hook_result":
        return mean_off(old)
    if step == "center_unembed" and name == "unembed.hook_out":
        return mean_off(old)
    if step == "fold_value_biases" and name in biases:
        return old - biases[name]
    return old


def check_every_hook(model, steps, tolerance):
    bridge, x = TransformerBridge(model), tokens()
    fused = hasattr(model, "transformer")
    for step in steps:
        before = everything(bridge, x)
        biases = {}
        if step == "fold_value_biases" and fused:
            for name in before:
                if name.endswith(("attn.hook_z", "attn.hook_v", "attn.hook_result")):
                    v = value_bias(bridge, name)
                    heads = bridge.cfg.n_heads
                    per_head = v if v.ndim == 0 or len(v) == heads else v.expand(heads, -1)
                    if name.endswith("hook_v"):
                        per_head = per_head if v.ndim == 0 else per_head[:: heads // bridge.cfg.n_key_value_heads]
                    if name.endswith("hook_result"):
                        dense = model.transformer.h[int(name.split(".")[1])].self_attention.dense.weight
                        each = dense.detach().unflatten(-1, (heads, -1))
                        per_head = torch.stack(
                            [each[:, h] @ per_head.expand(heads, each.shape[-1])[h] for h in range(heads)]
                        )
                    biases[name] = per_head
        getattr(bridge, step)()
        after = everything(bridge, x)
        assert list(after) == list(before)
        for name, value in after.items():
            wanted = expected(step, bridge, name, before[name], before, biases)
            finite = torch.isfinite(wanted)
            assert torch.equal(finite, torch.isfinite(value)), (step, name)
            # Scores of masked keys are the lowest number of the dtype.
            error = ((value - wanted) / wanted.abs().clamp(min=1))[finite].abs().max()
            assert error < tolerance, (step, name, error)
    assert bridge.processed == tuple(steps)
    check_weights(bridge, steps, tolerance)


def check_weights(bridge, steps, tolerance):
    """What the weights themselves say afterwards."""
    for component in bridge.components():
        if component.name.rpartition(".")[2] in ("ln1", "ln2", "ln_final"):
            norm = component.original_component
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
            assert getattr(norm, "bias", None) is None or not norm.bias.any()
    logits = bridge(tokens())
    assert logits.mean(-1).abs().max() < tolerance
    if "center_writing_weights" in steps:
        cache = everything(bridge, tokens())
        written = [name for name in cache if name.rpartition(".")[2] in STREAMS]
        assert len(written) >= 1 + 6 * bridge.cfg.n_layers
        assert all(cache[name].mean(-1).abs().max() < tolerance for name in written)
    if hasattr(bridge.original_model, "transformer"):
        for block in bridge.original_model.transformer.h:
            attention = block.self_attention
            nothing = torch.zeros(1, 1, bridge.cfg.d_model, dtype=torch.float64)
            assert not attention._split_heads(attention.query_key_value(nothing))[2].any()


# -- other heads, other inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_generation_and_padding_stay(name):
    model, x = family(name, tie_word_embeddings=True), tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    bridge = TransformerBridge(model)
    real = mask.bool()
    loss, padded = bridge(x, return_type="loss"), bridge(x, attention_mask=mask).log_softmax(-1)[real]
    said = model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert (bridge(x, return_type="loss") - loss).abs() < 1e-5
    assert (bridge(x, attention_mask=mask).log_softmax(-1)[real] - padded).abs().max() < 1e-5
    assert torch.equal(model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0), said)


@pytest.mark.parametrize("name", FAMILIES)
def test_verify_ablations_and_gradients_are_right_after_processing(name):
    model, x = family(name), tokens()
    bridge = TransformerBridge(model)

    def silence(z, hook):
        z[:, :, 1] = 0

    places = ("blocks.0.attn.hook_z", "blocks.1.hook_mlp_out")
    grads = {}

    def keep(grad, hook):
        grads.setdefault(hook.name, []).append(grad.clone())

    def shuffled(value, hook):
        # A constant along d_model would be seen by RMSNorm alone, so the edit is one that both norms see.
        return value + torch.linspace(-1, 1, value.shape[-1])

    def predictions():
        edits = (silence, shuffled)
        hooked = [[pair] for pair in zip(places, edits, strict=True)]
        return [bridge.run_with_hooks(x, fwd_hooks=hooks).log_softmax(-1) for hooks in hooked]

    def loss_gradient():
        with bridge.hooks(bwd_hooks=[("blocks.0.hook_attn_out", keep)]):
            bridge(x, return_type="loss").backward()

    # Without value biases a silenced head writes the same in both: zero.
    changes = {"fold_value_biases": False, "disable_warnings": True}
    before = predictions()
    loss_gradient()
    bridge.enable_compatibility_mode(**changes)
    after = predictions()
    loss_gradient()
    for old, new in zip(before, after, strict=True):
        assert (new - old).abs().max() < 2e-5
    first, second = grads["blocks.0.hook_attn_out"]
    assert first.abs().max() > 1e-4
    assert (first - second).abs().max() < 1e-5
    bridge.zero_grad()
    bridge.fold_value_biases()
    report = bridge.verify()
    assert report.passed, str(report)


def test_a_model_without_head_keeps_its_output():
    model, x = perturbed(FalconModel(falcon_config(**LAYOUTS["40b"]))), tokens()
    before = model(x).last_hidden_state
    bridge = TransformerBridge(model)
    with pytest.warns(UserWarning, match="center_unembed is left out: FalconModel has no unembedding"):
        bridge.process_weights()
    assert bridge.processed == ("fold_ln", "center_writing_weights", "fold_value_biases")
    assert not torch.equal(model.ln_f.weight, torch.ones(32))
    assert (model(x).last_hidden_state - before).abs().max() < 1e-5
    with pytest.raises(ValueError, match="center_unembed: FalconModel has no unembedding. Nothing was changed"):
        bridge.center_unembed()


def test_a_classifier_keeps_its_scores():
    config = falcon_config(**LAYOUTS["7b"], num_labels=3, pad_token_id=0)
    model, x = perturbed(FalconForSequenceClassification(config)), tokens()
    before = model(x).logits
    bridge = TransformerBridge(model)
    bridge.fold_ln()
    assert torch.equal(model.transformer.ln_f.weight, torch.ones(32))
    assert (model(x).logits - before).abs().max() < 1e-5
    bridge.detach()
    assert model.score.bias is None


@pytest.mark.parametrize("name", ["7b", "rw", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_processed_in_float32_and_says_so(name, dtype):
    model = family(name, tie_word_embeddings=False)
    word = str(dtype).removeprefix("torch.")
    wide = TransformerBridge(model)
    rounded = {key: value.to(dtype) for key, value in model.state_dict().items()}
    model.load_state_dict(rounded)
    wide.enable_compatibility_mode(disable_warnings=True)
    exact = {key: value.clone() for key, value in model.state_dict().items()}
    wide.detach()
    narrow = TransformerBridge(model.to(dtype))
    with pytest.warns(UserWarning, match=f"the weights are {word}: they are processed in float32 and rounded back"):
        narrow.fold_ln()
    for key, value in model.state_dict().items():
        assert value.dtype == dtype
        if ".mlp." in key and "4h_to_h" not in key and "down" not in key:  # what fold_ln alone changes
            assert torch.equal(value, exact[key].to(dtype)), key
    narrow.detach()
    assert all(torch.equal(value, rounded[key]) for key, value in model.state_dict().items())
