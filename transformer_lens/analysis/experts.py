"""Experts of a mixture: hooks that take them away or route to them, routing and its statistics over a
data set, what each adds to a logit, and one expert's activations. All in one place to import from."""

from transformer_lens.analysis.expert_attribution import LogitAttribution, expert_logit_attribution, logit_attribution
from transformer_lens.analysis.expert_hooks import ablate_expert, forbid_experts, force_experts
from transformer_lens.analysis.expert_views import ExpertView, expert_activation, expert_view
from transformer_lens.analysis.routing import RoutedToken, Routing, routing
from transformer_lens.analysis.routing_statistics import ExpertToken, RoutingStatistics, routing_statistics

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
