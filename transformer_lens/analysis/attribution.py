"""Attribution and patching along edges under one import path."""

from transformer_lens.analysis.atp_star import atp_star
from transformer_lens.analysis.attribution_patching import (
    AttributionScores,
    attribution_patching,
    expert_attribution_patching,
)
from transformer_lens.analysis.direct_logit_attribution import DirectLogitAttribution, direct_logit_attribution
from transformer_lens.analysis.edge_attribution import edge_attribution_patching, edge_attribution_patching_ig
from transformer_lens.analysis.edge_graph import Circuit, EdgeGraph, EdgeScores
from transformer_lens.analysis.integrated_gradients import IntegratedGradients, integrated_gradients
from transformer_lens.analysis.path_patching import circuit_metric, edge_effects, faithfulness, path_patching

__all__ = [
    "AttributionScores",
    "Circuit",
    "DirectLogitAttribution",
    "EdgeGraph",
    "EdgeScores",
    "IntegratedGradients",
    "atp_star",
    "attribution_patching",
    "circuit_metric",
    "direct_logit_attribution",
    "edge_attribution_patching",
    "edge_attribution_patching_ig",
    "edge_effects",
    "expert_attribution_patching",
    "faithfulness",
    "integrated_gradients",
    "path_patching",
]
