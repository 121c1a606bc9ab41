"""GPT-NeoX (and Pythia), with partial RoPE, and Bloom, with ALiBi: QKV fused head by head.

Source: their modeling files in transformers >= 5.13. The fused matmul is Falcon's with one head per group.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    PARALLEL,
    ROOT_HOOKS,
    SEQUENTIAL,
    ALiBiJointQKVAttentionBridge,
    BlockBridge,
    Branch,
    EmbeddingBridge,
    JointQKVAttentionBridge,
    LayerNormBridge,
    MLPBridge,
    Part,
    RotaryEmbeddingBridge,
    linears,
)
from transformer_lens.model_bridge.generalized_components.attention_ports import FUSED, OF_ONE_MATMUL, SCORES, qkv_hooks
from transformer_lens.model_bridge.supported_architectures import by_type
from transformer_lens.model_bridge.supported_architectures.gpt2 import GPTNeoAttentionBridge

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
    config_keys: ClassVar[tuple[str, ...]] = ("use_parallel_residual",)
    harmless: ClassVar[tuple[str, ...]] = ("attention_bias", "classifier_dropout", "is_decoder")

    def variant(self) -> Mapping[str, Any]:
        d_head = self.config.hidden_size // self.config.num_attention_heads
        return {"d_head": d_head, "positional_embedding_type": "rotary", "normalization_type": "LN"}

    def components(self) -> dict[str, Part]:
        return {
            "embed": Part(EmbeddingBridge, "embed_in"),
            "rotary_emb": Part(RotaryEmbeddingBridge, "rotary_emb"),
            "blocks": Part(BlockBridge, "layers", BLOCK, PARALLEL if self.config.use_parallel_residual else SEQUENTIAL),
            "ln_final": Part(LayerNormBridge, "final_layer_norm"),
        }


class BloomAttentionBridge(GPTNeoAttentionBridge):
    """Bloom's attention, with ALiBi's bias in its scores and a softmax in its own code: roles `qkv`, `o`."""

    places = FUSED
    reads = OF_ONE_MATMUL
    hooks = (*qkv_hooks(FUSED), *SCORES)
    absent = ALiBiJointQKVAttentionBridge.absent
    number = "layer_idx"
    attributes = ("layer_idx",)


class BloomArchitectureAdapter(GPTNeoXArchitectureAdapter):
    """ALiBi, and a norm after the embeddings; attention and MLP add what they read from to their outputs themselves."""

    model_type = "bloom"
    takes_positions = False
    block_returns_tuple = True
    root_hooks = (replace(ROOT_HOOKS[0], port=Port("embed_norm"), aliases=()),)
    cfg_names = {
        **{"n_layers": "n_layer", "n_heads": "n_head", "n_key_value_heads": "n_head", "eps": "layer_norm_epsilon"},
        **{"d_model": "hidden_size", "d_vocab": "vocab_size"},
    }
    config_keys = ()
    harmless = ("pretraining_tp", "slow_but_exact")

    def variant(self) -> Mapping[str, Any]:
        d_model = self.config.hidden_size
        sizes = {"d_head": d_model // self.config.n_head, "d_mlp": 4 * d_model, "n_ctx": 2048}
        return {**sizes, "act_fn": "gelu_new", "positional_embedding_type": "alibi", "normalization_type": "LN"}

    def components(self) -> dict[str, Part]:
        attention = Part(BloomAttentionBridge, "self_attention", ATTENTION.parts)
        stages = ((Branch("ln1", "attn", adds="attn.o"),), (Branch("ln2", "mlp", adds="mlp.out"),))
        return {
            "embed": Part(EmbeddingBridge, "word_embeddings"),
            **linears({"embed_norm": "word_embeddings_layernorm"}),
            "blocks": Part(BlockBridge, "h", {**BLOCK, "attn": attention}, stages),
            "ln_final": Part(LayerNormBridge, "ln_f"),
        }


FAMILIES = by_type(GPTNeoXArchitectureAdapter, BloomArchitectureAdapter)
