"""The demonstration of a shared Mixtral runs, and the page about it shows that very code and output."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_prints_what_the_page_shows() -> None:
    page = (ROOT / "docs/sharded.md").read_text()
    command = [sys.executable, "demos/sharded_mixtral.py"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"```text\n{done.stdout}```" in page
    code = (ROOT / "demos/sharded_mixtral.py").read_text()
    shown = code[code.index("def silence_head") : code.index("def main")].strip()
    assert shown in page
