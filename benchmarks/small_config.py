"""A config of the same family with small sizes, all different where the family lets them be."""

from __future__ import annotations

from typing import Any

NAMED = {
    4: """rotary_dim num_attention_heads n_head n_heads num_heads decoder_attention_heads mamba_n_heads
        linear_num_value_heads""",
    2: """num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk num_experts_per_token
        moe_top_k moe_k mamba_n_groups n_groups n_shared_experts num_shared_experts moe_num_shared_experts""",
    61: "vocab_size",
    32: "hidden_size n_embd d_model n_embed emb_dim embedding_size word_embed_proj_dim",
    28: "intermediate_size ffn_dim decoder_ffn_dim n_inner ffn_hidden_size d_ff dim_ff ffn_size",
    20: "moe_shared_expert_intermediate_size shared_expert_intermediate_size shared_intermediate_size",
    12: "moe_intermediate_size",
    16: "mamba_d_head kv_lora_rank q_lora_rank",
    8: """head_dim attention_head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim linear_key_head_dim mamba_d_state
        linear_value_head_dim state_size ssm_state_size mamba_chunk_size chunk_size mamba_head_dim""",
    64: "mamba_d_ssm max_position_embeddings n_positions n_ctx max_seq_len",
    6: "num_experts num_local_experts n_routed_experts moe_num_experts",
    1: "topk_group bos_token_id first_k_dense_replace",
    0: "pad_token_id",
}
SIZES: dict[str, Any] = {name: size for size, names in NAMED.items() for name in names.split()}
SIZES |= {"n_group": 2, "sliding_window": 4, "eos_token_id": 2, "is_decoder": True}
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")


def small_config(config: Any, **changes: Any) -> Any:
    """A small config of the same class; its first layers, as many as it takes to see every kind of them."""
    there = {*config.to_dict(), *type(config).attribute_map}
    layers = next((getattr(config, name) for name in DEPTHS if name in there), 0)
    lists = {
        name: value for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == layers
    }
    depth = max([4, *(max(map(list(map(str, kinds)).index, map(str, kinds))) + 1 for kinds in lists.values() if kinds)])
    known = {name: value for name, value in config.to_diff_dict().items() if name in there and not name.startswith("_")}
    changed = {**known, **{name: size for name, size in SIZES.items() if name in there}}
    changed |= {name: depth for name in DEPTHS if name in there}
    changed |= {name: kinds[:depth] for name, kinds in lists.items()}
    changed |= {"num_key_value_heads": 4} if "kv_lora_rank" in there else {}
    return type(config)(**{**changed, **changes})
