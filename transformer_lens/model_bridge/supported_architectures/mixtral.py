"""Mixtures of experts with Llama's attention: each row says how a family differs.

Source: their modeling files in transformers >= 5.13 (Granite: 5.24). Mixtral 8x7B and 8x22B differ only in size.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import log, prod
from typing import Any, ClassVar

import transformer_lens.model_bridge.generalized_components as kinds
import transformer_lens.model_bridge.generalized_components.attention as opened
from transformer_lens.model_bridge.generalized_components import Part, linears
from transformer_lens.model_bridge.supported_architectures import by_type, row
from transformer_lens.model_bridge.supported_architectures.llama import (
    AROUND,
    CENTRED,
    COHERE,
    EXAONE,
    GATED,
    GLM4_NORMS,
    GRANITE,
    HEADS_FIRST,
    LATE_NORMED,
    NAMES,
    NORMED,
    OLMO2,
    WHOLE_NORMED,
    WINDOWED,
    LlamaArchitectureAdapter,
    Qwen3ArchitectureAdapter,
    attends,
    in_windows,
    normed_if_asked,
)


def mixes(
    kind: type[kinds.MoEBridge] = kinds.MoEBridge,
    at: str = "mlp",
    router: str = "gate",
    more: Mapping[str, Part] | None = None,
) -> Part:
    """A mixture: its path, its router's, and its further or other parts."""
    parts = {"gate": Part(kinds.RouterBridge, router), "experts": Part(kinds.ExpertsBridge, "experts")}
    return Part(kind, at, {**parts, **(more or {})})


def routed_by(at: str, weight: str) -> Part:
    """A mixture with a shared expert and a router whose weight is in a linear map."""
    router = Part(kinds.LinearRouterBridge, at, linears({"w": weight}))
    return mixes(kinds.LinearRoutedMoEBridge, more={"gate": router})


FLAT_SHARED = Part(kinds.FlatSharedExpertBridge, "shared_experts", GATED.parts)

LOSSES = ("output_router_logits", "router_aux_loss_coef")
HARMLESS = (*LlamaArchitectureAdapter.harmless, *LOSSES)
NARROW = {**NAMES, "d_mlp": "moe_intermediate_size"}
"""The config names of a family whose experts are narrower than its dense MLPs."""
CHOSEN = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}
LOCAL = {**CHOSEN, "num_experts": "num_local_experts"}
SLIDING = {**NARROW, **CHOSEN, "sliding_window": "sliding_window"}
ROUTED = {**CHOSEN, "num_experts": "n_routed_experts"}


class MixtureArchitectureAdapter(LlamaArchitectureAdapter):
    """Llama with mixtures of experts."""

    mixture: ClassVar[Part] = mixes()
    shared: ClassVar[Part] = Part(kinds.SharedExpertBridge, "shared_experts", GATED.parts)
    """The shared expert, in a mixture that has one."""
    shared_width: ClassVar[tuple[str, ...]] = ()
    """The config names whose product is the shared expert's width; empty without one."""
    cfg_names = {**NARROW, **CHOSEN}
    harmless = HARMLESS

    def refusals(self) -> list[str]:
        if not all(map(self.is_dense, range(self.config.num_hidden_layers))):
            experts, chosen = (getattr(self.config, self.cfg_names[name]) for name in CHOSEN)
            if (chosen or experts + 1) > experts:
                return [f"it chooses {chosen} experts for each token and has {experts}"]
        return super().refusals()

    def is_dense(self, layer: int) -> bool:
        return False

    def mlp(self, layer: int) -> Part:
        if self.is_dense(layer):
            return replace(self.dense, sizes={"d_mlp": self.config.intermediate_size})
        width = prod(getattr(self.config, name) for name in self.shared_width)
        if not self.shared_width or not width:
            return self.mixture
        shared = replace(self.shared, sizes={"d_mlp": width})
        kind = kinds.SharedMoEBridge if self.mixture.kind is kinds.MoEBridge else self.mixture.kind
        return replace(self.mixture, kind=kind, parts={**self.mixture.parts, "shared": shared})


class MixtralArchitectureAdapter(MixtureArchitectureAdapter):
    """Every Mixtral that transformers can run, 8x7B and 8x22B among them."""

    model_type = "mixtral"
    dropouts = ("attention_dropout", "router_jitter_noise")
    cfg_names = {**WINDOWED, **LOCAL}
    config_keys = ("head_dim",)


