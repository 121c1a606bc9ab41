"""`Picture`: data that plotly draws as one self-contained HTML page and matplotlib as PNG, imported when they draw."""

import base64
import html
import io
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_lens.checks import a_path, file_to_write, needed

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from plotly.graph_objects import Figure

MISSING = "drawing needs plotly and matplotlib: pip install 'transformer-lens-bridge[viz]'"
DIVERGING = "RdBu"  # colours around zero, distinguishable with the common kinds of colour blindness
SEQUENTIAL = "Blues"  # colours from little to much, in one hue that also works without colour vision and in print
RISE, FALL, TOTAL = "#0072B2", "#D55E00", "#777777"
"""From the palette of Okabe and Ito (2008), safe for the common kinds of colour blindness."""
FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
LAYOUT = {"template": "plotly_white", "font": {"family": FONT}}
MOST_LABELS = 60  # more labels than this along an axis are thinned out to stay readable
SHOWN = {"\n": "⏎", "\t": "⇥"}


def visible(token: str) -> str:
    """A token as a label: line breaks, tabs and an empty token become signs, other control characters codes."""
    return "".join(SHOWN.get(one) or (one if one.isprintable() else repr(one)[1:-1]) for one in token) or "∅"


def escaped(labels: Sequence[str]) -> list[str]:
    """Labels for plotly, which interprets `<b>` and the like."""
    return [html.escape(visible(label), quote=False) for label in labels]


def ticks(labels: Sequence[str]) -> list[int]:
    """The positions along an axis that get a label."""
    step = -(-len(labels) // MOST_LABELS)
    return list(range(0, len(labels), step)) if labels else []


class Picture(ABC):
    """Shows itself as the last line of a notebook cell; `save(path)` writes `.html` or `.png`."""

    @abstractmethod
    def figure(self) -> "Figure":
        """The picture as a plotly figure, which you can change before showing it."""

    @abstractmethod
    def drawing(self) -> "Drawing":
        """The picture as a matplotlib figure."""

    def html(self) -> str:
        """A complete, self-contained page."""
        return str(self.figure().to_html(include_plotlyjs=True, full_html=True, config={"responsive": True}))

    def save(self, path: str | Path) -> Path:
        """Write one file, HTML or PNG by its extension. Raises `ValueError` for other extensions."""
        suffix = a_path("path", path).suffix.lower()
        if suffix not in (".html", ".png"):
            raise ValueError(f"save: got {str(path)!r}, expected a name that ends in .html or .png")
        return self.save_html(path) if suffix == ".html" else self.save_png(path)

    def save_html(self, path: str | Path) -> Path:
        """Write one HTML file, in which values show on hover."""
        path = file_to_write("path", path)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def save_png(self, path: str | Path) -> Path:
        """Write a PNG that is readable 900 pixels wide."""
        path = file_to_write("path", path)
        path.write_bytes(self.png())
        return path

    def png(self) -> bytes:
        """The picture as a PNG."""
        file = io.BytesIO()
        self.drawing().savefig(file, dpi=120, format="png")
        return file.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """For Jupyter: interactive if the front end supports plotly, else an image."""
        return {
            "application/vnd.plotly.v1+json": self.figure().to_plotly_json(),
            "image/png": base64.b64encode(self.png()).decode(),
            "text/plain": repr(self),
        }


def new_drawing(width: float, height: float) -> "Drawing":
    """An empty matplotlib figure, sized in inches, without a window or global state."""
    make: type[Drawing] = needed("matplotlib.figure", MISSING).Figure
    return make(figsize=(max(7.5, width), height), layout="constrained")


def entitle(figure: "Drawing", title: str) -> None:
    """Add a left-aligned title, wrapped as needed: an inch holds about 11 letters of this size."""
    lines = textwrap.fill(title, int(11 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=11, parse_math=False)


def plotly() -> Any:
    return needed("plotly.graph_objects", MISSING)
