"""Weights that cannot be rewritten are refused in a sentence, and nothing is changed."""

import warnings

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from tests.families.models import MODELS, build
from tests.processing.test_undo import same, snapshot
from tests.support import falcon, family, mixtral, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    JointQKVPositionEmbeddingsAttentionBridge,
    LayerNormBridge,
    MLPBridge,
)

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def refuses(model, sentence, steps=("enable_compatibility_mode", "fold_ln")):
    bridge = TransformerBridge(model)
    before = [(path, id(p), p.data_ptr() if type(p) is nn.Parameter else 0) for path, p in model.named_parameters()]
    for step in steps:
        with pytest.raises(ValueError) as caught:
            getattr(bridge, step)()
        assert str(caught.value) == f"weights cannot be processed: {sentence}. Nothing was changed"
        after = [(path, id(p), p.data_ptr() if type(p) is nn.Parameter else 0) for path, p in model.named_parameters()]
        assert after == before
        assert bridge.processed == ()
    return bridge


def exchanged(model, linear, **changes):
    """The model with another kind of linear layer in place of the second block's MLP input."""
    mlp = model.transformer.h[1].mlp
    old = mlp.dense_h_to_4h
    new = linear(old.in_features, old.out_features, bias=old.bias is not None, **changes)
    new.load_state_dict(old.state_dict())
    mlp.dense_h_to_4h = new.to("cpu")
    return model


MLP_IN = "transformer.h.1.mlp.dense_h_to_4h.weight"


def test_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
    eight = exchanged(falcon(), bnb.nn.Linear8bitLt, has_fp16_weights=False)
    refuses(eight, f"{MLP_IN}: it is a Int8Params, quantised or sharded; load the model whole, in a float dtype")
    four = exchanged(falcon(), bnb.nn.Linear4bit)
    refuses(four, f"{MLP_IN}: it is a Params4bit, quantised or sharded; load the model whole, in a float dtype")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtypes_of_quantised_weights(dtype):
    model = falcon()
    linear = model.transformer.h[1].mlp.dense_h_to_4h
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    refuses(model, f"{MLP_IN}: it holds {dtype}, which is quantised; load a float dtype")


def test_offloaded_weights():
    model = falcon(tie_word_embeddings=False)
    cpu_offload(model.transformer.h[1], execution_device="cpu")
    sentence = "transformer.h.1.input_layernorm.weight: it is offloaded (on the meta device); "
    bridge = refuses(model, sentence + "load the model without offloading")
    bridge.center_unembed()  # what it needs is there
    assert bridge.processed == ("center_unembed",)


@pytest.mark.parametrize(
    ("target", "place", "allowed"),
    [
        ("query_key_value", "transformer.h.0.self_attention.query_key_value.weight", "center_unembed"),
        ("dense", "transformer.h.0.self_attention.dense.weight", "fold_ln"),
        ("dense_4h_to_h", "transformer.h.0.mlp.dense_4h_to_h.weight", "fold_value_biases"),
    ],
)
def test_adapters_that_are_not_merged(target, place, allowed):
    peft = pytest.importorskip("peft", reason="the extra 'peft' is not installed")
    model = falcon(tie_word_embeddings=False, bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], init_lora_weights=False))
    sentence = f"{place}: an adapter (Linear) sits on it; merge it first, model = model.merge_and_unload(), and make "
    bridge = refuses(model.eval(), sentence + "a bridge for that", steps=("enable_compatibility_mode",))
    x = tokens()
    before = model(x).logits.log_softmax(-1)
    with getattr(bridge, allowed)():  # a step that leaves the adapter's weight alone
        assert (model(x).logits.log_softmax(-1) - before).abs().max() < 1e-5
    bridge.detach()
    merged = tuned.merge_and_unload()
    bridge = TransformerBridge(merged)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert bridge.processed == STEPS
    assert (bridge(x).log_softmax(-1) - before).abs().max() < 1e-5


