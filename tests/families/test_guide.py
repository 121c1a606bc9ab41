"""docs/adding_an_architecture.md: its code runs and prints what it says, and its adapter is a screen of lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from transformer_lens.model_bridge.supported_architectures import ADAPTERS

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "adding_an_architecture.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def code_blocks(page: Path) -> list[tuple[str, str | None]]:
    """The Python blocks of a page, each with the text it is said to print."""
    found = [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]
    assert len(found) == page.read_text().count("```python")
    return found


def execute(page: Path) -> None:
    """Run a page from top to bottom; a block followed by a text block prints just that."""
    names: dict[str, Any] = {"__name__": page.stem}
    for number, (code, expected) in enumerate(code_blocks(page)):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)
        assert printed.getvalue() == (expected or "")


@pytest.fixture
def registry() -> Iterator[None]:
    """The adapters registered in a test are forgotten after it."""
    before = dict(ADAPTERS)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


@pytest.mark.core
@pytest.mark.usefixtures("registry")
def test_the_guide_runs_and_prints_what_it_says() -> None:
    execute(GUIDE)
    assert "olmo2" in ADAPTERS


def test_its_adapter_is_a_screen_of_lines() -> None:
    (code,) = [code for code, _ in code_blocks(GUIDE) if "@register_adapter" in code]
    assert sum(isinstance(node, ast.ClassDef) for node in ast.parse(code).body) == 2
    assert len([line for line in code.splitlines() if line.strip()]) < 40
