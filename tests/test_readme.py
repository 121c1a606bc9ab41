"""README and docs run: their examples print what they say, and the tables of hooks are the real ones.

`python -m tests.test_readme --write` writes the tables.
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import pytest

from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, adapter_class

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
HOOKS = ROOT / "docs" / "hooks.md"
FAMILIES = ROOT / "docs" / "families.md"
HOOKS_TEXT = """# Hooks

The name, shape and meaning of every hook. The table is that of the shipped Falcon and Mixtral, with `{i}` for the
layer; `bridge.hook_table()` lists those of your model, with shapes in numbers, and says why other names are absent.

```python
from transformer_lens import TransformerBridge

bridge = TransformerBridge.boot_transformers("tiny-falcon")
print(bridge.hook_table().row("blocks.{i}.attn.hook_z").shape)
_, cache = bridge.run_with_cache("Mary and John", names_filter="blocks.1.attn.hook_z")
print(cache["z", 1].shape)
```

```text
('batch', 'pos', 4, 32)
torch.Size([1, 5, 4, 32])
```

In every family `attn.hook_z` is what enters W_O, head by head, and `attn.hook_result` that times each head's part of
W_O. Where a norm or a gate makes z of what attention returns (`bitnet`, `afmoe`, `qwen3_next`, `qwen3_5_text`,
`qwen3_5_moe_text`), `attn.hook_attended` is what attention returns for each head: the values averaged by its pattern.
`attn.hook_gate` is the gate before its sigmoid, and z is `hook_attended * hook_gate.sigmoid()`. Likewise
`mlp.hook_post` is what enters W_out, and in `bitnet` `mlp.hook_activated` is what enters the norm in front of it.

"Kind" says where the value is read: [ports, seams and formulas](concepts.md#ports). Hooks marked "on request" are left
out of a cache of everything.

"""
MARKS = ("<!-- hooks: written by tests/test_readme.py --write -->\n", "<!-- /hooks -->")
FAMILY_MARKS = ("<!-- families: written by tests/test_readme.py --write -->\n", "<!-- /families -->")


def families_in_words() -> str:
    """Every family of the registry, by the `model_type` of its config."""
    return f"{len(ADAPTERS)} families, by the `model_type` of a config: {', '.join(sorted(ADAPTERS))}.\n"


def families_as_markdown() -> str:
    """The same as a table, with what each adapter says of it."""
    rows = [f"| `{name}` | {adapter_class(name).__doc__.splitlines()[0]} |" for name in sorted(ADAPTERS)]
    mixtures = sum("num_experts" in adapter_class(name).cfg_names for name in ADAPTERS)
    count = f"{len(ADAPTERS)} families; {mixtures} of them have mixtures of experts."
    return "\n".join(["| `model_type` | |", "|---|---|", *rows, "", count]) + "\n"


def between(text: str, marks: tuple[str, str], new: str) -> str:
    """A text with something else between two marks."""
    start, end = text.index(marks[0]) + len(marks[0]), text.index(marks[1])
    return text[:start] + new + text[end:]


SPEED_MARKS = ("<!-- speed: written by tests/test_readme.py --write -->\n", "<!-- /speed -->")
SPEED_ROWS = {
    "untouched_forward": "forward, nothing hooked",
    "untouched_decode": "one-token decode, nothing hooked",
    "resid_cache": "caching every `hook_resid_post`, 2,048 tokens",
    "pattern_cache": "caching one layer's pattern, 2,048 tokens",
    "port_cache": "caching every port, 128 tokens",
    "full_cache": "caching everything, 128 tokens",
    "steering": "steering one layer, 32 generated tokens",
}


def speed_as_markdown() -> str:
    """The stored figures as ratios to bare transformers with sdpa."""
    found: dict[str, dict[str, str]] = {}
    machine = ""
    for file in sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json")):
        stored = json.loads(file.read_text())
        where = stored["environment"]
        machine = f"{where['processor']}, {where['threads']} threads, torch {where['packages']['torch']}, "
        machine += f"transformers {where['packages']['transformers']}"
        for row in stored["rows"]:
            if row["key"] in SPEED_ROWS:
                found.setdefault(row["model"], {})[row["key"]] = f"{row['measured']['median']:.2f}"
    models = sorted(found, key=lambda name: ("tiny" not in name, name))
    lines = [f"| time / bare model | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for key, what in SPEED_ROWS.items():
        lines.append(f"| {what} | {' | '.join(found[model].get(key, '') for model in models)} |")
    return "\n".join([*lines, "", f"Medians of interleaved runs in one process ({machine}).", ""])


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


@pytest.mark.parametrize(("page", "printing"), [("README.md", 2), ("docs/index.md", 2)])
def test_examples_print_what_the_page_says(page, printing):
    blocks = re.findall(r"```(python|text)\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    space: dict[str, object] = {}
    checked = 0
    for place, (kind, code) in enumerate(blocks):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), space)
        following = blocks[place + 1] if place + 1 < len(blocks) else ("", "")
        assert printed.getvalue() == (following[1] if following[0] == "text" else "")
        checked += following[0] == "text"
    assert checked == printing


def test_the_table_of_hooks_is_that_of_the_models():
    text = README.read_text()
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    assert text[start:end] == hooks_as_markdown()
    assert HOOKS.read_text() == HOOKS_TEXT + hooks_as_markdown()


def test_the_families_are_those_of_the_registry():
    for page, expected in ((README, families_in_words()), (FAMILIES, families_as_markdown())):
        assert between(page.read_text(), FAMILY_MARKS, expected) == page.read_text()


def test_the_figures_are_the_stored_ones():
    text = README.read_text()
    start, end = text.index(SPEED_MARKS[0]) + len(SPEED_MARKS[0]), text.index(SPEED_MARKS[1])
    assert text[start:end] == speed_as_markdown()


def test_the_commands_the_readme_names_exist():
    text, makefile = README.read_text(), (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", text))
    assert {"demo", "test", "bench", "bench-peers"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
    for path in re.findall(r"\]\((docs/[^)]+)\)", text):
        assert (README.parent / path).exists()


if __name__ == "__main__" and "--write" in sys.argv:
    text = README.read_text()
    written = {MARKS: hooks_as_markdown(), FAMILY_MARKS: families_in_words(), SPEED_MARKS: speed_as_markdown()}
    for marks, new in written.items():
        text = between(text, marks, new)
    README.write_text(text)
    FAMILIES.write_text(between(FAMILIES.read_text(), FAMILY_MARKS, families_as_markdown()))
    HOOKS.write_text(HOOKS_TEXT + hooks_as_markdown())
