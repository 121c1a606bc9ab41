"""`HookTable`: every hook of a model with its shape, meaning and spellings, for reading and for docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.text_table import Tabular, TextTable

if TYPE_CHECKING:
    from rich.table import Table

SIZES = {
    "d_model": "d_model",
    "head": "n_heads",
    "kv_head": "n_key_value_heads",
    "d_head": "d_head",
    "d_mlp": "d_mlp",
    "d_vocab": "d_vocab",
    "d_vocab_out": "d_vocab_out",
    "expert": "num_experts",
    "chosen": "experts_per_token",
}
"""Axis -> the field of `BridgeConfig` that gives its length; other axes depend on the input."""

COLUMNS = ("hook", "axes", "kind", "meaning", "also called")


def axis_sizes(axes: str, cfg: BridgeConfig) -> tuple[int | str, ...]:
    """The length of each axis, or its name where the input decides.

    >>> axis_sizes("batch pos head d_head", bridge.cfg)
    ('batch', 'pos', 4, 32)
    """
    return tuple(getattr(cfg, SIZES[axis]) if axis in SIZES else axis for axis in axes.split())


@dataclass(frozen=True)
class HookRow:
    """One hook, or the same hook of every block: `{i}` stands for the layer."""

    name: str
    axes: str
    shape: tuple[int | str, ...]
    kind: str
    meaning: str
    aliases: tuple[str, ...]
    read_only: bool
    absent: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        if self.absent:
            return (self.name, "", "absent", self.absent, "")
        kind = self.kind + (", read-only" if self.read_only else "")
        return (self.name, self.sizes(), kind, self.meaning, ", ".join(self.aliases))

    def sizes(self) -> str:
        """The axes with their lengths: `batch pos head=8 d_head=16`."""
        pairs = zip(self.axes.split(), self.shape, strict=True)
        return " ".join(axis if axis == str(size) else f"{axis}={size}" for axis, size in pairs)


class HookTable(Tabular):
    """A table of hooks: prints as text, shows as HTML in a notebook, and renders with rich.

    >>> print(bridge.hook_table())  # doctest: +SKIP
    >>> [row.name for row in bridge.hook_table()][0]
    'hook_embed'
    """

    def __init__(self, title: str, rows: list[HookRow]) -> None:
        self.title = title
        self.rows = rows

    def __iter__(self) -> Iterator[HookRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def present(self) -> list[HookRow]:
        """The hooks this model has."""
        return [row for row in self.rows if not row.absent]

    def absent(self) -> list[HookRow]:
        """Names of other architectures, each with the reason why it is absent here."""
        return [row for row in self.rows if row.absent]

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [dict(vars(row)) for row in self.rows]

    def table(self) -> TextTable:
        """One line for each hook, those that are absent in grey."""
        # The reason of an absent row runs on, so the line under the head ends before it.
        grey = ["#767676" if row.absent else "" for row in self.rows]
        return TextTable(self.title, COLUMNS, [row.cells() for row in self.rows], ruled=True, colours=grey)

    __repr__ = Tabular.__str__

    def __rich__(self) -> Table:
        """Two columns, readable in 80: names on the left, axes, meaning and spellings on the right."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("hook", no_wrap=True)
        table.add_column("axes and meaning", overflow="fold")
        for row in self.present():
            kind = "" if row.kind == "port" else f"  ({row.kind})"
            lines = [Text(row.sizes() + kind, style="cyan"), Text(row.meaning)]
            lines += [Text("also " + ", ".join(row.aliases), style="dim")] if row.aliases else []
            table.add_row(row.name, Text("\n").join(lines))
        reasons = dict.fromkeys(row.absent for row in self.absent())
        for reason in reasons:
            names = "\n".join(row.name for row in self.absent() if row.absent == reason)
            table.add_row(names, f"absent: {reason}", style="dim")
        return table
