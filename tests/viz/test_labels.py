"""What a picture says of its own: real head numbers, tokens as text, a colour bar that fits its panel."""

import base64
import io
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
import torch

from tests.support import falcon as bare_falcon
from tests.support import tokens as random_tokens
from transformer_lens import TransformerBridge
from transformer_lens.viz import (
    Heatmap,
    Heatmaps,
    TokenText,
    Waterfall,
    attention_patterns,
    head_map,
    logit_lens_grid,
    logit_waterfall,
    patching_map,
    routing_map,
    token_losses,
)
from transformer_lens.viz.token_text import COLUMNS, MOST_LINES

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.fixture
def cache(falcon):
    return falcon.run_with_cache(TEXT)[1]


def test_a_waterfall_names_its_tokens_by_text_also_where_ids_were_given(falcon, cache):
    mary, john = falcon.to_single_token(" Mary"), falcon.to_single_token(" John")
    expected = "What adds to the logit of ' Mary' less that of ' John', at position 14"
    assert logit_waterfall(cache, mary, john).title == expected
    assert logit_waterfall(cache, torch.tensor(mary), " John").title == expected
    assert logit_waterfall(cache, mary, position=3).title == "What adds to the logit of ' Mary', at position 3"
    torch.testing.assert_close(
        logit_waterfall(cache, mary, john).values, logit_waterfall(cache, " Mary", " John").values
    )


def test_without_a_tokenizer_a_waterfall_shows_ids():
    bridge = TransformerBridge(bare_falcon())
    _, cache = bridge.run_with_cache(random_tokens(1))
    assert (
        logit_waterfall(cache, 12, 7).title == "What adds to the logit of token 12 less that of token 7, at position 6"
    )


def test_chosen_heads_keep_their_numbers(falcon, cache):
    tokens = falcon.to_str_tokens(TEXT)
    pattern = cache["pattern", 1][0]
    chosen = attention_patterns(tokens, pattern[[3, 1]], heads=[3, 1], layers=1, first=(1, 1))
    assert (list(chosen.panels), chosen.first) == (["L1H3", "L1H1"], "L1H1")
    seen = torch.ones(15, 15, dtype=torch.bool).tril()
    for head in (3, 1):
        assert torch.equal(chosen.panels[f"L1H{head}"].values[seen], pattern[head][seen])
    assert list(attention_patterns(tokens, pattern[2], heads=2).panels) == ["head 2"]
    assert list(attention_patterns(tokens, pattern[2:3], heads=[2]).panels) == ["head 2"]
    assert list(attention_patterns(tokens, pattern[2], heads=2, layers=1).panels) == ["L1H2"]
    layers = torch.stack([cache["pattern", layer][0, :2] for layer in (1, 3)])
    stacked = attention_patterns(tokens, layers, layers=(1, 3))
    assert list(stacked.panels) == [f"L{layer}H{head}" for layer in (1, 3) for head in (0, 1)]
    assert torch.equal(stacked.panels["L3H1"].values[seen], cache["pattern", 3][0, 1][seen])


def test_of_a_cache_heads_and_layers_are_chosen(falcon, cache):
    tokens = falcon.to_str_tokens(TEXT)
    some = attention_patterns(tokens, cache, heads=[1, 3], layers=[0, 2])
    assert list(some.panels) == ["L0H1", "L0H3", "L2H1", "L2H3"]
    seen = torch.ones(15, 15, dtype=torch.bool).tril()
    assert torch.equal(some.panels["L2H3"].values[seen], cache["pattern", 2][0, 3][seen])
    assert list(attention_patterns(tokens, cache, heads=3, layers=2).panels) == ["L2H3"]
    with pytest.raises(ValueError, match=r"got L0H4, expected heads 0 to 3 of layers \[0, 1, 2, 3\]"):
        attention_patterns(tokens, cache, heads=[1, 4])
    assert list(attention_patterns(tokens, cache, heads=3, layers=-1).panels) == ["L3H3"]
    with pytest.raises(ValueError, match="layers: got 4, expected -4 to 3 in a model of 4 layers"):
        attention_patterns(tokens, cache, layers=4)


@pytest.mark.parametrize("numbers", [[1], [1, 1], [1, 2, 3]])
def test_numbers_have_to_fit_the_tensor(falcon, cache, numbers):
    tokens = falcon.to_str_tokens(TEXT)
    with pytest.raises(
        ValueError, match=r"got heads=\[.*\] and layers=None, expected different ones, one for each of the 1 x 2"
    ):
        attention_patterns(tokens, cache["pattern", 1][0, :2], heads=numbers)
    with pytest.raises(ValueError, match=r"got heads=None and layers=\[.*\], expected different ones"):
        attention_patterns(tokens, torch.stack([cache["pattern", i][0] for i in (0, 1)]), layers=numbers)
    with pytest.raises(ValueError, match="say which head a single one is with heads="):
        attention_patterns(tokens, cache["pattern", 1][0, 0])


