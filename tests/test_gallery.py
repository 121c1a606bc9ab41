"""The gallery: its pictures are what its code makes, and each stands below that code.

`python -m tests.test_gallery --write` runs the code, and stores the pictures and the page's contents.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from transformer_lens.viz import Picture

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gallery.md"
STORED = ROOT / "docs" / "drawings" / "gallery"
MARKS = ("<!-- contents: written by tests/test_gallery.py --write -->\n", "<!-- /contents -->")
SECTION = re.compile(r"^## ([^\n]+) \{ #([\w-]+) \}\n(.*?)(?=^## |\Z)", re.M | re.S)
CODE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
IMAGE = re.compile(r"\n\[!\[[^\]]*\]\(drawings/gallery/[\w-]+\.png\)\]\([^)]*\)\n")


def made(folder: Path) -> dict[str, Picture]:
    """Every picture of the page, by the name of its section."""
    text, here = PAGE.read_text(), Path.cwd()
    space: dict[str, Any] = {}
    found: dict[str, Picture] = {}
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        exec("\n".join(CODE.findall(text.split("\n## ")[0])), space)
        for title, name, body in SECTION.findall(text):
            exec(compile("\n".join(CODE.findall(body)), f"{PAGE.name}: {title}", "exec"), space)
            assert Path(f"{name}.html").read_text() == space["picture"].html()
            found[name] = space["picture"]
    finally:
        os.chdir(here)
    return found


def written(text: str) -> str:
    """The page with a picture below the code of each section, and a table of them at its top."""
    sections = SECTION.findall(text)

    def with_picture(section: re.Match[str]) -> str:
        title, name, body = section.groups()
        body = IMAGE.sub("", body).rstrip("\n")
        image = f"[![{title}](drawings/gallery/{name}.png)](drawings/gallery/{name}.html)"
        return f"## {title} {{ #{name} }}\n{body}\n\n{image}\n\n"

    text = SECTION.sub(with_picture, text).rstrip("\n") + "\n"
    cells = [f"[![{title}](drawings/gallery/{name}.png)<br>{title}](#{name})" for title, name, _ in sections]
    rows = [cells[start : start + 3] for start in range(0, len(cells), 3)]
    table = "".join(f"| {' | '.join([*row, '', ''][:3])} |\n" for row in rows)
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    return text[:start] + "\n| | | |\n|---|---|---|\n" + table + "\n" + text[end:]


def parts(page: str) -> tuple[str, object]:
    """A page without what it draws, and what it draws."""
    before, _, rest = page.partition('id="data">')
    data, _, after = rest.partition("</script>")
    return before + after, json.loads(data)


def alike(one: object, other: object) -> bool:
    """Whether two pages draw the same; numbers may differ by what another processor rounds."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) or isinstance(other, float):
        return one == pytest.approx(other, rel=0.02, abs=0.02)
    long = isinstance(one, str) and isinstance(other, str) and len(one) > 1000  # attention, packed
    return (
        (len(str(one)) == len(str(other)))
        if long
        else type(one) is type(other) and (one == other or isinstance(one, str))
    )


def test_every_picture_is_what_the_code_above_it_makes(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert list(found) == [name for _, name, _ in SECTION.findall(PAGE.read_text())]
    for name, picture in found.items():
        (template, data), (now, drawn) = parts((STORED / f"{name}.html").read_text()), parts(picture.html())
        assert template == now, f"{name}: the page has changed; python -m tests.test_gallery --write"
        assert alike(data, drawn), f"{name}: the picture has changed; python -m tests.test_gallery --write"
        assert (STORED / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in STORED.iterdir()} == set(found)


def test_the_page_shows_each_picture_below_its_code_and_links_to_it() -> None:
    assert written(PAGE.read_text()) == PAGE.read_text()


if __name__ == "__main__" and "--write" in sys.argv:
    STORED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for name, picture in made(Path(place)).items():
            for ending in ("html", "png"):
                picture.save(STORED / f"{name}.{ending}")
    PAGE.write_text(written(PAGE.read_text()))
