"""Pictures in a real browser, at the width of a desk and of a phone, in light and dark: they are drawn, say nothing on
the console, fit the page, and answer to the mouse, to touch and to the keyboard.

Run by `make pictures`, which installs Chromium where there is none.
"""

import shutil
import time

import pytest
import torch

from transformer_lens import TransformerBridge
from transformer_lens.analysis.lenses import TunedLens
from transformer_lens.viz import (
    Heatmap,
    Heatmaps,
    TokenText,
    Waterfall,
    attention_patterns,
    expert_map,
    head_map,
    lens_grids,
    logit_lens_grid,
    logit_waterfall,
    patching_map,
    path_map,
    routing_map,
    steering_sweep,
    token_losses,
    token_predictions,
    top_contexts_text,
    tuned_lens_grid,
)
from transformer_lens.viz.of_runs import RoutingMap

pytestmark = pytest.mark.browser
TEXT = "When Mary and John went to the store, John gave a drink to"
SCREENS = {
    "desk": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True, "is_mobile": True},
}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "these tests need Chromium; `make pictures` installs it"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=SCREENS)
def screen(request) -> str:
    return request.param


@pytest.fixture
def show(browser, tmp_path, screen):
    """Open a picture as a file, with the network off; fail on what the console complains of, and on a page too wide."""
    complaints: list[str] = []
    context = browser.new_context(offline=True, **SCREENS[screen])
    pages = []

    def open_page(picture):
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda asked: complaints.append(asked.url))
        page.goto(picture.save(tmp_path / "picture.html").as_uri())
        pages.append((picture, page))
        return page

    yield open_page
    width = SCREENS[screen]["viewport"]["width"]
    for picture, page in pages:
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{picture} is too wide"
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.fixture(scope="module")
def mixtral() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-mixtral")


def said(page) -> str:
    return page.locator(".said").first.text_content()


def colour(element) -> str:
    return element.evaluate("e => getComputedStyle(e).backgroundColor")


def test_a_token_tells_what_it_attends_to_and_can_be_locked(show, falcon):
    tokens, (_, cache) = falcon.to_str_tokens(TEXT), falcon.run_with_cache(TEXT)
    page = show(attention_patterns(tokens, cache, first="L3H2"))
    words = page.locator(".tokens .token")
    pattern = cache["pattern", 3][0, 2]
    words.nth(14).click()  # a tap, on a phone
    value, key = pattern[14].max(0)
    assert said(page).startswith(f"L3H2: from ' to' (14): '{tokens[key]}' ({int(key)}) {value:.3f}")
    assert colour(words.nth(int(key))) != colour(words.nth(1))
    words.nth(3).hover()
    assert "from ' to' (14)" in said(page)  # locked
    page.get_by_role("button", name="who attends to it").click()
    assert "L3H2: to ' to' (14)" in said(page)
    words.nth(14).click()
    words.nth(10).hover()
    asks = pattern[:, 10].max(0)
    assert said(page).startswith(
        f"L3H2: to ' John' (10): '{tokens[asks.indices]}' ({int(asks.indices)}) {asks.values:.3f}"
    )


def test_the_large_pattern_says_its_values_and_thumbnails_choose_the_head(show, falcon):
    tokens, (_, cache) = falcon.to_str_tokens(TEXT), falcon.run_with_cache(TEXT)
    page = show(attention_patterns(tokens, cache))
    assert page.locator(".thumbs button").count() == 16
    page.get_by_role("button", name="L1H2").click()
    assert page.locator("select").input_value() == "L1H2"
    large = page.locator("canvas.large")
    large.scroll_into_view_if_needed()
    box, cell = large.bounding_box(), 1 / len(tokens)
    page.mouse.move(box["x"] + 4.5 * cell * box["width"], box["y"] + (1 - cell / 2) * box["height"])
    assert said(page) == f"L1H2: from ' to' (14) to ' John' (4): {cache['pattern', 1][0, 2, 14, 4]:.3f}"
    page.get_by_role("button", name="L1H2").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("select").input_value() == "L2H3"
    # What is drawn large is that head: the cell of its largest value is darker than paper, in light and in dark.
    q, k = divmod(int(cache["pattern", 2][0, 3].argmax()), len(tokens))
    read = "(c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    pixels = torch.tensor(large.evaluate(read)).view(len(tokens), len(tokens), 4)
    assert pixels[q, k, :3].tolist() != pixels[0, 0, :3].tolist() or cache["pattern", 2][0, 3, 0, 0] > 0.99
    assert pixels[..., 3].bool().tolist() == torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril().tolist()


