"""`hook_table()`: as rows, as text, as HTML and in rich."""

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tests.support import FAMILIES, family, tokens
from transformer_lens import TransformerBridge


@pytest.fixture(params=FAMILIES)
def bridge(request) -> TransformerBridge:
    return TransformerBridge(family(request.param))


class Cells(HTMLParser):
    """The cells of a table, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.caption = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open[-1] == "caption":
            self.caption += data


@pytest.mark.core
def test_rows_are_the_hooks_of_the_model(bridge):
    table = bridge.hook_table()
    first = {name for name in bridge.hook_dict if not name.startswith("blocks.") or name.startswith("blocks.0.")}
    assert {row.name.replace("{i}", "0") for row in table.present()} == first
    assert len({row.name for row in table}) == len(table) == len(table.present()) + len(table.absent())
    aliases = {alias.replace("{i}", "0") for row in table for alias in row.aliases}
    of_the_last_layer = {"ln_final.hook_in"}  # a row is for every layer
    assert aliases == {a for a in bridge.aliases if "blocks" not in a or "blocks.0" in a} - of_the_last_layer


def test_shapes_are_those_of_the_tensors(bridge):
    x = tokens(3, 5)
    rows = bridge.hook_table().present()
    _, cache = bridge.run_with_cache(x, names_filter=[row.name.replace("{i}", "0") for row in rows])
    sizes = {"batch": 3, "pos": 5, "query_pos": 5, "key_pos": 5, "1": 1, 1: 1}
    for row in rows:
        tensor = cache[row.name.replace("{i}", "0")]
        assert tensor.shape == tuple(sizes.get(size, size) for size in row.shape)
        assert len(row.axes.split()) == tensor.ndim


def test_absent_rows_say_why(bridge):
    absent = {row.name: row for row in bridge.hook_table().absent()}
    assert "nothing is added to the embeddings" in absent["hook_pos_embed"].absent
    assert all(len(row.absent) > 20 and row.shape == () and not row.aliases for row in absent.values())
    assert not set(absent) & set(bridge.hook_dict)
    parallel = bridge.cfg.parallel_attn_mlp
    assert ("blocks.{i}.hook_resid_mid" in absent) == parallel
    dense = bridge.cfg.num_experts is None
    assert ("blocks.{i}.mlp.hook_expert_out" in absent and dense) or not dense
    for name, row in absent.items():
        with pytest.raises(KeyError) as error:
            bridge.run_with_cache(tokens(), names_filter=name.replace("{i}", "0"))
        assert row.absent in str(error.value.args[0])


def test_text(bridge):
    table = bridge.hook_table()
    text = str(table)
    lines = text.splitlines()
    assert repr(table) == text
    assert lines[0] == f"{bridge.cfg.model_name}: {bridge.cfg.architecture}, 2 layers"
    assert lines[1].split() == ["hook", "axes", "kind", "meaning", "also", "called"]
    assert len(lines) == len(table) + 3
    for line, row in zip(lines[3:], table, strict=True):
        assert line.startswith(row.name)
        assert all(cell in line for cell in row.cells())


def test_html(bridge):
    table = bridge.hook_table()
    table.rows[0] = type(table.rows[0])(**{**vars(table.rows[0]), "meaning": "a < b & <b>c</b>"})
    parsed = Cells(table._repr_html_())
    assert parsed.open == []
    assert parsed.caption == table.title
    assert parsed.rows[0] == ["hook", "axes", "kind", "meaning", "also called"]
    assert [tuple(cells) for cells in parsed.rows[1:]] == [row.cells() for row in table]


def test_rich(bridge):
    table = bridge.hook_table()
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert table.title in text
    for row in table.present():
        assert row.name in text
        assert row.sizes() in text
        assert row.meaning in text
        assert all(alias in text for alias in row.aliases)
    for row in table.absent():
        assert row.name in text
        assert f"absent: {row.absent}" in text


def test_rich_at_eighty_columns_keeps_names_and_axes_whole(bridge):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(bridge.hook_table())
    text = console.export_text()
    assert all(row.name in text for row in bridge.hook_table())
    assert max(map(len, text.splitlines())) <= 80


def test_plain_data(bridge):
    table = bridge.hook_table()
    rows = table.to_dicts()
    assert rows[0]["name"] == "hook_embed"
    assert rows[0]["shape"] == ("batch", "pos", 32)
    assert [row["name"] for row in rows] == [row.name for row in table]
    assert set(rows[0]) >= {"name", "axes", "shape", "kind", "meaning", "aliases", "read_only", "absent"}


def test_axes_are_on_the_points(bridge):
    for row in bridge.hook_table().present():
        assert bridge.hook_dict[row.name.replace("{i}", "1")].axes == row.axes
