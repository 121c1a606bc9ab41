"""`Heatmap`, a labelled matrix, `Heatmaps`, several with a menu, and `Waterfall`, parts that add up to a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

import transformer_lens.viz.picture as base
from transformer_lens.checks import as_numbers, in_words, is_one_of, listed, whole
from transformer_lens.utilities import to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

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
    makes them sequential. `texts` are written into the cells, `notes` show on hover, NaN leaves a cell blank.
    `interval` holds the lower and the upper end of each value; an image brackets the values whose interval holds zero.
    `paths` say, for each column, what a click on it follows down the rows. Raises `ValueError` if labels, texts or
    intervals do not fit.
    """

    script: ClassVar[str] = "grid"
    values: Float[Tensor, "row column"]
    rows: Sequence[str]
    columns: Sequence[str]
    title: str = ""
    row_title: str = ""
    column_title: str = ""
    value: str = "value"
    limits: tuple[float, float] | None = None
    texts: Sequence[Sequence[str]] | None = None
    notes: Sequence[Sequence[str]] | None = None
    interval: tuple[Tensor, Tensor] | None = None
    paths: Sequence[Mapping[str, Sequence[float]]] | None = None

    def __post_init__(self) -> None:
        where, given = f"heat map {self.title!r}", vars(self)
        object.__setattr__(self, "values", as_numbers(f"{where}: values", self.values))
        for name in ("rows", "columns", "texts", "notes", "paths"):
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
        if self.interval is not None:
            ends = [as_numbers(f"{where}: interval", end) for end in listed(f"{where}: interval", self.interval)]
            if [list(end.shape) for end in ends] != [expected, expected]:
                raise ValueError(f"{where}: got an interval that does not fill {expected} cells")
            object.__setattr__(self, "interval", tuple(ends))
        if self.paths is not None and [isinstance(path, Mapping) for path in self.paths] != [True] * expected[1]:
            raise ValueError(f"{where}: got paths that do not fit, expected values by name for each of the columns")
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

    @property
    def unsure(self) -> np.ndarray:
        """The cells whose interval holds zero."""
        if self.interval is None:
            return np.zeros(self.matrix.shape, dtype=bool)
        low, high = self.interval
        return to_numpy((low <= 0) & (high >= 0))

    def _panel(self, name: str = "") -> dict[str, Any]:
        """What `grid.js` draws as one matrix."""
        low, high = map(_numbers, self.interval) if self.interval else (None, None)
        shown = ("rows", "columns", "row_title", "column_title", "value", "texts", "notes", "paths", "range")
        given = {one: getattr(self, one) for one in shown}
        return {"name": name, **given, "values": _numbers(self.values), "low": low, "high": high}

    def data(self) -> dict[str, Any]:
        return {"panels": [self._panel()], "first": 0, "beside": False}

    def draw(self, axes: Axes, width: float, size: float = 10, numbers: bool = True) -> Any:
        """Draw the cells into matplotlib axes about `width` inches wide; returns the image, for a colour bar."""
        matrix, (low, high) = self.matrix, self.range
        picture = axes.imshow(matrix, cmap=self.colours, vmin=low, vmax=high, aspect="auto")
        faint, inked = (
            (0.0, 0.55) if low >= 0 else (0.5, 0.3)
        )  # the palest colour; how far from it white contrasts better
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
        if self.texts is not None or (numbers and self.written):
            for (row, column), cell in np.ndenumerate(matrix):
                number = f"{round(float(cell), 2) + 0.0:.2f}"
                text = f"({number})" if self.unsure[row, column] else number
                if self.texts is not None:
                    text = base.visible(self.texts[row][column])
                if np.isfinite(cell):
                    ink = "w" if abs((cell - low) / (high - low) - faint) > inked else "k"
                    axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink, parse_math=False)
        return picture

    @property
    def written(self) -> bool:
        """Whether an image shows what its cells hold."""
        return self.texts is not None or self.matrix.size <= MOST_NUMBERS

    def size(self) -> tuple[float, float]:
        """The width and height of an image, in inches."""
        width, height = (0.8 if self.texts is not None else 0.62, 0.42) if self.written else (0.2, 0.2)
        columns, rows = (min(len(labels), base.MOST_LABELS) for labels in (self.columns, self.rows))
        return max(7.5, width * columns + 2.5), max(3.2, height * rows + 2.0)

    def drawing(self) -> Drawing:
        figure = base.new_drawing(*self.size())
        base.entitle(figure, self.title)
        beside = 1.6 + 0.09 * max((len(base.visible(row)) for row in self.rows), default=0)  # row labels and colour bar
        label = self.value + ("\n(in brackets: the interval holds 0)" if self.interval else "")
        figure.colorbar(self.draw(figure.subplots(), figure.get_figwidth() - beside), label=label)
        return figure


def _numbers(values: Tensor) -> list[list[float | None]]:
    """Rows of numbers to five digits, for JSON; `None` for NaN."""
    return [[float(f"{v:.5g}") if math.isfinite(v) else None for v in row] for row in values.double().tolist()]


