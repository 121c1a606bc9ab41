"""Adapters of families whose blocks are put together otherwise than Falcon's and Mixtral's; none of them is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import transformers

from tests.support import VOCAB, perturbed
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    SEQUENTIAL,
    BlockBridge,
    Branch,
    EmbeddingBridge,
    ExpertsBridge,
    FinalRMSNormBridge,
    GatedMLPBridge,
    LinearBridge,
    MixerBridge,
    MoEBridge,
    Part,
    PositionEmbeddingsAttentionBridge,
    RMSNormBridge,
    RotaryEmbeddingBridge,
    Stages,
    linears,
)

H1 = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "attention_out_multiplier": 0.7,
    "attention_in_multiplier": 0.9,
    "ssm_out_multiplier": 1.3,
}


class AttentionWithNorms(PositionEmbeddingsAttentionBridge):
    """Attention with norms of q and k that are not named here: what it rotates is not what its projections return."""

    hooks = tuple(hook for hook in PositionEmbeddingsAttentionBridge.hooks if not hook.name.startswith("hook_rot"))


GATED = linears({"gate": "gate_proj", "in": "up_proj", "out": "down_proj"})
ATTENTION = Part(PositionEmbeddingsAttentionBridge, "self_attn", linears({role: f"{role}_proj" for role in "qkvo"}))
MLP = Part(GatedMLPBridge, "mlp", GATED)


class Family(ArchitectureAdapter):
    """What they have in common: Llama's names."""

    norms: ClassVar[Mapping[str, str]] = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    final_norm: ClassVar[str] = "norm"
    harmless = ("attention_bias", "mlp_bias", "embedding_multiplier", "residual_multiplier")
    cfg_names = {
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

    def variant(self) -> Mapping[str, Any]:
        kinds = {"positional_embedding_type": "rotary", "normalization_type": "RMS"}
        d_head = self.config.hidden_size // self.config.num_attention_heads
        return {**kinds, "d_head": d_head, "final_rms": True, "gated_mlp": True}

    def stages(self, layer: int) -> Stages:
        return SEQUENTIAL

    def inside(self, layer: int) -> dict[str, Part]:
        return {"attn": ATTENTION, "mlp": MLP}

    def layer(self, layer: int) -> Part:
        norms = {role: Part(RMSNormBridge, at) for role, at in self.norms.items()}
        return Part(BlockBridge, "layers", {**norms, **self.inside(layer)}, self.stages(layer))

    def components(self) -> Mapping[str, Any]:
        return {
            "embed": Part(EmbeddingBridge, "embed_tokens"),
            "rotary_emb": Part(RotaryEmbeddingBridge, "rotary_emb"),
            "blocks": self.layer,
            "ln_final": Part(FinalRMSNormBridge, self.final_norm),
        }


class Granite(Family):
    """Each branch is multiplied by a number before it is added."""

    model_type = "granite"

    def stages(self, layer: int) -> Stages:
        scale = self.config.residual_multiplier
        return ((Branch("ln1", "attn", scale=scale),), (Branch("ln2", "mlp", scale=scale),))


class Olmo2(Family):
    """No norm in front of a branch, one behind it."""

    model_type = "olmo2"
    norms = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}

    def stages(self, layer: int) -> Stages:
        return ((Branch("", "attn", post_norm="ln1_post"),), (Branch("", "mlp", post_norm="ln2_post"),))

    def inside(self, layer: int) -> dict[str, Part]:
        return {"attn": replace(ATTENTION, kind=AttentionWithNorms), "mlp": MLP}


class FalconH1(Family):
    """A state-space mixer and attention side by side behind one norm, each with a multiplier, then an MLP."""

    model_type = "falcon_h1"
    block_returns_tuple = True
    harmless = tuple(H1)
    norms = {"ln1": "input_layernorm", "ln2": "pre_ff_layernorm"}
    final_norm = "final_layernorm"

    def stages(self, layer: int) -> Stages:
        c = self.config
        mixer = Branch("ln1", "mixer", scale=c.ssm_out_multiplier)
        attn = Branch("ln1", "attn", scale=c.attention_out_multiplier, scale_in=c.attention_in_multiplier)
        return ((mixer, attn), (Branch("ln2", "mlp"),))

    def inside(self, layer: int) -> dict[str, Part]:
        mlp = Part(GatedMLPBridge, "feed_forward", GATED)
        return {"attn": ATTENTION, "mixer": Part(MixerBridge, "mamba"), "mlp": mlp}


class Lfm2(Family):
    """Short convolutions in some layers, attention in others."""

    model_type = "lfm2"
    config_keys = ("layer_types",)
    harmless = ("block_auto_adjust_ff_dim",)
    norms = {"ln1": "operator_norm", "ln2": "ffn_norm"}
    final_norm = "embedding_norm"
    cfg_names = {name: at for name, at in Family.cfg_names.items() if name != "act_fn"} | {"eps": "norm_eps"}

    def variant(self) -> Mapping[str, Any]:
        return {**super().variant(), "act_fn": "silu"}

    def is_attention(self, layer: int) -> bool:
        return bool(self.config.layer_types[layer] == "full_attention")

    def stages(self, layer: int) -> Stages:
        return ((Branch("ln1", "attn" if self.is_attention(layer) else "mixer"),), (Branch("ln2", "mlp"),))

    def inside(self, layer: int) -> dict[str, Part]:
        projections = linears({"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"})
        attention = {"attn": Part(AttentionWithNorms, "self_attn", projections)}
        mlp = {"mlp": Part(GatedMLPBridge, "feed_forward", linears({"gate": "w1", "in": "w3", "out": "w2"}))}
        return mlp | (attention if self.is_attention(layer) else {"mixer": Part(MixerBridge, "conv")})


class Ernie(Family):
    """Dense first layers, then mixtures of experts of another width."""

    model_type = "ernie4_5_moe"
    config_keys = ("moe_layer_start_index", "moe_intermediate_size", "moe_num_shared_experts")
    harmless = ("moe_layer_end_index",)
    cfg_names = {**Family.cfg_names, "num_experts": "moe_num_experts", "experts_per_token": "moe_k"}

    def inside(self, layer: int) -> dict[str, Part]:
        if layer < self.config.moe_layer_start_index:
            return {"attn": ATTENTION, "mlp": MLP}
        experts = {"gate": Part(LinearBridge, "gate"), "experts": Part(ExpertsBridge, "experts")}
        return {
            "attn": ATTENTION,
            "mlp": Part(MoEBridge, "mlp", experts, sizes={"d_mlp": self.config.moe_intermediate_size}),
        }


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MIXTURE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 0}
KINDS: dict[str, tuple[type[Family], str, dict[str, Any]]] = {
    "granite": (Granite, "Granite", {"residual_multiplier": 0.22, "attention_bias": True, "mlp_bias": True}),
    "olmo2": (Olmo2, "Olmo2", {}),
    "falcon_h1": (FalconH1, "FalconH1", H1),
    "lfm2": (Lfm2, "Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "ernie": (Ernie, "Ernie4_5_Moe", {**MIXTURE, "num_hidden_layers": 3, "moe_layer_start_index": 1}),
}


def build(name: str, **changes: Any) -> Any:
    """A small random model of a family."""
    _, family, options = KINDS[name]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options, **changes})
    return perturbed(getattr(transformers, f"{family}ForCausalLM")(config))
