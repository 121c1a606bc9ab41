"""GPT-2, with QKV fused as `[Q | K | V]`, GPT-Neo and GPT-J; GPT-NeoX (Pythia) and Bloom, with QKV fused by heads.

Source: their modeling files in transformers >= 5.13 (GPT-J: 5.24). GPT-2's linear layers are transposed (`Conv1D`). The
fused matmul of GPT-NeoX and Bloom is Falcon's with one head per group.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import transformer_lens.model_bridge.generalized_components as kinds
import transformer_lens.model_bridge.generalized_components.attention as opened
import transformer_lens.model_bridge.generalized_components.attention_rows as rows
from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.access.seams import Probabilities
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import Branch, Hook, Part, Stages, linears
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionRun
from transformer_lens.model_bridge.supported_architectures import by_type, row
from transformer_lens.model_bridge.supported_architectures.llama import CENTRED, LlamaArchitectureAdapter, attends
from transformer_lens.model_bridge.upstream import attribute


def with_own_softmax(run: AttentionRun) -> Any:
    """A call of attention with a softmax in its own code, opened."""
    if not run.wants_any(*rows.PROBABILITIES):
        return run.call.run()
    with Probabilities(run.call.module, run.scores, run.pattern, drops=True):
        return run.call.run()


class GPT2AttentionBridge(kinds.QKVBlocksAttentionBridge):
    """GPT-2's attention, whose eager version may compute its own softmax in float32 (`reorder_and_upcast_attn`)."""

    attributes = (*kinds.QKVBlocksAttentionBridge.attributes, "reorder_and_upcast_attn")

    def attend(self, run: AttentionRun) -> Any:
        module: Any = run.call.module
        itself = module.reorder_and_upcast_attn and module.config._attn_implementation == "eager"
        return with_own_softmax(run) if itself else super().attend(run)


PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


class GPT2ArchitectureAdapter(LlamaArchitectureAdapter):
    """Every GPT-2 without cross-attention."""

    model_type = "gpt2"
    root_hooks: tuple[Hook, ...] = (*kinds.ROOT_HOOKS, kinds.POSITION_HOOK)
    absent: ClassVar[Mapping[str, str]] = {}
    norm = kinds.LayerNormBridge
    norms = {"ln1": "ln_1", "ln2": "ln_2"}
    attention = Part(GPT2AttentionBridge, "attn", linears({"qkv": "c_attn", "o": "c_proj"}))
    dense = Part(kinds.MLPBridge, "mlp", linears({"in": "c_fc", "out": "c_proj"}))
    embed, layers, ln_final = "wte", "h", "ln_f"
    positions: ClassVar[Mapping[str, Part]] = {"pos_embed": Part(kinds.PositionEmbeddingBridge, "wpe")}
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
        unscaled = {"attn_scale": 1.0} if c.to_dict().get("scale_attn_weights") is False else {}
        return {"d_mlp": d_mlp or 4 * c.hidden_size, **unscaled, **super().variant()}


class GPTNeoAttentionBridge(opened.OpenAttentionBridge):
    """GPT-Neo's attention, with a float32 softmax in its own code: roles `q`, `k`, `v`, `o`."""

    places = rows.SEPARATE
    reads = rows.OF_PROJECTIONS
    hooks = (*rows.qkv_hooks(rows.SEPARATE), *rows.SCORES)
    absent = kinds.QKVBlocksAttentionBridge.absent
    number = "layer_id"
    attributes: ClassVar[tuple[str, ...]] = ("config", "layer_id")

    def attend(self, run: AttentionRun) -> Any:
        return with_own_softmax(run)


class GPTNeoArchitectureAdapter(GPT2ArchitectureAdapter):
    """GPT-2 with separate projections, and local attention in every other layer."""

    model_type = "gpt_neo"
    constants = {"positional_embedding_type": "standard", "attn_scale": 1.0}
    block_returns_tuple = True
    attention = Part(GPTNeoAttentionBridge, "attn.attention", linears(PROJECTIONS))
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
    root_hooks = kinds.ROOT_HOOKS
    absent = ArchitectureAdapter.absent
    stages = kinds.PARALLEL_ONE_NORM
    norms = {"ln1": "ln_1"}
    attention = Part(kinds.PositionEmbeddingsAttentionBridge, "attn", linears(PROJECTIONS))
    dense = Part(kinds.MLPBridge, "mlp", linears({"in": "fc_in", "out": "fc_out"}))
    positions = LlamaArchitectureAdapter.positions
    constants = {"positional_embedding_type": "rotary", "rotary_base": 10000.0}
    cfg_names = {**GPT2ArchitectureAdapter.cfg_names, "rotary_dim": "rotary_dim"}
    config_keys = ("n_inner",)
    harmless = ()


