"""Tables of text that print, show as HTML in a notebook and render with rich."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformer_lens.checks import needed

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TextTable:
    """A small table of text, with a title that says what a cell means.

    >>> print(TextTable("two rows", ["layer", "value"], [["0", "a"], ["1", "b"]]))
    two rows
    layer  value
    0      a
    1      b
    """

    title: str
    columns: Sequence[str]
    """Column names; if all are empty, there is no header."""
    rows: Sequence[Sequence[str]]
    ruled: bool = False
    """Whether the text form has a line under the header."""
    colours: Sequence[str] = ()
    """The colour of each row in HTML; empty for the page's own."""

    def __str__(self) -> str:
        lines = [self.columns, *self.rows] if any(self.columns) else self.rows
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        rule = ["-" * min(len(text[0]), 120)] if self.ruled else []
        return "\n".join([self.title, *text[:1], *rule, *text[1:]])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str, colour: str = "") -> str:
            inner = "".join(f"<{tag} style='text-align:left'>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr style='color:{colour}'>{inner}</tr>" if colour else f"<tr>{inner}</tr>"

        colours = self.colours or [""] * len(self.rows)
        body = "".join(line(row, "td", colour) for row, colour in zip(self.rows, colours, strict=True))
        head = f"<thead>{line(self.columns, 'th')}</thead>" if any(self.columns) else ""
        return f"<table><caption>{html.escape(self.title)}</caption>{head}<tbody>{body}</tbody></table>"

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        shown = Table(title=Text(self.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        shown.show_header = any(self.columns)
        for column in self.columns:
            shown.add_column(column)
        for row in self.rows:
            shown.add_row(*map(Text, row))
        return shown


class Records:
    """Anything that has rows of plain values."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows, as values by column."""
        raise NotImplementedError

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame, unrounded. Raises `ImportError` if pandas is not installed.

        >>> list(bridge.hook_table().to_dataframe().columns)[:3]
        ['name', 'axes', 'shape']
        """
        return needed("pandas", "to_dataframe needs pandas: pip install pandas").DataFrame(self.to_dicts())


class Tabular(Records, ABC):
    """Anything with a table, which is how it is shown."""

    @abstractmethod
    def table(self) -> TextTable:
        """The rows to show."""

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __rich__(self) -> Table:
        return self.table().__rich__()