def test_adapters_on_experts():
    peft = pytest.importorskip("peft", reason="the extra 'peft' is not installed")
    model = mixtral()
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config)
    refuses(
        model,
        "model.layers.0.mlp.experts.gate_up_proj: an adapter (ParamWrapper) sits on it; merge it first, "
        "model = model.merge_and_unload(), and make a bridge for that",
    )


def test_parametrised_weights():
    model = falcon()
    nn.utils.parametrizations.weight_norm(model.transformer.h[1].mlp.dense_h_to_4h)
    refuses(model, f"{MLP_IN}: its ParametrizedFalconLinear has no such parameter of its own")


def test_a_missing_weight():
    model = falcon()
    model.transformer.h[1].mlp.dense_h_to_4h.weight = None
    refuses(model, f"{MLP_IN}: its FalconLinear holds no parameter there")


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = falcon()
    sentence = (
        "transformer.h.0.input_layernorm.weight: it was made under torch.inference_mode(); load the model outside"
    )
    refuses(model, f"{sentence} it")


def test_weights_shared_by_layers():
    model = falcon()
    mlps = [block.mlp for block in model.transformer.h]
    mlps[1].dense_h_to_4h.weight = mlps[0].dense_h_to_4h.weight
    place, other = MLP_IN.replace(".1.", ".0."), MLP_IN
    refuses(model, f"{place}: it is shared with {other}; give each a weight of its own")


def test_tied_weights_that_somebody_else_shares():
    model = falcon(tie_word_embeddings=True)
    model.third = nn.Embedding(61, 32)
    model.third.weight = model.lm_head.weight
    refuses(
        model,
        "lm_head.weight: it is shared with transformer.word_embeddings.weight, third.weight; "
        "give each a weight of its own",
    )


def test_a_weight_of_another_shape():
    model = falcon()
    model.transformer.h[1].mlp.dense_h_to_4h.weight = nn.Parameter(torch.zeros(48, 16))
    refuses(model, f"{MLP_IN}: its shape is [48, 16], and axis -1 should be d_model 32")


# -- components that do not say enough -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "attribute", "value", "step", "sentence"),
    [
        (
            LayerNormBridge,
            "affine",
            None,
            "fold_ln",
            "h.0.input_layernorm.weight: LayerNormBridge does not know the formula",
        ),
        (MLPBridge, "reads", (), "fold_ln", "h.0.mlp.weight: MLPBridge does not say which of its weights read"),
        (
            MLPBridge,
            "writes",
            (),
            "center_writing_weights",
            "h.0.mlp.weight: MLPBridge does not say which of its weights w",
        ),
        (
            JointQKVPositionEmbeddingsAttentionBridge,
            "places",
            {},
            "fold_value_biases",
            "h.0.self_attention.bias: JointQKVPositionEmbeddingsAttentionBridge does not say where its values are",
        ),
    ],
)
def test_a_component_that_does_not_say_enough(monkeypatch, kind, attribute, value, step, sentence):
    model = falcon(bias=True)
    bridge, before = TransformerBridge(model), snapshot(model)
    monkeypatch.setattr(kind, attribute, value)
    with pytest.raises(ValueError, match=f"^weights cannot be processed: transformer.{sentence}"):
        getattr(bridge, step)()
    assert same(model, before)


def test_a_norm_with_a_bias_before_weights_that_take_none(monkeypatch):
    model = falcon()
    bridge, before = TransformerBridge(model), snapshot(model)
    matrix = MLPBridge.reads[0]
    monkeypatch.setattr(MLPBridge, "reads", (type(matrix)(matrix.role, bias=""),))
    with pytest.raises(ValueError, match="the norm in front has a bias, and this module has none"):
        bridge.fold_ln()
    assert same(model, before)


def test_norms_without_parameters_are_folded_already():
    model, x = falcon(), tokens()
    for block in model.transformer.h:
        block.input_layernorm = nn.LayerNorm(32, elementwise_affine=False)
    before = model(x).logits
    bridge = TransformerBridge(model)
    changes = bridge.fold_ln()
    assert not any(path.startswith("transformer.h.") for path in changes.changed)
    assert (model(x).logits - before).abs().max() < 1e-5


