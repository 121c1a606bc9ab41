"""Llama and its relatives without experts, with RMSNorms or LayerNorms: each row says how a family differs.

RMSNorm before each branch, RoPE attention with separate projections, a gated MLP. Source: the modeling files of these
families in transformers >= 5.13.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import transformer_lens.model_bridge.generalized_components as kinds
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter, refuse_unless_divisible
from transformer_lens.model_bridge.generalized_components import Branch, Part, Stages, linears
from transformer_lens.model_bridge.generalized_components.attention import SubNormedAttentionBridge
from transformer_lens.model_bridge.generalized_components.mlp import SubNormedMLPBridge
from transformer_lens.model_bridge.supported_architectures import by_type, row
from transformer_lens.model_bridge.upstream import attribute

PROJECTIONS = {role: f"{role}_proj" for role in "qkvo"}
"""The usual names of attention's projections, by role."""
NORMED = {**PROJECTIONS, "q_norm": "q_norm", "k_norm": "k_norm"}
NAMES = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_key_value_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_mlp": "intermediate_size",
    "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "act_fn": "hidden_act",
    "eps": "rms_norm_eps",
}
WINDOWED = {**NAMES, "sliding_window": "sliding_window"}


def attends(kind: type[Any], places: Mapping[str, str] = PROJECTIONS) -> Part:
    """A kind of attention, at its usual place."""
    return Part(kind, "self_attn", linears(places))


