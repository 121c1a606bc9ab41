"""Which blocks go to which node of a cluster, and what is said where Ray is missing. tests/cluster runs the rest."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from transformer_lens.cli.app import app
from transformer_lens.cli.serve import numbers
from transformer_lens.distributed.server.cluster import MARGIN, placed

MISSING = "error: servers on a cluster need Ray: pip install 'transformer-lens-bridge[cluster]'"


WIDE = {"COLUMNS": "200"}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_where_there_is_room_every_block_has_a_place(sizes: list[int], rooms: list[int]) -> None:
    needed = sum(sizes) * MARGIN
    if all(room < min(sizes) * MARGIN for room in rooms):
        with pytest.raises(ValueError, match=f"and there is room for 0 of {len(sizes)}: add nodes"):
            placed(sizes, rooms)
    if not all(room >= needed for room in rooms):
        return
    found = placed(sizes, rooms)
    assert sorted(layer for span in found for layer in span) == list(range(len(sizes)))
    assert all(sum(sizes[layer] for layer in span) * MARGIN <= room for span, room in zip(found, rooms, strict=True))


def test_nodes_with_room_for_all_share_evenly() -> None:
    for nodes in range(1, 6):
        counts = [len(span) for span in placed([7] * 16, [1e9] * nodes)]
        assert sum(counts) == 16 and max(counts) - min(counts) <= 1


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^the blocks take 75 bytes, and there is room for 3 of 6: add nodes$"):
        placed([10] * 6, [25, 13])


@pytest.mark.parametrize("command", [["up"], ["status"], ["down"]])
def test_a_missing_ray_is_said(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    found = CliRunner().invoke(app, ["cluster", *command, "tiny-falcon"], env=WIDE)
    assert found.exit_code == 1 and MISSING in found.stderr


def test_limits_on_a_command_line() -> None:
    given = ["memory=64GiB", "calls=4", "session_seconds=1.5", "answer=0.5KiB"]
    assert numbers(given) == {"memory": 64 * 2**30, "calls": 4, "session_seconds": 1.5, "answer": 512}
    for wrong in ("memory", "memory=", "memory=1GB", "=4", "calls=-1", "calls=nan"):
        found = CliRunner().invoke(app, ["serve", "tiny-falcon", "--blocks", "0:2", "--limit", wrong], env=WIDE)
        assert found.exit_code == 2 and "expected a name and a number, such as" in found.stderr
    found = CliRunner().invoke(app, ["serve", "tiny-falcon", "--blocks", "0:2", "--limit", "memry=1"], env=WIDE)
    assert found.exit_code == 1 and "limits: got 'memry', expected one of message" in found.stderr.replace("\n", " ")
