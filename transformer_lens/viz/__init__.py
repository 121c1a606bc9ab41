"""Pictures: self-contained HTML, PNG, SVG and PDF. Needs the extra `[viz]`."""

from transformer_lens.viz.figures import Heatmap, Heatmaps, Waterfall
from transformer_lens.viz.of_results import (
    bootstrap,
    expert_map,
    head_map,
    patching_map,
    path_map,
    steering_sweep,
    top_contexts_text,
)
from transformer_lens.viz.of_runs import (
    attention_patterns,
    lens_grids,
    logit_lens_grid,
    logit_waterfall,
    routing_map,
    token_losses,
    token_predictions,
    tuned_lens_grid,
)
from transformer_lens.viz.picture import Picture
from transformer_lens.viz.token_text import TokenText

__all__ = [
    "Heatmap",
    "Heatmaps",
    "Picture",
    "TokenText",
    "Waterfall",
    "attention_patterns",
    "bootstrap",
    "expert_map",
    "head_map",
    "lens_grids",
    "logit_lens_grid",
    "logit_waterfall",
    "patching_map",
    "path_map",
    "routing_map",
    "steering_sweep",
    "token_losses",
    "token_predictions",
    "top_contexts_text",
    "tuned_lens_grid",
]
