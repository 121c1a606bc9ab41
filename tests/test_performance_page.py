"""docs/performance.md and docs/swarm_costs.md show the stored figures, and say what is over its budget."""

import json

import pytest

from benchmarks import page


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_the_page_shows_the_stored_figures(path):
    assert page.filled(path) == path.read_text(), "run: python -m benchmarks.page"


def test_the_figures_of_servers_are_the_stored_medians():
    stored = json.loads((page.RESULTS / "swarm.json").read_text())["figures"]
    lines = page.swarm_page.swarm().splitlines()
    for figure in stored:
        assert any(
            line.startswith(f"| {figure['what']} | {page.swarm_page.readable(figure['median'], figure['unit'])} |")
            for line in lines
        )


def test_every_row_over_its_budget_is_marked():
    text = page.budgets()
    over = 0
    for file in page.RESULTS.glob("cpu-*.json"):
        for row in json.loads(file.read_text())["rows"]:
            if row["budget"] is not None and row["measured"]["median"] > row["budget"]:
                over += 1
                line = next(line for line in text.splitlines() if line.startswith(f"| {row['what']} |"))
                assert f"**{row['measured']['median']:.2f} (over)**" in line
    assert text.count("(over)") == over


def test_a_cell_stands_under_its_model():
    row = {"key": "a", "what": "w", "unit": "x", "budget": 1.0, "verdict": "over"}
    rows = [{**row, "model": "m 100m", "measured": {"median": 1.5}}]
    rows += [
        {**row, "key": "b", "what": "v", "budget": None, "verdict": "-", "model": "m tiny", "measured": {"median": 2}}
    ]
    assert page.budget_table([{"rows": rows}]).splitlines() == [
        "| what | at most | m tiny | m 100m |",
        "| --- | --- | --- | --- |",
        "| w | 1.00 |  | **1.50 (over)** |",
        "| v |  | 2.00 |  |",
    ]
