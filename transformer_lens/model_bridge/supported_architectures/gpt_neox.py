"""GPT-NeoX (and Pythia): QKV fused head by head, and partial RoPE.

Source: `modeling_gpt_neox.py` in transformers >= 5.13. The fused matmul is Falcon's with one head per group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    PARALLEL,
    SEQUENTIAL,
    BlockBridge,
    EmbeddingBridge,
    FinalLayerNormBridge,
    JointQKVAttentionBridge,
    LayerNormBridge,
    MLPBridge,
    Part,
    RotaryEmbeddingBridge,
    linears,
)
from transformer_lens.model_bridge.supported_architectures import by_type

ATTENTION = Part(JointQKVAttentionBridge, "attention", linears({"qkv": "query_key_value", "o": "dense"}))
BLOCK = {
    "ln1": Part(LayerNormBridge, "input_layernorm"),
    "attn": ATTENTION,
    "ln2": Part(LayerNormBridge, "post_attention_layernorm"),
    "mlp": Part(MLPBridge, "mlp", linears({"in": "dense_h_to_4h", "out": "dense_4h_to_h"})),
}


class GPTNeoXArchitectureAdapter(ArchitectureAdapter):
    """Every GPT-NeoX, with attention and MLP in parallel or in sequence."""

    model_type = "gpt_neox"
    dropouts = ("attention_dropout", "hidden_dropout")
    cfg_names = {
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_key_value_heads": "num_attention_heads",
        "d_model": "hidden_size",
        "d_mlp": "intermediate_size",
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "act_fn": "hidden_act",
        "eps": "layer_norm_eps",
    }
    config_keys = ("use_parallel_residual",)
    harmless = ("attention_bias", "classifier_dropout", "is_decoder")

    def variant(self) -> Mapping[str, Any]:
        d_head = self.config.hidden_size // self.config.num_attention_heads
        return {"d_head": d_head, "positional_embedding_type": "rotary", "normalization_type": "LN"}

    def components(self) -> dict[str, Part]:
        return {
            "embed": Part(EmbeddingBridge, "embed_in"),
            "rotary_emb": Part(RotaryEmbeddingBridge, "rotary_emb"),
            "blocks": Part(BlockBridge, "layers", BLOCK, PARALLEL if self.config.use_parallel_residual else SEQUENTIAL),
            "ln_final": Part(FinalLayerNormBridge, "final_layer_norm"),
        }


FAMILIES = by_type(GPTNeoXArchitectureAdapter)