def test_the_heads_of_a_7b_open_soon_and_draw_what_is_in_sight(show):
    patterns = torch.randn(32, 32, 64, 64).tril().softmax(-1)
    picture = attention_patterns([f" word{i}" for i in range(64)], patterns)
    start = time.monotonic()
    page = show(picture)
    page.wait_for_selector(".thumbs button[aria-pressed=true]")
    page.locator(".tokens .token").nth(63).click()
    assert "L0H0: from ' word63' (63)" in said(page)
    assert time.monotonic() - start < 30  # the browser's own start included; some seconds on an idle machine
    page.locator(".thumbs").scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.thumbs canvas').width === 64")
    drawn = page.evaluate("[...document.querySelectorAll('.thumbs canvas')].filter((c) => c.width === 64).length")
    assert 4 <= drawn < 1024


def test_lenses_answer_together_and_follow_a_token(show, falcon):
    page = show(lens_grids(TunedLens(falcon), TEXT))
    tables = page.locator("table.grid")
    assert tables.count() == 2
    last = tables.first.locator("td").last
    assert last.text_content() == " Mary"
    last.scroll_into_view_if_needed()
    last.click()
    both = page.locator(".said").all_text_contents()
    assert len(both) == 2 and all(text.startswith("stream final_post, after ' to' (14): ") for text in both)
    assert all("' Mary' 1.00" in text for text in both)
    assert page.locator("svg").count() == 2
    assert "the path of ' Mary'" in page.locator("h2").all_text_contents()[2]
    assert " Mary" in page.locator("svg").first.locator("text[font-weight=bold]").all_text_contents()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".said").first.text_content().startswith("stream final_post, after ' drink' (13)")


def test_experts_have_a_layer_at_a_time(show, mixtral):
    picture = routing_map(mixtral, TEXT)
    layers = picture.data()["layers"]
    page = show(picture)
    page.locator(".routed").nth(2).click()
    best, weight = layers[0]["indices"][2][0], layers[0]["weights"][2][0]
    assert said(page).startswith(f"' Mary' (2), layer 0: expert {best}: {weight:.3f}")
    page.get_by_label("layer").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("output").text_content() == "layer 1"
    page.get_by_role("button", name="expert 3", exact=True).click()
    chosen = sum(3 in row for row in layers[1]["indices"])
    assert said(page).startswith(f"expert 3 of layer 1: chosen for {chosen} of 15 tokens")
    assert page.locator(".routed.faded").count() == 15 - chosen


def test_text_shows_values_on_hover_and_changes_with_its_menu(show):
    rows = {"loss": torch.tensor([2.0, 0.0, 1.0]), "score": torch.tensor([0.0, -3.0, 0.0])}
    page = show(TokenText([" Mary", " and", "\n"], rows, title="two rows", unit="nats", notes=["", "a note", ""]))
    words = page.locator(".tokens .token")
    before = [colour(words.nth(i)) for i in range(3)]
    assert len(set(before)) == 3
    words.nth(0).click()
    assert said(page).startswith("' Mary' (0): loss 2.0000 nats, score 0.0000 nats")
    words.nth(0).click()
    page.locator("select").select_option("score")
    assert [colour(words.nth(i)) for i in range(3)] != before
    words.nth(1).click()
    assert "score -3.0000 nats\na note" in said(page)
    page.keyboard.press("Tab")
    assert words.nth(2).text_content() == "⏎"


def test_patching_shows_its_uncertainty(show, falcon):
    tokens = falcon.to_str_tokens(TEXT)
    picture = patching_map(torch.randn(9, 4, 15), tokens, "patches")
    page = show(picture)
    assert page.locator("td.unsure").count() == int(picture.unsure.sum())
    page.locator("td").nth(0).click()
    low, high = (float(end[0, 0]) for end in picture.interval)
    assert said(page).startswith("layer 0, position '<|bos|>' (0): ")
    assert f"{round(low, 4):g}"[:5] in said(page) and f"{round(high, 4):g}"[:5] in said(page)
    assert page.locator("svg polygon").count() == 1


