"""docs/errors.md: every sentence of the package is on it, and what it explains is still said."""

from __future__ import annotations

import html
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "errors.md").read_text()
EXPLAINED = re.findall(r"^\| `(.+?)` \|", PAGE, flags=re.M)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


INDEX = load(ROOT / "docs" / "error_index.py")
MESSAGES = list(INDEX.messages())


def test_every_module_that_speaks_has_a_theme() -> None:
    homeless = {message.module for message in MESSAGES if INDEX.theme_of(message.module) is None}
    assert not homeless, f"{sorted(homeless)}: name them in THEMES of docs/error_index.py"


def test_every_theme_is_on_the_page_once() -> None:
    assert sorted(re.findall(r"<!-- errors: ([\w ]+) -->", PAGE)) == sorted(INDEX.THEMES)


def test_the_built_page_lists_every_sentence() -> None:
    built = "".join(INDEX.listed(theme, MESSAGES) for theme in INDEX.THEMES)
    assert all(html.escape(message.text) in built for message in MESSAGES)


@pytest.mark.parametrize("sentence", EXPLAINED)
def test_what_is_explained_is_still_said(sentence: str) -> None:
    assert any(message.text.startswith(sentence) for message in MESSAGES)


SPEAKING = """
MISSING = "install the extra {extra}"
def f(x, n):
    raise ValueError(f"x: got {x!r}, " "expected one" + " of two")
def g():
    raise ImportError(MISSING.format(extra="viz"))
def unknown(name):
    return KeyError(f"there is no {name}")
def refusals(self):
    return [f"{self} does not fit"]
def cautions(self):
    return ["this may surprise you"]
def h(draft, log):
    warnings.warn("mind the gap")
    raise draft.refusal(self, "weight", f"its {log} is elsewhere")
class E(ValueError): ...
"""


def test_sentences_are_read_from_every_way_of_saying_them(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(SPEAKING)
    assert {(m.kind, m.text, m.module) for m in INDEX.messages(tmp_path)} == {
        ("ValueError", "x: got …, expected one of two", "checks"),
        ("ImportError", "install the extra …", "checks"),
        ("KeyError", "there is no …", "checks"),
        ("ValueError", "… does not fit", "checks"),
        ("warning", "this may surprise you", "checks"),
        ("warning", "mind the gap", "checks"),
        ("ValueError", "its … is elsewhere", "checks"),
    }


def test_the_longest_prefix_gives_the_theme() -> None:
    assert INDEX.theme_of("analysis.experts.hooks") == "experts"
    assert INDEX.theme_of("analysis.svd") == "analysis"
    assert INDEX.theme_of("unheard_of") is None


def test_texts_that_the_tests_provoke_are_indexed() -> None:
    """An independent reading: the literal texts that tests/messages provokes at run time."""
    from tests.messages import test_messages

    tables = [value for value in vars(test_messages).values() if isinstance(value, dict)]
    texts = [case[2] for table in tables for case in table.values() if isinstance(case, tuple) and len(case) == 3]
    ours = [text for text in texts if "unexpected keyword argument" not in text]  # those are Python's words
    assert len(ours) > 40
    told = [m.text for m in MESSAGES if len(m.text.replace("…", "").split()) > 3]
    patterns = [re.compile(".*?".join(map(re.escape, text.split("…"))) + r"\Z", re.S) for text in told]
    missing = [text for text in ours if not any(pattern.match(text) for pattern in patterns)]
    assert not missing
