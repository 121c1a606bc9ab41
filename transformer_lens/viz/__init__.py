"""Pictures: self-contained HTML and PNG. Needs the extra `[viz]`."""

from transformer_lens.viz.figures import Heatmap, Heatmaps, Waterfall
from transformer_lens.viz.of_runs import (
    attention_patterns,
    head_map,
    logit_lens_grid,
    logit_waterfall,
    patching_map,
    routing_map,
    token_losses,
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
    "head_map",
    "logit_lens_grid",
    "logit_waterfall",
    "patching_map",
    "routing_map",
    "token_losses",
]
