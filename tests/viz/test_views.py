"""What the pages hold: attention as whole numbers, lenses with their paths, uncertainty, steering, predictions."""

import base64
import time

import numpy as np
import pytest
import torch

from transformer_lens import TransformerBridge
from transformer_lens.analysis.lenses import TunedLens
from transformer_lens.viz import (
    Heatmap,
    Heatmaps,
    attention_patterns,
    bootstrap,
    expert_map,
    head_map,
    lens_grids,
    logit_lens_grid,
    patching_map,
    path_map,
    routing_map,
    steering_sweep,
    token_predictions,
    top_contexts_text,
    tuned_lens_grid,
)

TEXT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.fixture(scope="module")
def mixtral() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-mixtral")


def random_patterns(layers: int, heads: int, tokens: int) -> torch.Tensor:
    scores = torch.randn(layers, heads, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def unpacked(data) -> torch.Tensor:
    """The patterns in a page, [head query key], as its script reads them."""
    kind = "<u2" if data["levels"] == 65535 else "u1"
    counts = np.frombuffer(base64.b64decode(data["values"]), kind).astype(np.float32) / data["levels"]
    keys, queries, heads = len(data["tokens"]), data["queries"], len(data["heads"])
    found = torch.zeros(heads, queries, keys)
    found[:, torch.ones(queries, keys, dtype=torch.bool).tril(data["first_query"])] = torch.tensor(counts).view(
        heads, -1
    )
    return found


def test_a_page_of_attention_holds_every_value(falcon):
    tokens, (_, cache) = falcon.to_str_tokens(TEXT), falcon.run_with_cache(TEXT)
    data = attention_patterns(tokens, cache, first="L2H1").data()
    expected = torch.cat([cache["pattern", layer][0] for layer in range(4)])
    torch.testing.assert_close(unpacked(data), expected, atol=0.51 / 65535, rtol=0)
    assert (data["first"], data["heads"][9]) == (9, "L2H1")
    assert data["layers"][1] == {"name": "L1", "heads": [4, 5, 6, 7]}
    late = attention_patterns(tokens, cache["pattern", 1][0, :, -2:]).data()
    torch.testing.assert_close(unpacked(late), cache["pattern", 1][0, :, -2:], atol=0.51 / 65535, rtol=0)


@pytest.mark.parametrize("heads", [32, 71])
def test_all_heads_of_a_7b_fit_a_page(heads):
    patterns, tokens = random_patterns(32, heads, 64), [f" word{i}" for i in range(64)]
    start = time.process_time()
    page = attention_patterns(tokens, patterns).html()
    assert time.process_time() - start < 5
    assert len(page) < 15_000_000


def test_a_longer_text_is_rounded_to_a_byte():
    patterns = random_patterns(2, 32, 400)
    data = attention_patterns([str(i) for i in range(400)], patterns).data()
    assert data["levels"] == 255
    torch.testing.assert_close(unpacked(data), patterns.flatten(0, 1), atol=0.51 / 255, rtol=0)


def test_the_path_of_a_token_is_its_probability_in_every_layer(falcon):
    grid = logit_lens_grid(falcon, TEXT)
    _, cache = falcon.run_with_cache(TEXT)
    probabilities = cache.logit_lens()[:, 0].softmax(-1)
    mary = falcon.to_single_token(" Mary")
    assert grid.paths[-1][" Mary"] == pytest.approx(probabilities[:, -1, mary].tolist(), abs=1e-4)
    assert set(grid.paths[-1]) == {row[-1] for row in grid.texts}


def test_lenses_stand_side_by_side(falcon):
    lens = TunedLens(falcon)
    with torch.no_grad():
        for translator in lens.translators:
            translator.bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    both = lens_grids(lens, TEXT, top=3)
    assert both.beside and both.data()["beside"] and list(both.panels) == ["logit lens", "tuned lens"]
    _, cache = falcon.run_with_cache(TEXT)
    for name, logits in (("logit lens", cache.logit_lens()), ("tuned lens", lens.logits(cache))):
        torch.testing.assert_close(
            both.panels[name].values, logits[:, 0].detach().softmax(-1).amax(-1), rtol=1e-4, atol=1e-5
        )
    assert not torch.equal(both.panels["logit lens"].values, both.panels["tuned lens"].values)
    with pytest.raises(TypeError, match="lens: got a TransformerBridge, expected a TunedLens"):
        tuned_lens_grid(falcon, TEXT)


def test_a_page_of_experts_holds_the_routers_choices(mixtral):
    data = routing_map(mixtral, TEXT).data()
    _, cache = mixtral.run_with_cache(TEXT)
    for number, layer in enumerate(data["layers"]):
        order = cache["expert_weights", number][0].argsort(-1, descending=True)
        assert layer["indices"] == cache["expert_indices", number][0].gather(-1, order).tolist()
        torch.testing.assert_close(
            torch.tensor(layer["weights"]), cache["expert_weights", number][0].gather(-1, order), atol=1e-4, rtol=0
        )
    assert (data["n_experts"], data["layers"][2]["name"]) == (4, "layer 2")


def test_predictions_are_those_of_the_position_before(falcon):
    picture = token_predictions(falcon, TEXT + " Mary", top=2)
    ids = falcon.to_tokens(TEXT + " Mary")[0]
    logits = falcon(ids[None])[0].detach()
    log_probs = logits.log_softmax(-1)
    assert picture.values["loss (nats)"][-1] == pytest.approx(-float(log_probs[-2, ids[-1]]), abs=1e-5)
    assert picture.values["logit"][-1] == pytest.approx(float(logits[-2, ids[-1]]), abs=1e-4)
    entropy = torch.distributions.Categorical(logits=logits[-2]).entropy()
    assert picture.values["entropy (nats)"][-1] == pytest.approx(float(entropy), abs=1e-5)
    assert picture.notes[-1].startswith("expected: ' Mary' 1.00, ")
    assert len(picture.notes) == len(ids) and "nothing was expected" in picture.notes[0]


# -- uncertainty ---------------------------------------------------------------------------------------


def test_the_bootstrap_is_that_of_the_mean():
    values = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(1)) + 1
    mean, low, high = bootstrap(values)
    torch.testing.assert_close(mean, values.mean(0))
    # For a mean, the bootstrap's width comes to that of a normal interval.
    normal = 1.96 * values.std(0, correction=0) / 40**0.5
    torch.testing.assert_close((high - low) / 2, normal, rtol=0.1, atol=0)
    narrow = bootstrap(values, confidence=0.5)
    assert bool((narrow[1] > low).all()) and bool((narrow[2] < high).all())
    assert all(torch.equal(*pair) for pair in zip(bootstrap(values), (mean, low, high), strict=True))
    one = bootstrap([1.0, 2.0, 3.0])
    assert [end.ndim for end in one] == [0, 0, 0] and float(one[0]) == 2
    for wrong in (torch.ones(1, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="expected two prompts or more along the first axis"):
            bootstrap(wrong)


def test_maps_of_several_prompts_show_the_mean_and_its_interval(falcon):
    tokens = falcon.to_str_tokens(TEXT)
    values = torch.randn(9, 4, 15, generator=torch.Generator().manual_seed(2))
    values[:, 0, 0] = 5 + values[:, 0, 0]
    mean, low, high = bootstrap(values)
    pictures = [
        patching_map(values, tokens),
        head_map(values),
        expert_map(values),
        path_map(values, list("abcd"), list(map(str, range(15)))),
    ]
    for picture in pictures:
        torch.testing.assert_close(picture.values, mean)
        torch.testing.assert_close(picture.interval, (low, high))
        assert picture.unsure.tolist() == ((low <= 0) & (high >= 0)).tolist() and not picture.unsure[0, 0]
        written = [text.get_text() for text in picture.drawing().axes[0].texts]
        assert [text.startswith("(") for text in written] == picture.unsure.flatten().tolist()
        panel = picture.data()["panels"][0]
        assert panel["low"][1][1] == pytest.approx(float(low[1, 1]), rel=1e-4)
    assert pictures[0].columns == tokens and not head_map(values[0]).unsure.any()
    with pytest.raises(
        ValueError, match=r"expert_map: got values of shape \[4\], expected \[layer expert\] or \[prompt layer"
    ):
        expert_map(torch.zeros(4))


# -- steering ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_steering_sweep_is_what_one_finds_by_hand(falcon):
    toward = falcon.tokens_to_residual_directions(" Alice").detach()
    prompts = [TEXT, "Mary and John went to the park, and John gave a ball to"]
    sweep = steering_sweep(falcon, prompts, toward, " Alice", layers=[1, -1], scales=[-4, 0, 8], max_new_tokens=3)
    effect, fluency = sweep.panels.values()
    assert (effect.rows, effect.columns) == (["1", "3"], ["-4", "0", "8"])
    assert torch.equal(effect.values[:, 1], torch.zeros(2))
    alice, expected, losses = falcon.to_single_token(" Alice"), [], []
    for prompt in prompts:
        ids = falcon.to_tokens(prompt)
        plain = falcon(ids)[0, -1].log_softmax(-1)[alice]
        with falcon.steer(toward, 3, scale=8.0):
            expected.append(float(falcon(ids)[0, -1].log_softmax(-1)[alice] - plain))
            out = falcon.generate(ids, max_new_tokens=3, do_sample=False)
        log_probs = falcon(out)[0].log_softmax(-1)
        new = range(ids.shape[1], out.shape[1])
        losses.append(-sum(float(log_probs[i - 1, out[0, i]]) for i in new) / len(new))
    assert float(effect.values[1, 2]) == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert float(fluency.values[1, 2]) == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert effect.interval[0][1, 2] == pytest.approx(min(expected), abs=1e-4)
    assert all(f"{prompt} →" in effect.notes[1][2] for prompt in prompts)


def test_a_steering_sweep_takes_a_measure_of_the_text(falcon):
    toward = falcon.tokens_to_residual_directions(" Alice").detach()
    sweep = steering_sweep(falcon, TEXT, toward, lambda said: float("Alice" in said), layers=3, scales=[0.0, 60.0])
    assert sweep.panels["change in the measure"].values.tolist() == [[0.0, 1.0]]
    assert sweep.panels["change in the measure"].interval is None
    with pytest.raises(ValueError, match="got no prompts or no scales"):
        steering_sweep(falcon, [], toward, " Alice")
    with pytest.raises(TypeError, match="measure: got 3, expected a token's text, or a function of a continuation"):
        steering_sweep(falcon, TEXT, toward, 3)
    with pytest.raises(ValueError, match="layers: got 9|layer: got 9"):
        steering_sweep(falcon, TEXT, toward, " Alice", layers=9)


# -- the rest ------------------------------------------------------------------------------------------


def test_top_contexts_are_lines_of_text():
    contexts = [(2.5, 0, 20, [f" w{i}" for i in range(17)]), (1.0, 3, 1, [" John", " left"])]
    picture = top_contexts_text(contexts, "feature 7")
    assert picture.tokens[17] == "\n" and picture.tokens[-3:] == [" John", " left", "\n"]
    values = picture.values["value"].tolist()
    assert values[8] == 2.5 and values[-2] == 1.0 and sum(value != 0 for value in values) == 2


def test_panels_keep_what_is_written_in_their_cells(falcon):
    grid = logit_lens_grid(falcon, TEXT)
    drawn = Heatmaps({"a": grid, "b": grid}).drawing()
    said = [[text.get_text() for text in axes.texts] for axes in drawn.axes[:2]]
    assert said[0] == said[1] == [cell for row in grid.texts for cell in row]
    few = Heatmap(torch.eye(2), ["a", "b"], ["x", "y"])
    assert [text.get_text() for text in Heatmaps({"a": few}).drawing().axes[0].texts] == [
        "1.00",
        "0.00",
        "0.00",
        "1.00",
    ]


def test_images_do_not_change_from_one_drawing_to_the_next():
    for kind in ("png", "pdf"):
        assert head_map(torch.eye(3)).image(kind) == head_map(torch.eye(3)).image(kind)
