"""Mixtral: RoPE attention with grouped keys and values, and a mixture of experts in every block.

Source: `modeling_mixtral.py` in transformers >= 5.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter, refuse_unless_divisible
from transformer_lens.model_bridge.generalized_components import (
    SEQUENTIAL,
    BlockBridge,
    EmbeddingBridge,
    ExpertsBridge,
    FinalRMSNormBridge,
    MoEBridge,
    Part,
    PositionEmbeddingsAttentionBridge,
    RMSNormBridge,
    RotaryEmbeddingBridge,
    RouterBridge,
    linears,
)


class MixtralArchitectureAdapter(ArchitectureAdapter):
    """Describes Mixtral 8x7B, 8x22B and every other Mixtral that transformers can run."""

    model_type = "mixtral"
    dropouts = ("attention_dropout", "router_jitter_noise")
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
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "sliding_window": "sliding_window",
    }
    config_keys = ("head_dim",)
    harmless = ("output_router_logits", "router_aux_loss_coef")

    def refusals(self) -> list[str]:
        c = self.config
        if c.num_experts_per_tok > c.num_local_experts:
            return [f"it chooses {c.num_experts_per_tok} experts for each token and has {c.num_local_experts}"]
        return refuse_unless_divisible(c.num_attention_heads, c.num_key_value_heads)

    def variant(self) -> Mapping[str, Any]:
        return {
            "d_head": self.config.head_dim or self.config.hidden_size // self.config.num_attention_heads,
            "positional_embedding_type": "rotary",
            "normalization_type": "RMS",
            "final_rms": True,
            "gated_mlp": True,
        }

    def components(self) -> dict[str, Part]:
        projections = linears({role: f"{role}_proj" for role in "qkvo"})
        experts = {"gate": Part(RouterBridge, "gate"), "experts": Part(ExpertsBridge, "experts")}
        inside = {
            "ln1": Part(RMSNormBridge, "input_layernorm"),
            "attn": Part(PositionEmbeddingsAttentionBridge, "self_attn", projections),
            "ln2": Part(RMSNormBridge, "post_attention_layernorm"),
            "mlp": Part(MoEBridge, "mlp", experts),
        }
        return {
            "embed": Part(EmbeddingBridge, "embed_tokens"),
            "rotary_emb": Part(RotaryEmbeddingBridge, "rotary_emb"),
            "blocks": Part(BlockBridge, "layers", inside, SEQUENTIAL),
            "ln_final": Part(FinalRMSNormBridge, "norm"),
        }
