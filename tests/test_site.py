"""The documentation as it is built: strictly, with every exported name, and found in one search."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import transformer_lens

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(300)

QUERIES = {
    "cache activations": "howto/#cache-activations",
    "ablate head": "howto/#ablate-a-head",
    "activation patching": "howto/#activation-patching",
    "attention patterns": "howto/#attention-patterns",
    "logit lens": "howto/#logit-lens",
    "steer generation": "howto/#steer-generation",
    "gradients metric": "howto/#gradients",
    "use own fine-tuned model": "howto/#use-my-own-model",
    "train probe activations": "howto/#train-a-probe-or-sae",
    "expert routing": "howto/#expert-routing",
    "SAE": "dictionaries/",
}
"""What people type -> where the answer is."""
OTHER_WORDS = {
    "hidden states": "cache-activations",
    "mean ablation": "ablate-a-head",
    "attention weights": "attention-patterns",
    "steering vector": "steer-generation",
    "sparse autoencoder": "train-a-probe-or-sae",
    "SAE": "train-a-probe-or-sae",
    "quantised": "use-my-own-model",
    "residual stream decode": "logit-lens",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: `make docs`, elsewhere."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return place


@pytest.fixture(scope="module")
def index(site: Path) -> list[dict[str, str]]:
    """What the search box searches: a title and a text for each heading."""
    docs: list[dict[str, str]] = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    return docs


def words(text: str) -> set[str]:
    """Words without case, marks and endings."""
    return {word.rstrip("s") for word in re.findall(r"[a-z0-9-]+", re.sub("<.*?>", "", text).lower())}


@pytest.mark.parametrize("query", QUERIES)
def test_the_common_tasks_are_found_by_their_headings(query: str, index: list[dict[str, str]]) -> None:
    asked = words(query)
    titled = [doc["location"] for doc in index if asked <= words(doc["title"])]
    assert QUERIES[query] in titled
    # Few other headings outside the API say the same, so the answer is on the first screen of results.
    assert len([place for place in titled if not place.startswith("api/")]) <= 4, titled


@pytest.mark.parametrize("query", OTHER_WORDS)
def test_other_words_for_them_are_there_too(query: str, index: list[dict[str, str]]) -> None:
    (section,) = [doc for doc in index if doc["location"] == f"howto/#{OTHER_WORDS[query]}"]
    assert words(query) <= words(section["title"])


def exported() -> Iterator[str]:
    """Every name in an `__all__` of the package."""
    for found in pkgutil.walk_packages(transformer_lens.__path__, "transformer_lens."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            for name in getattr(module, "__all__", ()):
                yield f"{found.name}.{name}"
    for name in transformer_lens.__all__:
        yield f"transformer_lens.{name}"


def used_in_pages() -> Iterator[str]:
    """Every name that the code of a page imports from the package."""
    for page in (ROOT / "docs").rglob("*.md"):
        if "decisions" not in page.parts:
            for code in re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), flags=re.M | re.S):
                for node in ast.walk(ast.parse(code)):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_lens"):
                        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def documented(site: Path) -> set[str]:
    """The objects that the API pages show, by full name."""
    lines = (site / "objects.inv").read_bytes().split(b"\n", 4)
    return {line.split(" ")[0] for line in zlib.decompress(lines[4]).decode().splitlines()}


NOT_SHOWN = re.compile(r"transformer_lens\.(data|components)\.|.*\.ADAPTERS$")
"""Made-up English and its generator are part of the demos; components are other names of classes that are shown."""


@pytest.mark.parametrize("names", [exported, used_in_pages])
def test_the_api_shows_every_name(names: Any, site: Path) -> None:
    shown = documented(site)
    missing = set()
    for full in names():
        module, _, name = full.rpartition(".")
        value = getattr(importlib.import_module(module), name, None)
        homes = {full, f"{getattr(value, '__module__', module)}.{name}"}
        of_type = value is None or isinstance(value, type(pytest))  # a module
        if not of_type and not homes & shown and not NOT_SHOWN.match(full):
            missing.add(full)
    assert not missing, f"add to docs/api.md: {sorted(missing)}"


OUTSIDE = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"' >]+""")


def test_pages_ask_for_nothing_from_outside(site: Path) -> None:
    asked = {
        (page.relative_to(site).as_posix(), found)
        for page in site.rglob("*.html")
        for found in OUTSIDE.findall(page.read_text())
        if 'rel="canonical"' not in found
    }
    assert not asked
    styles = [
        sheet for sheet in site.rglob("*.css") if re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text())
    ]
    assert not styles


def test_errors_are_on_their_page(site: Path, index: list[dict[str, str]]) -> None:
    text = " ".join(doc["text"] for doc in index if doc["location"].startswith("errors/"))
    assert "these hooks were asked for and never fired" in text
    assert "<!-- errors" not in (site / "errors" / "index.html").read_text()


CODE_TOO_WIDE = """() => document.documentElement.scrollWidth > innerWidth ||
    [...document.querySelectorAll("pre code:has(.n, .k)")].some((e) => e.scrollWidth > e.clientWidth + 1)"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_and_their_code_fit_a_desk_and_a_phone(site: Path, width: int) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        wide = []
        for file in sorted(site.rglob("index.html")):
            page.goto(file.as_uri())
            if page.evaluate(CODE_TOO_WIDE):
                wide.append(str(file.relative_to(site)))
        browser.close()
    assert not wide


FIRST_RESULT = r"""place => [...document.querySelectorAll(".md-search-result__link")].slice(0, 2)
    .some(link => link.href.replace(/\?[^#]*/, "").endsWith(place))"""
"""Whether the first result is a place: a page's first link is the page, the second its best heading."""


@pytest.mark.browser
def test_the_search_box_finds_them_first(site: Path) -> None:
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(site)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            port = re.search(r"port (\d+)", server.stdout.readline())
            assert port is not None
            search_for_each_task(f"http://127.0.0.1:{port[1]}/")
        finally:
            server.terminate()


def search_for_each_task(address: str) -> None:
    """Type each query into the page's own search box."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        outside: list[str] = []
        page.on("request", lambda request: outside.append(request.url) if "127.0.0.1" not in request.url else None)
        page.goto(address)
        for query, place in QUERIES.items():
            page.click("input.md-search__input")
            page.keyboard.press("Control+A")
            page.keyboard.type(query)
            page.wait_for_function(FIRST_RESULT, arg=place, timeout=20_000)
        browser.close()
    assert not outside