SPARSE = ("mlp_only_layers", "decoder_sparse_step", "intermediate_size", "norm_topk_prob")
"""The config names that say which layers are dense, and how."""


class Qwen3MoeArchitectureAdapter(MixtureArchitectureAdapter):
    """Qwen 3 with a mixture of experts in most layers, and a dense MLP of another width in the others."""

    model_type = "qwen3_moe"
    attention = Qwen3ArchitectureAdapter.attention
    cfg_names = SLIDING
    config_keys = SPARSE
    harmless = (*Qwen3ArchitectureAdapter.harmless, *LOSSES)

    def is_dense(self, layer: int) -> bool:
        c = self.config
        return layer in c.mlp_only_layers or not c.num_experts or bool((layer + 1) % c.decoder_sparse_step)


def always(adapter: LlamaArchitectureAdapter, layer: int) -> bool:
    """Dense MLPs alone."""
    return True


def before(number: str) -> Callable[[LlamaArchitectureAdapter, int], bool]:
    """Dense MLPs in the first layers; their number is in the config."""
    return lambda adapter, layer: bool(layer < getattr(adapter.config, number))


def named_dense(adapter: LlamaArchitectureAdapter, layer: int) -> bool:
    """Dense MLPs in the layers that a list in the config names."""
    return bool(adapter.config.mlp_layer_types[layer] == "dense")


def in_windows_or_dense(adapter: MixtralArchitectureAdapter, layer: int) -> bool:
    """RoPE in sliding-window layers, and in dense ones if the config has no pattern of windows for these."""
    alone = adapter.config.prefix_dense_sliding_window_pattern == 1
    return adapter.window(layer) is not None or (alone and adapter.is_dense(layer))


def ernies_dense_layers(adapter: LlamaArchitectureAdapter, layer: int) -> bool:
    """Dense MLPs outside a range of layers, and outside a period within it."""
    c = adapter.config
    return bool((layer + 1) % c.moe_layer_interval) or not c.moe_layer_start_index <= layer <= c.moe_layer_end_index


def root_if_asked(adapter: LlamaArchitectureAdapter) -> float:
    """Embeddings times sqrt(d_model) if the config asks for it."""
    return float(adapter.config.hidden_size**0.5) if adapter.config.mup_enabled else 1.0


def latent_attention(adapter: LlamaArchitectureAdapter, layer: int) -> Mapping[str, Part]:
    """Attention whose keys and values come from a latent vector, and its queries too where the config says so."""
    c, places = adapter.config, {"kv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_b": "kv_b_proj"}
    places |= {"q": "q_proj", "o": "o_proj"}
    kind, sizes = opened.LatentAttentionBridge, {"d_latent": c.kv_lora_rank, "d_v": c.v_head_dim}
    if c.q_lora_rank is not None:
        kind, sizes = opened.LatentQueryAttentionBridge, {**sizes, "d_q_latent": c.q_lora_rank}
        places |= {"q_a": "q_a_proj", "q_norm": "q_a_layernorm", "q": "q_b_proj"}
    return {"attn": Part(kind, "self_attn", linears(places), sizes=sizes), "mlp": adapter.mlp(layer)}


def indexed_attention(adapter: LlamaArchitectureAdapter, layer: int) -> Mapping[str, Part]:
    """The same with an indexer, but in layers that use the choice of one before them."""
    found = latent_attention(adapter, layer)
    kind, parts = opened.ChoosingAttentionBridge, found["attn"].parts
    if adapter.config.to_dict().get("indexer_types", {layer: "full"})[layer] == "full":
        kind = opened.IndexedAttentionBridge
        parts = {**parts, **linears({"index_k": "indexer.wk", "index_weights": "indexer.weights_proj"})}
    return {**found, "attn": replace(found["attn"], kind=kind, parts=parts)}


def latent_sizes(adapter: LlamaArchitectureAdapter) -> Mapping[str, Any]:
    """Heads of which a part is rotated; YaRN may scale their products too (`yarn_apply_mscale` in transformers)."""
    c, rotation = adapter.config, adapter.config.to_dict()["rope_parameters"]
    d_head, scale = c.qk_nope_head_dim + c.qk_rope_head_dim, 1.0
    if rotation["rope_type"] != "default" and rotation.get("mscale_all_dim"):
        scale += 0.1 * rotation["mscale_all_dim"] * log(max(rotation["factor"], 1))
    heads = {"d_head": d_head, "rotary_dim": c.qk_rope_head_dim, "attn_scale": d_head**0.5 / scale**2}
    return {**LlamaArchitectureAdapter.variant(adapter), **heads}


