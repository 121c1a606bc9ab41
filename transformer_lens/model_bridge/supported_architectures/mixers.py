"""Families with state-space mixers or short convolutions, instead of attention or in parallel with it.

Source: the modeling files of these families in transformers >= 5.24.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from transformer_lens.model_bridge.generalized_components import (
    Branch,
    GatedMLPBridge,
    MixerBridge,
    NormedQKAttentionBridge,
    Part,
    Stages,
    linears,
)
from transformer_lens.model_bridge.supported_architectures import by_type
from transformer_lens.model_bridge.supported_architectures.llama import (
    GATED,
    NAMES,
    PROJECTIONS,
    UNROTATED,
    LlamaArchitectureAdapter,
    attends,
)
from transformer_lens.model_bridge.supported_architectures.mixtral import (
    CHOSEN,
    LOSSES,
    NARROW,
    MixtralArchitectureAdapter,
    mixes,
)

PERIODS = tuple(f"{what}_layer_{how}" for what in ("attn", "expert") for how in ("period", "offset"))
MIXED: Stages = ((Branch("ln1", "mixer"),), (Branch("ln2", "mlp"),))


class Lfm2MoeArchitectureAdapter(MixtralArchitectureAdapter):
    """Short convolutions in some layers, attention in others; dense first layers, then mixtures."""

    model_type = "lfm2_moe"
    since = "5.24"
    norms = {"ln1": "operator_norm", "ln2": "ffn_norm"}
    ln_final = "embedding_norm"
    rotary_emb = "pos_emb"
    attention = attends(
        NormedQKAttentionBridge, {**PROJECTIONS, "o": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
    )
    dense = Part(GatedMLPBridge, "feed_forward", linears({"gate": "w1", "in": "w3", "out": "w2"}))
    mixture = mixes(at="feed_forward")
    mixer: ClassVar[Part] = Part(MixerBridge, "conv")
    dropouts: ClassVar[tuple[str, ...]] = ()
    cfg_names = {name: at for name, at in {**NARROW, **CHOSEN, "eps": "norm_eps"}.items() if name != "act_fn"}
    constants = {"act_fn": "silu"}
    config_keys: ClassVar[tuple[str, ...]] = ("layer_types", "num_dense_layers", "intermediate_size")
    harmless: ClassVar[tuple[str, ...]] = (
        *("output_router_logits", "routed_scaling_factor", "norm_topk_prob", "use_expert_bias"),
        *("conv_bias", "conv_L_cache"),
    )

    def attends(self, layer: int) -> bool:
        return bool(self.config.layer_types[layer] == "full_attention")

    def is_dense(self, layer: int) -> bool:
        return bool(layer < self.config.num_dense_layers)

    def branches(self, layer: int) -> Stages:
        return self.stages if self.attends(layer) else MIXED

    def mixers(self, layer: int) -> Mapping[str, Part]:
        return super().mixers(layer) if self.attends(layer) else {"mixer": self.mixer, "mlp": self.mlp(layer)}


class Lfm2ArchitectureAdapter(Lfm2MoeArchitectureAdapter):
    """Short convolutions in some layers, attention in others."""

    model_type = "lfm2"
    rotary_emb = "rotary_emb"
    cfg_names = {name: at for name, at in {**NAMES, "eps": "norm_eps"}.items() if name != "act_fn"}
    config_keys = ("layer_types",)
    harmless = (
        *("conv_bias", "conv_L_cache", "full_attn_idxs", "block_auto_adjust_ff_dim"),
        *("block_multiple_of", "block_ffn_dim_multiplier"),
    )

    def refusals(self) -> list[str]:
        return super(MixtralArchitectureAdapter, self).refusals()

    def mlp(self, layer: int) -> Part:
        return self.dense

    def variant(self) -> Mapping[str, Any]:
        c = self.config
        width = c.intermediate_size
        if c.block_auto_adjust_ff_dim:
            width = int(c.block_ffn_dim_multiplier * int(2 * width / 3))
            width = -(-width // c.block_multiple_of) * c.block_multiple_of
        return {**super().variant(), "d_mlp": width}


class JambaArchitectureAdapter(Lfm2MoeArchitectureAdapter):
    """State-space mixers, attention without position encoding in some layers, and mixtures in some."""

    model_type = "jamba"
    norms = {"ln1": "input_layernorm", "ln2": "pre_ff_layernorm"}
    ln_final = "final_layernorm"
    rotary_emb = ""
    attention = UNROTATED
    dense = Part(GatedMLPBridge, "feed_forward", GATED.parts)
    mixture = mixes(at="feed_forward", router="router")
    mixer = Part(MixerBridge, "mamba")
    dropouts = ("attention_dropout",)
    cfg_names = {**NAMES, **CHOSEN}
    constants = {"positional_embedding_type": "none"}
    config_keys = ("layers_block_type", "layers_num_experts", *PERIODS)
    harmless = (
        *LOSSES,
        *(f"mamba_{name}" for name in ("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "proj_bias")),
        *("use_mamba_kernels", "use_mambapy", "use_associative_scan"),
    )

    def attends(self, layer: int) -> bool:
        return bool(self.config.layers_block_type[layer] == "attention")

    def is_dense(self, layer: int) -> bool:
        return bool(self.config.layers_num_experts[layer] == 1)


class FalconH1ArchitectureAdapter(LlamaArchitectureAdapter):
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
        *LlamaArchitectureAdapter.harmless,
        *("lm_head_multiplier", "ssm_multipliers", "ssm_in_multiplier", "num_logits_to_keep", "projectors_bias"),
        *(f"mamba_{name}" for name in ("d_ssm", "n_heads", "d_head", "n_groups", "d_state", "d_conv", "expand")),
        *(f"mamba_{name}" for name in ("chunk_size", "conv_bias", "proj_bias", "norm_before_gate", "rms_norm")),
        "time_step_limit",
    )

    def branches(self, layer: int) -> Stages:
        c = self.config
        mixer = Branch("ln1", "mixer", scale=c.ssm_out_multiplier)
        attn = Branch("ln1", "attn", scale=c.attention_out_multiplier, scale_in=c.attention_in_multiplier)
        return ((mixer, attn), (Branch("ln2", "mlp"),))

    def mixers(self, layer: int) -> Mapping[str, Part]:
        gate, out = self.config.mlp_multipliers
        return {
            "attn": replace(self.attention, scales={"k": self.config.key_multiplier}),
            "mixer": Part(MixerBridge, "mamba"),
            "mlp": Part(GatedMLPBridge, "feed_forward", GATED.parts, scales={"gate": gate, "out": out}),
        }


FAMILIES = by_type(
    Lfm2ArchitectureAdapter, Lfm2MoeArchitectureAdapter, JambaArchitectureAdapter, FalconH1ArchitectureAdapter
)
