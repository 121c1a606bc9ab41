"""The page of features: what it holds, computed a second time, and how it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dictionaries.models import model, random_dictionary
from transformer_lens.data.generate import training_text
from transformer_lens.dictionaries import Dictionary, feature_logits, feature_page, top_contexts

TEXTS = [*training_text(24, seed=2), "<b>Mary</b> & \u201cJohn\u201d </script>"]


def dictionary(d_sae: int = 60) -> Dictionary:
    """Some features that fire now and then, and one that never does."""
    made = random_dictionary(128, d_sae=d_sae)
    with torch.no_grad():
        made.get_parameter("b_enc").sub_(1)
        made.get_parameter("b_enc")[7] = -1e6
    return made


def data(file: Path) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text("utf-8"), re.S)
    return json.loads(found)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "features.html"
    return feature_page(model("tiny-falcon"), dictionary(), TEXTS, path, at=1, k=4)


@torch.no_grad()
def test_what_the_page_holds(page: Path) -> None:
    bridge, found = model("tiny-falcon"), data(page)
    assert [one["number"] for one in found["features"]] == list(range(60))
    assert found["about"] == "relu autoencoder 128 -> 60 -> 128 at blocks.1.hook_resid_post of tiny-falcon"
    everything = []
    for text in TEXTS:
        _, cache = bridge.run_with_cache(text, names_filter="blocks.1.hook_resid_post")
        everything.append(dictionary().encode(cache["resid_post", 1][0]))
    together = torch.cat(everything)
    assert found["count"] == len(together)
    best = top_contexts(bridge, dictionary(), TEXTS, range(60), 1, k=4)
    for number, one in enumerate(found["features"]):
        assert sum(count for _, count in one["histogram"]) == int((together[:, number] > 0).sum())
        for place, count in one["histogram"]:
            low, high = found["bins"][place] * (place > 0), found["bins"][place + 1]  # the first is open
            real = int(((together[:, number] >= low * 0.99) & (together[:, number] < high * 1.01)).sum())
            assert 0 < count <= real
        assert len(one["contexts"]) == len(best[number])
        for context, (value, text, position, words) in zip(one["contexts"], best[number], strict=True):
            assert context["value"] == pytest.approx(value, rel=6e-3)
            assert (context["text"], context["place"]) == (text, position)
            assert [found["tokens"][str(token)] for token in context["tokens"]] == words
            near = everything[text][max(0, position - 8) : position + 9, number].tolist()
            assert context["strengths"] == pytest.approx(near, rel=6e-3, abs=1e-4)
            assert context["strengths"][context["peak"]] == context["value"]
        written = feature_logits(bridge, dictionary(), number)[0]
        assert [token for token, _ in one["logits"]["up"]] == written.topk(8).indices.tolist()
        assert [token for token, _ in one["logits"]["down"]] == (-written).topk(8).indices.tolist()
    assert found["features"][7]["contexts"] == [] == found["features"][7]["histogram"]


def test_a_transcoder_inside_a_mixture(tmp_path: Path) -> None:
    bridge, made = model("tiny-mixtral"), random_dictionary(128, 4)
    file = feature_page(
        bridge, made, TEXTS[:3], tmp_path / "one.html", [3], ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_router_logits")
    )
    (one,) = data(file)["features"]
    assert "logits" not in one and one["number"] == 3


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    bridge = model("tiny-falcon")
    with pytest.raises(ValueError, match=r"features: got 60, expected 0 to 59 \(features\)"):
        feature_page(bridge, dictionary(), TEXTS, tmp_path / "a.html", [60], 1)
    with pytest.raises(ValueError, match="texts: got none"):
        feature_page(bridge, dictionary(), [], tmp_path / "a.html", [6], 1)
    with pytest.raises(TypeError, match="dictionary: got 'nothing', expected a Dictionary"):
        feature_page(bridge, "nothing", TEXTS, tmp_path / "a.html", [6], 1)  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


# -- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "these tests need Chromium; `make pictures` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chromium: Any, file: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page with the network off, and what the console complains of."""
    complaints: list[str] = []
    page = chromium.new_context(offline=True, **options).new_page()
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda asked: complaints.append(asked.url))
    page.goto(file.as_uri())
    return page, complaints


@pytest.mark.browser
def test_search_keyboard_and_order(chromium: Any, page: Path) -> None:
    shown, complaints = opened(chromium, page, viewport={"width": 1280, "height": 800})
    name = shown.locator("#name")
    assert name.text_content() == "Feature 0" and shown.locator("#list button").count() == 60
    shown.keyboard.press("j")
    shown.keyboard.press("ArrowDown")
    shown.keyboard.press("k")
    assert name.text_content() == "Feature 1" and shown.url.endswith("#1")
    shown.keyboard.press("/")
    shown.keyboard.type("7")
    assert shown.locator("#list button").count() == 1 and name.text_content() == "Feature 7"
    assert "does not fire" in shown.locator("#facts").text_content()
    shown.locator("#search").fill("noah")
    listed = shown.locator("#list button").count()
    expected = [one for one in data(page)["features"] if "noah" in said(one, data(page)).lower()]
    assert listed == len(expected) and 0 < listed < 60
    shown.keyboard.press("Escape")
    shown.locator("#search").fill("")
    shown.locator("#order").select_option("most")
    first = int(shown.locator("#list button").first.get_attribute("data-number"))
    strongest = max(data(page)["features"], key=lambda one: one["contexts"][0]["value"] if one["contexts"] else 0)
    assert first == strongest["number"]
    shown.locator("#list button").first.click()
    context, peak = strongest["contexts"][0], shown.locator("#contexts .peak").first
    assert peak.text_content() == data(page)["tokens"][str(context["tokens"][context["peak"]])]
    assert "rgba" in peak.get_attribute("style") and shown.locator("#histogram rect").count() > 2
    assert complaints == []


def said(one: Any, found: Any) -> str:
    tokens = lambda ids: "".join(found["tokens"][str(token)] for token in ids)  # noqa: E731
    return "\n".join(
        [*(found["tokens"][str(t)] for t, _ in one["logits"]["up"]), *(tokens(c["tokens"]) for c in one["contexts"])]
    )


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_thousand_features_can_be_read_on_a_desk_and_on_a_phone(
    chromium: Any, width: int, scheme: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "thousand.html"
    if not file.exists():
        feature_page(model("tiny-falcon"), dictionary(1000), TEXTS, file, at=1, k=10)
    assert file.stat().st_size < 8_000_000
    size = {"width": width, "height": 800}
    shown, complaints = opened(chromium, file, viewport=size, color_scheme=scheme)
    assert shown.locator("#list button").count() == 1000
    shown.evaluate("location.hash = '#997'")
    shown.wait_for_function("document.getElementById('name').textContent === 'Feature 997'")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    box = shown.locator("#list button[aria-current=true]").bounding_box()
    around = shown.locator("#list").bounding_box()
    assert around["y"] <= box["y"] < around["y"] + around["height"], "the chosen feature is in sight"
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 29)"}[scheme]
    press = "for (let i = 0; i < 20; i++) document.getElementById('before').click()"
    milliseconds = shown.evaluate(
        f"(() => {{ const t = performance.now(); {press}; return performance.now() - t; }})()"
    )
    assert milliseconds < 20 * 500, "moving on is quick, also on a busy machine"
    shown.screenshot(path=str(file.with_name(f"thousand_{width}_{scheme}.png")))
    assert complaints == []
