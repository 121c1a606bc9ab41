"""`make demo-swarm`: what it prints, that it compares, and that it leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demos import swarm
from tests.swarm.processes import daemons, running, wait_until

DEMO = Path(__file__).parents[2] / "demos" / "swarm.py"


def test_the_demo_shows_that_everything_is_the_same(tmp_path: Path) -> None:
    before = daemons()
    done = subprocess.run([sys.executable, str(DEMO)], cwd=tmp_path, capture_output=True, text=True, timeout=150)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) <= 40 and "DIFFER" not in done.stdout
    assert sum("the same to the last bit" in line for line in lines) == 3
    assert "L1H0 moves the name" in done.stdout
    assert re.search(r"' Mary' █{30} 0\.999", done.stdout)
    (said,) = re.findall(r"   '(.*)' \.\.\. kill -9 of the server of blocks \d:\d", done.stdout)
    assert f"   '{said}, and Mary handed the cup to John.'" in lines
    assert re.search(r"took over in \d+ ms: \d+ calls were sent again", done.stdout)
    assert (tmp_path / "out" / "swarm-attention.html").stat().st_size > 10_000
    wait_until("the demo's daemons to end", lambda: daemons() == before, 10)


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    before = daemons()
    process = subprocess.Popen(
        [sys.executable, str(DEMO)], cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_until("the first server's daemon to be there", lambda: daemons() != before)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the servers, too
    assert process.wait(60) != 0
    wait_until("the demo's daemons to end", lambda: daemons() == before, 10)
    wait_until("the demo's servers to end", lambda: process.pid not in {one.group for one in running()}, 10)


def test_a_difference_is_told_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    checks = swarm.Checks()
    checks.same("logits", torch.equal(torch.zeros(1), torch.zeros(1)))
    checks.same("text", False)
    assert checks.passed == [True, False]
    assert capsys.readouterr().out == "   logits: the same to the last bit\n   text: DIFFERENT\n"
