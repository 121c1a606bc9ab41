"""The hooks of attention: where queries, keys, values and each head's output are in its modules, and what is inside."""

from collections.abc import Callable
from dataclasses import replace

from transformer_lens.model_bridge.access import views
from transformer_lens.model_bridge.access.ports import Inside, Port
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.attention_run import Places
from transformer_lens.model_bridge.generalized_components.base import Hook, StreamMatrix

NOT_ROTATED = "ALiBi adds a bias to the scores and rotates nothing"
NO_POSITIONS = "this layer has no position encoding: it compares queries and keys as they are"
TO_NOTHING = "attention probabilities; the rest of each row goes to its sink"
PROBABILITIES = ("hook_attn_scores", "hook_pattern")
LEARNED = "positions are added to the embeddings, and nothing is rotated"


SEPARATE: Places = {"q": ("q", views.query_heads), "k": ("k", views.key_value_heads), "v": ("v", views.key_value_heads)}
FUSED: Places = {"q": ("qkv", views.fused_q), "k": ("qkv", views.fused_k), "v": ("qkv", views.fused_v)}
GATED: Places = {**SEPARATE, "gate": ("gate", views.query_heads)}
GATED_QUERIES: Places = {**SEPARATE, "q": ("q", views.gated_q), "gate": ("q", views.gate_of_q)}
LATENT: Places = {"q": ("q", views.query_heads), "v": ("kv_b", views.expanded_values)}
BLOCKS: Places = {"q": ("qkv", views.block_q), "k": ("qkv", views.block_k), "v": ("qkv", views.block_v)}
OF_ONE_MATMUL: tuple[StreamMatrix, ...] = (StreamMatrix("qkv"),)
OF_PROJECTIONS: tuple[StreamMatrix, ...] = (StreamMatrix("q"), StreamMatrix("k"), StreamMatrix("v"))
OUTPUT = (StreamMatrix("o"),)


def qkv_hooks(places: Places, width: str = "d_head", values: str = "pos") -> tuple[Hook, ...]:
    """The rows of q, k, v and z; the axes of values and z end in `width`, and `values` are at these positions."""
    words = {
        "q": ("pos head d_head", "the queries before position encoding"),
        "k": ("pos kv_head d_head", "the keys before position encoding"),
        "v": (f"{values} kv_head {width}", "the values"),
        "gate": ("pos head d_head", "each head's gate, before its sigmoid"),
    }
    enter = Hook("hook_in", "batch pos d_model", "the normalised stream that enters attention", Port(side="in"))
    projections = tuple(
        Hook(
            f"hook_{part}",
            f"batch {words[part][0]}",
            words[part][1],
            Port(role, "out", view),
            aliases=(f"{part}.hook_out",),
        )
        for part, (role, view) in places.items()
    )
    z = Hook(
        "hook_z",
        f"batch pos head {width}",
        "each head's output before W_O: the values averaged by its pattern",
        Port("o", "in", views.query_heads),
        aliases=("o.hook_in",),
    )
    return (enter, *projections, z)


ATTENDED = Hook(
    "hook_attended",
    "batch pos head d_head",
    "what attention returns for each head: the values averaged by its pattern",
    Inside(),
)


def through(what: str, hooks: tuple[Hook, ...]) -> tuple[Hook, ...]:
    """The rows of attention in which `what` makes each head's z of what attention returns for it."""
    z = f"what enters each head's part of W_O: hook_attended, {what}"
    return (*(replace(hook, meaning=z) if hook.name == "hook_z" else hook for hook in hooks), ATTENDED)


ROTATED = (
    Hook("hook_rot_q", "batch pos head d_head", "the queries after rotary position encoding", Inside()),
    Hook("hook_rot_k", "batch pos kv_head d_head", "the keys after rotary position encoding", Inside()),
)


def normed(**heads: Callable[[BridgeConfig], views.View]) -> tuple[Hook, ...]:
    """The hooks after QK-norm, by the view of heads in what the norms return."""
    words = {"q": ("head", "the queries"), "k": ("kv_head", "the keys")}
    return tuple(
        Hook(
            f"hook_{part}_normed",
            f"batch pos {words[part][0]} d_head",
            f"{words[part][1]} after their norm, before position encoding",
            Port(f"{part}_norm", view=view),
            aliases=(f"{part}_norm.hook_out",),
        )
        for part, view in heads.items()
    )


NORMED = normed(q=views.whole, k=views.whole)
NORMED_HEADS_FIRST = normed(q=views.heads_first, k=views.heads_first)
NORMED_WHOLE = normed(q=views.query_heads, k=views.key_value_heads)
SCORES = (
    Hook(
        "hook_attn_scores",
        "batch head query_pos key_pos",
        "attention scores, scaled and masked, before the softmax",
        Inside(),
    ),
    Hook("hook_pattern", "batch head query_pos key_pos", "attention probabilities; each row sums to one", Inside()),
    Hook(
        "hook_result",
        "batch pos head d_model",
        "each head's z times its part of W_O; they sum to what attention returns, less the bias",
        Inside(kind="formula"),
        on_request=True,
    ),
)


def gated(places: Places) -> tuple[Hook, ...]:
    """The rows of QK-normed attention whose heads are multiplied by gates."""
    return through("times the sigmoid of hook_gate", (*qkv_hooks(places), *ROTATED, *NORMED, *SCORES))
