"""Attribution graphs: what feeds what on one prompt, between features, errors, experts, tokens and logits."""

from transformer_lens.dictionaries.graphs.attribution import attribution_graph
from transformer_lens.dictionaries.graphs.files import save_for_viewers, save_page
from transformer_lens.dictionaries.graphs.graph import AttributionGraph, Intervention
from transformer_lens.dictionaries.graphs.local_model import Node

__all__ = ["AttributionGraph", "Intervention", "Node", "attribution_graph", "save_for_viewers", "save_page"]
