"""docs/real_models.md: its code runs, and prints what stands below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_docs import run_page

pytestmark = pytest.mark.real


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("docs/real_models.md", tmp_path, monkeypatch)
