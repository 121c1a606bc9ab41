"""`TokenText`: running text, each token coloured by a number, with a menu if there are several."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from transformer_lens.checks import as_numbers, in_words, listed
from transformer_lens.viz.figures import Heatmap
from transformer_lens.viz.picture import FALL, FONT, RISE, Picture, entitle, new_drawing, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from plotly.graph_objects import Figure

Line = list[tuple[int, int, str]]  # the tokens of a line: index, first column and visible text
COLUMNS, MOST_LINES = 80, 150  # characters per line, and lines, of a PNG
WIDTH, LINE, HEAD, FONT_SIZE = 8.0, 0.27, 0.3, 9.5
"""Inches: PNG width, line height, title height; then the font size in points, at which one character fills a column."""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title></head><body>{body}</body></html>"""
FRAGMENT = """<figure class="token-text" style="margin:1em;font-family:{font};max-width:60em">
<figcaption style="font-size:1.05em;margin-bottom:.6em">{title} <select aria-label="values">{options}</select>
<span class="token-text-value" style="margin-left:1em;color:#444"></span></figcaption>
<div class="token-text-tokens" style="line-height:2;font-size:1em">{tokens}</div>
<script type="application/json">{data}</script>
<script>{script}</script></figure>"""
SCRIPT = """(() => {
  const root = document.currentScript.parentElement;
  const {rows, unit} = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const picker = root.querySelector("select"), said = root.querySelector(".token-text-value");
  const tokens = [...root.querySelectorAll(".token-text-tokens span")];
  const paint = () => {
    const values = rows[picker.selectedIndex];
    const most = Math.max(...values.map(Math.abs)) || 1;
    tokens.forEach((token, i) => {
      const share = values[i] / most, tint = share < 0 ? "213,94,0" : "0,114,178";
      token.style.background = `rgba(${tint},${(0.75 * Math.abs(share)).toFixed(3)})`;
      token.title = `${token.dataset.token}: ${values[i].toFixed(4)} ${unit}`;
    });
  };
  tokens.forEach((token) => token.addEventListener("mouseenter", () => { said.textContent = token.title; }));
  picker.addEventListener("change", paint);
  picker.style.display = rows.length > 1 ? "" : "none";
  paint();
})();"""


@dataclass(frozen=True, repr=False)
class TokenText(Picture):
    """Tokens as running text, blue where a value is positive and orange where it is negative.

    >>> TokenText([" Mary", " and"], {"loss": torch.tensor([2.0, 0.5])}, title="loss by token", unit="nats")
    TokenText 'loss by token': 2 tokens, coloured by loss

    `values` maps names to rows with one number per token (a tensor, an array or a list). Raises `ValueError` if they do
    not fit, for a value that is not finite, and for no tokens.
    """

    tokens: Sequence[str]
    values: Mapping[str, Tensor]
    title: str
    unit: str = ""

    def __post_init__(self) -> None:
        where, values = f"token text {self.title!r}", cast(Any, self.values)
        if not isinstance(values, Mapping):
            what = "a row of numbers under each name: {'loss': values}"
            raise TypeError(f"{where}: got {in_words(values)}, expected {what}")
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

    def __repr__(self) -> str:
        return f"TokenText {self.title!r}: {len(self.tokens)} tokens, coloured by {', '.join(self.values)}"

    def fragment(self) -> str:
        """The text as an HTML fragment, with its own few lines of script."""
        rows = [[round(float(v), 6) for v in row.double().tolist()] for row in self.values.values()]
        most = max(map(abs, rows[0]))
        # A page that may run no script has the first row's colours.
        tints = [f"{'0,114,178' if value >= 0 else '213,94,0'},{_share(value, most):.3f}" for value in rows[0]]
        data = json.dumps({"rows": rows, "unit": self.unit}).replace("<", "\\u003c")
        return FRAGMENT.format(
            font=html.escape(FONT),
            title=html.escape(self.title),
            options="".join(f"<option>{html.escape(name)}</option>" for name in self.values),
            tokens="".join(_token(*pair) for pair in zip(self.tokens, tints, strict=True)),
            data=data,
            script=SCRIPT,
        )

    def html(self) -> str:
        return PAGE.format(title=html.escape(self.title), body=self.fragment())

    def figure(self) -> "Figure":
        rows = torch.stack([row.detach().cpu().float() for row in self.values.values()])
        return Heatmap(rows, list(self.values), self.tokens, self.title, "", "token", self.unit or "value").figure()

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
        axes.set_title(
            f"{name}: full colour is {most:.3g} {self.unit}".rstrip(), loc="left", fontsize=9, color="#444444"
        )
        for y, line in enumerate(lines):
            for place, start, shown in line:
                colour = RISE if values[place] >= 0 else FALL
                span = [(start, len(shown))]
                axes.broken_barh(span, (y + 0.08, 0.84), color=colour, alpha=_share(values[place], most), linewidth=0)
                axes.text(start, y + 0.5, shown, family="monospace", fontsize=FONT_SIZE, va="center", parse_math=False)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """For Jupyter: HTML with a script where scripts run, coloured HTML elsewhere, else an image."""
        return {
            "text/html": self.fragment(),
            "image/png": base64.b64encode(self.png()).decode(),
            "text/plain": repr(self),
        }


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


def _share(value: float, most: float) -> float:
    """How strong a value's colour is; black text stays readable on the strongest."""
    return 0.75 * abs(value) / (most or 1.0)


def _token(token: str, tint: str) -> str:
    shown = html.escape(visible(token).replace(" ", "\u00a0"))
    style = f"padding:.15em .05em;border-radius:.2em;cursor:default;display:inline-block;background:rgba({tint})"
    wide = "<br>" if token.endswith("\n") else ""
    return f'<span style="{style}" data-token="{html.escape(token)}">{shown}</span>{wide}'
