"""Small models whose blocks are put together otherwise than Falcon's and Mixtral's."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support import VOCAB, perturbed

H1 = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "attention_out_multiplier": 0.7,
    "attention_in_multiplier": 0.9,
    "ssm_out_multiplier": 1.3,
}
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MIXTURE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_num_shared_experts": 0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("Granite", {"residual_multiplier": 0.22, "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2", {}),
    "falcon_h1": ("FalconH1", H1),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "ernie": ("Ernie4_5_Moe", {**MIXTURE, "num_hidden_layers": 3, "moe_layer_start_index": 1}),
}


def build(name: str, **changes: Any) -> Any:
    """A small random model of a family."""
    family, options = KINDS[name]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options, **changes})
    return perturbed(getattr(transformers, f"{family}ForCausalLM")(config))
