"""One run of pytest in a process of its own, and what became of its tests."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_run(python: str | Path, arguments: Sequence[str], variables: Mapping[str, str]) -> dict[str, Any]:
    """Run pytest under an interpreter, from the root of the repository."""
    ours = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY)}
    with TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [str(python), "-m", "pytest", "-q", *arguments, f"--junitxml={report}"]
        finished = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **ours, **variables}, check=False)
        counts = read_counts(report) if report.exists() else {}
    return {"arguments": list(arguments), "exit_status": finished.returncode, **counts}


def read_counts(report: Path) -> dict[str, Any]:
    """How many tests ran, failed and were skipped, and the names of those that failed."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts: dict[str, Any] = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    counts["failed"] = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    return counts
