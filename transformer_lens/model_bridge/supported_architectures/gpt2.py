"""GPT-2: learned positions are added to the embeddings; q, k and v come from one matmul, `[Q | K | V]`.

Source: `modeling_gpt2.py` in transformers >= 5.13. Its linear layers are `Conv1D`, with their weight transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    POSITION_HOOK,
    ROOT_HOOKS,
    SEQUENTIAL,
    BlockBridge,
    EmbeddingBridge,
    FinalLayerNormBridge,
    LayerNormBridge,
    MLPBridge,
    Part,
    PositionEmbeddingBridge,
    QKVBlocksAttentionBridge,
    linears,
)
from transformer_lens.model_bridge.generalized_components.attention import PROBABILITIES
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionRun
from transformer_lens.model_bridge.seams import Probabilities
from transformer_lens.model_bridge.supported_architectures import by_type


class GPT2AttentionBridge(QKVBlocksAttentionBridge):
    """GPT-2's attention, which under eager may compute its softmax itself, in float32 (`reorder_and_upcast_attn`)."""

    attributes = (*QKVBlocksAttentionBridge.attributes, "reorder_and_upcast_attn")

    def attend(self, run: AttentionRun) -> Any:
        module: Any = run.call.module
        itself = module.reorder_and_upcast_attn and module.config._attn_implementation == "eager"
        if not itself or not run.wants_any(*PROBABILITIES):
            return super().attend(run)
        with Probabilities(module, run.scores, run.pattern, drops=True):
            return run.call.run()


BLOCK = {
    "ln1": Part(LayerNormBridge, "ln_1"),
    "attn": Part(GPT2AttentionBridge, "attn", linears({"qkv": "c_attn", "o": "c_proj"})),
    "ln2": Part(LayerNormBridge, "ln_2"),
    "mlp": Part(MLPBridge, "mlp", linears({"in": "c_fc", "out": "c_proj"})),
}


class GPT2ArchitectureAdapter(ArchitectureAdapter):
    """Describes every GPT-2 without cross-attention."""

    model_type = "gpt2"
    root_hooks = (*ROOT_HOOKS, POSITION_HOOK)
    absent = {}
    dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
    cfg_names = {
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "n_key_value_heads": "n_head",
        "d_model": "n_embd",
        "d_vocab": "vocab_size",
        "n_ctx": "n_positions",
        "act_fn": "activation_function",
        "eps": "layer_norm_epsilon",
    }
    config_keys = ("n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    harmless = tuple(
        f"summary_{what}" for what in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
    )

    def variant(self) -> Mapping[str, Any]:
        c = self.config
        sizes = {"d_head": c.n_embd // c.n_head, "d_mlp": c.n_inner or 4 * c.n_embd}
        return {**sizes, "positional_embedding_type": "standard", "normalization_type": "LN"}

    def components(self) -> dict[str, Part]:
        return {
            "embed": Part(EmbeddingBridge, "wte"),
            "pos_embed": Part(PositionEmbeddingBridge, "wpe"),
            "blocks": Part(BlockBridge, "h", BLOCK, SEQUENTIAL),
            "ln_final": Part(FinalLayerNormBridge, "ln_f"),
        }


FAMILIES = by_type(GPT2ArchitectureAdapter)
