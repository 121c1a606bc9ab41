"""Lists on docs/errors.md every sentence that the package can raise or warn with: an mkdocs hook.

The list is read from the source while the site is built, so it cannot be out of date. A theme is a group of
modules; `tests/test_errors_page.py` finds a module that belongs to none.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "transformer_lens"

THEMES: Mapping[str, tuple[str, ...]] = {
    "hooks": ("hooks", "checks", "model_bridge.attaching", "model_bridge.access"),
    "loading": (
        "__init__",
        "HookedTransformer",
        *(f"model_bridge.{name}" for name in ("bridge", "loading", "published", "config")),
        "model_bridge",  # what no other theme names
        "model_bridge.architecture_adapter",
        "model_bridge.supported_architectures",
        "model_bridge.generalized_components.base",
    ),
    "running": (
        *(f"model_bridge.{name}" for name in ("calls", "attaching.partial_run")),
        "model_bridge.verification",
        "compiled",
        "utilities",
    ),
    "caches": ("cache",),
    "weights": (
        "factored_matrix",
        "model_bridge.weights",
        "model_bridge.generalized_components",
        "model_bridge.processing",
        "model_bridge.loading.state",
    ),
    "special": (*(f"model_bridge.access.{name}" for name in ("weights", "sharding", "checkpointing")),),
    "generation": (
        *(f"model_bridge.{name}" for name in ("generating", "steering", "calls.caches")),
        "analysis.steering",
    ),
    "patching": ("analysis.patching", "analysis.attribution.paths"),
    "experts": ("analysis.experts",),
    "analysis": ("analysis", "asking", "tools.analysis"),
    "pictures": ("viz",),
    "collect": ("collect",),
    "dictionaries": ("dictionaries",),
    "distributed": ("distributed",),
    "command line": ("cli", "data"),
}
"""Theme -> the modules in it; the longest prefix wins."""


@dataclass(frozen=True)
class Message:
    """One sentence of the package. `…` stands for what is filled in."""

    kind: str
    text: str
    module: str


def theme_of(module: str) -> str | None:
    """The theme with the longest prefix of a module's name."""
    fitting = [
        (len(prefix), theme)
        for theme, prefixes in THEMES.items()
        for prefix in prefixes
        if module == prefix or module.startswith(prefix if prefix.endswith("_") else f"{prefix}.")
    ]
    return max(fitting)[1] if fitting else None


def _sentence(node: ast.expr, constants: Mapping[str, str]) -> str:
    """A string expression as text, with `…` for what is only known when it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_sentence(part, constants) for part in node.values)
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _sentence(node.left, constants) + _sentence(node.right, constants)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return re.sub(r"\{.*?\}", "…", _sentence(node.func.value, constants))
    return "…"


def _spoken(node: ast.AST) -> tuple[str, list[ast.expr]] | None:
    """The kind of a call that makes an error or a warning, and the arguments that may hold its sentence."""
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func).split(".")[-1]
    if re.fullmatch(r"[A-Z]\w*(Error|Exit|BadParameter)|BadParameter|Exit", name):
        return name, node.args
    if ast.unparse(node.func) in ("warnings.warn", "logger.warning"):
        return "warning", node.args[:1]
    if name == "refusal":  # `draft.refusal(component, weight, why)`
        return "ValueError", node.args
    return None


def messages(package: Path = PACKAGE) -> Iterator[Message]:
    """Every sentence, in the order of the source."""
    for file in sorted(package.rglob("*.py")):
        module = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        constants = {
            target.id: _sentence(node.value, {})
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            said = _spoken(node)
            if said is not None:
                found = [_sentence(argument, constants) for argument in said[1]]
                text = max(found, key=len, default="…")
                if len(text.replace("…", "").split()) > 1:
                    yield Message(said[0], text, module)
            if isinstance(node, ast.FunctionDef) and node.name in ("refusals", "cautions", "refuse_unless_divisible"):
                lists = [inner for inner in ast.walk(node) if isinstance(inner, ast.List)]
                for sentence in (item for inner in lists for item in inner.elts):
                    kind = "warning" if node.name == "cautions" else "ValueError"
                    yield Message(kind, _sentence(sentence, constants), module)


def listed(theme: str, spoken: Iterable[Message]) -> str:
    """The sentences of a theme as HTML."""
    rows = dict.fromkeys((m.kind, m.text) for m in spoken if theme_of(m.module) == theme)
    items = "".join(f"<li><code>{kind}</code> {html.escape(text)}</li>" for kind, text in sorted(rows))
    return f'<ul class="errors">{items}</ul>'


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What mkdocs calls for each page: puts the lists in the places of the marks."""
    if page.file.src_uri != "errors.md":
        return markdown
    spoken = list(messages())
    return re.sub(r"<!-- errors: ([\w ]+) -->", lambda mark: listed(mark[1], spoken), markdown)
