"""Relatives of Llama with LayerNorms: each row says how a family differs.

Source: the modeling files of these families in transformers >= 5.13.
"""

from collections.abc import Mapping
from typing import Any

from transformer_lens.model_bridge.generalized_components import (
    PARALLEL_ONE_NORM,
    SEQUENTIAL,
    BareLayerNormBridge,
    BiaslessLayerNormBridge,
    LayerNormBridge,
    MLPBridge,
    OffsetLayerNormBridge,
    Part,
    PositionEmbeddingsAttentionBridge,
    Stages,
    linears,
)
from transformer_lens.model_bridge.supported_architectures import by_type, row
from transformer_lens.model_bridge.supported_architectures.llama import (
    BIASES,
    NAMES,
    PLAIN,
    PROJECTIONS,
    WINDOWED,
    Llama,
    attends,
    in_windows,
    normed_if_asked,
)

CENTRED = {**NAMES, "eps": "layer_norm_eps"}
"""The config names of a family with LayerNorms."""
COHERE: Mapping[str, Any] = {
    "stages": PARALLEL_ONE_NORM,
    "norm": BiaslessLayerNormBridge,
    "logit_multiplier": "logit_scale",
    "harmless": (*Llama.harmless, "logit_scale"),
}


class StableLmArchitectureAdapter(Llama):
    """Llama with LayerNorms and partial RoPE; attention and MLP in parallel or in sequence."""

    model_type = "stablelm"
    norm = LayerNormBridge
    cfg_names = CENTRED
    config_keys = ("use_parallel_residual",)
    dropouts = ("attention_dropout", "hidden_dropout")
    harmless = (*Llama.harmless, "use_qkv_bias")

    def stages_of(self) -> Stages:
        return PARALLEL_ONE_NORM if self.config.use_parallel_residual else SEQUENTIAL


FAMILIES = by_type(
    StableLmArchitectureAdapter,
    row(
        Llama,
        "jais2",
        "Llama with LayerNorms, biases and a plain MLP: a squared ReLU.",
        norm=LayerNormBridge,
        dense=PLAIN,
        cfg_names=CENTRED,
    ),
    row(
        Llama,
        "olmo",
        "Llama with LayerNorms that have no weights.",
        norm=BareLayerNormBridge,
        cfg_names={name: at for name, at in NAMES.items() if name != "eps"},
        constants={"eps": 1e-5},
    ),
    row(
        Llama,
        "phi",
        "Parallel attention and plain MLP after one LayerNorm; biases everywhere, partial RoPE.",
        norm=LayerNormBridge,
        stages=PARALLEL_ONE_NORM,
        attention=attends(PositionEmbeddingsAttentionBridge, {**PROJECTIONS, "o": "dense"}),
        dense=Part(MLPBridge, "mlp", linears({"in": "fc1", "out": "fc2"})),
        ln_final="final_layernorm",
        cfg_names=CENTRED,
        dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"),
    ),
    row(
        Llama,
        "starcoder2",
        "Llama with LayerNorms, biases and a plain MLP.",
        norm=LayerNormBridge,
        dense=Part(MLPBridge, "mlp", linears({"in": "c_fc", "out": "c_proj"})),
        cfg_names={**WINDOWED, "eps": "norm_epsilon"},
        dropouts=("attention_dropout", "residual_dropout", "embedding_dropout"),
        harmless=BIASES,
    ),
    row(
        Llama,
        "nemotron",
        "LayerNorms that multiply by one plus their weight, and a plain MLP: a squared ReLU.",
        norm=OffsetLayerNormBridge,
        dense=PLAIN,
        cfg_names={**NAMES, "eps": "norm_eps"},
    ),
    row(
        Llama,
        "cohere",
        "Parallel attention and MLP after one LayerNorm without a bias; scaled logits.",
        **COHERE,
        cfg_names=CENTRED,
        config_keys=("use_qk_norm",),
        mixers=normed_if_asked,
    ),
    row(
        Llama,
        "cohere2",
        "Cohere with sliding-window attention in most layers, and no position encoding in the others.",
        **COHERE,
        cfg_names={**CENTRED, "sliding_window": "sliding_window"},
        config_keys=("layer_types",),
        rotates=in_windows,
    ),
)
