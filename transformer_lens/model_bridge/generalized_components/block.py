"""Transformer blocks: attention and MLP one after the other, or side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook
from transformer_lens.model_bridge.ports import BranchPort, Inside, Port, SharedPort

STREAM = "batch pos d_model"


def _branch(name: str, who: str) -> Hook:
    meaning = f"the residual stream as {who} of each query head reads it, before the norm"
    return Hook(name, "batch pos head d_model", meaning, Inside("attn", stream_of=""), on_request=True)


BRANCHES = (
    _branch("hook_attn_in", "attention"),
    _branch("hook_q_input", "the query"),
    _branch("hook_k_input", "the key"),
    _branch("hook_v_input", "the value"),
)

RESID_PRE = Hook(
    "hook_resid_pre", STREAM, "the residual stream that enters the block", Port(side="in"), aliases=("hook_in",)
)
ATTN_OUT = Hook(
    "hook_attn_out", STREAM, "what attention adds to the stream", Port("attn", "out"), aliases=("attn.hook_out",)
)
RESID_MID = Hook("hook_resid_mid", STREAM, "the residual stream between attention and MLP", SharedPort("ln2", "in"))
MLP_IN_MEANING = "the residual stream as the MLP reads it, before its norm"
MLP_IN = Hook("hook_mlp_in", STREAM, MLP_IN_MEANING, Port("ln2", "in"), aliases=("ln2.hook_in",))
MLP_OUT = Hook("hook_mlp_out", STREAM, "what the MLP adds to the stream", Port("mlp", "out"), aliases=("mlp.hook_out",))
RESID_POST = Hook("hook_resid_post", STREAM, "the residual stream that leaves the block", Port(), aliases=("hook_out",))

NO_MIDDLE = "attention and MLP read the same stream side by side, so there is no stream between them"

EACH_ITS_OWN = {"ln1": ("attn",), "ln2": ("mlp",)}
"""Every norm feeds one branch."""


class StreamBlock(ComponentBridge):
    """Any block: called on a residual stream, it returns the stream that leaves it."""

    run: Callable[..., Any]
    """The bridge of the whole model; not a submodule, for the tree has no cycles."""

    def forward(self, stream: Float[Tensor, "batch pos d_model"], **options: Any) -> Float[Tensor, "batch pos d_model"]:
        """Run this block alone, with the mask and the positions that the model makes for it.

        >>> torch.equal(bridge.blocks[0](cache["resid_pre", 0]), cache["resid_post", 0])
        True

        The same as `bridge(stream, start_at_layer=i, stop_at_layer=i + 1)`, whose options it takes.
        """
        layer = int(self.name.split(".")[1])
        return self.run(stream, start_at_layer=layer, stop_at_layer=layer + 1, **options)  # type: ignore[no-any-return]


class BlockBridge(StreamBlock):
    """A sequential block: roles `ln1`, `attn`, `ln2`, `mlp`."""

    feeds = EACH_ITS_OWN
    adds = ("attn", "mlp")
    hooks = (
        RESID_PRE,
        *BRANCHES,
        ATTN_OUT,
        RESID_MID,
        MLP_IN,
        MLP_OUT,
        RESID_POST,
    )


class PostNormBlockBridge(StreamBlock):
    """A sequential block with a norm before and after each branch: roles `ln1`, `attn`, `ln1_post`, `ln2`, `mlp`,
    `ln2_post`. What is added to the stream is what the later norm returns."""

    feeds = EACH_ITS_OWN
    adds = ("ln1_post", "ln2_post")
    hooks = (
        RESID_PRE,
        *BRANCHES,
        replace(ATTN_OUT, port=Port("ln1_post"), aliases=("ln1_post.hook_out",)),
        RESID_MID,
        MLP_IN,
        replace(MLP_OUT, port=Port("ln2_post"), aliases=("ln2_post.hook_out",)),
        RESID_POST,
    )


class ParallelBlockBridge(StreamBlock):
    """A parallel block with a norm for each branch: roles `ln1`, `attn`, `ln2`, `mlp`."""

    feeds = EACH_ITS_OWN
    adds = ("attn", "mlp")
    hooks = (RESID_PRE, *BRANCHES, ATTN_OUT, MLP_IN, MLP_OUT, RESID_POST)
    absent = {"hook_resid_mid": NO_MIDDLE}


class SharedNormParallelBlockBridge(StreamBlock):
    """A parallel block whose one norm feeds both branches: roles `ln1`, `attn`, `mlp`."""

    feeds = {"ln1": ("attn", "mlp")}
    adds = ("attn", "mlp")
    hooks = (
        RESID_PRE,
        *BRANCHES,
        ATTN_OUT,
        Hook("hook_mlp_in", STREAM, MLP_IN_MEANING, BranchPort("mlp", "in", stream="", norm="ln1")),
        MLP_OUT,
        RESID_POST,
    )
    absent = {
        "hook_resid_mid": NO_MIDDLE,
        "ln2.hook_scale": "one norm feeds attention and MLP: read ln1.hook_scale",
        "ln2.hook_normalized": "one norm feeds attention and MLP: read ln1.hook_normalized",
    }
