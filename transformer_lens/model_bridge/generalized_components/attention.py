"""Attention: q, k and v before position encoding, z before the output projection.

Two axes of variation, each a table row: where q, k and v come from (three projections, or one fused
matmul), and how positions enter (RoPE or ALiBi).
"""

from __future__ import annotations

from collections.abc import Callable

from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook
from transformer_lens.model_bridge.ports import Port
from transformer_lens.model_bridge.views import View, fused_k, fused_q, fused_v, key_value_heads, query_heads

INSIDE = "it lives inside the attention kernel and is handed over by no module; it needs the attention's twin"
ALIBI = "ALiBi adds a bias to the scores and rotates nothing"


def qkv_hooks(places: dict[str, tuple[str, Callable[[BridgeConfig], View]]]) -> tuple[Hook, ...]:
    """The hooks of every attention; `places` says in which role's output q, k and v are, and how."""
    meanings = {"q": "queries", "k": "keys", "v": "values"}
    heads = {"q": "head", "k": "kv_head", "v": "kv_head"}
    enter = Hook("hook_in", "batch pos d_model", "the normalised stream that enters attention", Port(side="in"))
    projections = tuple(
        Hook(
            f"hook_{part}",
            f"batch pos {heads[part]} d_head",
            f"the {meanings[part]}" + (" before position encoding" if part != "v" else ""),
            Port(role, "out", view),
            aliases=(f"{part}.hook_out",),
        )
        for part, (role, view) in places.items()
    )
    z = Hook(
        "hook_z",
        "batch pos head d_head",
        "what each head read: the values averaged by its pattern",
        Port("o", "in", query_heads),
        aliases=("o.hook_in",),
    )
    return (enter, *projections, z)


class AttentionBridge(ComponentBridge):
    """What every attention lacks until its twin names it."""

    absent = {
        "hook_rot_q": INSIDE,
        "hook_rot_k": INSIDE,
        "hook_attn_scores": INSIDE,
        "hook_pattern": INSIDE,
        "hook_result": INSIDE,
    }


class PositionEmbeddingsAttentionBridge(AttentionBridge):
    """RoPE attention with separate projections: roles `q`, `k`, `v`, `o`."""

    hooks = qkv_hooks({"q": ("q", query_heads), "k": ("k", key_value_heads), "v": ("v", key_value_heads)})


class JointQKVPositionEmbeddingsAttentionBridge(AttentionBridge):
    """RoPE attention with one fused, grouped matmul: roles `qkv`, `o`."""

    hooks = qkv_hooks({"q": ("qkv", fused_q), "k": ("qkv", fused_k), "v": ("qkv", fused_v)})


class ALiBiJointQKVAttentionBridge(JointQKVPositionEmbeddingsAttentionBridge):
    """ALiBi attention with one fused, grouped matmul: roles `qkv`, `o`."""

    absent = {**AttentionBridge.absent, "hook_rot_q": ALIBI, "hook_rot_k": ALIBI}
