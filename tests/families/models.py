"""Small models of the shipped families: all sizes differ, and nothing is at its neutral value."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.support import VOCAB, perturbed
from transformer_lens.model_bridge.supported_versions import minor

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A head size other than d_model / n_heads, so that one is not taken for the other.
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 4, "intermediate_size": 24, "head_dim": 6}
HALVED = {name: value for name, value in GROUPED.items() if name != "head_dim"}
WINDOWS: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SLIDES: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MIXTURE: dict[str, Any] = {**GROUPED, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
ROUTES: dict[str, Any] = {name: value for name, value in MIXTURE.items() if name != "head_dim"}
LOCAL: dict[str, Any] = {**HALVED, "num_local_experts": 5, "num_experts_per_tok": 3}
SIGMOIDS: dict[str, Any] = {
    **HALVED, "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.3,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **SIGMOIDS, "num_key_value_heads": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "kv_lora_rank": 14, "q_lora_rank": 9, "attention_bias": True,
}  # fmt: skip
INDEX = {"index_topk": 3, "index_head_dim": 8, "index_n_heads": 8, "first_k_dense_replace": 1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 0.7, "mscale": 0.7,
        "original_max_position_embeddings": 16}  # fmt: skip
ERNIE = {"moe_num_experts": 5, "moe_k": 3, "moe_intermediate_size": 16, "moe_num_shared_experts": 2,
         "moe_layer_start_index": 1}  # fmt: skip
STATES = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "linear_key_head_dim": 6, "linear_value_head_dim": 10, "head_dim": 8}  # fmt: skip
NEOX: dict[str, Any] = {**SMALL, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 48}
UNCAPPED: dict[str, Any] = {"final_logit_softcapping": None, "attn_logit_softcapping": None}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {**SMALL, "intermediate_size": 24, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2", {**GROUPED, **SLIDES}),
    "qwen3": ("Qwen3", {**GROUPED, **SLIDES, "attention_bias": True}),
    "gemma": ("Gemma", GROUPED),
    "gemma2": ("Gemma2", {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 7, "final_logit_softcapping": 3.0,
                          "attn_logit_softcapping": 2.0}),
    "gemma2, uncapped": ("Gemma2", {**GROUPED, **UNCAPPED}),
    "gemma3_text": ("Gemma3Text", {**GROUPED, **WINDOWS, "query_pre_attn_scalar": 7}),
    "vaultgemma": ("VaultGemma", {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 7,
                                  "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "falcon 3": ("Llama", {**GROUPED, "head_dim": 10}),
    "ministral3": ("Ministral3", {**GROUPED, "sliding_window": 4}),
    "ministral": ("Ministral", {**GROUPED, **WINDOWS}),
    "smollm3": ("SmolLM3", {**HALVED, "no_rope_layers": [1, 0]}),
    "seed_oss": ("SeedOss", {**GROUPED, "attention_out_bias": True}),
    "ernie4_5": ("Ernie4_5", {**GROUPED, "use_bias": True}),
    "helium": ("Helium", {**GROUPED, "head_dim": 4}),
    "arcee": ("Arcee", {**GROUPED, "mlp_bias": True}),
    "apertus": ("Apertus", HALVED),
    "apertus1p5_text": ("Apertus1p5Text", {**HALVED, "attention_bias": True}),
    "bitnet": ("BitNet", HALVED),
    "bitnet, biased": ("BitNet", {**HALVED, "attention_bias": True}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {**GROUPED, "attention_bias": True}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {**GROUPED, "num_experts": 5, "moe_topk": 3}),
    "exaone": ("Exaone", {**GROUPED, "attention_bias": True}),
    "internlm3": ("InternLM3", GROUPED),
    "iquestcoder": ("IQuestCoder", GROUPED),
    "cwm": ("Cwm", {**GROUPED, **WINDOWS}),
    "jais2": ("Jais2", GROUPED),
    "hyperclovax": ("HyperCLOVAX", {**GROUPED, "embedding_multiplier": 3.0, "logits_scaling": 0.7,
                                    "residual_multiplier": 0.7, "attention_multiplier": 0.4}),
    "hyperclovax, without": ("HyperCLOVAX", {**GROUPED, "use_post_norm": False}),
    "granite": ("Granite", {**HALVED, "attention_bias": True, "embedding_multiplier": 3.0, "logits_scaling": 1.7,
                            "residual_multiplier": 0.7, "attention_multiplier": 0.4}),
    "olmo": ("Olmo", HALVED),
    "olmo2": ("Olmo2", HALVED),
    "olmo3": ("Olmo3", {**HALVED, **WINDOWS}),
    "exaone4": ("Exaone4", {**HALVED, **WINDOWS}),
    "exaone4, without a window": ("Exaone4", {**HALVED, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "glm": ("Glm", {**GROUPED, "head_dim": 8}),
    "glm4": ("Glm4", {**GROUPED, "head_dim": 8}),
    "phi3": ("Phi3", {**HALVED, "sliding_window": 4}),
    "phi": ("Phi", {**HALVED, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "starcoder2": ("Starcoder2", {**HALVED, "sliding_window": 4}),
    "nemotron": ("Nemotron", {**GROUPED, "head_dim": 8, "attention_bias": True}),
    "stablelm": ("StableLm", {**HALVED, "use_qkv_bias": True, "hidden_size": 64}),
    "stablelm, parallel": ("StableLm", {**HALVED, "use_parallel_residual": True, "hidden_size": 64}),
    "cohere": ("Cohere", {**HALVED, "logit_scale": 0.3}),
    "cohere, normed": ("Cohere", {**HALVED, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**HALVED, **WINDOWS, "logit_scale": 0.3}),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox, sequential": ("GPTNeoX", {**NEOX, "use_parallel_residual": False}),
    "persimmon": ("Persimmon", NEOX),
    "gptj": ("GPTJ", {**SMALL, "hidden_size": 64, "rotary_dim": 4, "n_inner": 20}),
    "gpt_neo": ("GPTNeo", {**SMALL, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_head": 8, "n_layer": 2, "initializer_range": 0.3,
                        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", SMALL),
    "gpt_bigcode": ("GPTBigCode", {**SMALL, "n_inner": 20}),
    "gpt2, scaled": ("GPT2", {**SMALL, "n_inner": 20, "scale_attn_by_inverse_layer_idx": True,
                              "reorder_and_upcast_attn": True}),
    "qwen3_moe": ("Qwen3Moe", {**MIXTURE, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4}),
    "qwen3_moe, dense first": ("Qwen3Moe", {**MIXTURE, "mlp_only_layers": [0]}),
    "qwen3_moe, every other": ("Qwen3Moe", {**MIXTURE, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    "lfm2": ("Lfm2", {**HALVED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "lfm2, adjusted": ("Lfm2", {**HALVED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 10,
                                "block_ffn_dim_multiplier": 1.7}),
    "lfm2_moe": ("Lfm2Moe", {**ROUTES, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "falcon_h1": ("FalconH1", {**HALVED, **STATES, "embedding_multiplier": 3.0, "lm_head_multiplier": 0.7,
                               "attention_out_multiplier": 0.7, "attention_in_multiplier": 0.9,
                               "ssm_out_multiplier": 1.3, "key_multiplier": 0.6,
                               "mlp_multipliers": [0.8, 1.4], "ssm_in_multiplier": 0.9,
                               "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7]}),
    "falcon_h1, plain": ("FalconH1", {**HALVED, **STATES, "attention_bias": True, "mlp_bias": True}),
    "jamba": ("Jamba", {**ROUTES, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 6,
                        "mamba_dt_rank": 3, "use_mamba_kernels": False}),
    "qwen2_moe": ("Qwen2Moe", {**ROUTES, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]}),
    "gpt_oss": ("GptOss", {**LOCAL, **WINDOWS, "head_dim": 6, "swiglu_limit": 1.0}),
    "olmoe": ("Olmoe", ROUTES),
    "flex_olmo": ("FlexOlmo", ROUTES),
    "phimoe": ("Phimoe", {**LOCAL, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}),
    "granitemoe": ("GraniteMoe", {**LOCAL, "embedding_multiplier": 3.0, "residual_multiplier": 0.7}),
    "dots1": ("Dots1", {**SIGMOIDS, **WINDOWS}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek_v2, whole queries": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "n_group": None, "topk_group": None,
                                                  "attention_bias": False}),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "deepseek_v3, yarn": ("DeepseekV3", {**LATENT, "rope_parameters": YARN, "rope_interleave": False}),
    "mistral4": ("Mistral4", LATENT),
    "youtu": ("Youtu", {**LATENT, "tie_word_embeddings": False}),
    "sarvam_mla": ("SarvamMLA", {**LATENT, "q_lora_rank": None}),
    "deepseek_v32": ("DeepseekV32", {**LATENT, **INDEX}),
    "glm_moe_dsa": ("GlmMoeDsa", {**LATENT, **INDEX, "indexer_types": ["full", "shared"]}),
    "glm_moe_dsa, all full": ("GlmMoeDsa", {**LATENT, **INDEX, "mlp_layer_types": ["sparse", "dense"]}),
    "glm4_moe_lite": ("Glm4MoeLite", {**LATENT, "mlp_layer_types": ["dense", "sparse"]}),
    "glm4_moe": ("Glm4Moe", {**SIGMOIDS, "use_qk_norm": True}),
    "glm4_moe, without norms": ("Glm4Moe", {**SIGMOIDS, "n_group": 1, "topk_group": 1}),
    "sarvam_moe": ("SarvamMoE", {**SIGMOIDS, "head_dim": 6}),
    "mellum": ("Mellum", {**MIXTURE, **WINDOWS, "mlp_layer_types": ["dense", "sparse"]}),
    "hy_v3": ("HYV3", {**MIXTURE, "mlp_layer_types": ["dense", "sparse"], "num_shared_experts": 2}),
    "solar_open": ("SolarOpen", {**SIGMOIDS, "head_dim": 6}),
    "exaone_moe": ("ExaoneMoe", {**ROUTES, **WINDOWS, "num_shared_experts": 2, "first_k_dense_replace": 1,
                                 "num_experts": 6, "n_group": 2, "topk_group": 1, "sliding_window_pattern": 2}),
    "afmoe": ("Afmoe", {**MIXTURE, **WINDOWS, "num_shared_experts": 2, "mup_enabled": True, "route_scale": 1.3}),
    "afmoe, without mup": ("Afmoe", {**MIXTURE, "num_dense_layers": 0, "global_attn_every_n_layers": 2}),
    "qwen3_next": ("Qwen3Next", {**MIXTURE, **LINEAR, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]}),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", {**MIXTURE, **LINEAR, "shared_expert_intermediate_size": 20}),
    "qwen3_5_text": ("Qwen3_5Text", {**GROUPED, **LINEAR, "attention_bias": True}),
    "kolibri1": ("Kolibri1", {**MIXTURE, **WINDOWS, "shared_expert_intermediate_size": 20}),
    "flint": ("Flint", {**MIXTURE, **WINDOWS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]}),
    "aria_text": ("AriaText", {**HALVED, "moe_num_experts": 5, "moe_topk": 3, "attention_bias": True}),
    "cohere2_moe": ("Cohere2Moe", {**GROUPED, **WINDOWS, "num_experts": 5, "num_experts_per_tok": 3, "logit_scale": 0.3,
                                   "mlp_layer_types": ["sparse", "sparse"], "expert_selection_fn": "sigmoid"}),
    "cohere2_moe, dense": ("Cohere2Moe", {**GROUPED, **WINDOWS, "num_experts": 5, "num_experts_per_tok": 3,
                                          "mlp_layer_types": ["sparse", "dense"]}),
    "minimax_m2": ("MiniMaxM2", {**LOCAL, "head_dim": 6}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {**HALVED, **ERNIE}),
    "ernie4_5_moe, none shared": ("Ernie4_5_Moe", {**HALVED, **ERNIE, "moe_num_shared_experts": 0}),
}  # fmt: skip
LATENTS = ("deepseek_v2", "deepseek_v3", "mistral4", "sarvam_mla", "youtu", "glm4_moe_lite", "deepseek_v32",
           "glm_moe_dsa")  # fmt: skip
"""Families with latent attention."""
LINEARS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Families with linear attention in some layers."""
SINCE = dict.fromkeys(
    ("afmoe", "aria_text", "granitemoe", "jamba", "gptj", "lfm2", "lfm2_moe", "falcon_h1", *LATENTS, *LINEARS), (5, 24)
)
"""Families whose modules are other ones in older releases of transformers, which the adapter refuses."""
for name, (family, _) in [*MODELS.items()]:
    if minor(transformers.__version__) < SINCE.get(name.split(",")[0], (0, 0)) or not hasattr(
        transformers, f"{family}Config"
    ):
        del MODELS[name]
