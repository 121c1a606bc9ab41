"""Pictures in a real browser: they are drawn, say nothing on the console, and answer to the mouse.

Run by `make pictures`, which installs Chromium where there is none.
"""

import shutil

import pytest
import torch

from transformer_lens import TransformerBridge
from transformer_lens.viz import (
    TokenText,
    attention_patterns,
    head_map,
    logit_lens_grid,
    logit_waterfall,
    patching_map,
    routing_map,
)

pytestmark = pytest.mark.browser
TEXT = "When Mary and John went to the store, John gave a drink to"
WIDTH = 900


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "these tests need Chromium; `make pictures` installs it"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a picture as a file, with the network off; fail on anything the console complains of."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": WIDTH, "height": 800}, offline=True)

    def open_page(picture):
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda asked: complaints.append(asked.url))
        page.goto(picture.save(tmp_path / "picture.html").as_uri())
        return page

    yield open_page
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


def hovered(page, x: float, y: float) -> str:
    """What shows when the mouse rests at a share of the plot's width and height."""
    box = page.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
    page.wait_for_timeout(500)  # plotly answers to the last move within some tens of milliseconds
    page.wait_for_selector(".hoverlayer .hovertext", timeout=5000)
    return page.locator(".hoverlayer .hovertext").first.text_content()


def test_hovering_over_attention_names_tokens_and_value_and_the_menu_changes_the_head(show, falcon):
    tokens = falcon.to_str_tokens(TEXT)
    _, cache = falcon.run_with_cache(TEXT)
    page = show(attention_patterns(tokens, cache, first=(1, 2)))
    cell = 1 / len(tokens)
    # The last row, the fifth column: from " to", to " John".
    before = hovered(page, 4.5 * cell, 1 - cell / 2)
    assert "from  to" in before.replace("\xa0", " ")
    assert "to  John" in before.replace("\xa0", " ")
    assert f"{cache['pattern', 1][0, 2, -1, 4]:.3f}" in before
    page.mouse.move(5, 5)
    page.locator(".updatemenu-header").click()
    page.locator(".updatemenu-dropdown-button", has_text="L0H3").click()
    page.wait_for_function("document.querySelector('.js-plotly-plot').data[3].visible === true")
    assert page.evaluate("document.querySelector('.js-plotly-plot').data.filter(t => t.visible === true).length") == 1
    after = hovered(page, 4.5 * cell, 1 - cell / 2)
    assert f"{cache['pattern', 0][0, 3, -1, 4]:.3f}" in after


def test_every_plot_is_drawn_within_the_page(show, falcon):
    tokens = falcon.to_str_tokens(TEXT)
    _, cache = falcon.run_with_cache(TEXT)
    moe = TransformerBridge.boot_transformers("tiny-mixtral")
    pictures = [
        head_map(torch.randn(4, 4), "heads"),
        patching_map(torch.randn(4, 15), tokens, "patches"),
        logit_lens_grid(falcon, TEXT),
        logit_waterfall(cache, " Mary", " John"),
        routing_map(moe, TEXT),
    ]
    for picture in pictures:
        page = show(picture)
        page.wait_for_selector(".js-plotly-plot .main-svg")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= WIDTH, f"{picture} is {width} pixels wide"
        labels = page.locator(".xtick text, .ytick text").all_text_contents()
        assert len(labels) >= 6
        # Cells are an image of more than one colour, bars are paths with an area.
        drawn = page.evaluate(
            "[...document.querySelectorAll('.hm image, .bars path')].some(e => e.getBoundingClientRect().width > 10)"
        )
        assert drawn, f"{picture} shows nothing"
        page.close()


def test_the_lens_grid_shows_tokens_in_cells_that_can_be_read(show, falcon):
    page = show(logit_lens_grid(falcon, TEXT))
    page.wait_for_selector(".heatmap-label")
    said = page.locator(".heatmap-label text").all_text_contents()
    assert " Mary" in [text.replace("\xa0", " ") for text in said]
    size = page.evaluate("parseFloat(getComputedStyle(document.querySelector('.heatmap-label text')).fontSize)")
    assert size >= 11


def test_token_text_shows_values_on_hover_and_changes_with_its_menu(show):
    picture = TokenText(
        [" Mary", " and", "\n"],
        {"loss": torch.tensor([2.0, 0.0, 1.0]), "score": torch.tensor([0.0, -3.0, 0.0])},
        title="two rows",
        unit="nats",
    )
    page = show(picture)
    tokens = page.locator(".token-text-tokens span")
    colours = lambda: [tokens.nth(i).evaluate("e => e.style.background") for i in range(3)]  # noqa: E731
    first = colours()
    assert "0, 114, 178, 0.75" in first[0]
    tokens.nth(0).hover()
    assert page.locator(".token-text-value").text_content() == " Mary: 2.0000 nats"
    page.locator("select").select_option("score")
    second = colours()
    assert second != first
    assert "213, 94, 0, 0.75" in second[1]
    tokens.nth(1).hover()
    assert page.locator(".token-text-value").text_content() == " and: -3.0000 nats"
