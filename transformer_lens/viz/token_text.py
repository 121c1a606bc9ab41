"""`TokenText`: running text, each token coloured by a number, with a menu if there are several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from transformer_lens.checks import as_numbers, listed
from transformer_lens.viz.picture import FALL, RISE, Picture, entitle, new_drawing, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

Line = list[tuple[int, int, str]]  # the tokens of a line: index, first column and visible text
COLUMNS, MOST_LINES = 80, 150  # characters per line, and lines, of a PNG
WIDTH, LINE, HEAD, FONT_SIZE = 8.0, 0.27, 0.3, 9.5
"""Inches: PNG width, line height, title height; then the font size in points, at which one character fills a column."""


@dataclass(frozen=True, repr=False)
class TokenText(Picture):
    """Tokens as running text, blue where a value is positive and orange where it is negative.

    >>> TokenText([" Mary", " and"], {"loss": torch.tensor([2.0, 0.5])}, title="loss by token", unit="nats")
    TokenText 'loss by token': 2 tokens, coloured by loss

    `values` is a row with one number per token (a tensor, an array or a list), or maps names to rows. `notes` say more
    of each token when it is pointed at. Raises `ValueError` if they do not fit, for a value that is not finite, and for
    no tokens.
    """

    script: ClassVar[str] = "text"
    tokens: Sequence[str]
    values: Mapping[str, Tensor]
    title: str = ""
    unit: str = ""
    notes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        where, given = f"token text {self.title!r}", self.values
        values: Mapping[str, Any] = given if isinstance(given, Mapping) else {self.unit or "value": given}
        object.__setattr__(self, "tokens", listed(f"{where}: tokens", self.tokens))
        if not self.tokens or not values:
            raise ValueError(f"{where}: got no tokens or no values, expected both")
        rows = {name: as_numbers(f"{where}: {name!r}", row) for name, row in values.items()}
        object.__setattr__(self, "values", rows)
        for name, row in rows.items():
            if list(row.shape) != [len(self.tokens)]:
                what = f"a value for each of the {len(self.tokens)} tokens"
                raise ValueError(f"{where}: got {name!r} of shape {list(row.shape)}, expected {what}")
            if not bool(row.isfinite().all()):
                raise ValueError(f"{where}: got values in {name!r} that are not finite")
        notes = None if self.notes is None else listed(f"{where}: notes", self.notes)
        object.__setattr__(self, "notes", notes)
        if notes is not None and len(notes) != len(self.tokens):
            raise ValueError(f"{where}: got {len(notes)} notes, expected one for each of the {len(self.tokens)} tokens")

    def __repr__(self) -> str:
        return f"TokenText {self.title!r}: {len(self.tokens)} tokens, coloured by {', '.join(self.values)}"

    def data(self) -> dict[str, Any]:
        rows = [[round(value, 6) for value in row.double().tolist()] for row in self.values.values()]
        names = {"tokens": list(self.tokens), "names": list(self.values), "rows": rows}
        return {**names, "unit": self.unit, "notes": self.notes}

    def drawing(self) -> "Drawing":
        """The text once per row of values, up to `MOST_LINES` lines in all."""
        lines = _lines(self.tokens)
        each = max(1, MOST_LINES // len(lines))
        names, lines = list(self.values)[:each], lines[:MOST_LINES]
        figure = new_drawing(WIDTH, HEAD + len(names) * (HEAD + LINE * len(lines)))
        for axes, name in zip(figure.subplots(len(names), squeeze=False).flat, names, strict=True):
            self._write(axes, name, lines)
        whole = len(names) == len(self.values) and sum(map(len, lines)) == len(self.tokens)
        entitle(figure, self.title + ("" if whole else "   (the first part)"))
        return figure

    def _write(self, axes: "Axes", name: str, lines: Sequence[Line]) -> None:
        """One row of values: its name and largest value, then the coloured text."""
        values = self.values[name].double().tolist()
        axes.set(xlim=(0, COLUMNS), ylim=(len(lines), 0))
        axes.set_axis_off()
        most = max(map(abs, values))
        told = f"{name}: full colour is {most:.3g} {self.unit}".rstrip()
        axes.set_title(told, loc="left", fontsize=9, color="#444444")
        for y, line in enumerate(lines):
            for place, start, shown in line:
                colour = RISE if values[place] >= 0 else FALL
                strength = 0.75 * abs(values[place]) / (most or 1.0)  # black text stays readable on the strongest
                axes.broken_barh([(start, len(shown))], (y + 0.08, 0.84), color=colour, alpha=strength, linewidth=0)
                axes.text(start, y + 0.5, shown, family="monospace", fontsize=FONT_SIZE, va="center", parse_math=False)


def _lines(tokens: Sequence[str]) -> list[Line]:
    """Tokens in lines of `COLUMNS` characters, broken where a token would not fit."""
    lines: list[Line] = [[]]
    column = 0
    for place, token in enumerate(tokens):
        shown = visible(token).replace(" ", "\u00a0")[:COLUMNS]
        if column + len(shown) > COLUMNS and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((place, column, shown))
        column += len(shown)
        if token.endswith("\n"):
            column = COLUMNS
    return lines