@dataclass(frozen=True, repr=False)
class Heatmaps(base.Picture):
    """Several heat maps with a menu, or side by side. An image shows all, with one colour bar if they share a scale.

    >>> panels = {f"head {h}": Heatmap(torch.eye(2), ["a", "b"], ["a", "b"], "") for h in range(3)}
    >>> Heatmaps(panels, title="heads")
    Heatmaps 'heads': 3 panels, head 0 to head 2

    Raises `ValueError` for no panels, and for an unknown `first`.
    """

    script: ClassVar[str] = "grid"
    panels: Mapping[str, Heatmap]
    title: str = ""
    first: str = ""
    """The panel shown at the start; by default the first."""
    beside: bool = False
    """Whether a page shows all at once, so that pointing at a cell of one tells of the same cell of the others."""

    def __post_init__(self) -> None:
        where, panels = f"heat maps {self.title!r}", self.panels
        if not isinstance(panels, Mapping) or not all(isinstance(one, Heatmap) for one in panels.values()):
            raise TypeError(f"{where}: got {in_words(panels)}, expected a Heatmap under each name")
        if not panels:
            raise ValueError(f"{where}: got no panel, expected at least one")
        if not is_one_of(self.first, ("", *panels)):
            raise ValueError(f"{where}: got first={self.first!r}, expected one of {list(panels)}")

    def __repr__(self) -> str:
        names = list(self.panels)
        return f"Heatmaps {self.title!r}: {len(names)} panels, {names[0]} to {names[-1]}"

    @property
    def place(self) -> int:
        """The number of the panel shown at the start."""
        return list(self.panels).index(self.first) if self.first else 0

    def data(self) -> dict[str, Any]:
        panels = [panel._panel(name) for name, panel in self.panels.items()]
        return {"panels": panels, "first": self.place, "beside": self.beside}

    def drawing(self) -> Drawing:
        shown = list(self.panels.items())[:MOST_PANELS]
        sample = shown[0][1]
        width, height = 3.2, max(2.2, 0.16 * min(len(sample.rows), base.MOST_LABELS) + 1.0)
        if any(panel.texts is not None for _, panel in shown):
            width, height = sample.size()  # what is written in the cells has to be read
        columns = min(len(shown), max(1, int(COLUMNS * 3.2 / width)))
        rows = -(-len(shown) // columns)
        figure = base.new_drawing(width * columns, height * rows + 0.6)
        grid = figure.subplots(rows, columns, squeeze=False)
        shared = len({(*panel.range, panel.value) for _, panel in shown}) == 1
        more = f"   (the first {len(shown)} of {len(self.panels)})" if len(shown) < len(self.panels) else ""
        base.entitle(figure, self.title + more)
        for axes in grid.flat[len(shown) :]:
            axes.set_axis_off()
        for place, ((name, panel), axes) in enumerate(zip(shown, grid.flat, strict=False)):
            room = figure.get_figwidth() / columns - (0.8 if shared else 1.4)
            image = panel.draw(axes, room, 6.5, numbers=len(panel.columns) <= 8)
            if not shared:
                _bar(figure, image, axes, panel.value)
            axes.set_title(name, loc="left", fontsize=9)
            if place % columns and panel.rows == shown[place - 1][1].rows:
                axes.set(ylabel="", yticks=[])
            below = place + columns
            if below < len(shown) and panel.columns == shown[below][1].columns:
                axes.set(xlabel="", xticks=[])
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

    script: ClassVar[str] = "bars"
    values: Float[Tensor, " component"]
    labels: Sequence[str]
    title: str = ""
    value: str = "logits"
    most: int = 24

    def __post_init__(self) -> None:
        where = f"waterfall {self.title!r}"
        object.__setattr__(self, "values", as_numbers(f"{where}: values", self.values))
        object.__setattr__(self, "labels", listed(f"{where}: labels", self.labels))
        shape, count = list(self.values.shape), len(self.labels)
        if shape != [count] or not count:
            told = "expected one value for each label, at least one"
            raise ValueError(f"{where}: got values of shape {shape} and {count} labels, {told}")
        if not bool(self.values.isfinite().all()):
            raise ValueError(f"{where}: got values that are not finite")
        whole(f"{where}: most", self.most, 1)

    def __repr__(self) -> str:
        return f"Waterfall {self.title!r}: {len(self.labels)} parts, {float(self.values.double().sum()):.3f} in all"

    def bars(self) -> tuple[list[str], list[float]]:
        """The labels and values shown: the largest, and the sum of the others."""
        values: list[float] = self.values.double().tolist()
        order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
        kept, rest = sorted(order[: self.most]), [values[i] for i in order[self.most :]]
        labels, shown = [self.labels[i] for i in kept], [values[i] for i in kept]
        return ([*labels, f"{len(rest)} others"], [*shown, sum(rest)]) if rest else (labels, shown)

    def data(self) -> dict[str, Any]:
        labels, values = self.bars()
        return {"labels": labels, "values": values, "value": self.value}

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
        axes.spines[["top", "right"]].set_visible(False)
        return figure
