"""`Picture`: data that a script of `templates/` draws as one self-contained HTML page, and matplotlib as an image."""

import base64
import html
import io
import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, ClassVar

from transformer_lens.checks import a_path, file_to_write, needed, one_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

MISSING = "drawing needs matplotlib: pip install 'transformer-lens-bridge[viz]'"
DIVERGING = "RdBu"  # colours around zero, distinguishable with the common kinds of colour blindness
SEQUENTIAL = "Blues"  # colours from little to much, in one hue that also works without colour vision and in print
RISE, FALL, TOTAL = "#0072B2", "#D55E00", "#777777"
"""From the palette of Okabe and Ito (2008), safe for the common kinds of colour blindness."""
MOST_LABELS = 60  # more labels than this along an axis are thinned out to stay readable
SHOWN = {"\n": "⏎", "\t": "⇥"}


def visible(token: str) -> str:
    """A token as a label: line breaks, tabs and an empty token become signs, other control characters codes."""
    return "".join(SHOWN.get(one) or (one if one.isprintable() else repr(one)[1:-1]) for one in token) or "∅"


def ticks(labels: Sequence[str]) -> list[int]:
    """The positions along an axis that get a label."""
    return list(range(0, len(labels), -(-len(labels) // MOST_LABELS) or 1))


TEMPLATES = Path(__file__).parent / "templates"
FORMATS = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""The kinds of image, each with what keeps the time of drawing out of the file."""


def template(name: str, **parts: str) -> str:
    """A file of `templates/` with its `$names` filled in; what is filled in stays as it is."""
    return Template((TEMPLATES / name).read_text(encoding="utf-8")).substitute(parts)


def as_json(value: Any) -> str:
    """JSON that may stand in a page: no text in it can end the script that holds it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def page(script: str, data: dict[str, Any]) -> str:
    """A self-contained page: the script, what it draws, and what all pages share."""
    return template(
        "page.html",
        title=html.escape(data["title"]),
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        data=as_json(data),
        script="\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.js", f"{script}.js")),
    )


class Picture(ABC):
    """Shows itself as the last line of a notebook cell; `save(path)` writes `.html`, `.png`, `.svg` or `.pdf`."""

    title: str
    script: ClassVar[str]
    """The script of `templates/` that draws the page."""

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """What the script draws, as JSON's types."""

    @abstractmethod
    def drawing(self) -> "Drawing":
        """The picture as a matplotlib figure."""

    def html(self) -> str:
        """A complete, self-contained page for browsers and phones, in light and dark; it loads nothing from outside."""
        return page(self.script, {"title": self.title or type(self).__name__, **self.data()})

    def save(self, path: str | Path) -> Path:
        """Write one file, of the kind its extension says. Raises `ValueError` for other extensions."""
        suffix = a_path("path", path).suffix.lower()
        if suffix not in (".html", *FORMATS):
            raise ValueError(f"save: got {str(path)!r}, expected a name that ends in .html, .png, .svg or .pdf")
        content = self.html().encode() if suffix == ".html" else self.image(suffix[1:])
        return _written(path, content)

    def save_html(self, path: str | Path) -> Path:
        """Write one HTML file, in which values show on hover."""
        return _written(path, self.html().encode())

    def save_png(self, path: str | Path) -> Path:
        """Write a PNG that is readable 900 pixels wide."""
        return _written(path, self.png())

    def png(self) -> bytes:
        """The picture as a PNG."""
        return self.image("png")

    def image(self, kind: str) -> bytes:
        """The picture as "png", "svg" or "pdf"."""
        one_of("kind", kind, [suffix[1:] for suffix in FORMATS])
        file = io.BytesIO()
        self.drawing().savefig(file, dpi=120, format=kind, metadata=FORMATS[f".{kind}"])
        return file.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """For Jupyter: the page where scripts run, else an image."""
        image = base64.b64encode(self.png()).decode()
        live = template("notebook.html", title=html.escape(self.title), image=image, page=as_json(self.html()))
        return {"text/html": live, "image/png": image, "text/plain": repr(self)}


def _written(path: str | Path, content: bytes) -> Path:
    path = file_to_write("path", path)
    path.write_bytes(content)
    return path


def new_drawing(width: float, height: float) -> "Drawing":
    """An empty matplotlib figure, sized in inches, without a window or global state."""
    make: type[Drawing] = needed("matplotlib.figure", MISSING).Figure
    return make(figsize=(max(7.5, width), height), layout="constrained")


def entitle(figure: "Drawing", title: str) -> None:
    """Add a left-aligned title, wrapped as needed: an inch holds about 11 letters of this size."""
    lines = textwrap.fill(title, int(11 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=11, parse_math=False)
