"""`make demo-cluster`: what it prints, and that it compares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "demos" / "cluster.py"


def test_the_demo_shows_that_everything_is_the_same(tmp_path: Path) -> None:
    """In a cluster of its own, which it does not find by itself."""
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(DEMO)], cwd=tmp_path, capture_output=True, text=True, timeout=500, env=alone
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DIFFER" not in done.stdout and done.stdout.count("the same to the last bit") == 3
    assert len(re.findall(r"block \d: ' to' goes to the experts \[\d, \d\]; its head \d attends to", done.stdout)) == 3
    assert re.search(r"\.\.\. the node of blocks \d:\d is gone", done.stdout)
    assert re.search(r"after \d+\.\d s the text went on: \d+ calls were sent again", done.stdout)
