"""Normalisation: LayerNorm or RMSNorm, before a branch or at the end of the model."""

from __future__ import annotations

from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook
from transformer_lens.model_bridge.ports import Port

INSIDE = "it is computed inside the normalisation and handed over by no module; it needs that module's twin"


class NormalizationBridge(ComponentBridge):
    """A norm before attention or MLP. What it returns is read at `attn.hook_in` and `mlp.hook_in`."""

    absent = {"hook_scale": INSIDE, "hook_normalized": INSIDE}


class FinalNormalizationBridge(NormalizationBridge):
    """The norm after the last block."""

    hooks = (
        Hook(
            "hook_out",
            "batch pos d_model",
            "the stream after the final norm, as the head reads it",
            Port(side="out"),
        ),
    )
