"""Pictures of runs: what they show is what the model did, and bad input is refused with a sentence."""

import json

import numpy as np
import pytest
import torch

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
from transformer_lens.viz.picture import visible

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.fixture(scope="module")
def mixtral() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-mixtral")


@pytest.fixture(scope="module")
def tokens(falcon) -> list[str]:
    return falcon.to_str_tokens(TEXT)


def in_page(page: str):
    """What the script of a page draws."""
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


@pytest.fixture
def cache(falcon):
    return falcon.run_with_cache(TEXT)[1]


def test_attention_patterns_show_every_head_and_hide_the_future(cache, tokens):
    picture = attention_patterns(tokens, cache, first=(1, 2))
    assert len(picture.panels) == 16
    shown = picture.panels["L2H1"].values
    seen = torch.ones(15, 15, dtype=torch.bool).tril()
    assert torch.equal(shown[seen], cache["pattern", 2][0, 1][seen])
    assert shown[~seen].isnan().all()
    assert picture.place == 1 * 4 + 2


def test_attention_given_as_a_tensor(cache, tokens):
    one = attention_patterns(tokens, cache["pattern", 1][0])
    assert list(one.panels) == [f"head {h}" for h in range(4)]
    stacked = attention_patterns(tokens, torch.stack([cache["pattern", i][0] for i in range(2)]), first=(1, 3))
    assert (len(stacked.panels), stacked.first) == (8, "L1H3")
    # With a KV cache there are fewer queries than keys: the last positions.
    late = attention_patterns(tokens, cache["pattern", 1][0, :, -2:])
    assert late.panels["head 0"].rows == tokens[-2:]
    assert late.panels["head 0"].values.isnan().sum() == 1


def test_what_attention_patterns_refuse(falcon, cache, tokens):
    with pytest.raises(ValueError, match=r"pattern of \[15, 15\] and 14 tokens"):
        attention_patterns(tokens[1:], cache)
    with pytest.raises(ValueError, match=r"a tensor of \[15, 15\], expected \[head query_pos key_pos\]"):
        attention_patterns(tokens, cache["pattern", 0][0, 0])
    with pytest.raises(ValueError, match=r"first=\(9, 0\), and there is no L9H0"):
        attention_patterns(tokens, cache, first=(9, 0))
    _, some = falcon.run_with_cache([TEXT, TEXT])
    with pytest.raises(ValueError, match=r"a batch of 2, expected one text; choose it by"):
        attention_patterns(tokens, some)
    _, none = falcon.run_with_cache(TEXT, names_filter="hook_embed")
    with pytest.raises(ValueError, match="holds no attn.hook_pattern"):
        attention_patterns(tokens, none)


def test_the_lens_grid_ends_in_what_the_model_says(falcon):
    grid = logit_lens_grid(falcon, TEXT)
    probabilities = falcon(TEXT)[0].softmax(-1)
    best = probabilities.max(-1)
    assert list(grid.texts[-1]) == [falcon.to_string([i]) for i in best.indices.tolist()]
    torch.testing.assert_close(grid.values[-1], best.values, rtol=1e-4, atol=1e-5)
    assert grid.texts[-1][-1] == " Mary"
    assert grid.notes[-1][-1].startswith("' Mary' ")
    assert grid.notes[0][0].count(",") >= 4


def test_a_waterfall_ends_at_the_logit_difference(falcon, cache):
    picture = logit_waterfall(cache, " Mary", " John")
    logits = falcon(TEXT)[0, -1].detach()
    mary, john = falcon.to_single_token(" Mary"), falcon.to_single_token(" John")
    constant = (falcon.ln_final.b @ falcon.unembed.W_U + falcon.unembed.b_U).detach()
    expected = logits[mary] - logits[john] - (constant[mary] - constant[john])
    assert float(picture.values.sum()) == pytest.approx(float(expected), abs=1e-3)
    labels, values = logit_waterfall(cache, " Mary", " John", most=5).bars()
    assert (len(labels), labels[-1]) == (6, "17 others")
    assert sum(values) == pytest.approx(float(expected), abs=1e-3)
    assert min(map(abs, values[:-1])) == pytest.approx(float(picture.values.abs().sort().values[-5]), abs=1e-5)
    bars = picture.drawing().axes[0].patches
    assert len(bars) == 22 + 1 and bars[-1].get_height() == pytest.approx(float(expected), abs=1e-3)


def test_routing_shows_each_chosen_experts_weight(mixtral):
    picture = routing_map(mixtral, TEXT)
    _, cache = mixtral.run_with_cache(TEXT)
    assert list(picture.panels) == ["layer 0", "layer 1", "layer 2"]
    for layer in range(3):
        shares = picture.panels[f"layer {layer}"].values
        torch.testing.assert_close(shares.sum(0), torch.ones(15))
        assert torch.equal((shares > 0).sum(0), torch.full((15,), 2))
        best = cache["expert_indices", layer][0, :, 0]
        assert torch.equal(shares.argmax(0), best)