def test_rms_norms_read_the_mean_that_centring_would_take():
    model = mixtral()
    bridge, before = TransformerBridge(model), snapshot(model)
    with pytest.raises(ValueError) as caught:
        bridge.center_writing_weights()
    assert str(caught.value) == (
        "center_writing_weights: the norms of this model (RMSNormBridge) do not take the mean off "
        "the stream, so the mean of what is written there counts. Nothing was changed"
    )
    assert same(model, before)


# -- other families --------------------------------------------------------------------------------------

PLAIN = ("fold_ln", "center_unembed", "fold_value_biases")  # RMSNorm
CENTRED = (
    "jais2",
    "olmo",
    "phi",
    "starcoder2",
    "nemotron",
    "stablelm",
    "cohere",
    "gpt_neox",
    "gpt_neo",
    "gptj",
    "gpt2",
    "gpt_bigcode",
    "bloom",
    "persimmon",
)
OTHERS = {
    **{name: STEPS for name in MODELS if name.split(",")[0] in (*CENTRED, "cohere2", "cohere2_moe")},
    # Capped logits.
    **dict.fromkeys(["gemma2", "vaultgemma"], ("fold_ln", "fold_value_biases")),
    # A mixer does not say which of its weights read the stream.
    **{name: PLAIN[1:] for name in MODELS if name.startswith(("lfm2", "falcon_h1", "jamba"))},
    # A gate or a norm between the values and W_O, or sinks.
    **{name: PLAIN[:2] for name in MODELS if name.startswith(("bitnet", "afmoe", "flint"))},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), ("center_unembed",)),
    "aria_text": PLAIN[1:],  # its experts lie otherwise
    "phimoe": ("center_writing_weights", *PLAIN[1:]),  # its norm has a bias, and its router takes none
    "gpt_oss": ("center_unembed",),  # sinks, and experts that lie otherwise
}
# A norm, a scale of the logits, a softmax or a router computes in float32.
IN_FLOAT32 = (
    "gemma",
    "vaultgemma",
    "helium",
    "olmo",
    "cohere",
    "dots1",
    "glm4_moe",
    "sarvam",
    "hy_v3",
    "solar",
    "exaone_moe",
    "deepseek",
    "sarvam_mla",
    "bloom",
    "afmoe",
    "flint",
    "glm_moe_dsa",
    "kolibri1",
)


@pytest.mark.parametrize("name", MODELS)
def test_other_families_keep_their_predictions_or_refuse(name):
    narrow = name.startswith((*IN_FLOAT32, "ernie4_5_moe"))
    dtype, tolerance = torch.float64, 1e-5 if narrow else 1e-10
    model, x = build(name).to(dtype), tokens()
    model.config._experts_implementation = "eager"  # grouped experts run in no float64
    with torch.no_grad():
        before = model(x).logits.log_softmax(-1)
    bridge, state = TransformerBridge(model), snapshot(model)
    wanted = OTHERS.get(name, PLAIN)
    for step in STEPS:
        if step in wanted:
            getattr(bridge, step)()
            continue
        held = snapshot(model)
        with pytest.raises(ValueError, match="Nothing was changed"):
            getattr(bridge, step)()
        assert same(model, held)
    assert bridge.processed == wanted
    with torch.no_grad():
        assert (model(x).logits.log_softmax(-1) - before).abs().max() < tolerance
    bridge.detach()
    assert same(model, state)


def test_layouts_are_not_confused_by_their_names():
    # The layer norms of 40b are two, and each feeds its own branch.
    model = family("40b")
    norms = {
        branch: getattr(model.transformer.h[0], f"ln_{branch}").weight.detach().clone() for branch in ("attn", "mlp")
    }
    qkv, up = model.transformer.h[0].self_attention.query_key_value, model.transformer.h[0].mlp.dense_h_to_4h
    old = qkv.weight.detach().clone(), up.weight.detach().clone()
    TransformerBridge(model).fold_ln()
    assert torch.equal(qkv.weight, old[0] * norms["attn"])
    assert torch.equal(up.weight, old[1] * norms["mlp"])
