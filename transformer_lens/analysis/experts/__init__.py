"""Experts of a mixture: ablate them, route to them, count their tokens, and measure their direct logit contribution."""

from transformer_lens.analysis.attribution.direct_logits import (
    LogitAttribution,
    expert_logit_attribution,
    logit_attribution,
)
from transformer_lens.analysis.experts.hooks import ablate_expert, forbid_experts, force_experts
from transformer_lens.analysis.experts.routers import (
    ExpertToken,
    RoutedToken,
    Routing,
    RoutingStatistics,
    routing,
    routing_statistics,
)
from transformer_lens.analysis.experts.views import ExpertView, expert_activation, expert_view

__all__ = [
    "ExpertToken",
    "ExpertView",
    "LogitAttribution",
    "RoutedToken",
    "Routing",
    "RoutingStatistics",
    "ablate_expert",
    "expert_activation",
    "expert_logit_attribution",
    "expert_view",
    "forbid_experts",
    "force_experts",
    "logit_attribution",
    "routing",
    "routing_statistics",
]