ROTATED, UNROTATED = attends(kinds.PositionEmbeddingsAttentionBridge), attends(kinds.UnrotatedAttentionBridge)
LATE_NORMED = attends(
    kinds.LateNormedQKAttentionBridge, {**PROJECTIONS, "q_late_norm": "query_layernorm", "k_late_norm": "key_layernorm"}
)
WHOLE_NORMED = attends(kinds.WholeNormedQKAttentionBridge, NORMED)
HEADS_FIRST = attends(kinds.HeadsFirstNormedQKAttentionBridge, NORMED)
GATED = Part(kinds.GatedMLPBridge, "mlp", linears({"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}))
FUSED = Part(kinds.FusedGatedMLPBridge, "mlp", linears({"gate_up": "gate_up_proj", "out": "down_proj"}))
PLAIN = Part(kinds.MLPBridge, "mlp", linears({"in": "up_proj", "out": "down_proj"}))
BEHIND: Stages = ((Branch("", "attn", post_norm="ln1_post"),), (Branch("", "mlp", post_norm="ln2_post"),))
"""A norm after each branch, and none before it."""
BEHIND_NORMS = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}
AROUND: Stages = ((Branch("ln1", "attn", post_norm="ln1_post"),), (Branch("ln2", "mlp", post_norm="ln2_post"),))
"""A norm before and after each branch."""


class LlamaArchitectureAdapter(ArchitectureAdapter):
    """Every Llama that transformers can run."""

    model_type = "llama"
    stages: ClassVar[Stages] = kinds.SEQUENTIAL
    norm: ClassVar[type[kinds.NormalizationBridge]] = kinds.RMSNormBridge
    norms: ClassVar[Mapping[str, str]] = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    attention: ClassVar[Part] = ROTATED
    unrotated: ClassVar[Part] = UNROTATED
    dense: ClassVar[Part] = GATED
    embed: ClassVar[str] = "embed_tokens"
    layers: ClassVar[str] = "layers"
    ln_final: ClassVar[str] = "norm"
    """The paths of the token embedding, the blocks and the final norm."""
    constants: ClassVar[Mapping[str, Any]] = {}
    """Fields of `BridgeConfig` that all models of the family share."""
    positions: ClassVar[Mapping[str, Part]] = {"rotary_emb": Part(kinds.RotaryEmbeddingBridge, "rotary_emb")}
    """What stands beside the token embedding: RoPE's table, or a table of learned positions."""
    multiplier: ClassVar[str] = ""
    """The config name of the factor on each branch."""
    embed_multiplier: ClassVar[str] = ""
    """The config name of the factor on embeddings."""
    logit_multiplier: ClassVar[str] = ""
    """The config name of the factor or divisor of the logits, after the head."""
    dropouts: ClassVar[tuple[str, ...]] = ("attention_dropout",)
    cfg_names = NAMES
    harmless: ClassVar[tuple[str, ...]] = ("attention_bias", "head_dim", "mlp_bias", "pretraining_tp")

    def refusals(self) -> list[str]:
        heads, groups = (attribute(self.config, self.cfg_names[name]) for name in ("n_heads", "n_key_value_heads"))
        return refuse_unless_divisible(heads, groups)

    def variant(self) -> Mapping[str, Any]:
        # These families' attention asks for it in this way: the configs of some have no such field of their own.
        d_head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        norms = {"normalization_type": "LN" if self.norm.centres else "RMS", "final_rms": not self.norm.centres}
        gated = {"positional_embedding_type": "rotary", "gated_mlp": self.dense.kind is not kinds.MLPBridge}
        return {**norms, **gated, "d_head": d_head, **self.constants}

    def embed_scale(self) -> float:
        return float(getattr(self.config, self.embed_multiplier)) if self.embed_multiplier else 1.0

    def changes_logits(self) -> bool:
        multiplied = self.logit_multiplier and getattr(self.config, self.logit_multiplier) != 1.0
        return bool(multiplied) or super().changes_logits()

    def stages_of(self) -> Stages:
        """The branches that the config asks for, before their multiplier."""
        return self.stages

    def branches(self, layer: int) -> Stages:
        if not self.multiplier:
            return self.stages_of()
        scale = float(getattr(self.config, self.multiplier))
        return tuple(tuple(replace(branch, scale=scale) for branch in stage) for stage in self.stages_of())

    def rotates(self, layer: int) -> bool:
        """Whether attention of one layer has RoPE."""
        return True

    def mlp(self, layer: int) -> Part:
        return self.dense

    def mixers(self, layer: int) -> Mapping[str, Part]:
        """The attention and MLP of one layer, by role."""
        return {"attn": self.attention if self.rotates(layer) else self.unrotated, "mlp": self.mlp(layer)}

    def layer(self, layer: int) -> Part:
        stages = self.branches(layer)
        roles = {role for stage in stages for branch in stage for role in branch.roles}
        inside = {role: Part(self.norm, at) for role, at in self.norms.items() if role in roles}
        return Part(kinds.BlockBridge, self.layers, {**inside, **self.mixers(layer)}, stages)

    def components(self) -> Mapping[str, Any]:
        return {
            "embed": Part(kinds.EmbeddingBridge, self.embed),
            **self.positions,
            "blocks": self.layer,
            "ln_final": Part(self.norm, self.ln_final),
        }


class Qwen2ArchitectureAdapter(LlamaArchitectureAdapter):
    """Llama with biases in q, k and v, and optional sliding-window attention in some layers."""

    model_type = "qwen2"
    cfg_names = WINDOWED
    config_keys: ClassVar[tuple[str, ...]] = ("layer_types",)
    harmless: ClassVar[tuple[str, ...]] = (
        *LlamaArchitectureAdapter.harmless,
        "max_window_layers",
        "use_sliding_window",
    )


class Qwen3ArchitectureAdapter(Qwen2ArchitectureAdapter):
    """Llama with QK-norm: each head's query and key are normalised before RoPE."""

    model_type = "qwen3"
    attention = attends(kinds.NormedQKAttentionBridge, NORMED)


class GemmaArchitectureAdapter(LlamaArchitectureAdapter):
    """Llama whose norms multiply by one plus their weight, and whose embeddings are scaled by sqrt(d_model)."""

    model_type = "gemma"
    norm = kinds.OffsetRMSNormBridge


class Gemma2ArchitectureAdapter(GemmaArchitectureAdapter):
    """Gemma with norms after attention and MLP, soft caps, and sliding-window attention in every other layer."""

    model_type = "gemma2"
    stages = AROUND
    norms = {
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    }
    cfg_names = {**WINDOWED, "act_fn": "hidden_activation"}
    config_keys = ("layer_types", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar")

    def logit_cap(self) -> float | None:
        return self.config.final_logit_softcapping  # type: ignore[no-any-return]


Llama = LlamaArchitectureAdapter
LAYER_TYPES: Mapping[str, Any] = {"cfg_names": WINDOWED, "config_keys": ("layer_types",)}
"""Sliding-window attention in some layers."""
OLMO2: Mapping[str, Any] = {"stages": BEHIND, "norms": BEHIND_NORMS, "attention": WHOLE_NORMED}
GRANITE: Mapping[str, Any] = {
    "multiplier": "residual_multiplier",
    "embed_multiplier": "embedding_multiplier",
    "logit_multiplier": "logits_scaling",
    "config_keys": ("residual_multiplier", "embedding_multiplier", "attention_multiplier", "logits_scaling"),
}
APERTUS: Mapping[str, Any] = {
    "norms": {"ln1": "attention_layernorm", "ln2": "feedforward_layernorm"},
    "attention": HEADS_FIRST,
    "dense": PLAIN,
}
EXAONE: Mapping[str, Any] = {
    "attention": HEADS_FIRST,
    "unrotated": attends(kinds.UnrotatedNormedQKAttentionBridge, NORMED),
}
GLM4_NORMS = {**Llama.norms, "ln1_post": "post_self_attn_layernorm", "ln2_post": "post_mlp_layernorm"}
BIASES = (*Llama.harmless, "use_bias")
CENTRED = {**NAMES, "eps": "layer_norm_eps"}
"""The config names of a family with LayerNorms."""
COHERE: Mapping[str, Any] = {
    "stages": kinds.PARALLEL_ONE_NORM,
    "norm": kinds.BiaslessLayerNormBridge,
    "logit_multiplier": "logit_scale",
    "harmless": (*Llama.harmless, "logit_scale"),
}


def around_if_asked(adapter: LlamaArchitectureAdapter) -> Stages:
    """Norms after attention and MLP too if the config asks for them."""
    return AROUND if adapter.config.use_post_norm else kinds.SEQUENTIAL


def parallel_if_asked(adapter: LlamaArchitectureAdapter) -> Stages:
    """Attention and MLP in parallel if the config asks for it."""
    return kinds.PARALLEL_ONE_NORM if adapter.config.use_parallel_residual else kinds.SEQUENTIAL


def normed_if_asked(adapter: LlamaArchitectureAdapter, layer: int) -> Mapping[str, Part]:
    """QK-norm if the config asks for it."""
    attention = Qwen3ArchitectureAdapter.attention if adapter.config.use_qk_norm else ROTATED
    return {"attn": attention, "mlp": adapter.mlp(layer)}


def no_rope_layers(adapter: LlamaArchitectureAdapter, layer: int) -> bool:
    """RoPE where a list in the config says so, layer by layer."""
    return bool(adapter.config.no_rope_layers[layer])


def in_windows(adapter: LlamaArchitectureAdapter, layer: int) -> bool:
    """RoPE in sliding-window layers alone; in every layer if there is no window."""
    return adapter.cfg.sliding_window is None or adapter.window(layer) is not None


FAMILIES = by_type(
    Llama,
    Qwen2ArchitectureAdapter,
    Qwen3ArchitectureAdapter,
    GemmaArchitectureAdapter,
    Gemma2ArchitectureAdapter,
    row(Llama, "mistral", "Llama with sliding-window attention in every layer.", cfg_names=WINDOWED),
    row(Llama, "ministral3", "Mistral whose queries grow beyond a length.", cfg_names=WINDOWED),
    row(Llama, "ministral", "Mistral with sliding-window attention in some layers.", **LAYER_TYPES),
    row(
        Gemma2ArchitectureAdapter,
        "gemma3_text",
        "Gemma 2 with QK-norm, and another RoPE base in its sliding-window layers.",
        attention=HEADS_FIRST,
    ),
    row(
        Gemma2ArchitectureAdapter,
        "vaultgemma",
        "Gemma 2 without the norms after attention and MLP.",
        stages=kinds.SEQUENTIAL,
        norms={"ln1": "input_layernorm", "ln2": "pre_feedforward_layernorm"},
    ),
    row(
        Qwen2ArchitectureAdapter,
        "smollm3",
        "Llama without position encoding in every fourth layer.",
        config_keys=("layer_types", "no_rope_layers"),
        harmless=(*Qwen2ArchitectureAdapter.harmless, "no_rope_layer_interval"),
        rotates=no_rope_layers,
    ),
    row(
        Llama,
        "seed_oss",
        "Llama with biases in q, k and v, and dropout after attention and MLP.",
        harmless=(*Llama.harmless, "attention_out_bias"),
        dropouts=("attention_dropout", "residual_dropout"),
    ),
    row(Llama, "ernie4_5", "Llama whose RoPE rotates adjacent pairs of dimensions.", dropouts=(), harmless=BIASES),
    row(
        Llama,
        "hunyuan_v1_dense",
        "Llama with QK-norm after RoPE.",
        attention=LATE_NORMED,
        harmless=(*Llama.harmless, "eod_token_id"),
    ),
    *(row(Llama, name, "Llama under another name.") for name in ("exaone", "internlm3", "iquestcoder")),
    row(Llama, "cwm", "Llama with sliding-window attention in some layers.", **LAYER_TYPES),
    row(
        Llama,
        "hyperclovax",
        "Granite, with norms after attention and MLP where its config says so.",
        **{**GRANITE, "config_keys": (*GRANITE["config_keys"], "use_post_norm")},
        norms={**Llama.norms, "ln1_post": "post_norm1", "ln2_post": "post_norm2"},
        stages_of=around_if_asked,
    ),
    row(
        Llama,
        "stablelm",
        "Llama with LayerNorms and partial RoPE; attention and MLP in parallel or in sequence.",
        norm=kinds.LayerNormBridge,
        cfg_names=CENTRED,
        config_keys=("use_parallel_residual",),
        dropouts=("attention_dropout", "hidden_dropout"),
        harmless=(*Llama.harmless, "use_qkv_bias"),
        stages_of=parallel_if_asked,
    ),
    row(Llama, "helium", "Llama whose RoPE rotates adjacent pairs of dimensions."),
    row(Llama, "arcee", "Llama whose MLP has no gate: a squared ReLU.", dense=PLAIN),
    row(Llama, "apertus", "Llama with QK-norm, and an MLP without a gate.", **APERTUS),
    row(Llama, "apertus1p5_text", "Apertus under another name.", **APERTUS),
    row(
        Llama,
        "bitnet",
        "Llama with a norm in front of W_O, and one in front of W_out (Falcon-E; its linears may be of 1.58 bits).",
        attention=attends(SubNormedAttentionBridge, {**PROJECTIONS, "norm": "attn_sub_norm"}),
        dense=Part(SubNormedMLPBridge, "mlp", {**GATED.parts, **linears({"norm": "ffn_sub_norm"})}),
    ),
    row(Llama, "granite", "Llama whose config scales embeddings, scores, branches and logits.", **GRANITE),
    row(Llama, "olmo2", "Post-norm Llama, with one norm over all queries and one over all keys.", **OLMO2),
    row(Llama, "olmo3", "OLMo 2 with sliding-window attention in most layers.", **OLMO2, **LAYER_TYPES),
    row(
        Llama,
        "exaone4",
        "Post-norm Llama with QK-norm, and RoPE in its sliding-window layers alone.",
        **LAYER_TYPES,
        **EXAONE,
        stages=BEHIND,
        norms=BEHIND_NORMS,
        rotates=in_windows,
        harmless=(*Llama.harmless, "sliding_window_pattern"),
    ),
    row(Llama, "glm", "Llama with a fused gate and up projection, and RoPE on half of each head.", dense=FUSED),
    row(Llama, "glm4", "GLM with norms after attention and MLP too.", dense=FUSED, stages=AROUND, norms=GLM4_NORMS),
    row(
        Llama,
        "phi3",
        "Llama with fused QKV, and a fused gate and up projection.",
        cfg_names=WINDOWED,
        attention=attends(kinds.RotatedQKVBlocksAttentionBridge, {"qkv": "qkv_proj", "o": "o_proj"}),
        dense=FUSED,
        dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"),
        harmless=(*Llama.harmless, "original_max_position_embeddings"),
    ),
    row(
        Llama,
        "jais2",
        "Llama with LayerNorms, biases and a plain MLP: a squared ReLU.",
        norm=kinds.LayerNormBridge,
        dense=PLAIN,
        cfg_names=CENTRED,
    ),
    row(
        Llama,
        "olmo",
        "Llama with LayerNorms that have no weights.",
        norm=kinds.BareLayerNormBridge,
        cfg_names={name: at for name, at in NAMES.items() if name != "eps"},
        constants={"eps": 1e-5},
    ),
    row(
        Llama,
        "phi",
        "Parallel attention and plain MLP after one LayerNorm; biases everywhere, partial RoPE.",
        norm=kinds.LayerNormBridge,
        stages=kinds.PARALLEL_ONE_NORM,
        attention=attends(kinds.PositionEmbeddingsAttentionBridge, {**PROJECTIONS, "o": "dense"}),
        dense=Part(kinds.MLPBridge, "mlp", linears({"in": "fc1", "out": "fc2"})),
        ln_final="final_layernorm",
        cfg_names=CENTRED,
        dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"),
    ),
    row(
        Llama,
        "starcoder2",
        "Llama with LayerNorms, biases and a plain MLP.",
        norm=kinds.LayerNormBridge,
        dense=Part(kinds.MLPBridge, "mlp", linears({"in": "c_fc", "out": "c_proj"})),
        cfg_names={**WINDOWED, "eps": "norm_epsilon"},
        dropouts=("attention_dropout", "residual_dropout", "embedding_dropout"),
        harmless=BIASES,
    ),
    row(
        Llama,
        "nemotron",
        "LayerNorms that multiply by one plus their weight, and a plain MLP: a squared ReLU.",
        norm=kinds.OffsetLayerNormBridge,
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