def test_maps_take_the_ends_of_their_colours(falcon):
    tokens = falcon.to_str_tokens("Mary and John")
    for picture in (
        head_map(torch.eye(4), "heads", limits=(0.0, 2.0)),
        patching_map(torch.zeros(4, 5), tokens, "patches", limits=(0.0, 2.0)),
    ):
        assert picture.data()["panels"][0]["range"] == (0.0, 2.0)
        assert picture.drawing().axes[0].images[0].get_clim() == (0.0, 2.0)
    assert head_map(-3 * torch.eye(4), "heads").range == (-3.0, 3.0)
    for wrong in ((1.0, 1.0), (2.0, 0.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="expected \\(low, high\\), low below high"):
            head_map(torch.eye(4), "heads", limits=wrong)


@pytest.mark.parametrize("picture", [logit_lens_grid, token_losses, routing_map])
def test_a_picture_of_a_text_is_of_one(falcon, picture):
    bridge = TransformerBridge.boot_transformers("tiny-mixtral") if picture is routing_map else falcon
    for several in (["Mary", "John"], ["Mary"], bridge.to_tokens(["Mary", "John"]), torch.zeros(1, 2, 128), None):
        with pytest.raises(TypeError, match=f"{picture.__name__}: got .*, expected one text, or the token ids of one"):
            picture(bridge, several)
    ids = bridge.to_tokens("Mary and John")
    told = [picture(bridge, given).html() for given in ("Mary and John", ids, ids[0])]
    assert told[0] == told[1] == told[2]


def test_values_may_be_lists_and_arrays():
    tokens, wanted = [" Mary", " and"], torch.tensor([2.0, 0.5])
    for values in ([2.0, 0.5], np.array([2.0, 0.5]), (2.0, 0.5)):
        assert torch.equal(TokenText(tokens, {"loss": values}, "t").values["loss"].float(), wanted)
        assert torch.equal(Waterfall(values, tokens, "t").values.float(), wanted)
        assert torch.equal(Heatmap([values], ["row"], tokens, "t").values[0].float(), wanted)
    assert torch.equal(TokenText(tokens, [2.0, 0.5]).values["value"].float(), wanted)
    assert list(TokenText(tokens, torch.tensor([2.0, 0.5]), unit="nats").values) == ["nats"]
    for wrong in (["a", "b"], [[1.0], [1.0, 2.0]], "ab", None):
        for make in (
            lambda values: TokenText(tokens, {"loss": values}, "t"),
            lambda values: Waterfall(values, tokens, "t"),
            lambda values: Heatmap(values, ["row"], tokens, "t"),
            lambda values: head_map(values, "t"),
        ):
            with pytest.raises(TypeError, match="expected a tensor, an array or a list of numbers"):
                make(wrong)


def bars_of(drawing, panels: int) -> list[tuple[float, float]]:
    """The ends of every colour bar of a drawing, which stand after its panels."""
    return [axes.get_ylim() for axes in drawing.axes[panels:]]


def test_panels_share_a_colour_bar_only_where_their_colours_mean_the_same():
    def panel(size: float, **options) -> Heatmap:
        return Heatmap(size * torch.eye(2), ["a", "b"], ["x", "y"], "", **options)

    same = Heatmaps({"a": panel(2), "b": panel(-2)}, "same").drawing()
    assert bars_of(same, 4 - 2) == [(-2.0, 2.0)]
    units = Heatmaps({"a": panel(2), "b": panel(2, value="share")}, "units").drawing()
    assert [axes.get_ylabel() for axes in units.axes[2:]] == ["value", "share"]
    different = Heatmaps({"a": panel(2), "b": panel(5), "c": panel(2, value="share")}, "different").drawing()
    assert [axes.images[0].get_clim() for axes in different.axes[:3]] == [(-2, 2), (-5, 5), (-2, 2)]
    assert bars_of(different, 3) == [(-2.0, 2.0), (-5.0, 5.0), (-2.0, 2.0)]
    assert [axes.get_ylabel() for axes in different.axes[3:]] == ["value", "value", "share"]


def pixels(picture: TokenText) -> np.ndarray:
    bundle = picture._repr_mimebundle_()
    assert bundle["text/plain"] == repr(picture)
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(bundle["image/png"])))


