"""Llama and its relatives: Mistral, Qwen 2 and 3, Qwen 3's mixture of experts, Gemma and Gemma 2.

RMSNorm before each branch, RoPE attention with separate projections, a gated MLP; each family says what it has
otherwise. Source: the modeling files of these families in transformers >= 5.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter, refuse_unless_divisible
from transformer_lens.model_bridge.generalized_components import (
    SEQUENTIAL,
    BlockBridge,
    Branch,
    ComponentBridge,
    EmbeddingBridge,
    ExpertsBridge,
    FinalOffsetRMSNormBridge,
    FinalRMSNormBridge,
    GatedMLPBridge,
    MoEBridge,
    NormedQKAttentionBridge,
    OffsetRMSNormBridge,
    Part,
    PositionEmbeddingsAttentionBridge,
    RMSNormBridge,
    RotaryEmbeddingBridge,
    RouterBridge,
    Stages,
    linears,
)

PROJECTIONS = {role: f"{role}_proj" for role in "qkvo"}
"""What most families call the projections of attention, by role."""
DENSE = linears({"gate": "gate_proj", "in": "up_proj", "out": "down_proj"})
MIXTURE = {"gate": Part(RouterBridge, "gate"), "experts": Part(ExpertsBridge, "experts")}


class LlamaArchitectureAdapter(ArchitectureAdapter):
    """Describes every Llama that transformers can run; biases of projections are in the projections."""

    model_type = "llama"
    stages: ClassVar[Stages] = SEQUENTIAL
    norm: ClassVar[type[ComponentBridge]] = RMSNormBridge
    final_norm: ClassVar[type[ComponentBridge]] = FinalRMSNormBridge
    norms: ClassVar[Mapping[str, str]] = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    attention: ClassVar[Part] = Part(PositionEmbeddingsAttentionBridge, "self_attn", linears(PROJECTIONS))
    dropouts = ("attention_dropout",)
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
    harmless: ClassVar[tuple[str, ...]] = ("attention_bias", "head_dim", "mlp_bias", "pretraining_tp")

    def refusals(self) -> list[str]:
        return refuse_unless_divisible(self.config.num_attention_heads, self.config.num_key_value_heads)

    def variant(self) -> Mapping[str, Any]:
        # Attention of these families asks for it in this way: the configs of some have no such field of their own.
        d_head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        kinds = {"positional_embedding_type": "rotary", "normalization_type": "RMS"}
        return {**kinds, "d_head": d_head, "final_rms": True, "gated_mlp": True}

    def mlp(self, layer: int) -> Part:
        """The MLP of one layer."""
        return Part(GatedMLPBridge, "mlp", DENSE)

    def layer(self, layer: int) -> Part:
        """The block of one layer."""
        inside = {role: Part(self.norm, at) for role, at in self.norms.items()}
        return Part(BlockBridge, "layers", {**inside, "attn": self.attention, "mlp": self.mlp(layer)}, self.stages)

    def components(self) -> Mapping[str, Any]:
        return {
            "embed": Part(EmbeddingBridge, "embed_tokens"),
            "rotary_emb": Part(RotaryEmbeddingBridge, "rotary_emb"),
            "blocks": self.layer,
            "ln_final": Part(self.final_norm, "norm"),
        }


class MistralArchitectureAdapter(LlamaArchitectureAdapter):
    """Llama whose layers all look back over a window."""

    model_type = "mistral"
    cfg_names = {**LlamaArchitectureAdapter.cfg_names, "sliding_window": "sliding_window"}


class Qwen2ArchitectureAdapter(MistralArchitectureAdapter):
    """Llama with biases in q, k and v; where it has a window, only some layers look back over that."""

    model_type = "qwen2"
    config_keys: ClassVar[tuple[str, ...]] = ("layer_types",)
    harmless: ClassVar[tuple[str, ...]] = (
        *LlamaArchitectureAdapter.harmless,
        "max_window_layers",
        "use_sliding_window",
    )

    def window(self, layer: int) -> int | None:
        return self.cfg.sliding_window if self.config.layer_types[layer] == "sliding_attention" else None


class Qwen3ArchitectureAdapter(Qwen2ArchitectureAdapter):
    """Each head's query and key pass a norm before they are rotated."""

    model_type = "qwen3"
    attention = Part(
        NormedQKAttentionBridge, "self_attn", linears({**PROJECTIONS, "q_norm": "q_norm", "k_norm": "k_norm"})
    )


class Qwen3MoeArchitectureAdapter(Qwen3ArchitectureAdapter):
    """Qwen 3 with a mixture of experts in most layers; the others have a dense MLP of another width."""

    model_type = "qwen3_moe"
    cfg_names = {
        **MistralArchitectureAdapter.cfg_names,
        "d_mlp": "moe_intermediate_size",
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
    }
    config_keys = ("mlp_only_layers", "decoder_sparse_step", "intermediate_size", "norm_topk_prob")
    harmless = (*Qwen2ArchitectureAdapter.harmless, "output_router_logits", "router_aux_loss_coef")

    def window(self, layer: int) -> int | None:
        return self.cfg.sliding_window

    def mlp(self, layer: int) -> Part:
        c = self.config
        if layer in c.mlp_only_layers or not c.num_experts or (layer + 1) % c.decoder_sparse_step:
            return Part(GatedMLPBridge, "mlp", DENSE, sizes={"d_mlp": c.intermediate_size})
        return Part(MoEBridge, "mlp", MIXTURE)


class GemmaArchitectureAdapter(LlamaArchitectureAdapter):
    """Its norms multiply by one plus their weight, and its embedding module scales by the square root of d_model."""

    model_type = "gemma"
    norm, final_norm = OffsetRMSNormBridge, FinalOffsetRMSNormBridge


class Gemma2ArchitectureAdapter(GemmaArchitectureAdapter):
    """Gemma with norms behind attention and MLP too, capped scores and logits, and a window in every other layer."""

    model_type = "gemma2"
    stages = ((Branch("ln1", "attn", post_norm="ln1_post"),), (Branch("ln2", "mlp", post_norm="ln2_post"),))
    norms = {
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    }
    cfg_names = {**MistralArchitectureAdapter.cfg_names, "act_fn": "hidden_activation"}
    config_keys = ("layer_types", "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar")
    window = Qwen2ArchitectureAdapter.window

    def logit_cap(self) -> float | None:
        return self.config.final_logit_softcapping  # type: ignore[no-any-return]
