"""GPT-2, with QKV fused as `[Q | K | V]`, GPT-Neo and GPT-J; GPT-NeoX (Pythia) and Bloom, with QKV fused by heads.

Source: their modeling files in transformers >= 5.13 (GPT-J: 5.24). GPT-2's linear layers are transposed (`Conv1D`). The
fused matmul of GPT-NeoX and Bloom is Falcon's with one head per group.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.access.seams import Probabilities
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    PARALLEL,
    PARALLEL_ONE_NORM,
    POSITION_HOOK,
    ROOT_HOOKS,
    SEQUENTIAL,
    ALiBiJointQKVAttentionBridge,
    BlockBridge,
    Branch,
    EmbeddingBridge,
    Hook,
    JointQKVAttentionBridge,
    LayerNormBridge,
    MLPBridge,
    Part,
    PositionEmbeddingBridge,
    PositionEmbeddingsAttentionBridge,
    QKVBlocksAttentionBridge,
    RotaryEmbeddingBridge,
    Stages,
    linears,
)
from transformer_lens.model_bridge.generalized_components.attention import (
    FUSED,
    OF_ONE_MATMUL,
    OF_PROJECTIONS,
    PROBABILITIES,
    SCORES,
    SEPARATE,
    OpenAttentionBridge,
    qkv_hooks,
)
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionRun
from transformer_lens.model_bridge.supported_architectures import by_type, row
from transformer_lens.model_bridge.supported_architectures.llama import CENTRED
from transformer_lens.model_bridge.upstream import attribute


class GPT2AttentionBridge(QKVBlocksAttentionBridge):
    """GPT-2's attention, whose eager version may compute its own softmax in float32 (`reorder_and_upcast_attn`)."""

    attributes = (*QKVBlocksAttentionBridge.attributes, "reorder_and_upcast_attn")

    def attend(self, run: AttentionRun) -> Any:
        module: Any = run.call.module
        itself = module.reorder_and_upcast_attn and module.config._attn_implementation == "eager"
        if not itself or not run.wants_any(*PROBABILITIES):
            return super().attend(run)
        with Probabilities(module, run.scores, run.pattern, drops=True):
            return run.call.run()


PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
BLOCK = {
    "ln1": Part(LayerNormBridge, "ln_1"),
    "attn": Part(GPT2AttentionBridge, "attn", linears({"qkv": "c_attn", "o": "c_proj"})),
    "ln2": Part(LayerNormBridge, "ln_2"),
    "mlp": Part(MLPBridge, "mlp", linears({"in": "c_fc", "out": "c_proj"})),
}


