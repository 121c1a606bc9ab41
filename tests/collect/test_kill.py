"""A job that is killed at any moment goes on, and ends with the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def kill(folder: Path, kills: int, seed: int) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.collect.killing", str(folder), str(kills), str(seed)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=alone, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def check(found: dict[str, object], kills: int) -> None:
    assert found["killed"] >= kills
    assert found["failed"] == 0
    assert found["different"] == []


def test_killed_a_few_times(tmp_path: Path) -> None:
    check(kill(tmp_path, 8, seed=1), 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_killed_hundreds_of_times(tmp_path: Path, seed: int) -> None:
    check(kill(tmp_path, 100, seed), 100)
