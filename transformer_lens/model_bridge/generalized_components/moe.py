"""The mixture of experts: a router chooses experts for each token, and their outputs are summed."""

from __future__ import annotations

from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook
from transformer_lens.model_bridge.ports import FlatTokensPort, Port

FUSED = "it is computed inside the fused experts and handed over by no module; it needs that module's twin"


class MoEBridge(ComponentBridge):
    """A mixture of experts with the roles `gate` (the router) and `experts`.

    The router returns `(logits, weights, indices)` over flattened tokens; the experts use the weights
    and indices alone (source: `MixtralSparseMoeBlock` in transformers >= 5.13).
    """

    hooks = (
        Hook(
            "hook_in",
            "batch pos d_model",
            "the normalised stream that enters the router and the experts",
            # With router jitter a training forward multiplies this tensor in place.
            Port(side="in", aliased=True),
        ),
        Hook(
            "hook_expert_weights",
            "batch pos chosen",
            "how much each chosen expert counts; they sum to one",
            FlatTokensPort("gate", "out", item=1, rows_of=""),
        ),
        Hook(
            "hook_expert_indices",
            "batch pos chosen",
            "which experts were chosen, the best first; a write re-routes",
            FlatTokensPort("gate", "out", item=2, rows_of=""),
            integer=True,
        ),
    )
    absent = {
        "hook_router_logits": "the model goes on with weights and indices alone: a write needs the router's twin",
        "hook_pre": FUSED,
        "hook_pre_linear": FUSED,
        "hook_post": FUSED,
        "hook_expert_out": FUSED,
    }
