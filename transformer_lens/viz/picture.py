"""`Picture`: something that shows in Jupyter and saves to one file, HTML or PNG.

A picture is data; plotly draws it for HTML and matplotlib for PNG. Both are imported where they draw,
so that importing this costs nothing without them. HTML needs no script from outside.
"""

from __future__ import annotations

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
DIVERGING = "RdBu"
"""Around zero; told apart by the common kinds of colour blindness."""
SEQUENTIAL = "Blues"
"""From nothing to much; one hue from white on, so it reads without colour vision and in print."""
RISE, FALL, TOTAL = "#0072B2", "#D55E00", "#777777"
"""From the palette of Okabe and Ito (2008), safe for the common kinds of colour blindness."""
FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
MOST_LABELS = 60
"""More labels than this along an axis are thinned out, or nobody can read them."""
SHOWN = {"\n": "⏎", "\t": "⇥"}


def visible(token: str) -> str:
    """A token as a label: line breaks and tabs get a sign, nothing becomes a sign too, other control characters a code.

    >>> visible("a\\n"), visible(""), visible("\\x03")
    ('a⏎', '∅', '\\\\x03')
    """
    return "".join(SHOWN.get(one) or (one if one.isprintable() else repr(one)[1:-1]) for one in token) or "∅"


def escaped(labels: Sequence[str]) -> list[str]:
    """Labels for plotly, which reads `<b>` and its like as formatting."""
    return [html.escape(visible(label), quote=False) for label in labels]


def ticks(labels: Sequence[str]) -> list[int]:
    """The positions along an axis that get a label."""
    step = -(-len(labels) // MOST_LABELS)
    return list(range(0, len(labels), step)) if labels else []


class Picture(ABC):
    """Shows itself as the last line of a notebook cell; `save(path)` writes `.html` or `.png`."""

    @abstractmethod
    def figure(self) -> Figure:
        """The picture as a plotly figure, to change before it is shown."""

    @abstractmethod
    def drawing(self) -> Drawing:
        """The picture as a matplotlib figure."""

    def html(self) -> str:
        """A whole page that needs nothing from outside."""
        found: str = self.figure().to_html(include_plotlyjs=True, full_html=True, config={"responsive": True})
        return found

    def save(self, path: str | Path) -> Path:
        """Write one file, HTML or PNG by the ending of its name. Raises `ValueError` for other endings."""
        suffix = a_path("path", path).suffix.lower()
        if suffix == ".html":
            return self.save_html(path)
        if suffix == ".png":
            return self.save_png(path)
        raise ValueError(f"save: got {str(path)!r}, expected a name that ends in .html or .png")

    def save_html(self, path: str | Path) -> Path:
        """Write one HTML file; values show on hover."""
        path = file_to_write("path", path)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def save_png(self, path: str | Path) -> Path:
        """Write a PNG that is readable at 900 pixels."""
        path = file_to_write("path", path)
        path.write_bytes(self.png())
        return path

    def png(self) -> bytes:
        """The picture as a PNG."""
        file = io.BytesIO()
        self.drawing().savefig(file, dpi=120, format="png")
        return file.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """For Jupyter: live where the front end knows plotly, an image elsewhere."""
        return {
            "application/vnd.plotly.v1+json": self.figure().to_plotly_json(),
            "image/png": base64.b64encode(self.png()).decode(),
            "text/plain": repr(self),
        }


def new_drawing(width: float, height: float) -> Drawing:
    """An empty matplotlib figure, in inches; no window and no global state."""
    make: type[Drawing] = needed("matplotlib.figure", MISSING).Figure
    return make(figsize=(max(7.5, width), height), layout="constrained")


def entitle(figure: Drawing, title: str) -> None:
    """A title from the left edge, in as many lines as it needs: an inch holds about 11 letters of this size."""
    lines = textwrap.fill(title, int(11 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=11, parse_math=False)


def plotly() -> Any:
    """plotly's graph objects."""
    return needed("plotly.graph_objects", MISSING)
