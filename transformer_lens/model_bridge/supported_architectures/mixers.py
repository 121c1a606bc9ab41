"""Families with state-space mixers or short convolutions, instead of attention or in parallel with it.

Source: the modeling files of these families in transformers >= 5.24.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import transformer_lens.model_bridge.generalized_components as kinds
from transformer_lens.model_bridge.generalized_components import Branch, Part, Stages, linears
from transformer_lens.model_bridge.generalized_components.attention import GatedQueryAttentionBridge
from transformer_lens.model_bridge.supported_architectures import by_type, llama, mixtral, row

PERIODS = tuple(f"{what}_layer_{how}" for what in ("attn", "expert") for how in ("period", "offset"))
MIXED: Stages = ((Branch("ln1", "mixer"),), (Branch("ln2", "mlp"),))


class MixedArchitectureAdapter(mixtral.MixtureArchitectureAdapter):
    """Attention in some layers, and another mixer in the others."""

    since = "5.24"
    mixer: ClassVar[Part]
    mixer_settings = ("mamba", "conv", "linear")

    def attends(self, layer: int) -> bool:
        return bool(self.config.layer_types[layer] == "full_attention")

    def branches(self, layer: int) -> Stages:
        return self.stages if self.attends(layer) else MIXED

    def mixers(self, layer: int) -> Mapping[str, Part]:
        return super().mixers(layer) if self.attends(layer) else {"mixer": self.mixer, "mlp": self.mlp(layer)}


class Lfm2MoeArchitectureAdapter(MixedArchitectureAdapter):
    """Short convolutions in some layers, attention in others; dense first layers, then mixtures."""

    model_type = "lfm2_moe"
    norms = {"ln1": "operator_norm", "ln2": "ffn_norm"}
    ln_final = "embedding_norm"
    positions: ClassVar[Mapping[str, Part]] = {"rotary_emb": Part(kinds.RotaryEmbeddingBridge, "pos_emb")}
    attention = llama.attends(
        kinds.NormedQKAttentionBridge,
        {**llama.PROJECTIONS, "o": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"},
    )
    dense = Part(kinds.GatedMLPBridge, "feed_forward", linears({"gate": "w1", "in": "w3", "out": "w2"}))
    mixture = mixtral.mixes(at="feed_forward")
    mixer = Part(kinds.MixerBridge, "conv")
    dropouts = ()
    cfg_names = {
        name: at for name, at in {**mixtral.NARROW, **mixtral.CHOSEN, "eps": "norm_eps"}.items() if name != "act_fn"
    }
    constants = {"act_fn": "silu"}
    config_keys: ClassVar[tuple[str, ...]] = ("layer_types", "num_dense_layers", "intermediate_size")
    harmless = ("output_router_logits", "routed_scaling_factor", "norm_topk_prob", "use_expert_bias")

    def is_dense(self, layer: int) -> bool:
        return bool(layer < self.config.num_dense_layers)


class Lfm2ArchitectureAdapter(Lfm2MoeArchitectureAdapter):
    """Short convolutions in some layers, attention in others."""

    model_type = "lfm2"
    positions = MixedArchitectureAdapter.positions
    cfg_names = {name: at for name, at in {**llama.NAMES, "eps": "norm_eps"}.items() if name != "act_fn"}
    is_dense = mixtral.always
    config_keys = ("layer_types",)
    harmless = ("full_attn_idxs", "block_auto_adjust_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier")

    def mlp(self, layer: int) -> Part:
        return self.dense

    def variant(self) -> Mapping[str, Any]:
        c = self.config
        width = c.intermediate_size
        if c.block_auto_adjust_ff_dim:
            width = int(c.block_ffn_dim_multiplier * int(2 * width / 3))
            width = -(-width // c.block_multiple_of) * c.block_multiple_of
        return {**super().variant(), "d_mlp": width}


class JambaArchitectureAdapter(MixedArchitectureAdapter):
    """State-space mixers, attention without position encoding in some layers, and mixtures in some."""

    model_type = "jamba"
    norms = {"ln1": "input_layernorm", "ln2": "pre_ff_layernorm"}
    ln_final = "final_layernorm"
    positions = {}
    attention = llama.UNROTATED
    dense = Part(kinds.GatedMLPBridge, "feed_forward", llama.GATED.parts)
    mixture = mixtral.mixes(at="feed_forward", router="router")
    mixer = Part(kinds.MixerBridge, "mamba")
    cfg_names = {**llama.NAMES, **mixtral.CHOSEN}
    constants = {"positional_embedding_type": "none"}
    config_keys = ("layers_block_type", "layers_num_experts", *PERIODS)
    harmless = (*mixtral.LOSSES, "use_mamba_kernels", "use_mambapy", "use_associative_scan")

    def attends(self, layer: int) -> bool:
        return bool(self.config.layers_block_type[layer] == "attention")

    def is_dense(self, layer: int) -> bool:
        return bool(self.config.layers_num_experts[layer] == 1)


class FalconH1ArchitectureAdapter(llama.LlamaArchitectureAdapter):
    """Attention and a state-space mixer in parallel after one norm, then an MLP, all with multipliers."""

    model_type = "falcon_h1"
    since = "5.24"
    block_returns_tuple = True
    norms = {"ln1": "input_layernorm", "ln2": "pre_ff_layernorm"}
    ln_final = "final_layernorm"
    embed_multiplier = "embedding_multiplier"
    scales_given_embeddings = False
    logit_multiplier = "lm_head_multiplier"
    config_keys = (
        *("attention_in_multiplier", "attention_out_multiplier", "ssm_out_multiplier"),
        *("key_multiplier", "mlp_multipliers", "embedding_multiplier"),
    )
    harmless = (
        *llama.LlamaArchitectureAdapter.harmless,
        "lm_head_multiplier",
        "projectors_bias",
        "num_logits_to_keep",
        "time_step_limit",
    )
    mixer_settings = ("mamba", "ssm")

    def branches(self, layer: int) -> Stages:
        c = self.config
        mixer = Branch("ln1", "mixer", scale=c.ssm_out_multiplier)
        attn = Branch("ln1", "attn", scale=c.attention_out_multiplier, scale_in=c.attention_in_multiplier)
        return ((mixer, attn), (Branch("ln2", "mlp"),))

    def mixers(self, layer: int) -> Mapping[str, Part]:
        gate, out = self.config.mlp_multipliers
        return {
            "attn": replace(self.attention, scales={"k": self.config.key_multiplier}),
            "mixer": Part(kinds.MixerBridge, "mamba"),
            "mlp": Part(kinds.GatedMLPBridge, "feed_forward", llama.GATED.parts, scales={"gate": gate, "out": out}),
        }


QWEN_NEXT: Mapping[str, Any] = {
    "norm": kinds.OffsetRMSNormBridge,
    "attention": llama.attends(GatedQueryAttentionBridge, llama.NORMED),
    "mixer": Part(kinds.MixerBridge, "linear_attn"),
    "harmless": mixtral.MixtureArchitectureAdapter.harmless,
}
FAMILIES = by_type(
    Lfm2ArchitectureAdapter,
    Lfm2MoeArchitectureAdapter,
    JambaArchitectureAdapter,
    FalconH1ArchitectureAdapter,
    row(
        MixedArchitectureAdapter,
        "qwen3_next",
        "Gated attention in some layers, linear attention in others; mixtures with a gated shared expert.",
        **QWEN_NEXT,
        **mixtral.WEIGHED_SHARED,
        is_dense=mixtral.Qwen3MoeArchitectureAdapter.is_dense,
        config_keys=(*mixtral.SPARSE, "layer_types", "shared_expert_intermediate_size"),
    ),
    row(
        MixedArchitectureAdapter,
        "qwen3_5_moe_text",
        "Qwen 3 Next with another linear attention, and a mixture in every layer.",
        **QWEN_NEXT,
        **mixtral.WEIGHED_SHARED,
        config_keys=("layer_types", "shared_expert_intermediate_size"),
    ),
    row(
        MixedArchitectureAdapter,
        "qwen3_5_text",
        "Qwen 3 Next with another linear attention, and without mixtures.",
        **QWEN_NEXT,
        cfg_names=llama.NAMES,
        is_dense=mixtral.always,
        config_keys=("layer_types",),
    ),
)