def test_every_kind_is_drawn_within_the_page(show, falcon, mixtral):
    tokens, (_, cache) = falcon.to_str_tokens(TEXT), falcon.run_with_cache(TEXT)
    toward = falcon.tokens_to_residual_directions(" Alice").detach()
    pictures = [
        head_map(torch.randn(32, 71), "every head of a Falcon-7B"),
        expert_map(torch.randn(32, 128), "every expert"),
        path_map(torch.randn(5, 2, 2), ["L0H1", "L1H2"], ["L3H1.q", "L3H1.k"], "paths"),
        logit_lens_grid(falcon, TEXT),
        tuned_lens_grid(TunedLens(falcon), TEXT),
        steering_sweep(falcon, TEXT, toward, " Alice", layers=[1, 2], max_new_tokens=2),
        logit_waterfall(cache, " Mary", " John"),
        token_losses(falcon, TEXT),
        token_predictions(falcon, TEXT),
        top_contexts_text([(2.5, 0, 1, [" Mary", " and", " John"])], "a feature"),
        Heatmap(torch.zeros(2, 300), ["a", "b"], tokens * 20, "long"),
    ]
    for picture in pictures:
        page = show(picture)
        drawn = page.locator("table.grid td, svg rect, .tokens .token")
        assert drawn.count() >= 4
        shown = {colour(drawn.nth(i)) for i in range(min(40, drawn.count()))}
        fills = page.evaluate(
            "[...new Set([...document.querySelectorAll('svg rect')].map((e) => e.getAttribute('fill')))].length"
        )
        assert len(shown) > 1 or fills > 1 or "long" in repr(picture), f"{picture} has one colour"
        drawn.first.click()
        assert len(said(page)) > 8


def test_the_other_kinds_open_at_the_size_of_a_7b(show):
    layers, tokens, experts = 32, [f" word{i}" for i in range(64)], 64
    texts = [[f" said{i}" for i in range(64)] for _ in range(layers)]
    notes = [[", ".join(f"' w{n}' 0.10" for n in range(5))] * 64] * layers
    paths = [{f" said{i}": [0.5] * layers, **{f" other{n}": [0.1] * layers for n in range(12)}} for i in range(64)]
    chances, labels = torch.rand(layers, 64), [f"{i}_pre" for i in range(layers)]
    axes = ("stream", "after", "probability", (0.0, 1.0))
    lens = Heatmap(chances, labels, tokens, "lens", *axes, texts, notes, paths=paths)
    weights = torch.rand(layers, experts, 64)
    weights = weights * (weights >= weights.topk(8, dim=1).values[:, -1:])
    names = list(map(str, range(experts)))
    panels = {f"layer {i}": Heatmap(one, names, tokens, f"layer {i}") for i, one in enumerate(weights)}
    sweep = Heatmap(torch.randn(layers, 9), list(map(str, range(layers))), list("123456789"), "", "layer", "strength")
    pictures = [
        (Heatmaps({"logit lens": lens, "tuned lens": lens}, "lenses", beside=True), ("td", 2 * layers * 64)),
        (RoutingMap(panels, "Routing"), (".routed", 64)),
        (patching_map(torch.randn(20, layers, 64), tokens, "patching"), ("td", layers * 64)),
        (Heatmaps({"effect": sweep, "fluency": sweep}, "steering", beside=True), ("td", 2 * layers * 9)),
        (TokenText(tokens * 32, torch.randn(2048), "a long text"), (".tokens .token", 2048)),
        (head_map(torch.randn(32, 32), "heads"), ("td", 1024)),
        (expert_map(torch.randn(32, 64), "experts"), ("td", 2048)),
        (Waterfall(torch.randn(1100), [f"part {i}" for i in range(1100)], "parts", most=60), ("rect", 62)),
    ]
    for picture, (what, count) in pictures:
        assert len(picture.html()) < 15_000_000
        start = time.monotonic()
        page = show(picture)
        drawn = page.locator(what)
        assert drawn.count() == count
        drawn.nth(count // 2).click()
        assert len(said(page)) > 8
        assert time.monotonic() - start < 30  # a second or two on an idle machine


def test_a_notebook_shows_the_page_where_scripts_run_and_the_image_elsewhere(browser, falcon, tmp_path):
    fragment = token_losses(falcon, TEXT)._repr_mimebundle_()["text/html"]
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset=utf-8><body>{fragment}</body>")
    for scripts in (True, False):
        context = browser.new_context(offline=True, java_script_enabled=scripts)
        page = context.new_page()
        page.goto((tmp_path / "notebook.html").as_uri())
        if scripts:
            frame = page.frame_locator("iframe")
            frame.locator(".tokens .token").nth(2).click()
            assert frame.locator(".said").text_content().startswith("' Mary' (2): loss")
            page.wait_for_function("document.querySelector('iframe').clientHeight < 400")
        assert page.locator("img").count() == (0 if scripts else 1)
        context.close()
