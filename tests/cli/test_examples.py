"""Every example of the help texts and every bash block of docs/command_line.md runs, and prints what the page says."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from transformer_lens.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.M | re.S)
COMMANDS = typer.main.get_command(app).commands
HUB = "tiiuae/"
"""Examples with a model of the hub are read, not run."""
NETWORK = ("serve", "status", "cluster", "look")
"""Servers, and what asks them; tests/swarm, tests/cluster and test_look_cli.py run them, in networks of their own."""


def run(line: str) -> str:
    """A command of a shell, `echo TEXT |` before it if need be, in this process; what it prints."""
    words = shlex.split(line)
    text = None
    if words[0] == "echo":
        text, words = words[1] + "\n", words[3:]
    assert words[0] == "transformer-lens", line
    result = CliRunner().invoke(app, words[1:], input=text, env={"COLUMNS": "80"})
    assert result.exit_code == 0, f"{line}\n{result.output}"
    assert result.stdout
    return result.stdout


def examples(text: str) -> list[str]:
    """The commands of a text, one on each line or continued by a backslash."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    return [line for line in lines if line.startswith(("transformer-lens ", "echo "))]


HELP = {name: examples(command.help) for name, command in COMMANDS.items()}
HELP[""] = examples(typer.main.get_command(app).help)


def test_every_command_has_examples() -> None:
    assert all(HELP.values())
    for name, lines in HELP.items():
        assert all(f"transformer-lens {name}" in line for line in lines)


def quick(name: str, line: str) -> object:
    return pytest.param(line, marks=pytest.mark.slow) if name == "demo" else line


@pytest.mark.parametrize(
    "line",
    [quick(name, line) for name, lines in HELP.items() if name not in NETWORK for line in lines if HUB not in line],
)
def test_an_example_of_the_help_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("Mary and John went to the store.\n", encoding="utf-8")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "texts.txt").write_text("The lamp is blue.\n", encoding="utf-8")
    run(line)


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for kind, code, printed in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        torch.manual_seed(0)
        if kind == "python":
            exec(compile(code, PAGE.name, "exec"), namespace)
            continue
        said = "".join(map(run, examples(code)))
        assert not printed or rstripped(said) == printed, code
    assert {path.name for path in tmp_path.iterdir()} >= {"alice.safetensors", "heads.html", "heads.png"}


def rstripped(text: str) -> str:
    """Tables are filled with spaces at their right, which no page keeps."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def write() -> None:
    """Put what the commands print into the page: `python -m tests.cli.test_examples`."""

    def block(found: re.Match[str]) -> str:
        kind, code, printed = found.groups()
        if kind == "python":
            exec(compile(code, PAGE.name, "exec"), namespace)
        if kind == "python" or printed is None:
            return found[0]
        return f"```bash\n{code}```\n\n```text\n{rstripped(''.join(map(run, examples(code))))}```"

    namespace: dict[str, object] = {}
    PAGE.write_text(FENCE.sub(block, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write())