FUSED = {"qkv": "query_key_value", "o": "dense"}


class GPTNeoXArchitectureAdapter(LlamaArchitectureAdapter):
    """Every GPT-NeoX, with attention and MLP in parallel or in sequence."""

    model_type = "gpt_neox"
    norm = kinds.LayerNormBridge
    attention = Part(kinds.JointQKVAttentionBridge, "attention", linears(FUSED))
    dense = Part(kinds.MLPBridge, "mlp", linears({"in": "dense_h_to_4h", "out": "dense_4h_to_h"}))
    embed, ln_final = "embed_in", "final_layer_norm"
    dropouts = ("attention_dropout", "hidden_dropout")
    cfg_names = {**CENTRED, "n_key_value_heads": "num_attention_heads"}
    config_keys: ClassVar[tuple[str, ...]] = ("use_parallel_residual",)
    harmless: ClassVar[tuple[str, ...]] = ("attention_bias", "classifier_dropout", "is_decoder")

    def stages_of(self) -> Stages:
        return kinds.PARALLEL if self.config.use_parallel_residual else kinds.SEQUENTIAL


class BloomAttentionBridge(GPTNeoAttentionBridge):
    """Bloom's attention, with ALiBi's bias in its scores and a softmax in its own code: roles `qkv`, `o`."""

    places = rows.FUSED
    reads = rows.OF_ONE_MATMUL
    hooks = (*rows.qkv_hooks(rows.FUSED), *rows.SCORES)
    absent = kinds.ALiBiJointQKVAttentionBridge.absent
    number = "layer_idx"
    attributes = ("layer_idx",)


class BloomArchitectureAdapter(GPTNeoXArchitectureAdapter):
    """ALiBi, and a norm after the embeddings; attention and MLP add what they read from to their outputs themselves."""

    model_type = "bloom"
    takes_positions = False
    block_returns_tuple = True
    root_hooks = (replace(kinds.ROOT_HOOKS[0], port=Port("embed_norm"), aliases=()),)
    cfg_names = {
        **{"n_layers": "n_layer", "n_heads": "n_head", "n_key_value_heads": "n_head", "eps": "layer_norm_epsilon"},
        **{"d_model": "hidden_size", "d_vocab": "vocab_size"},
    }
    config_keys = ()
    harmless = ("pretraining_tp", "slow_but_exact")

    attention = Part(BloomAttentionBridge, "self_attention", GPTNeoXArchitectureAdapter.attention.parts)
    embed, layers, ln_final = "word_embeddings", "h", "ln_f"
    positions = linears({"embed_norm": "word_embeddings_layernorm"})
    constants = {"n_ctx": 2048, "act_fn": "gelu_new", "positional_embedding_type": "alibi"}

    def variant(self) -> Mapping[str, Any]:
        return {**super().variant(), "d_mlp": 4 * self.config.hidden_size}

    def stages_of(self) -> Stages:
        return ((Branch("ln1", "attn", adds="attn.o"),), (Branch("ln2", "mlp", adds="mlp.out"),))


FAMILIES = by_type(
    GPT2ArchitectureAdapter,
    GPTNeoArchitectureAdapter,
    GPTJArchitectureAdapter,
    GPTNeoXArchitectureAdapter,
    BloomArchitectureAdapter,
    row(
        GPTNeoXArchitectureAdapter,
        "persimmon",
        "GPT-NeoX with QK-norm; attention and MLP in sequence.",
        embed="embed_tokens",
        ln_final="final_layernorm",
        attention=attends(
            opened.NormedJointQKVAttentionBridge, {**FUSED, "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
        ),
        stages_of=LlamaArchitectureAdapter.stages_of,
        config_keys=(),
    ),
    row(
        GPT2ArchitectureAdapter,
        "gpt_bigcode",
        "GPT-2 whose heads share one key and value (StarCoder).",
        attention=Part(kinds.QKVBlocksAttentionBridge, "attn", GPT2ArchitectureAdapter.attention.parts),
        constants={**GPT2ArchitectureAdapter.constants, "n_key_value_heads": 1},
        config_keys=("n_inner", "scale_attn_weights"),
        harmless=("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
    ),
)