def test_text_has_an_image_for_readers_that_show_no_html():
    drawn = pixels(TokenText(["aaaa", "bbbb", "cccc"], {"v": torch.tensor([2.0, 0.0, -1.0])}, "t", "nats"))
    found = {tuple(np.round(colour * 255).astype(int)) for colour in drawn[..., :3].reshape(-1, 3)}
    # Blue and orange of the palette on white, at three quarters of their strength and at half of that.
    strong = tuple(round(255 - 0.75 * (255 - c)) for c in (0, 114, 178))
    half = tuple(round(255 - 0.375 * (255 - c)) for c in (213, 94, 0))
    for wanted in (strong, half):
        assert min(max(abs(a - b) for a, b in zip(wanted, colour, strict=True)) for colour in found) <= 1
    said = " ".join(
        text.get_text()
        for axes in TokenText(["a"], {"v": torch.tensor([2.0])}, "t", "nats").drawing().axes
        for text in [axes.title, axes._left_title, *axes.texts]
    )
    assert "v: full colour is 2 nats" in said


def written(drawing) -> list[list[str]]:
    """The tokens of every panel of a drawing, in their order."""
    return [[text.get_text() for text in axes.texts] for axes in drawing.axes]


def test_an_image_of_text_breaks_lines_between_tokens_and_stays_a_page():
    words = [f" word{i}" for i in range(40)]
    drawing = TokenText(words, {"a": torch.ones(40), "b": torch.zeros(40)}, "t").drawing()
    assert written(drawing) == [[word.replace(" ", "\u00a0") for word in words]] * 2
    places = [text.get_position() for text in drawing.axes[0].texts]
    assert all(x + len(word) <= COLUMNS for (x, _), word in zip(places, words, strict=True))
    assert len({y for _, y in places}) == -(-sum(map(len, words)) // COLUMNS) or len({y for _, y in places}) == 5
    after_break = TokenText(["a\n", "b"], {"a": torch.ones(2)}, "t").drawing().axes[0].texts
    assert after_break[1].get_position()[0] == 0 and after_break[1].get_position()[1] > after_break[0].get_position()[1]
    long = TokenText(["x" * 200] * 1000, {str(i): torch.ones(1000) for i in range(9)}, "long").drawing()
    assert [len(panel) for panel in written(long)] == [MOST_LINES]
    assert long.get_suptitle() == "long   (the first part)"
    assert "(the first part)" not in drawing.get_suptitle()


def extents(drawing):
    """Where the title and the labels of the first panel's columns are, in pixels: (left, right)."""
    drawing.canvas.draw()
    labels = [label.get_window_extent() for label in drawing.axes[0].get_xticklabels() if label.get_text()]
    return drawing._suptitle.get_window_extent(), labels


@pytest.mark.parametrize(
    ("columns", "lying"),
    [
        (["0", "1", "2"], True),
        (["nothing", "last layer", "layers below"], True),
        (["<|bos|>", *[" Mary"] * 14], False),
        ([" When", *[" Mary"] * 14], True),
        (["a rather long label", "another long label", "x", "yy", "zzz", "again a long label"], False),
        ([str(i) for i in range(71)], True),
    ],
)
def test_labels_lie_where_they_have_room_and_never_overlap(columns, lying):
    rows = ["0", "1", "a row"]
    drawing = Heatmap(torch.randn(3, len(columns)), rows, columns, "t").drawing()
    _, labels = extents(drawing)
    angles = {label.get_rotation() for label in drawing.axes[0].get_xticklabels()}
    assert angles == ({0.0} if lying else {40.0})
    if lying:
        assert all(one.x1 < other.x0 for one, other in pairwise(labels))
    panels = Heatmaps({name: Heatmap(torch.randn(3, len(columns)), rows, columns, "") for name in "abc"}, "t").drawing()
    _, labels = extents(panels)
    if {label.get_rotation() for label in panels.axes[0].get_xticklabels()} == {0.0}:
        assert all(one.x1 < other.x0 for one, other in pairwise(labels))


def test_titles_are_whole():
    title = "What the induction heads still find, without two heads of the first layer, and " * 3
    for picture in (
        Heatmap(torch.eye(2), ["a row with a very long label indeed", "b"], ["x", "y"], title),
        Heatmaps({"a": Heatmap(torch.eye(2), ["a", "b"], ["x", "y"], "")}, title),
        TokenText(["a"], {"v": torch.ones(1)}, title),
        Waterfall(torch.ones(2), ["a", "b"], title),
    ):
        drawing = picture.drawing()
        drawing.canvas.draw()
        box = drawing._suptitle.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= drawing.bbox.width and box.y1 <= drawing.bbox.height
        assert drawing.get_suptitle().split() == title.split()


def test_nothing_is_minus_zero_and_many_heads_fit_a_page():
    drawing = Heatmap(torch.tensor([[-0.001, 0.004, -0.006]]), ["a"], ["x", "y", "z"], "t").drawing()
    assert [text.get_text() for text in drawing.axes[0].texts] == ["0.00", "0.00", "-0.01"]
    falcon_7b = head_map(torch.randn(32, 71), "every head of Falcon-7B").drawing()
    assert falcon_7b.get_figwidth() <= 16 and falcon_7b.get_figheight() <= 10
    assert not falcon_7b.axes[0].texts
