"""Every python block of the documentation runs, in the order of its page, and prints what stands below it.

A page's ```python blocks share one namespace and an empty working directory. A ```text block right after one is
what it prints. A block whose fence says `title="not run here: ..."` gives its reason and is only compiled.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md") if "decisions" not in p.parts)
ELSEWHERE = {
    "docs/adding_an_architecture.md": "tests/families/test_guide.py",
    "docs/index.md": "tests/test_readme.py",
    "docs/real_models.md": "tests/real/test_page.py",
}
"""Pages that a test of their own runs."""
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.M | re.S)


def blocks(page: str) -> list[tuple[str, str, str | None]]:
    """The python blocks of a page: what the fence says, the code, and what it prints if the page tells."""
    text = (ROOT / page).read_text()
    return [(title, code, printed or None) for kind, title, code, printed in FENCE.findall(text) if kind == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and blocks(page)])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, tmp_path, monkeypatch)


def run_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    torch.manual_seed(0)
    with torch.enable_grad():  # a page may switch gradients off for all of its blocks
        for number, (title, code, printed) in enumerate(blocks(page), 1):
            compiled = compile(code, f"{page}, block {number}", "exec")
            if "not run here:" in title:
                continue
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compiled, namespace)
            if printed is not None:
                assert said.getvalue() == printed, f"{page}, block {number}"
