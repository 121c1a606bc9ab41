"""`HookTable`: every hook of a model with its shape, meaning and aliases, for reading and for docs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from transformer_lens.checks import a_text, nearest
from transformer_lens.model_bridge.access.ports import Inside
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components import ComponentBridge, Hook
from transformer_lens.text_table import Tabular, TextTable

if TYPE_CHECKING:
    from rich.table import Table

SIZES = {
    **{name: name for name in ("d_model", "d_head", "d_mlp", "d_vocab", "d_vocab_out")},
    **{"head": "n_heads", "kv_head": "n_key_value_heads", "expert": "num_experts", "chosen": "experts_per_token"},
}
"""Axis -> the field of `BridgeConfig` with its length; other axes depend on the input."""

COLUMNS = ("hook", "axes", "kind", "meaning", "also called")


def axis_sizes(axes: str, cfg: BridgeConfig, sizes: Mapping[str, int | str] = {}) -> tuple[int | str, ...]:
    """The length of each axis, or its name where it depends on the input; `sizes` are a component's own."""
    return tuple(sizes.get(axis) or (getattr(cfg, SIZES[axis]) if axis in SIZES else axis) for axis in axes.split())


@dataclass(frozen=True)
class HookRow:
    """One hook, or the same hook of several blocks: `{i}` stands for the layer."""

    name: str
    axes: str
    shape: tuple[int | str, ...]
    kind: str
    meaning: str
    aliases: tuple[str, ...] = ()
    read_only: bool = False
    absent: str = ""
    layers: tuple[int, ...] = ()
    """The layers that the row holds for, if not all."""

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        if self.absent:
            return (self.name, "", "absent" + self.where(), self.absent, "")
        kind = self.kind + (", read-only" if self.read_only else "") + self.where()
        return (self.name, self.sizes(), kind, self.meaning, ", ".join(self.aliases))

    def where(self) -> str:
        """The layers it holds for as the end of a phrase, `, layers 1-3`; empty if all."""
        return f", {layers_in_words(self.layers)}" if self.layers else ""

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
        """Hooks of other architectures, and why each is absent here."""
        return [row for row in self.rows if row.absent]

    def row(self, name: str) -> HookRow:
        """The row of a hook by its full name. Raises `KeyError` where there is none.

        >>> bridge.hook_table().row("blocks.2.mlp.hook_post").shape
        ('batch', 'pos', 256)
        """
        a_text("name", name)
        general, layer = _general(name)
        for row in self.rows:
            if row.name == general and (not row.layers or layer in row.layers):
                return row
        near = nearest(general, [row.name for row in self.rows])
        raise KeyError(f"hook table: got {name!r}, expected the full name of a hook; the nearest are {near}")

    def to_dicts(self) -> list[dict[str, Any]]:
        return [dict(vars(row)) for row in self.rows]

    def table(self) -> TextTable:
        """One line for each hook, absent ones in grey."""
        # The reason of an absent row runs on, so the line under the head ends before it.
        grey = ["#767676" if row.absent else "" for row in self.rows]
        return TextTable(self.title, COLUMNS, [row.cells() for row in self.rows], ruled=True, colours=grey)

    __repr__ = Tabular.__str__

    def __rich__(self) -> Table:
        """Two columns, readable in 80: names on the left, axes, meaning and aliases on the right."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("hook", no_wrap=True)
        table.add_column("axes and meaning", overflow="fold")
        for row in self.present():
            kind = "" if row.kind == "port" and not row.layers else f"  ({row.kind}{row.where()})"
            lines = [Text(row.sizes() + kind, style="cyan"), Text(row.meaning)]
            lines += [Text("also " + ", ".join(row.aliases), style="dim")] if row.aliases else []
            table.add_row(row.name, Text("\n").join(lines))
        reasons = dict.fromkeys((row.where(), row.absent) for row in self.absent())
        for where, reason in reasons:
            names = "\n".join(row.name for row in self.absent() if (row.where(), row.absent) == (where, reason))
            table.add_row(names, f"absent{where}: {reason}", style="dim")
        return table


def layers_in_words(layers: Iterable[int]) -> str:
    """
    >>> layers_in_words([0]), layers_in_words([1, 2, 3, 5])
    ('layer 0', 'layers 1-3, 5')
    """
    steady = groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    runs = [[layer for _, layer in run] for _, run in steady]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' if sum(map(len, runs)) > 1 else ''} {text}"


def _general(name: str) -> tuple[str, int]:
    """The name with `{i}` for its layer, and the layer; -1 outside the blocks."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return (name, -1) if found is None else (f"blocks.{{i}}.{name[found.end() :]}", int(found[1]))


def make_table(
    title: str,
    cfg: BridgeConfig,
    root_hooks: Iterable[Hook],
    components: Iterable[ComponentBridge],
    absent: Mapping[str, str],
    points: Iterable[Any] = (),
) -> HookTable:
    """The table of a model's hooks; hooks that several layers declare alike are one row. `points` may tell more."""
    known: dict[Any, HookRow] = {}
    layers: dict[HookRow, list[int]] = {}

    def add(owner: str, hooks: Iterable[Hook], sizes: Mapping[str, int]) -> None:
        prefix, layer = _general(owner)
        for hook in hooks:
            key = prefix, id(hook), *sizes.items()  # layers share the hooks of a class, and so the rows
            if key not in known:
                kind: str = hook.port.kind if isinstance(hook.port, Inside) else "port"
                kind += ", on request" if hook.on_request else ""
                shape, aliases = axis_sizes(hook.axes, cfg, sizes), tuple(prefix + alias for alias in hook.aliases)
                facts = hook.axes, shape, kind, hook.meaning, aliases, bool(hook.read_only)
                known[key] = HookRow(prefix + hook.name, *facts)
            layers.setdefault(known[key], []).append(layer)

    add("", root_hooks, {})
    for component in components:
        add(f"{component.name}.", component.declared, component.sizes)
    for point in (point for point in points if point.meaning):
        (general, layer), shape = _general(str(point.name)), axis_sizes(point.axes, cfg, point.sizes)
        layers.setdefault(HookRow(general, point.axes, shape, "spliced", point.meaning), []).append(layer)
    for name, why in absent.items():
        general, layer = _general(name)
        layers.setdefault(HookRow(general, "", (), "absent", "", absent=why), []).append(layer)
    some = {row: tuple(at) if at[0] >= 0 and len(at) < cfg.n_layers else () for row, at in layers.items()}
    return HookTable(title, [replace(row, layers=at) for row, at in some.items()])
