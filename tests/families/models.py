"""Small models of the shipped families: all sizes differ, and nothing is at its neutral value."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.support import VOCAB, perturbed

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
SLIDES: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MIXTURE: dict[str, Any] = {**GROUPED, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
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
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox, sequential": ("GPTNeoX", {**NEOX, "use_parallel_residual": False}),
    "gpt2": ("GPT2", SMALL),
    "gpt2, scaled": ("GPT2", {**SMALL, "n_inner": 20, "scale_attn_by_inverse_layer_idx": True,
                              "reorder_and_upcast_attn": True}),
    "qwen3_moe": ("Qwen3Moe", {**MIXTURE, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4}),
    "qwen3_moe, dense first": ("Qwen3Moe", {**MIXTURE, "mlp_only_layers": [0]}),
    "qwen3_moe, every other": ("Qwen3Moe", {**MIXTURE, "norm_topk_prob": True, "decoder_sparse_step": 2}),
}  # fmt: skip
ESSENCE = ("llama", "qwen3", "gemma2", "gpt_neox", "gpt2", "qwen3_moe")
"""One of each kind of attention, norm, block and MLP."""


def build(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small random model in evaluation mode."""
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**options, **changes})
    config._attn_implementation = "eager" if family == "Gemma2" else attn  # transformers has no other for its softcap
    torch.manual_seed(len(name))
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return perturbed(getattr(transformers, family + head)(config), dtype)
