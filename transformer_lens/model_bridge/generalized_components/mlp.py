"""The dense MLP: one hidden layer, whose neurons are read before and after the activation."""

from dataclasses import replace
from typing import ClassVar

from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.access.views import first_half, second_half
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, StreamMatrix
from transformer_lens.model_bridge.generalized_components.weights import DenseWeights, FusedGatedWeights, GatedWeights

DENSE = "this MLP is dense: it has no router and no experts"
NO_EXPERTS = dict.fromkeys(
    ("hook_router_logits", "hook_expert_weights", "hook_expert_indices", "hook_expert_out"), DENSE
)
NORMED = "the neurons that enter W_out: hook_activated, behind the norm over all of them"
MLP_IN = Hook("hook_in", "batch pos d_model", "the normalised stream that enters the MLP", Port(side="in"))


class MLPBridge(DenseWeights, ComponentBridge):
    """A dense MLP with the roles `in` and `out`."""

    reads = (StreamMatrix("in"),)
    writes = (StreamMatrix("out"),)
    hooks = (
        MLP_IN,
        Hook(
            "hook_pre",
            "batch pos d_mlp",
            "the neurons before the activation function",
            Port("in", "out"),
            aliases=("in.hook_out",),
        ),
        Hook(
            "hook_post",
            "batch pos d_mlp",
            "the neurons after the activation function",
            Port("out", "in"),
            aliases=("out.hook_in",),
        ),
    )
    absent = {"hook_pre_linear": "this MLP has no gate, so there is one hidden layer and not two", **NO_EXPERTS}


class SpreadMLPBridge(MLPBridge):
    """The same where `in` and `out` lie in the block itself, with no module around them (OPT, BART)."""

    hooks = (replace(MLP_IN, port=Port("in", "in")), *MLPBridge.hooks[1:])


def gated_hooks(gate: Port, hidden: Port) -> tuple[Hook, ...]:
    """The rows of a gated MLP, from where its gate and its hidden layer are."""
    return (
        MLP_IN,
        Hook("hook_pre", "batch pos d_mlp", "the gate before its activation function", gate),
        Hook("hook_pre_linear", "batch pos d_mlp", "the hidden layer before gating", hidden),
        Hook("hook_post", "batch pos d_mlp", "the neurons: activated gate times hidden layer", Port("out", "in")),
    )


class GatedMLPBridge(GatedWeights, ComponentBridge):
    """A dense gated MLP with the roles `gate`, `in` and `out`: `out(act(gate(x)) * in(x))`."""

    reads = (StreamMatrix("gate"), StreamMatrix("in"))
    writes = (StreamMatrix("out"),)
    hooks: ClassVar[tuple[Hook, ...]] = gated_hooks(Port("gate"), Port("in"))
    absent = NO_EXPERTS


class SubNormedMLPBridge(GatedMLPBridge):
    """The same with the role `norm`, in front of `out` (BitNet)."""

    hooks = (
        *(replace(hook, meaning=NORMED) if hook.name == "hook_post" else hook for hook in GatedMLPBridge.hooks),
        Hook("hook_activated", "batch pos d_mlp", "activated gate times hidden layer", Port("norm", "in")),
    )


class FusedGatedMLPBridge(FusedGatedWeights, ComponentBridge):
    """A dense gated MLP with the roles `gate_up`, which computes gate and hidden layer side by side, and `out`."""

    reads = (StreamMatrix("gate_up"),)
    writes = (StreamMatrix("out"),)
    hooks = gated_hooks(Port("gate_up", view=first_half), Port("gate_up", view=second_half))
    absent = NO_EXPERTS
