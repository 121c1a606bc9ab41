"""The README runs: its examples print what it says, and its table of hooks is the real one.

`python tests/test_readme.py --write` writes the table.
"""

import contextlib
import io
import itertools
import re
import sys
from pathlib import Path

from transformer_lens import TransformerBridge

README = Path(__file__).resolve().parent.parent / "README.md"
MARKS = ("<!-- hooks: written by tests/test_readme.py --write -->\n", "<!-- /hooks -->")


def hooks_as_markdown() -> str:
    """Every hook of the two shipped models, once."""
    rows = {}
    for name in ("tiny-falcon", "tiny-mixtral"):
        for row in TransformerBridge.boot_transformers(name).hook_table().present():
            rows.setdefault((row.name, row.axes), row)
    lines = ["| hook | axes | kind | what it is |", "|---|---|---|---|"]
    for (name, axes), row in sorted(rows.items(), key=lambda item: (item[0][0].startswith("blocks"), 0)):
        lines.append(f"| `{name}` | {axes} | {row.kind} | {row.meaning} |")
    return "\n".join(lines) + "\n"


def test_examples_print_what_the_readme_says():
    blocks = re.findall(r"```(python|text)\n(.*?)```", README.read_text(), flags=re.S)
    space: dict[str, object] = {}
    checked = 0
    for (kind, code), (next_kind, expected) in itertools.pairwise(blocks):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), space)
        assert next_kind == "text"
        assert printed.getvalue() == expected
        checked += 1
    assert checked == 2


def test_the_table_of_hooks_is_that_of_the_models():
    text = README.read_text()
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    assert text[start:end] == hooks_as_markdown()


def test_the_commands_the_readme_names_exist():
    text, makefile = README.read_text(), (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", text))
    assert {"demo", "test", "bench", "bench-peers"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
    for path in re.findall(r"\]\((docs/[^)]+)\)", text):
        assert (README.parent / path).exists()


if __name__ == "__main__" and "--write" in sys.argv:
    text = README.read_text()
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    README.write_text(text[:start] + hooks_as_markdown() + text[end:])
