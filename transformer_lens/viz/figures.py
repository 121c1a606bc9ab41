"""`Heatmap`, a labelled matrix, `Heatmaps`, several with a menu, and `Waterfall`, parts that add up to a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

import transformer_lens.viz.picture as base
from transformer_lens.checks import as_numbers, in_words, is_one_of, listed, whole
from transformer_lens.utilities import to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from plotly.graph_objects import Figure

MOST_NUMBERS = 400  # the most cells whose values a PNG shows
MOST_PANELS = 24  # the most panels a PNG shows side by side
COLUMNS = 4


def _are_ends(limits: Any) -> bool:
    pair = isinstance(limits, (tuple, list)) and len(limits) == 2 and all(isinstance(end, Real) for end in limits)
    return pair and bool(-math.inf < limits[0] < limits[1] < math.inf)


@dataclass(frozen=True, repr=False)
class Heatmap(base.Picture):
    """A matrix with named rows and columns.

    >>> picture = Heatmap(torch.eye(2), rows=["a", "b"], columns=["x", "y"], title="identity")
    >>> picture
    Heatmap 'identity' of 2 x 2

    `value` says what a cell means, with its unit. Colours are centred on zero; `limits=(low, high)` with `low >= 0`
    makes them sequential. `texts` are written into the cells, `notes` show on hover, NaN leaves a cell blank. Raises
    `ValueError` if labels or texts do not fit.
    """

    values: Float[Tensor, "row column"]
    rows: Sequence[str]
    columns: Sequence[str]
    title: str
    row_title: str = ""
    column_title: str = ""
    value: str = "value"
    limits: tuple[float, float] | None = None
    texts: Sequence[Sequence[str]] | None = None
    notes: Sequence[Sequence[str]] | None = None

    def __post_init__(self) -> None:
        where, given = f"heat map {self.title!r}", vars(self)
        object.__setattr__(self, "values", as_numbers(f"{where}: values", self.values))
        for name in ("rows", "columns", "texts", "notes"):
            if given[name] is not None:
                object.__setattr__(self, name, listed(f"{where}: {name}", given[name]))
        got, expected = list(self.values.shape), [len(self.rows), len(self.columns)]
        if got != expected:
            raise ValueError(f"{where}: got values of shape {got}, expected {expected} for the labels given")
        for name in ("texts", "notes"):
            cells = given[name] or []
            widths = {len(row) if isinstance(row, (list, tuple)) else -1 for row in cells}
            if given[name] is not None and [len(cells), *widths] != expected:
                raise ValueError(f"{where}: got {name} that do not fill {expected} cells")
        if self.limits is not None and not _are_ends(self.limits):
            raise ValueError(f"{where}: got limits={self.limits}, expected (low, high), low below high")

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.title!r} of {len(self.rows)} x {len(self.columns)}"

    @property
    def matrix(self) -> np.ndarray:
        """The values as a float32 NumPy array."""
        return to_numpy(self.values.float())

    @property
    def range(self) -> tuple[float, float]:
        """The values at the ends of the colour scale."""
        if self.limits is not None:
            return self.limits
        finite = np.abs(self.matrix[np.isfinite(self.matrix)])
        limit = float(finite.max(initial=0.0)) or 1.0
        return -limit, limit

    @property
    def colours(self) -> str:
        return base.SEQUENTIAL if self.range[0] >= 0 else base.DIVERGING

    def trace(self) -> Any:
        """The cells as a plotly trace, with positions as coordinates since a label may occur twice."""
        low, high = self.range
        rows, columns = base.escaped(self.rows), base.escaped(self.columns)
        notes = self.notes or [[""] * len(columns)] * len(rows)
        about = [
            [[row, column, note and f"<br>{note}"] for column, note in zip(columns, line, strict=True)]
            for row, line in zip(rows, notes, strict=True)
        ]
        labels: dict[str, Any] = {}
        if self.texts is not None:
            texts = [base.escaped(row) for row in self.texts]
            labels = {"text": texts, "texttemplate": "%{text}", "textfont": {"size": 11}}
        return base.plotly().Heatmap(
            z=np.round(self.matrix, 5),
            x=list(range(len(columns))),
            y=list(range(len(rows))),
            zmin=low,
            zmax=high,
            colorscale=self.colours,
            hoverongaps=False,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": self.value, "side": "right"}},
            customdata=about,
            hovertemplate=(
                f"{self.row_title} %{{customdata[0]}}<br>{self.column_title} %{{customdata[1]}}<br>"
                f"{self.value}: %{{z:.3f}}%{{customdata[2]}}<extra></extra>"
            ),
            **labels,
        )

    def layout(self) -> dict[str, Any]:
        return {
            **base.LAYOUT,
            "title": {"text": self.title},
            "height": max(320, (34 if len(self.rows) <= 10 else 26) * min(len(self.rows), 60) + 220),
            "margin": {"l": 90, "r": 30},
            # The labels of columns turn as they need to.
            "xaxis": self._axis(self.columns, self.column_title, tickangle=None, autotickangles=[0, -40, -90]),
            "yaxis": self._axis(self.rows, self.row_title, autorange="reversed"),
        }

    @staticmethod
    def _axis(labels: Sequence[str], title: str, **more: Any) -> dict[str, Any]:
        places, shown = base.ticks(labels), base.escaped(labels)
        return {
            "title": {"text": title},
            "tickvals": places,
            "ticktext": [shown[place] for place in places],
            "tickangle": 0,
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
            **more,
        }

    def figure(self) -> Figure:
        return base.plotly().Figure(self.trace(), self.layout())

    def draw(self, axes: Axes, width: float, size: float = 10, numbers: bool = True) -> Any:
        """Draw the cells into matplotlib axes about `width` inches wide; returns the image, for a colour bar."""
        matrix, (low, high) = self.matrix, self.range
        picture = axes.imshow(matrix, cmap=self.colours, vmin=low, vmax=high, aspect="auto")
        x, y = base.ticks(self.columns), base.ticks(self.rows)
        labels = [base.visible(self.columns[place]) for place in x]
        # Labels lie flat while the longest has room; a letter is about 0.009 inches wide per point of its size.
        room = width / max(1, len(x)) / (0.009 * size)
        lying = max(map(len, labels), default=0) + 1 <= room
        turn: dict[str, Any] = {} if lying else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(x, labels, parse_math=False, **turn)
        axes.set_yticks(y, [base.visible(self.rows[place]) for place in y], parse_math=False)
        axes.tick_params(labelsize=size)
        axes.set_xlabel(self.column_title, fontsize=max(8, size))
        axes.set_ylabel(self.row_title, fontsize=max(8, size))
        if numbers and self._written:
            for (row, column), cell in np.ndenumerate(matrix):
                number = f"{round(float(cell), 2) + 0.0:.2f}"
                text = number if self.texts is None else base.visible(self.texts[row][column])
                if np.isfinite(cell):
                    ink = _ink((cell - low) / (high - low), self.colours)
                    axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink, parse_math=False)
        return picture

    @property
    def _written(self) -> bool:
        return self.texts is not None or self.matrix.size <= MOST_NUMBERS

    def drawing(self) -> Drawing:
        width, height = (0.8 if self.texts is not None else 0.62, 0.42) if self._written else (0.2, 0.2)
        columns, rows = (min(len(labels), base.MOST_LABELS) for labels in (self.columns, self.rows))
        figure = base.new_drawing(width * columns + 2.5, max(3.2, height * rows + 2.0))
        base.entitle(figure, self.title)
        beside = 1.6 + 0.09 * max((len(base.visible(row)) for row in self.rows), default=0)  # row labels and colour bar
        figure.colorbar(self.draw(figure.subplots(), figure.get_figwidth() - beside), label=self.value)
        return figure


def _ink(share: float, colours: str) -> str:
    """Black or white, whichever contrasts better with a colour `share` of the way up."""
    if colours == base.SEQUENTIAL:
        return "w" if share > 0.55 else "k"
    return "w" if abs(share - 0.5) > 0.3 else "k"


@dataclass(frozen=True, repr=False)
class Heatmaps(base.Picture):
    """Several heat maps with a menu. A PNG shows them side by side, with one colour bar if they share a scale.

    >>> panels = {f"head {h}": Heatmap(torch.eye(2), ["a", "b"], ["a", "b"], "") for h in range(3)}
    >>> Heatmaps(panels, title="heads")
    Heatmaps 'heads': 3 panels, head 0 to head 2

    Raises `ValueError` for no panels, and for an unknown `first`.
    """

    panels: Mapping[str, Heatmap]
    title: str
    first: str = ""
    """The panel shown at the start; by default the first."""

    def __post_init__(self) -> None:
        if not isinstance(self.panels, Mapping) or not all(isinstance(one, Heatmap) for one in self.panels.values()):
            raise TypeError(
                f"heat maps {self.title!r}: got {in_words(self.panels)}, expected a Heatmap under each name"
            )
        if not self.panels:
            raise ValueError(f"heat maps {self.title!r}: got no panel, expected at least one")
        if not is_one_of(self.first, ("", *self.panels)):
            raise ValueError(f"heat maps {self.title!r}: got first={self.first!r}, expected one of {list(self.panels)}")

    def __repr__(self) -> str:
        names = list(self.panels)
        return f"Heatmaps {self.title!r}: {len(names)} panels, {names[0]} to {names[-1]}"

    def figure(self) -> Figure:
        names = list(self.panels)
        at = names.index(self.first or names[0])
        traces = [panel.trace() for panel in self.panels.values()]
        for place, trace in enumerate(traces):
            trace.visible = place == at
        layouts = [panel.layout() for panel in self.panels.values()]
        buttons = [
            {
                "label": name,
                "method": "update",
                "args": [{"visible": [other == place for other in range(len(names))]}, {"xaxis": x, "yaxis": y}],
            }
            for place, name in enumerate(names)
            for x, y in [(layouts[place]["xaxis"], layouts[place]["yaxis"])]
        ]
        menu = {"buttons": buttons, "active": at, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
        layout = {**layouts[at], "title": {"text": self.title, "y": 0.98, "yanchor": "top"}, "updatemenus": [menu]}
        layout |= {"margin": {**layouts[at]["margin"], "t": 110}, "height": layouts[at]["height"] + 40}
        return base.plotly().Figure(traces, layout)

    def drawing(self) -> Drawing:
        shown = list(self.panels.items())[:MOST_PANELS]
        columns = min(COLUMNS, len(shown))
        rows = -(-len(shown) // columns)
        sample = shown[0][1]
        height = max(2.2, 0.16 * min(len(sample.rows), base.MOST_LABELS) + 1.0)
        figure = base.new_drawing(3.2 * columns, height * rows + 0.6)
        grid = figure.subplots(rows, columns, squeeze=False)
        shared = len({(*panel.range, panel.value) for _, panel in shown}) == 1
        more = f"   (the first {len(shown)} of {len(self.panels)})" if len(shown) < len(self.panels) else ""
        base.entitle(figure, self.title + more)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        for place, ((name, panel), axes) in enumerate(zip(shown, grid.flat, strict=False)):
            image = panel.draw(axes, figure.get_figwidth() / columns - (0.8 if shared else 1.4), 6.5, numbers=False)
            if not shared:
                _bar(figure, image, axes, panel.value)
            axes.set_title(name, loc="left", fontsize=9)
            if place % columns and list(panel.rows) == list(shown[place - 1][1].rows):
                axes.set_ylabel("")
                axes.set_yticks([])
            below = place + columns
            if below < len(shown) and list(panel.columns) == list(shown[below][1].columns):
                axes.set_xlabel("")
                axes.set_xticks([])
        if shared:
            _bar(figure, image, grid, sample.value, shrink=0.8)
        return figure


def _bar(figure: Drawing, image: Any, axes: Any, value: str, **options: Any) -> None:
    """A colour bar in the small letters of several panels."""
    bar = figure.colorbar(image, ax=axes, **options)
    bar.set_label(value, fontsize=8)
    bar.ax.tick_params(labelsize=6.5)


@dataclass(frozen=True, repr=False)
class Waterfall(base.Picture):
    """The parts of a logit (or of any other sum), each bar starting where the previous one ended.

    >>> Waterfall(torch.tensor([1.0, -0.5, 0.25]), ["embed", "L0H0", "bias"], title="logit of ' Mary'")
    Waterfall "logit of ' Mary'": 3 parts, 0.750 in all

    `most` keeps the largest parts, in their order, and sums the rest into one bar, so that the bars still end at the
    whole. Raises `ValueError` if labels do not fit, or for a NaN.
    """

    values: Float[Tensor, " component"]
    labels: Sequence[str]
    title: str
    value: str = "logits"
    most: int = 24

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", as_numbers(f"waterfall {self.title!r}: values", self.values))
        object.__setattr__(self, "labels", listed(f"waterfall {self.title!r}: labels", self.labels))
        if list(self.values.shape) != [len(self.labels)] or not len(self.labels):
            raise ValueError(
                f"waterfall {self.title!r}: got values of shape {list(self.values.shape)} and "
                f"{len(self.labels)} labels, expected one value for each label, at least one"
            )
        if not bool(self.values.isfinite().all()):
            raise ValueError(f"waterfall {self.title!r}: got values that are not finite")
        whole(f"waterfall {self.title!r}: most", self.most, 1)

    def __repr__(self) -> str:
        return f"Waterfall {self.title!r}: {len(self.labels)} parts, {float(self.values.double().sum()):.3f} in all"

    def bars(self) -> tuple[list[str], list[float]]:
        """The labels and values shown: the largest, and the sum of the others."""
        values: list[float] = self.values.double().tolist()
        order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
        kept, rest = sorted(order[: self.most]), [values[i] for i in order[self.most :]]
        labels, shown = [self.labels[i] for i in kept], [values[i] for i in kept]
        return ([*labels, f"{len(rest)} others"], [*shown, sum(rest)]) if rest else (labels, shown)

    def figure(self) -> Figure:
        labels, values = self.bars()
        steps = list(range(len(values) + 1))
        bars = base.plotly().Waterfall(
            x=steps,
            y=[*values, 0],
            measure=["relative"] * len(values) + ["total"],
            customdata=[*base.escaped(labels), "total"],
            increasing={"marker": {"color": base.RISE}},
            decreasing={"marker": {"color": base.FALL}},
            totals={"marker": {"color": base.TOTAL}},
            connector={"line": {"color": "#bbbbbb", "width": 1}},
            hovertemplate=(
                f"%{{customdata}}<br>adds %{{delta:.3f}} {self.value}<br>so far %{{final:.3f}}<extra></extra>"
            ),
        )
        axis = {"tickvals": steps, "ticktext": [*base.escaped(labels), "total"], "tickangle": -40, "automargin": True}
        layout = {
            **base.LAYOUT,
            "title": {"text": self.title},
            "height": 460,
            "showlegend": False,
            "xaxis": axis,
            "yaxis": {"title": {"text": self.value}, "zerolinecolor": "#444444"},
        }
        return base.plotly().Figure(bars, layout)

    def drawing(self) -> Drawing:
        labels, values = self.bars()
        ends = list(accumulate(values))
        starts = [0.0, *ends[:-1]]
        figure = base.new_drawing(0.42 * len(values) + 2, 4.2)
        axes = figure.subplots()
        axes.bar(range(len(values)), values, bottom=starts, color=[base.RISE if v >= 0 else base.FALL for v in values])
        axes.bar(len(values), ends[-1], color=base.TOTAL)
        for place, end in enumerate(ends):
            axes.plot([place - 0.4, place + 1.4], [end, end], color="#bbbbbb", linewidth=0.8)
        axes.axhline(0, color="#444444", linewidth=0.8)
        names = [*map(base.visible, labels), "total"]
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
        axes.use_sticky_edges = False  # bars would sit on the frame
        axes.margins(y=0.08)
        axes.set_ylabel(self.value)
        base.entitle(figure, self.title)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        return figure