Mixture = MixtureArchitectureAdapter
OLMOE: Mapping[str, Any] = {"cfg_names": {**NAMES, **CHOSEN}, "config_keys": ("norm_topk_prob",)}
SIGMOIDS = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
"""Settings of a router that scores with sigmoids and chooses among groups of experts."""
SHARED: Mapping[str, Any] = {
    "cfg_names": {**NARROW, **ROUTED},
    "shared_width": ("moe_intermediate_size", "n_shared_experts"),
}
WEIGHED_SHARED: Mapping[str, Any] = {
    "mixture": mixes(kinds.WeighedSharedMoEBridge, more=linears({"shared_gate": "shared_expert_gate"})),
    "shared": Part(kinds.WeighedSharedExpertBridge, "shared_expert", GATED.parts),
    "shared_width": ("shared_expert_intermediate_size",),
}
GLM4_MOE: Mapping[str, Any] = {
    **SHARED,
    "mixers": normed_if_asked,
    "is_dense": before("first_k_dense_replace"),
    "config_keys": (*SIGMOIDS, "first_k_dense_replace", "n_shared_experts", "intermediate_size", "use_qk_norm"),
    "harmless": (*HARMLESS, "num_mtp_layers"),
}
WIDTHS = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim")
LATENT: Mapping[str, Any] = {
    "since": "5.24",
    "mixers": latent_attention,
    "variant": latent_sizes,
    "config_keys": WIDTHS,
    "harmless": (*HARMLESS, "rope_interleave", "num_mtp_layers", "topk_method", "embedding_initializer_range"),
}
DEEPSEEK: Mapping[str, Any] = {
    **LATENT,
    **SHARED,
    "is_dense": before("first_k_dense_replace"),
    "config_keys": (*WIDTHS, *SIGMOIDS, "first_k_dense_replace", "n_shared_experts", "intermediate_size"),
}
LISTED: Mapping[str, Any] = {
    **DEEPSEEK,
    "is_dense": named_dense,
    "config_keys": (*WIDTHS, *SIGMOIDS, "mlp_layer_types", "n_shared_experts", "intermediate_size"),
}
INDEXED: Mapping[str, Any] = {
    **LISTED,
    "mixers": indexed_attention,
    "harmless": (
        *(*HARMLESS, "first_k_dense_replace", "layer_types", "indexer_types"),
        *("index_topk", "index_head_dim", "index_n_heads"),
    ),
}
FAMILIES = by_type(
    MixtralArchitectureAdapter,
    row(Mixture, "deepseek_v2", "Latent attention; dense first layers, then mixtures with a shared one.", **DEEPSEEK),
    row(Mixture, "deepseek_v3", "DeepSeek V2 whose router scores with sigmoids.", **DEEPSEEK),
    row(Mixture, "sarvam_mla", "DeepSeek V3 under another name.", **DEEPSEEK),
    row(Mixture, "mistral4", "DeepSeek V2 whose queries grow beyond a length.", **DEEPSEEK),
    row(Mixture, "glm4_moe_lite", "DeepSeek V3 under another name.", **LISTED),
    row(Mixture, "deepseek_v32", "DeepSeek V3 that attends to the tokens that an indexer chooses.", **INDEXED),
    row(
        Mixture,
        "glm_moe_dsa",
        "DeepSeek V3.2, some of whose layers attend to the tokens that a layer before them chose.",
        **INDEXED,
        block_returns_tuple=True,
    ),
    row(LlamaArchitectureAdapter, "youtu", "Llama with latent attention.", **LATENT),
    Qwen3MoeArchitectureAdapter,
    row(
        Qwen3MoeArchitectureAdapter,
        "qwen2_moe",
        "Qwen 2 with a mixture of experts and a gated shared expert.",
        attention=Mixture.attention,
        **WEIGHED_SHARED,
        config_keys=(*Qwen3MoeArchitectureAdapter.config_keys, "shared_expert_intermediate_size", "layer_types"),
        harmless=(*Qwen3MoeArchitectureAdapter.harmless, "qkv_bias"),
    ),
    row(
        MixtralArchitectureAdapter,
        "gpt_oss",
        "Attention sinks, sliding-window attention in every other layer, and experts with biases.",
        dropouts=Mixture.dropouts,
        attention=attends(kinds.SinkAttentionBridge),
        mixture=mixes(kinds.InterleavedMoEBridge, router="router"),
        config_keys=("layer_types",),
        harmless=(*HARMLESS, "swiglu_alpha", "swiglu_limit"),
    ),
    row(
        Mixture,
        "olmoe",
        "A mixture in every layer; one norm over all queries and one over all keys.",
        **OLMOE,
        attention=WHOLE_NORMED,
    ),
    row(Mixture, "flex_olmo", "OLMo 2 with a mixture in every layer.", **OLMO2, **OLMOE),
    row(
        MixtralArchitectureAdapter,
        "phimoe",
        "Mixtral with LayerNorms and biases; its router is a sparse mixer.",
        config_keys=(),
        norm=kinds.LayerNormBridge,
        mixture=mixes(router="router"),
        dropouts=("attention_dropout", "router_jitter_noise", "input_jitter_noise"),
        harmless=(*HARMLESS, "lm_head_bias"),
    ),
    row(
        Mixture,
        "granitemoe",
        "Granite with a mixture in every layer.",
        since="5.24",
        **GRANITE,
        mixture=mixes(at="block_sparse_moe", router="router"),
        cfg_names={**NAMES, **LOCAL},
    ),
    row(
        Mixture,
        "dots1",
        "Dense first layers, then mixtures with a shared expert; QK-norm.",
        **{**SHARED, "cfg_names": {**NARROW, **ROUTED, "sliding_window": "sliding_window"}},
        attention=Qwen3ArchitectureAdapter.attention,
        is_dense=before("first_k_dense_replace"),
        config_keys=(*SIGMOIDS, "first_k_dense_replace", "n_shared_experts", "intermediate_size", "layer_types"),
        harmless=(*HARMLESS, "max_window_layers"),
    ),
    row(Mixture, "glm4_moe", "Dense first layers, then mixtures with a shared expert; partial RoPE.", **GLM4_MOE),
    row(Mixture, "sarvam_moe", "GLM 4's mixture under another name.", **GLM4_MOE),
    row(
        Mixture,
        "mellum",
        "Qwen 3's mixture with sliding-window attention in some layers, which have another RoPE base.",
        attention=Qwen3ArchitectureAdapter.attention,
        cfg_names=SLIDING,
        is_dense=named_dense,
        config_keys=("mlp_layer_types", "layer_types", "intermediate_size", "norm_topk_prob"),
        harmless=(*HARMLESS, "num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types"),
    ),
    row(
        Mixture,
        "hy_v3",
        "Dense layers and mixtures with a shared expert; QK-norm.",
        attention=HEADS_FIRST,
        shared=FLAT_SHARED,
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        is_dense=named_dense,
        config_keys=("mlp_layer_types", "num_shared_experts", "intermediate_size"),
        harmless=(*HARMLESS, "router_scaling_factor", "enable_moe_fp32_combine"),
    ),
    row(
        Mixture,
        "solar_open",
        "A mixture with a shared expert in every layer.",
        **SHARED,
        config_keys=(*SIGMOIDS, "n_shared_experts"),
    ),
    row(
        Mixture,
        "kolibri1",
        "Norms around QK-normed attention, with RoPE in its windows alone, and around mixtures with a shared expert.",
        **EXAONE,
        stages=AROUND,
        norms=GLM4_NORMS,
        rotates=in_windows,
        cfg_names=SLIDING,
        shared_width=("shared_expert_intermediate_size",),
        config_keys=("layer_types", "shared_expert_intermediate_size", "norm_topk_prob"),
    ),
    row(
        Qwen3MoeArchitectureAdapter,
        "flint",
        "Qwen 3's mixture with a shared expert, attention sinks, and RoPE in its sliding-window layers alone.",
        attention=attends(opened.NormedSinkAttentionBridge, NORMED),
        unrotated=attends(opened.UnrotatedNormedSinkAttentionBridge, NORMED),
        rotates=in_windows,
        shared=Part(kinds.FlatSharedExpertBridge, "shared_expert", GATED.parts),
        shared_width=("shared_expert_intermediate_size",),
        config_keys=(*SPARSE, "layer_types", "shared_expert_intermediate_size"),
    ),
    row(
        Mixture,
        "aria_text",
        "Mixtral with a shared expert; its experts' weights are kept the other way round.",
        mixture=mixes(router="router"),
        shared_width=("intermediate_size", "moe_num_shared_experts"),
        cfg_names={**NAMES, "num_experts": "moe_num_experts", "experts_per_token": "moe_topk"},
        config_keys=("moe_num_shared_experts",),
        harmless=("attention_bias", "head_dim", "pretraining_tp"),
    ),
    row(
        Mixture,
        "cohere2_moe",
        "Cohere 2 with a mixture in most layers.",
        **{**COHERE, "harmless": (*COHERE["harmless"], *LOSSES, "expert_selection_fn", "sliding_window_pattern")},
        cfg_names={**CENTRED, **CHOSEN, "sliding_window": "sliding_window"},
        rotates=in_windows_or_dense,
        is_dense=named_dense,
        config_keys=("layer_types", "mlp_layer_types", "prefix_dense_sliding_window_pattern", "norm_topk_prob"),
    ),
    row(
        Mixture,
        "exaone_moe",
        "Exaone 4 with mixtures of experts: QK-norm, and RoPE in its sliding-window layers alone.",
        cfg_names=SLIDING,
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        **EXAONE,
        rotates=in_windows,
        is_dense=named_dense,
        config_keys=(*SIGMOIDS, "mlp_layer_types", "num_shared_experts", "intermediate_size", "layer_types"),
        harmless=(*HARMLESS, "sliding_window_pattern", "first_k_dense_replace"),
    ),
    row(
        Mixture,
        "hunyuan_v1_moe",
        "Hunyuan with a mixture with a shared expert in every layer.",
        attention=LATE_NORMED,
        mixture=routed_by("gate", "wg"),
        shared=Part(kinds.SharedExpertBridge, "shared_mlp", GATED.parts),
        shared_width=("intermediate_size",),
        cfg_names={**NAMES, "num_experts": "num_experts", "experts_per_token": "moe_topk"},
        harmless=(*HARMLESS, "eod_token_id", "sep_token_id"),
    ),
    row(
        Mixture,
        "afmoe",
        "Gated, QK-normed attention with RoPE in its sliding-window layers alone; mixtures with a shared expert.",
        stages=AROUND,
        norms={
            **{"ln1": "input_layernorm", "ln1_post": "post_attention_layernorm"},
            **{"ln2": "pre_mlp_layernorm", "ln2_post": "post_mlp_layernorm"},
        },
        attention=attends(opened.GatedAttentionBridge, {**NORMED, "gate": "gate_proj"}),
        unrotated=attends(opened.UnrotatedGatedAttentionBridge, {**NORMED, "gate": "gate_proj"}),
        rotates=in_windows,
        embed_scale=root_if_asked,
        mixture=routed_by("router", "gate"),
        shared=FLAT_SHARED,
        shared_width=("moe_intermediate_size", "num_shared_experts"),
        is_dense=before("num_dense_layers"),
        cfg_names=SLIDING,
        config_keys=("layer_types", "num_dense_layers", "num_shared_experts", "intermediate_size", "mup_enabled"),
        harmless=(*HARMLESS, "route_scale", "global_attn_every_n_layers"),
    ),
    row(
        MixtralArchitectureAdapter,
        "minimax_m2",
        "Mixtral whose router scores with sigmoids; one norm over all queries and one over all keys.",
        attention=WHOLE_NORMED,
        cfg_names={**NAMES, **LOCAL},
    ),
    row(
        Mixture,
        "ernie4_5_moe",
        "Ernie 4.5 with mixtures with a shared expert from some layer on.",
        cfg_names={**NARROW, "num_experts": "moe_num_experts", "experts_per_token": "moe_k"},
        shared=FLAT_SHARED,
        shared_width=("moe_intermediate_size", "moe_num_shared_experts"),
        is_dense=ernies_dense_layers,
        dropouts=(),
        config_keys=(
            *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_num_shared_experts"),
            *("moe_norm_min", "intermediate_size"),
        ),
    ),
)
