"""Attribution: how much each activation, edge and path contributes to a metric, by gradients or exactly."""

from transformer_lens.analysis.attribution.activations import (
    AttributionScores,
    IntegratedGradients,
    attribution_patching,
    expert_attribution_patching,
    integrated_gradients,
)
from transformer_lens.analysis.attribution.atp import atp_star
from transformer_lens.analysis.attribution.direct_logits import DirectLogitAttribution, direct_logit_attribution
from transformer_lens.analysis.attribution.edge_graph import Circuit, EdgeGraph, EdgeScores
from transformer_lens.analysis.attribution.edges import edge_attribution_patching, edge_attribution_patching_ig
from transformer_lens.analysis.attribution.paths import circuit_metric, edge_effects, faithfulness, path_patching

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
