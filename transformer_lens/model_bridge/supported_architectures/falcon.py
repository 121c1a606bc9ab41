"""Falcon: RW (per-head QKV, ALiBi, sequential), 7B (multi-query), 11B, 40B and 180B (grouped, parallel).

Source: `modeling_falcon.py` in transformers. `new_decoder_architecture` wins over `multi_query`.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconMLP

import transformer_lens.model_bridge.generalized_components as kinds
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter, Preparation, refuse_unless_divisible
from transformer_lens.model_bridge.generalized_components import Part, Stages, linears
from transformer_lens.model_bridge.supported_architectures import by_type
from transformer_lens.model_bridge.supported_architectures.llama import NAMES

BLOCKS: dict[str, tuple[Stages, dict[str, str]]] = {
    "sequential": (kinds.SEQUENTIAL, {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}),
    "parallel, one norm": (kinds.PARALLEL_ONE_NORM, {"ln1": "input_layernorm"}),
    "parallel, two norms": (kinds.PARALLEL, {"ln1": "ln_attn", "ln2": "ln_mlp"}),
}
LAYOUT_NAMES = {
    (False, False, "sequential", True): "RW",
    (False, True, "parallel, one norm", False): "7B",
    (True, False, "parallel, one norm", False): "11B",
    (True, False, "parallel, two norms", False): "40B and 180B",
}
"""The published models by new architecture, multi-query, kind of block, and ALiBi."""
ATTENTION = {True: kinds.ALiBiJointQKVAttentionBridge, False: kinds.JointQKVPositionEmbeddingsAttentionBridge}


class FreshOutput(nn.Module):
    """A module whose caller gets a tensor of its own.

    A parallel `FalconDecoderLayer` runs `mlp_output += attention_output` after every hook has seen the MLP's output.
    Here it adds into a copy, so hooks keep what the MLP computed, and autograd's backward hooks do not refuse.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().__call__(*args, **kwargs)
        return output.clone()


class FreshOutputFalconMLP(FreshOutput, FalconMLP):
    """Falcon's MLP with a fresh output."""


@lru_cache(maxsize=64)
def fresh(kind: Any) -> Any:
    """The class with fresh outputs of a module that replaces Falcon's MLP."""
    return FreshOutputFalconMLP if kind is FalconMLP else type(kind.__name__, (FreshOutput, kind), {})


class FreshOutputs(Preparation):
    """The MLPs whose class was replaced; each counts the preparations that hold it."""

    def __init__(self, mlps: list[Any]) -> None:
        self.mlps = mlps
        for mlp in mlps:
            mlp.__dict__["preparations"] = mlp.__dict__.get("preparations", 0) + 1
            if not isinstance(mlp, FreshOutput):
                mlp.__class__ = fresh(type(mlp))  # type: ignore[arg-type]

    def undo(self) -> None:
        for mlp in self.mlps:
            mlp.__dict__["preparations"] -= 1
            if not mlp.__dict__["preparations"]:
                del mlp.__dict__["preparations"]
                mlp.__class__ = type(mlp).__bases__[1]
        self.mlps = []