class GPT2ArchitectureAdapter(ArchitectureAdapter):
    """Every GPT-2 without cross-attention."""

    model_type = "gpt2"
    root_hooks: tuple[Hook, ...] = (*ROOT_HOOKS, POSITION_HOOK)
    absent: ClassVar[Mapping[str, str]] = {}
    stages: ClassVar[Stages] = SEQUENTIAL
    block_parts: ClassVar[Mapping[str, Part]] = BLOCK
    positions: ClassVar[Mapping[str, Part]] = {"pos_embed": Part(PositionEmbeddingBridge, "wpe")}
    constants: ClassVar[Mapping[str, Any]] = {"positional_embedding_type": "standard"}
    dropouts: ClassVar[tuple[str, ...]] = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
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
    config_keys: ClassVar[tuple[str, ...]] = (
        *("n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
    )
    harmless: ClassVar[tuple[str, ...]] = tuple(
        f"summary_{what}" for what in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
    )

    def variant(self) -> Mapping[str, Any]:
        c = self.config
        d_mlp = attribute(c, next(key for key in ("n_inner", "intermediate_size") if key in self.config_keys))
        sizes = {"d_head": c.hidden_size // c.num_attention_heads, "d_mlp": d_mlp or 4 * c.hidden_size}
        unscaled = {"attn_scale": 1.0} if c.to_dict().get("scale_attn_weights") is False else {}
        return {**sizes, "normalization_type": "LN", **unscaled, **self.constants}

    def components(self) -> dict[str, Part]:
        return {
            "embed": Part(EmbeddingBridge, "wte"),
            **self.positions,
            "blocks": Part(BlockBridge, "h", self.block_parts, self.stages),
            "ln_final": Part(LayerNormBridge, "ln_f"),
        }


class GPTNeoAttentionBridge(OpenAttentionBridge):
    """GPT-Neo's attention, with a float32 softmax in its own code: roles `q`, `k`, `v`, `o`."""

    places = SEPARATE
    reads = OF_PROJECTIONS
    hooks = (*qkv_hooks(SEPARATE), *SCORES)
    absent = QKVBlocksAttentionBridge.absent
    number = "layer_id"
    attributes: ClassVar[tuple[str, ...]] = ("config", "layer_id")

    def attend(self, run: AttentionRun) -> Any:
        if not run.wants_any(*PROBABILITIES):
            return run.call.run()
        with Probabilities(run.call.module, run.scores, run.pattern, drops=True):
            return run.call.run()


class GPTNeoArchitectureAdapter(GPT2ArchitectureAdapter):
    """GPT-2 with separate projections, and local attention in every other layer."""

    model_type = "gpt_neo"
    constants = {"positional_embedding_type": "standard", "attn_scale": 1.0}
    block_returns_tuple = True
    block_parts = {**BLOCK, "attn": Part(GPTNeoAttentionBridge, "attn.attention", linears(PROJECTIONS))}
    dropouts = ("attention_dropout", "embed_dropout", "resid_dropout")
    cfg_names = {
        **GPT2ArchitectureAdapter.cfg_names,
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "n_key_value_heads": "num_heads",
        "d_model": "hidden_size",
        "n_ctx": "max_position_embeddings",
        "sliding_window": "window_size",
    }
    config_keys = ("intermediate_size", "attention_types", "attention_layers")
    harmless = ("classifier_dropout",)

    def window(self, layer: int) -> int | None:
        return self.cfg.sliding_window if self.config.attention_layers[layer] == "local" else None


class GPTJArchitectureAdapter(GPT2ArchitectureAdapter):
    """Parallel attention and MLP after one LayerNorm; partial RoPE on adjacent pairs of dimensions."""

    model_type = "gptj"
    since = "5.24"
    root_hooks = ROOT_HOOKS
    absent = ArchitectureAdapter.absent
    stages = PARALLEL_ONE_NORM
    block_parts = {
        "ln1": Part(LayerNormBridge, "ln_1"),
        "attn": Part(PositionEmbeddingsAttentionBridge, "attn", linears(PROJECTIONS)),
        "mlp": Part(MLPBridge, "mlp", linears({"in": "fc_in", "out": "fc_out"})),
    }
    positions = {"rotary_emb": Part(RotaryEmbeddingBridge, "rotary_emb")}
    constants = {"positional_embedding_type": "rotary", "rotary_base": 10000.0}
    cfg_names = {**GPT2ArchitectureAdapter.cfg_names, "rotary_dim": "rotary_dim"}
    config_keys = ("n_inner",)
    harmless = ()


NEOX_BLOCK = {
    "ln1": Part(LayerNormBridge, "input_layernorm"),
    "attn": Part(JointQKVAttentionBridge, "attention", linears({"qkv": "query_key_value", "o": "dense"})),
    "ln2": Part(LayerNormBridge, "post_attention_layernorm"),
    "mlp": Part(MLPBridge, "mlp", linears({"in": "dense_h_to_4h", "out": "dense_4h_to_h"})),
}


class GPTNeoXArchitectureAdapter(ArchitectureAdapter):
    """Every GPT-NeoX, with attention and MLP in parallel or in sequence."""

    model_type = "gpt_neox"
    dropouts = ("attention_dropout", "hidden_dropout")
    cfg_names = {**CENTRED, "n_key_value_heads": "num_attention_heads"}
    config_keys: ClassVar[tuple[str, ...]] = ("use_parallel_residual",)
    harmless: ClassVar[tuple[str, ...]] = ("attention_bias", "classifier_dropout", "is_decoder")

    def variant(self) -> Mapping[str, Any]:
        d_head = self.config.hidden_size // self.config.num_attention_heads
        return {"d_head": d_head, "positional_embedding_type": "rotary", "normalization_type": "LN"}

    def components(self) -> dict[str, Part]:
        stages = PARALLEL if self.config.use_parallel_residual else SEQUENTIAL
        return {
            "embed": Part(EmbeddingBridge, "embed_in"),
            "rotary_emb": Part(RotaryEmbeddingBridge, "rotary_emb"),
            "blocks": Part(BlockBridge, "layers", NEOX_BLOCK, stages),
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
        attention = Part(BloomAttentionBridge, "self_attention", NEOX_BLOCK["attn"].parts)
        stages = ((Branch("ln1", "attn", adds="attn.o"),), (Branch("ln2", "mlp", adds="mlp.out"),))
        return {
            "embed": Part(EmbeddingBridge, "word_embeddings"),
            **linears({"embed_norm": "word_embeddings_layernorm"}),
            "blocks": Part(BlockBridge, "h", {**NEOX_BLOCK, "attn": attention}, stages),
            "ln_final": Part(LayerNormBridge, "ln_f"),
        }


FAMILIES = by_type(
    GPT2ArchitectureAdapter,
    GPTNeoArchitectureAdapter,
    GPTJArchitectureAdapter,
    GPTNeoXArchitectureAdapter,
    BloomArchitectureAdapter,
    row(
        GPT2ArchitectureAdapter,
        "gpt_bigcode",
        "GPT-2 whose heads share one key and value (StarCoder).",
        block_parts={**BLOCK, "attn": Part(QKVBlocksAttentionBridge, "attn", BLOCK["attn"].parts)},
        constants={**GPT2ArchitectureAdapter.constants, "n_key_value_heads": 1},
        config_keys=("n_inner", "scale_attn_weights"),
        harmless=("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
    ),
)
