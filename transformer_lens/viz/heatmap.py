"""`Heatmap`: a labelled matrix as a picture, to hover over in HTML or to print as PNG.

The libraries are imported where they draw, so that importing this costs nothing without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from transformer_lens.utilities import to_numpy

if TYPE_CHECKING:
    import numpy as np

MISSING = "drawing needs plotly and matplotlib: pip install 'transformer-lens-bridge[viz]'"
COLOURS = "RdBu"
"""Diverging, told apart by the common kinds of colour blindness."""


@dataclass(frozen=True)
class Heatmap:
    """A matrix with named rows and columns, coloured around zero.

    >>> Heatmap(torch.eye(2), rows=["a", "b"], columns=["x", "y"], title="identity").values.shape
    torch.Size([2, 2])

    `value` says what a cell means, with its unit. Raises `ValueError` if the labels do not fit.
    """

    values: Float[Tensor, "row column"]
    rows: Sequence[str]
    columns: Sequence[str]
    title: str
    row_title: str = ""
    column_title: str = ""
    value: str = "value"

    def __post_init__(self) -> None:
        if list(self.values.shape) != [len(self.rows), len(self.columns)]:
            raise ValueError(
                f"heat map {self.title!r}: got values of shape {list(self.values.shape)}, expected "
                f"{[len(self.rows), len(self.columns)]} for the labels given"
            )

    def _matrix(self) -> tuple[np.ndarray, float]:
        matrix = to_numpy(self.values.float())
        return matrix, float(abs(matrix).max()) or 1.0

    def save_html(self, path: str | Path) -> Path:
        """Write one HTML file that needs nothing from outside; the values show on hover."""
        try:
            import plotly.graph_objects as graph
        except ImportError as error:
            raise ImportError(MISSING) from error
        matrix, limit = self._matrix()
        # Positions, not labels, are the coordinates: a token may occur twice.
        picture = graph.Heatmap(
            z=matrix,
            x=list(range(len(self.columns))),
            y=list(range(len(self.rows))),
            zmin=-limit,
            zmax=limit,
            colorscale=COLOURS,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": self.value, "side": "right"}},
            customdata=[[[row, column] for column in self.columns] for row in self.rows],
            hovertemplate=f"%{{customdata[0]}}, %{{customdata[1]}}<br>{self.value}: %{{z:.3f}}<extra></extra>",
        )
        figure = graph.Figure(picture)
        figure.update_layout(
            title={"text": self.title},
            template="plotly_white",
            height=max(320, 34 * len(self.rows) + 220),
            xaxis={**self._axis(self.columns, self.column_title), "tickangle": -40},
            yaxis={**self._axis(self.rows, self.row_title), "autorange": "reversed"},
        )
        path = Path(path)
        figure.write_html(path, include_plotlyjs=True, full_html=True, config={"responsive": True})
        return path

    @staticmethod
    def _axis(labels: Sequence[str], title: str) -> dict[str, Any]:
        ticks = list(range(len(labels)))
        return {
            "title": {"text": title},
            "tickvals": ticks,
            "ticktext": list(labels),
            "tickangle": 0,
            "showgrid": False,
        }

    def save_png(self, path: str | Path) -> Path:
        """Write a PNG that is readable at 900 pixels."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(MISSING) from error
        matrix, limit = self._matrix()
        width = max(7.5, 0.62 * len(self.columns) + 2.5)
        figure = Figure(figsize=(width, max(3.2, 0.42 * len(self.rows) + 2.0)), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(matrix, cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(self.rows)), self.rows)
        axes.set_xlabel(self.column_title)
        axes.set_ylabel(self.row_title)
        axes.set_title(self.title, loc="left", fontsize=11)
        for place, cell in ((p, matrix[p]) for p in _cells(matrix) if matrix.size <= 400):
            dark = abs(cell) > 0.6 * limit
            axes.text(
                place[1], place[0], f"{cell:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
            )
        figure.colorbar(picture, label=self.value)
        path = Path(path)
        figure.savefig(path, dpi=120)
        return path


def _cells(matrix: np.ndarray) -> list[tuple[int, int]]:
    return [(row, column) for row in range(matrix.shape[0]) for column in range(matrix.shape[1])]
