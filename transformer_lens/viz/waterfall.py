"""`Waterfall`: how parts add up to a whole, one bar each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

import transformer_lens.viz.picture as base
from transformer_lens.checks import as_numbers, listed, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from plotly.graph_objects import Figure


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

    def figure(self) -> "Figure":
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

    def drawing(self) -> "Drawing":
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
