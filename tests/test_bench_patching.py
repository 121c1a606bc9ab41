"""The patching benchmark measures what it says: the same sweep on both sides, also for other packages."""

from __future__ import annotations

import pytest
import torch

from benchmarks.budgets import Place, Subject
from benchmarks.models import make_config, make_model
from benchmarks.patching_rows import PATCHING_ROWS, prompts
from benchmarks.peer_packages import PACKAGES
from benchmarks.peer_tasks import TIMINGS, Bench
from benchmarks.timing import Effort

CPU = torch.device("cpu")
ONE_PAIR = Effort(min_pairs=1, min_seconds=0.0, max_pairs=1, warm_up=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", PATCHING_ROWS)
def test_the_row_compares_equal_results(kind: str) -> None:
    config = make_config("falcon", "tiny", num_hidden_layers=2, initializer_range=0.2)
    subject = Subject("falcon tiny", make_model(config, CPU), Place(CPU, torch.float32, ONE_PAIR), "tiny")
    row = PATCHING_ROWS[kind](subject)
    assert row.detail["largest_error"] < 1e-3 * row.detail["spread_of_results"]
    assert row.budget is None and row.measured.samples == 1
    clean, corrupted = prompts(config, CPU, kind)
    assert int((clean != corrupted).sum()) == (1 if kind == "patching_one_token" else 20)


def test_our_side_of_the_peers_sweep_is_right() -> None:
    made = Bench(PACKAGES["ours"], "falcon-7b-layout", "tiny", ONE_PAIR, long_tokens=16)
    made.bare = make_model(make_config("falcon-7b-layout", "tiny", num_hidden_layers=4), CPU)
    with torch.no_grad():
        assert TIMINGS["patching"](made)["largest_error"] < 1e-5