def test_losses_colour_the_token_that_was_hard_to_predict(falcon):
    picture = token_losses(falcon, TEXT + " Mary")
    log_probs = falcon(TEXT + " Mary")[0].log_softmax(-1)
    ids = falcon.to_tokens(TEXT + " Mary")[0]
    expected = -log_probs[torch.arange(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(picture.values["loss"][1:], expected, rtol=1e-4, atol=1e-5)
    assert picture.values["loss"][0] == 0
    page = picture.html()
    assert "<script src" not in page and "<link" not in page
    assert np.allclose(in_page(page)["rows"][0], picture.values["loss"].numpy(), atol=1e-6)


def test_tokens_cannot_break_out_of_the_page():
    picture = TokenText(["</script><b>", "\n"], {"</script>": torch.tensor([1.0, -1.0])}, title="<i>", unit="</script>")
    page = picture.html()
    assert page.count("</script>") == 2  # the two that close ours
    assert "<b>" not in page and "<i>" not in page
    assert in_page(page)["tokens"] == ["</script><b>", "\n"]
    bundle = picture._repr_mimebundle_()["text/html"]
    assert bundle.count("</script>") == 2 and "<b>" not in bundle and "<i>" not in bundle


@pytest.mark.parametrize("ending", ["html", "png", "svg", "pdf"])
def test_every_kind_saves_to_one_file(tmp_path, falcon, mixtral, cache, tokens, ending):
    pictures = [
        attention_patterns(tokens, cache),
        head_map(torch.eye(4), "heads"),
        patching_map(torch.zeros(4, 15), tokens, "patches"),
        logit_lens_grid(falcon, TEXT),
        logit_waterfall(cache, " Mary"),
        routing_map(mixtral, TEXT),
        token_losses(falcon, TEXT),
    ]
    for number, picture in enumerate(pictures):
        file = picture.save(tmp_path / f"{number}.{ending}")
        starts = {"html": b"<!doctype html>", "png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}
        assert file.read_bytes().startswith(starts[ending])
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == len(pictures)


def test_in_a_notebook_it_is_live_and_has_an_image(cache, tokens):
    bundle = attention_patterns(tokens, cache)._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBOR")
    # The image stands in the HTML too, for readers that run no script; the page is data until a script runs.
    assert f'src="data:image/png;base64,{bundle["image/png"]}"' in bundle["text/html"]
    page = json.loads(bundle["text/html"].split('<script type="application/json">')[1].split("</script>")[0])
    assert page == attention_patterns(tokens, cache).html()


def test_long_texts_thin_their_labels():
    axes = Heatmap(torch.zeros(2, 300), ["a", "b"], [str(i) for i in range(300)], "long").drawing().axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) == 60 and labels[:2] == ["0", "5"]


def test_what_does_not_fit_is_refused(falcon, tokens):
    with pytest.raises(ValueError, match=r"head_map: got values of shape \[4\], expected \[layer head\]"):
        head_map(torch.zeros(4), "x")
    with pytest.raises(ValueError, match=r"got values of shape \[4, 3\], expected \[4, 15\] for the labels"):
        patching_map(torch.zeros(4, 3), tokens, "x")
    with pytest.raises(ValueError, match=r"got texts that do not fill \[1, 2\] cells"):
        Heatmap(torch.zeros(1, 2), ["a"], ["b", "c"], "x", texts=[["only one"]])
    with pytest.raises(ValueError, match="got no panel"):
        Heatmaps({}, "x")
    with pytest.raises(ValueError, match="got first='b', expected one of"):
        Heatmaps({"a": Heatmap(torch.zeros(1, 1), ["a"], ["b"], "x")}, "x", first="b")
    with pytest.raises(ValueError, match="expected one value for each label, at least one"):
        Waterfall(torch.zeros(2), ["a"], "x")
    with pytest.raises(ValueError, match="not finite"):
        Waterfall(torch.tensor([float("nan")]), ["a"], "x")
    with pytest.raises(ValueError, match="most: got 0, expected 1 or more"):
        Waterfall(torch.zeros(1), ["a"], "x", most=0)
    with pytest.raises(ValueError, match="got 'v' of shape"):
        TokenText(["a"], {"v": torch.zeros(2)}, "x")
    with pytest.raises(ValueError, match="in 'v' that are not finite"):
        TokenText(["a"], {"v": torch.tensor([float("inf")])}, "x")
    with pytest.raises(ValueError, match="no tokens or no values"):
        TokenText([], {}, "x")
    with pytest.raises(ValueError, match="routing_map needs a mixture of experts"):
        routing_map(falcon, TEXT)
    with pytest.raises(ValueError, match=r"got 'x.gif', expected a name that ends in .html, .png, .svg or .pdf"):
        head_map(torch.eye(2), "x").save("x.gif")
    with pytest.raises(ValueError, match=r"an interval that does not fill \[1, 2\] cells"):
        Heatmap(torch.zeros(1, 2), ["a"], ["b", "c"], interval=(torch.zeros(1, 2), torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="got 2 notes, expected one for each of the 1 tokens"):
        TokenText(["a"], [1.0], notes=["b", "c"])


def test_panels_with_rows_of_their_own_keep_their_labels():
    def panel(rows):
        return Heatmap(torch.eye(2), rows, ["x", "y"], "")

    drawn = Heatmaps({"a": panel(["1", "2"]), "b": panel(["1", "2"]), "c": panel(["3", "4"])}, "panels").drawing()
    labels = [[tick.get_text() for tick in axes.get_yticklabels()] for axes in drawn.axes[:3]]
    assert labels == [["1", "2"], [], ["3", "4"]]


def test_control_characters_show_as_codes(recwarn):
    Heatmap(torch.eye(2), ["\x03", "\r"], ["\n", "\u200d"], "codes").png()
    assert [visible(token) for token in ("\x03", "\r", "\u200d", "é", " a")] == ["\\x03", "\\r", "\\u200d", "é", " a"]
    assert not recwarn.list
