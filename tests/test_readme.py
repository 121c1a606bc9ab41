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
FAMILY_MARKS = ("<!-- families: written by tests/test_readme.py --write -->\n", "<!-- /families -->")


KNOWN = (
    *("llama", "qwen3", "gemma3_text", "mistral", "mixtral", "deepseek_v3", "gpt_oss", "falcon", "olmo2", "phi3"),
    *("granite", "gpt2", "gpt_neox", "jamba"),
)


def families_in_words() -> str:
    """How many families the registry has, and the best known of them by the `model_type` of their configs."""
    names = ", ".join(f"`{name}`" for name in KNOWN if name in ADAPTERS)
    return f"[{len(ADAPTERS)} families](docs/families.md) of models, {names} among them.\n"


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


WHY_MARKS = ("<!-- why: written by tests/test_readme.py --write -->\n", "<!-- /why -->")
WHY_ROWS = {
    ("untouched_forward", "mixtral tiny"): "Mixtral: a forward pass with nothing hooked",
    ("resid_cache", "mixtral tiny"): "Mixtral: caching the residual stream, 1,024 tokens",
    ("head_patch", "mixtral tiny"): "Mixtral: ablating one head",
    ("steering", "mixtral tiny"): "Mixtral: steering a generation of 32 tokens",
    ("rw:logits", "falcon, 2 layers"): "Falcon RW: its logits",
    ("40b:logits", "falcon, 2 layers"): "Falcon 40B's layout: its logits",
    ("40b:mlp_out", "falcon, 2 layers"): "Falcon 40B's layout: what the MLP adds",
    ("40b:q", "falcon, 2 layers"): "Falcon 40B's layout: the queries of each head",
}


def why_as_markdown() -> str:
    """The stored figures of this package and others as a short table."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text())
    found = {(row["task"], row["model"], row["package"]): row["text"] for row in stored["answers"]}
    peers = {name: stored["packages"][name]["packages"][name] for name in ("transformer-lens", "nnsight")}
    heads = [f"{name} {version}" for name, version in peers.items()]
    lines = [f"| | this package | {' | '.join(heads)} |", "|---|---|---|---|"]
    for (task, model), what in WHY_ROWS.items():
        cells = [found[task, model, name] for name in ("ours", *peers)]
        cells = [f"{float(cell):.2f}" if re.fullmatch(r"[0-9.]+", cell) else in_digits(cell) for cell in cells]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def in_digits(text: str) -> str:
    """An error such as "off by 6.2e+00" in plain digits."""
    return re.sub(r"[0-9.]+e[+-]\d+", lambda found: f"{float(found[0]):.2g}", text)


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
    assert HOOKS.read_text() == HOOKS_TEXT + hooks_as_markdown()


def test_the_families_are_those_of_the_registry():
    for page, expected in ((README, families_in_words()), (FAMILIES, families_as_markdown())):
        assert between(page.read_text(), FAMILY_MARKS, expected) == page.read_text()


def test_the_figures_are_the_stored_ones():
    text = README.read_text()
    assert between(text, WHY_MARKS, why_as_markdown()) == text
    assert len(why_as_markdown().splitlines()) <= 2 + 8


def test_the_commands_the_readme_names_exist():
    text, makefile = README.read_text(), (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", text))
    assert {"demo", "test", "bench", "bench-peers"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
    for path in re.findall(r"\]\((docs/[^)]+)\)", text):
        assert (README.parent / path).exists()


if __name__ == "__main__" and "--write" in sys.argv:
    text = README.read_text()
    written = {FAMILY_MARKS: families_in_words(), WHY_MARKS: why_as_markdown()}
    for marks, new in written.items():
        text = between(text, marks, new)
    README.write_text(text)
    FAMILIES.write_text(between(FAMILIES.read_text(), FAMILY_MARKS, families_as_markdown()))
    HOOKS.write_text(HOOKS_TEXT + hooks_as_markdown())
