"""Where attention's tensors and weights are: the places of q, k and v, and the rows of its hooks."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from transformer_lens.model_bridge.access.ports import Inside, Port
from transformer_lens.model_bridge.access.views import (
    View,
    block_k,
    block_q,
    block_v,
    expanded_values,
    fused_k,
    fused_q,
    fused_v,
    heads_first,
    key_value_heads,
    query_heads,
    whole,
)
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, StreamMatrix

Places = Mapping[str, tuple[str, Callable[[BridgeConfig], View]]]
"""The role whose output holds q, k or v, and the view of it there."""
SEPARATE: Places = {"q": ("q", query_heads), "k": ("k", key_value_heads), "v": ("v", key_value_heads)}
FUSED: Places = {"q": ("qkv", fused_q), "k": ("qkv", fused_k), "v": ("qkv", fused_v)}
LATENT: Places = {"q": ("q", query_heads), "v": ("kv_b", expanded_values)}
BLOCKS: Places = {"q": ("qkv", block_q), "k": ("qkv", block_k), "v": ("qkv", block_v)}
OF_ONE_MATMUL: tuple[StreamMatrix, ...] = (StreamMatrix("qkv"),)
OF_PROJECTIONS: tuple[StreamMatrix, ...] = (StreamMatrix("q"), StreamMatrix("k"), StreamMatrix("v"))
OUTPUT = (StreamMatrix("o"),)


def qkv_hooks(places: Places, width: str = "d_head", values: str = "pos") -> tuple[Hook, ...]:
    """The rows of q, k, v and z; the axes of values and z end in `width`, and `values` are at these positions."""
    meanings = {"q": "queries", "k": "keys", "v": "values"}
    heads = {"q": "head", "k": "kv_head", "v": "kv_head"}
    enter = Hook("hook_in", "batch pos d_model", "the normalised stream that enters attention", Port(side="in"))
    projections = tuple(
        Hook(
            f"hook_{part}",
            f"batch {values if part == 'v' else 'pos'} {heads[part]} {width if part == 'v' else 'd_head'}",
            f"the {meanings[part]}" + (" before position encoding" if part != "v" else ""),
            Port(role, "out", view),
            aliases=(f"{part}.hook_out",),
        )
        for part, (role, view) in places.items()
    )
    z = Hook(
        "hook_z",
        f"batch pos head {width}",
        "each head's output before W_O: the values averaged by its pattern",
        Port("o", "in", query_heads),
        aliases=("o.hook_in",),
    )
    return (enter, *projections, z)


ROTATED = (
    Hook("hook_rot_q", "batch pos head d_head", "the queries after rotary position encoding", Inside()),
    Hook("hook_rot_k", "batch pos kv_head d_head", "the keys after rotary position encoding", Inside()),
)


def normed(**views: Callable[[BridgeConfig], View]) -> tuple[Hook, ...]:
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
        for part, view in views.items()
    )


NORMED = normed(q=whole, k=whole)
NORMED_HEADS_FIRST = normed(q=heads_first, k=heads_first)
NORMED_WHOLE = normed(q=query_heads, k=key_value_heads)
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
        "what each head adds to the residual stream; they sum to hook_attn_out less the bias",
        Inside(kind="formula"),
        on_request=True,
    ),
)


class AttentionPlace(ComponentBridge):
    """Any attention; called by itself, it takes all arguments of its module."""

    places: ClassVar[Places]
    sinks: ClassVar[bool] = False
    """Whether a row of the pattern sums to less than one because the rest goes to a sink."""
    late_keys: ClassVar[bool] = False
    """Whether keys and values are made in each call, of all positions, from what the KV cache holds."""
    number: ClassVar[str] = "layer_idx"
    """The module's attribute with its layer number, by which it asks the KV cache."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) <= 1:
            raise ValueError(
                f"{self.name}: got the normalised stream alone, and attention reads a mask and positions too, which "
                f"the model makes for a whole block: call the block on a stream, bridge.{self._block()}(stream), with "
                f"a hook at {self.name}.hook_in to change what attention reads, or pass everything that "
                f"{type(self.original_component).__name__}.forward takes"
            )
        return super().forward(*args, **kwargs)

    def part_names(self) -> dict[str, str]:
        """The module's names for the parts that project q, k and v, by role."""
        roles = dict.fromkeys(role for role, _ in self.places.values())
        return {role: self.role(role).path.removeprefix(f"{self.path}.") for role in roles}

    def _block(self) -> str:
        block, layer = self.name.split(".")[:2]
        return f"{block}[{layer}]"
