"""Relatives of Llama with LayerNorms: each row says what a family has otherwise.

Source: the modeling files of these families in transformers >= 5.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_lens.model_bridge.generalized_components import (
    PARALLEL_ONE_NORM,
    SEQUENTIAL,
    BareLayerNormBridge,
    BiaslessLayerNormBridge,
    FinalBareLayerNormBridge,
    FinalBiaslessLayerNormBridge,
    FinalLayerNormBridge,
    FinalOffsetLayerNormBridge,
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
"""The names of a family with LayerNorms."""
LAYER_NORM: Mapping[str, Any] = {"norm": LayerNormBridge, "final_norm": FinalLayerNormBridge}
COHERE: Mapping[str, Any] = {
    "stages": PARALLEL_ONE_NORM,
    "norm": BiaslessLayerNormBridge,
    "final_norm": FinalBiaslessLayerNormBridge,
    "logit_multiplier": "logit_scale",
    "harmless": (*Llama.harmless, "logit_scale"),
}


class StableLmArchitectureAdapter(Llama):
    """Llama with LayerNorms, side by side behind one of them or one after the other; some dimensions turn."""

    model_type = "stablelm"
    norm, final_norm = LayerNormBridge, FinalLayerNormBridge
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
        **LAYER_NORM,
        dense=PLAIN,
        cfg_names=CENTRED,
    ),
    row(
        Llama,
        "olmo",
        "Llama with LayerNorms that have no weights.",
        norm=BareLayerNormBridge,
        final_norm=FinalBareLayerNormBridge,
        cfg_names={name: at for name, at in NAMES.items() if name != "eps"},
        constants={"eps": 1e-5},
    ),
    row(
        Llama,
        "phi",
        "Attention and a plain MLP side by side behind one LayerNorm; biases everywhere, some dimensions turn.",
        **LAYER_NORM,
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
        **LAYER_NORM,
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
        final_norm=FinalOffsetLayerNormBridge,
        dense=PLAIN,
        cfg_names={**NAMES, "eps": "norm_eps"},
    ),
    row(
        Llama,
        "cohere",
        "Attention and MLP side by side behind one LayerNorm without a bias; logits are multiplied by a number.",
        **COHERE,
        cfg_names=CENTRED,
        config_keys=("use_qk_norm",),
        mixers=normed_if_asked,
    ),
    row(
        Llama,
        "cohere2",
        "Cohere where most layers look back over a window, and the others are told no positions.",
        **COHERE,
        cfg_names={**CENTRED, "sliding_window": "sliding_window"},
        config_keys=("layer_types",),
        rotates=in_windows,
    ),
)
