"""`TextTable`: rows of text that print, show as HTML in a notebook and render with rich."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TextTable:
    """
    >>> print(TextTable("two rows", ["layer", "value"], [["0", "a"], ["1", "b"]]))
    two rows
    layer  value
    0      a
    1      b

    A small table of text, with a title that says what a cell means.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([self.title, *(line.rstrip() for line in text)])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            f"<thead>{line(self.columns, 'th')}</thead><tbody>{body}</tbody></table>"
        )

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            table.add_column(column)
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table
