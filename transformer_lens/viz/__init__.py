"""Pictures: self-contained HTML and PNG. Needs the extra `[viz]`."""

from transformer_lens.viz.heatmap import Heatmap

__all__ = ["Heatmap"]