ESSENCE = ("llama", "qwen3", "gemma2", "gpt_neox", "gpt2", "qwen3_moe")
"""One of each kind of attention, norm, block and MLP."""


HEADS = {
    "GPT2": "GPT2LMHeadModel",
    "Gemma3Text": "Gemma3ForCausalLM",
    "Qwen3_5Text": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeText": "Qwen3_5MoeForCausalLM",
    "SarvamMoE": "Glm4MoeForCausalLM",
    "SarvamMLA": "DeepseekV3ForCausalLM",
    **dict.fromkeys(("Exaone", "InternLM3", "IQuestCoder"), "LlamaForCausalLM"),
}
EAGER = ("Gemma2", "VaultGemma", "GPTNeo", "GptOss", "Bloom", "Flint")
"""transformers has no other attention for a cap on scores, nor for these."""


def build(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small random model in evaluation mode."""
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**options, **changes})
    config._attn_implementation = "eager" if family in EAGER else attn
    torch.manual_seed(len(name))
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for path, moved in (*model.named_parameters(), *model.named_buffers()):
            still = moved.ndim > 1 and not moved.any()  # a router whose weights start at zero
            if still or ("norm" in path and moved.ndim > 1) or "correction_bias" in path or "proj_bias" in path:
                moved.add_(0.2 * torch.randn_like(moved))
    return perturbed(model, dtype)