class FalconArchitectureAdapter(ArchitectureAdapter):
    """Every Falcon that transformers can run: 24 layouts, in 98 ways to write them in a config."""

    model_type = "falcon"
    block_returns_tuple = True
    dropouts = ("attention_dropout", "hidden_dropout")
    cfg_names = {
        **NAMES,
        "n_key_value_heads": "num_kv_heads",  # in the new architecture; see key_value_groups
        "d_head": "head_dim",
        "d_mlp": "ffn_hidden_size",
        "act_fn": "activation",
        "eps": "layer_norm_epsilon",
    }
    config_keys = ("alibi", "multi_query", "new_decoder_architecture", "num_ln_in_parallel_attn", "parallel_attn")
    harmless = ("bias",)

    def refusals(self) -> list[str]:
        c = self.config
        if c.hidden_size % c.num_attention_heads:
            return [f"hidden_size {c.hidden_size} is not a multiple of num_attention_heads {c.num_attention_heads}"]
        norms = c.num_ln_in_parallel_attn
        if c.new_decoder_architecture:
            if not c.parallel_attn:
                return ["new_decoder_architecture runs attention and MLP in parallel, so parallel_attn must be True"]
            if norms not in (None, 1, 2):
                return [f"num_ln_in_parallel_attn is {norms}, and a new_decoder_architecture block has 1 or 2 norms"]
            return refuse_unless_divisible(c.num_attention_heads, c.num_kv_heads)
        if c.parallel_attn and norms == 2:
            return ["num_ln_in_parallel_attn=2 in a parallel block needs new_decoder_architecture=True"]
        if not c.multi_query and c.num_kv_heads != c.num_attention_heads:
            return [
                f"the per-head layout (multi_query=False) has a key for each of its {c.num_attention_heads} heads, "
                f"so num_kv_heads={c.num_kv_heads} does not fit"
            ]
        return []

    def cautions(self) -> list[str]:
        if self.config.alibi and self.config._attn_implementation == "eager":
            return [
                "Falcon with ALiBi under eager attention adds its bias twice in transformers (the mask already "
                "holds it); the activations shown are the ones it computes. Load it with attn_implementation='sdpa'"
            ]
        return []

    def attentions_fault(self) -> str | None:
        if self.config._attn_implementation != "sdpa":
            return None
        if self.config.alibi:
            return "under sdpa transformers then adds Falcon's ALiBi bias a second time"
        return "under sdpa transformers then adds Falcon's boolean mask to the scores, and tokens attend to later ones"

    def block_kind(self) -> str:
        c = self.config
        if not c.parallel_attn:
            return "sequential"
        two = c.new_decoder_architecture and c.num_ln_in_parallel_attn in (None, 2)
        return "parallel, two norms" if two else "parallel, one norm"

    def key_value_groups(self) -> int:
        c = self.config
        if c.new_decoder_architecture:
            return int(c.num_kv_heads)
        return 1 if c.multi_query else int(c.num_attention_heads)

    def layout_name(self) -> str:
        """The published models with this layout."""
        new = bool(self.config.new_decoder_architecture)
        name = LAYOUT_NAMES.get((new, self.key_value_groups() == 1, self.block_kind(), bool(self.config.alibi)))
        known = f"Falcon {name} layout" if name else "Falcon, as none of the published layouts"
        return f"{known} (new decoder architecture)" if new else known

    def cached_heads(self) -> int:
        """The new architecture gives each query head its key before caching it (`FalconAttention._split_heads`)."""
        return self.cfg.n_heads if self.config.new_decoder_architecture else self.cfg.n_key_value_heads

    def variant(self) -> Mapping[str, Any]:
        return {
            "n_key_value_heads": self.key_value_groups(),
            "positional_embedding_type": "alibi" if self.config.alibi else "rotary",
            "normalization_type": "LN",
        }

    def components(self) -> dict[str, Part]:
        stages, norms = BLOCKS[self.block_kind()]
        projections = linears({"qkv": "query_key_value", "o": "dense"})
        layers = linears({"in": "dense_h_to_4h", "out": "dense_4h_to_h"})
        inside = {role: Part(kinds.LayerNormBridge, at) for role, at in norms.items()}
        inside["attn"] = Part(ATTENTION[bool(self.config.alibi)], "self_attention", projections)
        inside["mlp"] = Part(kinds.MLPBridge, "mlp", layers)
        return {
            "embed": Part(kinds.EmbeddingBridge, "word_embeddings"),
            "rotary_emb": Part(kinds.RotaryEmbeddingBridge, "rotary_emb"),
            "blocks": Part(kinds.BlockBridge, "h", inside, stages),
            "ln_final": Part(kinds.LayerNormBridge, "ln_f"),
        }

    @staticmethod
    def prepare_model(hf_model: nn.Module) -> Preparation:
        """Undo Falcon's in-place add for every hook, ours or plain torch ones; callable alone.

        >>> preparation = FalconArchitectureAdapter.prepare_model(model)
        >>> handle = model.transformer.h[0].mlp.register_full_backward_hook(lambda *_: None)
        >>> preparation.undo()
        """
        config: Any = hf_model.config
        if not config.parallel_attn:
            return Preparation()
        return FreshOutputs([m for m in hf_model.modules() if type(m) in (FalconMLP, FreshOutputFalconMLP)])

    def prepare_module(self, component: kinds.ComponentBridge, module: nn.Module) -> Preparation:
        """The block adds into whatever its MLP returns."""
        added_to = self.config.parallel_attn and isinstance(component, kinds.MLPBridge)
        return FreshOutputs([module]) if added_to else Preparation()


FAMILIES = by_type(FalconArchitectureAdapter)
