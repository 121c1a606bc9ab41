"""The simulation of a swarm says what has to be true: by hand where nothing is random, and of its baselines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.swarm_costs import FALCON_180B
from benchmarks.swarm_simulation import POLICIES, World, main, simulate

SMALL = World(servers=60, clients=6, seconds=240, lifetime=200, away=60, tokens=32, seed=3)
STEADY = replace(SMALL, lifetime=1e9, away=1e-3)
BEST, NO_BANS, RANDOM = POLICIES


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float]]:
    return {policy: simulate(SMALL, policy) for policy in POLICIES}


def test_without_bans_more_texts_are_lost(results: dict[str, dict[str, float]]) -> None:
    assert results[BEST]["failures"] > 20
    assert results[BEST]["success"] > results[NO_BANS]["success"] + 0.1
    assert results[NO_BANS]["failures"] > 2 * results[BEST]["failures"]


def test_the_best_path_is_faster_than_any_and_less_even(results: dict[str, dict[str, float]]) -> None:
    assert results[BEST]["tokens_per_second"] > 1.3 * results[RANDOM]["tokens_per_second"]
    assert results[BEST]["spread_of_busy"] > results[RANDOM]["spread_of_busy"]


def test_the_same_world_is_the_same_every_time(results: dict[str, dict[str, float]]) -> None:
    assert simulate(SMALL, BEST) == results[BEST]
    assert simulate(replace(SMALL, seed=4), BEST) != results[BEST]


def test_nothing_fails_where_nobody_dies() -> None:
    found = simulate(STEADY, BEST)
    assert (found["success"], found["failures"], found["covered"]) == (1.0, 0, 1.0)
    assert found["seconds_of_a_recovery"] == found["share_of_time_recovering"] == 0


def test_blocks_that_nobody_has() -> None:
    found = simulate(replace(STEADY, servers=3), BEST)
    assert found["texts"] > 0
    assert (found["success"], found["covered"], found["tokens_per_second"]) == (0.0, 0.0, 0.0)


def test_one_client_and_one_server_by_hand() -> None:
    world = replace(STEADY, servers=1, clients=1, span=(80, 80), latency=(0.1, 0.1), seconds_per_block=(0.002, 0.002))
    seconds = 0.0
    for nth in range(world.tokens):
        new, before = (world.prompt, 0) if nth == 0 else (1, world.prompt + nth - 1)
        size = FALCON_180B.request_bytes(new, before) + FALCON_180B.reply_bytes(new)
        seconds += 0.1 + 80 * (0.002 + (new - 1) * world.seconds_per_further_position) + size / world.bandwidth
    found = simulate(world, BEST)
    assert found["tokens_per_second"] == pytest.approx(world.tokens / seconds, rel=1e-9)
    # Many clients of the same server wait for one another.
    assert simulate(replace(world, clients=6), BEST)["tokens_per_second"] < 0.5 * found["tokens_per_second"]


def test_a_lone_server_that_comes_back_is_replayed_to() -> None:
    world = replace(SMALL, servers=1, clients=1, seconds=4000, span=(80, 80), away=2.0, lifetime=60, silent=0)
    found = simulate(world, BEST)
    assert found["failures"] > 10
    assert found["success"] >= 0.9
    assert found["seconds_of_a_recovery"] > 1  # the first wait is a second


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "swarm.json"
    main([str(file), "--servers", "40", "--clients", "2", "--seconds", "30"])
    document = json.loads(file.read_text())
    assert list(document["results"]) == list(POLICIES) and document["world"]["servers"] == 40
    assert "success" in capsys.readouterr().out
