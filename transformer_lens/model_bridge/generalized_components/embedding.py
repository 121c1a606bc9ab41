"""The two ends of the model: token and position embeddings, RoPE's table, unembedding, and other heads."""

from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, StreamMatrix
from transformer_lens.model_bridge.generalized_components.weights import Weight, linear, own
from transformer_lens.model_bridge.upstream import EMBEDDINGS, LOGITS


class EmbeddingBridge(ComponentBridge):
    """The token embedding; its output is the model's `hook_embed`."""

    attributes = ("weight",)
    writes = (StreamMatrix(bias="", rows=True),)
    W_E = Weight("d_vocab d_model", "each token's embedding", own("weight"))


class PositionEmbeddingBridge(ComponentBridge):
    """A table of learned positions; its output is the model's `hook_pos_embed`."""

    writes = (StreamMatrix(bias="", rows=True),)
    W_pos = Weight("pos d_model", "each position's embedding", own("weight"))


class RotaryEmbeddingBridge(ComponentBridge):
    """The table of angles that RoPE attention applies to q and k; it adds nothing to the stream."""


class UnembeddingBridge(ComponentBridge):
    """The map from the final residual stream to logits."""

    reads = (StreamMatrix(),)
    W_U = Weight("d_model d_vocab", "maps the final residual stream to logits", linear(""))
    b_U = Weight("d_vocab", "added to the logits", linear("", "bias"))
    hooks = (Hook("hook_out", "batch pos d_vocab", "the logits, before any soft cap or scale", Port(side="out")),)


class HeadBridge(ComponentBridge):
    """A task head: classification of sequences or tokens, or question answering."""

    reads = (StreamMatrix(),)
    hooks = (Hook("hook_out", "batch pos d_vocab_out", "the head's output at every position", Port(side="out")),)


ROOT_HOOKS = (
    Hook(
        "hook_embed",
        "batch pos d_model",
        "the token embeddings, or the embeddings that the model was called with",
        Port(at="embed", side="out", instead=Port(side="in", arg=EMBEDDINGS)),
        aliases=("embed.hook_out",),
    ),
)

WHOLE_MODEL = "model"
"""The role of the model with its head, in ports of hooks outside every component."""

LOGITS_HOOK = Hook(
    "hook_logits",
    "batch pos d_vocab",
    "the logits, after the model's soft cap or scale",
    Port(at=WHOLE_MODEL, item=LOGITS),
)
"""Added to `ROOT_HOOKS` where the logits differ from the head's output."""

POSITION_HOOK = Hook(
    "hook_pos_embed",
    "rows pos d_model",
    "the position embeddings; one row if all texts have the same positions",
    Port(at="pos_embed"),
    aliases=("pos_embed.hook_out",),
)
"""Added to `ROOT_HOOKS` where positions are added to the embeddings."""
