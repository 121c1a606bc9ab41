"""The table in docs/weights.md is measured: each weight is read, and its memory compared with the parameters'.

`python -m tests.bridge.test_weights_page --write` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.families.test_guide import execute
from tests.support import LAYOUTS, family
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.generalized_components.weights import Weight, weights_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "weights.md"
MARKS = ("<!-- weights: written by tests/bridge/test_weights_page.py --write -->\n", "<!-- /weights -->")
COLUMNS = {"7B": "7b", "11B, 40B, 180B": "40b", "RW": "rw", "Mixtral": "mixtral"}


def kinds(layout: str) -> dict[str, tuple[Weight, str]]:
    """What reading each weight of a layout gives: a view of a parameter, a copy, or zeros."""
    bridge = TransformerBridge(family(layout))
    memory = {p.untyped_storage().data_ptr() for p in bridge.parameters()}
    found = {}
    for component in bridge.components():
        place = component.name.replace("blocks.0.", "").replace("ln_final", "ln1")
        if place.startswith("blocks.") or place == "ln2":
            continue
        for weight in weights_of(type(component)):
            read = getattr(component, weight.name)
            shared = read.untyped_storage().data_ptr() in memory
            kind = "view" if shared else "**copy**" if read.any() else "zeros"
            found[f"{place}.{weight.name}"] = (weight, kind)
    return found


def table() -> str:
    of = {column: kinds(layout) for column, layout in COLUMNS.items()}
    assert kinds("11b").keys() == of["11B, 40B, 180B"].keys()
    assert all(kinds("11b")[name][1] == kind for name, (_, kind) in of["11B, 40B, 180B"].items())
    names = {name: weight for column in reversed(of.values()) for name, (weight, _) in column.items()}
    order = ["embed", "ln1", "attn", "mlp", "unembed"]
    lines = ["| weight | axes | what it is | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for name in sorted(names, key=lambda name: order.index(name.split(".")[0])):
        cells = [
            f"{column[name][1]}{axes_note(column[name][0], names[name])}" if name in column else ""
            for column in of.values()
        ]
        lines.append(f"| `{name}` | {names[name].axes} | {names[name].meaning} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def axes_note(weight: Weight, shown: Weight) -> str:
    """Experts have an axis more."""
    return "" if weight.axes == shown.axes else f" `{weight.axes}`"


def test_the_table_is_what_reading_gives() -> None:
    text = PAGE.read_text()
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    assert text[start:end] == table()


def test_the_code_of_the_page_runs_and_prints_what_it_says() -> None:
    execute(PAGE)


def test_the_layouts_of_the_table_are_all_published_ones() -> None:
    assert {*COLUMNS.values(), "11b", "rw-rope"} == {*LAYOUTS, "mixtral"}


if __name__ == "__main__" and "--write" in sys.argv:
    text = PAGE.read_text()
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    PAGE.write_text(text[:start] + table() + text[end:])
