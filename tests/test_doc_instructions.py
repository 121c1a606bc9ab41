"""Commands, links and calls that the pages name in passing exist: what no code block runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import transformer_lens
from transformer_lens.collect import ActivationStore

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OWNERS: dict[str, Any] = {
    "bridge": transformer_lens.TransformerBridge,
    "TransformerBridge": transformer_lens.TransformerBridge,
    "cache": transformer_lens.ActivationCache,
    "FactoredMatrix": transformer_lens.FactoredMatrix,
    "store": ActivationStore,
    "transformer_lens": transformer_lens,
}
"""What a name at the start of a call stands for on every page."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def commands(page: str) -> Iterator[str]:
    """Command lines: what a page shows in shell blocks and in inline code."""
    text = text_of(page)
    for block in re.findall(r"^```(?:bash|sh|shell|text|console)[^\n]*\n(.*?)^```", text, re.M | re.S):
        yield from (line.removeprefix("$ ").split("  #")[0].strip() for line in block.splitlines())
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    for line in commands(page):
        words = line.replace("'", "").replace('"', "").split() or [""]
        if words[0] == "make" and len(words) > 1 and re.fullmatch(r"[\w-]+", words[1]):
            assert re.search(rf"^([\w. -]+ )?{re.escape(words[1])}( [\w -]+)?:", MAKEFILE, re.M), (
                f"{line}: no such target"
            )
        module = re.match(r"(?:python )?-m ([\w.]+)", line)
        if module:
            assert find_spec(module[1]) is not None, f"{line}: no such module"
            for place in re.findall(r"\b(?:tests|benchmarks|demos)/[\w/.]+", line):
                assert (ROOT / place).exists() or place.startswith("benchmarks/results/"), (
                    f"{line}: {place} is not there"
                )
        script = re.match(r"python ([\w/.]+\.py)", line)
        if script:
            assert (ROOT / script[1]).is_file(), f"{line}: no such script"
        for extra in re.findall(r"(?:transformer-lens-bridge|-e \"?\.)\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= set(EXTRAS), f"{line}: no such extra"


def anchors(page: Path) -> set[str]:
    """The places on a page that can be linked to."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found = set(re.findall(r"\{ #([\w-]+) \}", text)) | set(re.findall(r'id="([\w-]+)"', text))
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\{.*?\}|[`*]", "", heading).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain)).strip("-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]+`(?!\])", "", text_of(page), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), f"{page}: {link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page}: {link}: the page has no such heading"


def calls(page: str) -> Iterator[ast.expr]:
    """Inline code that is a dotted name, or a call of one."""
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)):
        try:
            found = ast.parse(code.strip(), mode="eval").body
        except SyntaxError:
            continue
        if isinstance(found, (ast.Call, ast.Attribute)):
            yield found


def resolved(place: ast.expr) -> Any:
    """What a dotted name stands for; `None` where its first part is nothing that all pages agree on."""
    names: list[str] = []
    while isinstance(place, ast.Attribute):
        names.insert(0, place.attr)
        place = place.value
    if not isinstance(place, ast.Name) or place.id not in OWNERS:
        return None
    found = OWNERS[place.id]
    path = place.id
    for name in names:
        path = f"{path}.{name}"
        if inspect.ismodule(found) and not hasattr(found, name):
            found = importlib.import_module(path)
            continue
        if not hasattr(found, name):
            # An instance has more than its class: hooks, components, what `__init__` sets.
            assert inspect.isclass(found), f"{path} is not there"
            return None
        found = getattr(found, name)
        if not (inspect.ismodule(found) or inspect.isclass(found)):
            return found if name == names[-1] else None
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if "decisions" not in page])
def test_calls_in_passing_have_that_signature(page: str) -> None:
    for code in calls(page):
        function = resolved(code.func if isinstance(code, ast.Call) else code)
        if not isinstance(code, ast.Call) or not callable(function):
            continue
        if isinstance(code.func, ast.Name) and code.func.id.islower() and inspect.isclass(function):
            function = function.forward  # the page calls an instance
        written = ast.unparse(code)
        given = [argument for argument in code.args if not isinstance(argument, ast.Starred)]
        if any(isinstance(one, ast.Constant) and one.value is ... for one in given) or len(given) < len(code.args):
            continue
        keywords = {keyword.arg: None for keyword in code.keywords if keyword.arg}
        bound = not inspect.isclass(function) and not inspect.ismethod(function) and "." in function.__qualname__
        if not given and not keywords:
            continue  # a bare `name()` says which function, not how it is called
        try:
            inspect.signature(function).bind(*[None] * (len(given) + bound), **keywords)
        except TypeError as error:
            pytest.fail(f"{page}: `{written}`: {error}")
