"""`TokenText`: running text, each token coloured by a number, with a menu where there are several."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from transformer_lens.viz.heatmap import Heatmap
from transformer_lens.viz.picture import FONT, Picture, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing
    from plotly.graph_objects import Figure

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

    `values` has a row of numbers, one for each token, under each name. Raises `ValueError` if they do not
    fit, for a value that is not finite, and for no tokens.
    """

    tokens: Sequence[str]
    values: Mapping[str, Tensor]
    title: str
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.tokens or not self.values:
            raise ValueError(f"token text {self.title!r}: got no tokens or no values, expected both")
        for name, row in self.values.items():
            if list(row.shape) != [len(self.tokens)]:
                raise ValueError(
                    f"token text {self.title!r}: got {name!r} of shape {list(row.shape)}, expected a value for each of "
                    f"the {len(self.tokens)} tokens"
                )
            if not bool(row.isfinite().all()):
                raise ValueError(f"token text {self.title!r}: got values in {name!r} that are not finite")

    def __repr__(self) -> str:
        return f"TokenText {self.title!r}: {len(self.tokens)} tokens, coloured by {', '.join(self.values)}"

    def fragment(self) -> str:
        """The text as a piece of HTML, with its own few lines of script."""
        rows = [[round(float(v), 6) for v in row.double().tolist()] for row in self.values.values()]
        data = json.dumps({"rows": rows, "unit": self.unit}).replace("<", "\\u003c")
        return FRAGMENT.format(
            font=html.escape(FONT),
            title=html.escape(self.title),
            options="".join(f"<option>{html.escape(name)}</option>" for name in self.values),
            tokens="".join(map(_token, self.tokens)),
            data=data,
            script=SCRIPT,
        )

    def html(self) -> str:
        return PAGE.format(title=html.escape(self.title), body=self.fragment())

    def _heatmap(self) -> Heatmap:
        import torch

        rows = torch.stack([row.detach().cpu().float() for row in self.values.values()])
        return Heatmap(rows, list(self.values), self.tokens, self.title, "", "token", self.unit or "value")

    def figure(self) -> Figure:
        return self._heatmap().figure()

    def drawing(self) -> Drawing:
        return self._heatmap().drawing()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/html": self.fragment(), "text/plain": repr(self)}


def _token(token: str) -> str:
    shown = html.escape(visible(token).replace(" ", "\u00a0"))
    style = "padding:.15em .05em;border-radius:.2em;cursor:default;display:inline-block"
    wide = "<br>" if token.endswith("\n") else ""
    return f'<span style="{style}" data-token="{html.escape(token)}">{shown}</span>{wide}'
