"""From the README's first line to a circuit of one's own prompt in a picture, following only what is written."""

import contextlib
import io
import re
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.M | re.S)
OWN = {
    "clean": '"When Peter and Carol went to the park, Carol bought a cake for"',
    "corrupted": '"When Peter and Carol went to the park, Peter bought a cake for"',
    "answer, wrong": '" Peter", " Carol"',
}
"""The lines that the page says to change, with another prompt."""


def run(code: str, space: dict[str, Any]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "walk", "exec"), space)
    return said.getvalue()


def test_from_the_first_line_to_a_circuit_of_ones_own_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    title, sentence, picture, *_ = [line for line in readme.splitlines() if line]
    assert title.startswith("# ") and sentence.endswith(".") and picture.startswith("![")
    assert (ROOT / re.findall(r"\((docs/[^)]+\.png)\)", picture)[0]).is_file()

    # It installs what the page uses: the extras that the line names exist, and the models come with the package.
    (extras,) = set(re.findall(r'pip install "[^"\[]*\[([\w,]+)\]', readme))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)

    # The first code of the page runs, and prints what stands below it.
    _, code, printed = next(found for found in FENCE.findall(readme) if found[0] == "python")
    assert run(code, {"__name__": "__main__"}) == printed
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("from ", "import "))]
    assert len(lines) <= 10

    # Its first link to a page of the documentation goes on to the circuit, and so does "Where to start".
    links = re.findall(r"\]\((docs/[^)#]+\.md)\)", readme)
    start = readme[readme.index("## Where to start") :]
    assert links[0] == re.findall(r"\]\((docs/[^)#]+\.md)\)", start)[0] == "docs/tutorials/onramp.md"
    page = (ROOT / links[0]).read_text()
    blocks = [(code, printed) for kind, code, printed in FENCE.findall(page) if kind == "python"]

    # As written: every block, with what it prints.
    space: dict[str, Any] = {"__name__": "__main__"}
    for code, printed in blocks:
        assert run(code, space) == printed or not printed
    check(space, tmp_path)
    as_written = space["circuit"].values.clone()

    # With a prompt of one's own, in the lines that the page names.
    own = "\n".join(code for code, _ in blocks)
    for name, value in OWN.items():
        own, changed = re.subn(rf"^{name} = .*$", lambda found, new=f"{name} = {value}": new, own, flags=re.M)
        assert changed == 1, f"the page says to change {name}, and has it {changed} times"
    for path in tmp_path.iterdir():
        path.unlink()
    space = {"__name__": "__main__"}
    run(own, space)
    assert space["bridge"].to_string(space["logits"][0, -1].argmax()) == " Peter"
    check(space, tmp_path)
    assert not torch.equal(space["circuit"].values, as_written)
    assert time.monotonic() - started < 600


def check(space: dict[str, Any], folder: Path) -> None:
    """The pictures are there, and the heads in them are enough, and needed."""
    for name in ("stream.html", "heads.html", "circuit.html"):
        assert "</html>" in (folder / name).read_text()
    assert (folder / "circuit.png").read_bytes().startswith(b"\x89PNG")
    values = space["circuit"].values
    torch.testing.assert_close(values[:, 0], torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0)
    assert values[0, -1] > 0.9 and values[1, -1] < 0.1
