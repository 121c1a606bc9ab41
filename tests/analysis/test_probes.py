"""Probes: what is there is found, what is not is not, and nothing leaks from training to test."""

import math
import sys

import numpy as np
import pytest
import torch

from transformer_lens import TransformerBridge
from transformer_lens.analysis.probes import probe, probe_layers
from transformer_lens.analysis.steering import activations_at
from transformer_lens.data.words import NAMES

SMALL = sorted(NAMES)[:24]


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-falcon")


def test_a_property_along_one_direction_is_found_and_points_there():
    x = torch.randn(400, 12)
    direction = torch.randn(12)
    labels = ["yes" if value > 0 else "no" for value in (x @ direction).tolist()]
    found = probe(x * torch.arange(1, 13), labels)
    assert found.score > 0.95 and found.auc > 0.99 and found.classes == ("no", "yes")
    # In the scaled space the same direction has the inverse scales.
    wanted = direction / torch.arange(1, 13)
    assert float(found.direction @ wanted / wanted.norm()) > 0.97
    assert float(found.direction.norm()) == pytest.approx(1, abs=1e-5)
    assert abs(found.shuffled - 0.5) < 0.12 and abs(found.control - 0.5) < 0.12
    assert found.interval[0] <= found.score <= found.interval[1] and found.interval[1] - found.interval[0] < 0.08


def test_noise_is_chance():
    found = probe(torch.randn(400, 12), [0, 1] * 200)
    assert abs(found.score - 0.5) < 0.1 and abs(found.auc - 0.5) < 0.1
    assert found.interval[0] < 0.5 < found.interval[1] + 0.05


def test_it_is_scikit_learn_by_hand():
    """Out-of-fold predictions of the same model, written out."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    x = torch.randn(90, 5).double()
    y = ((x[:, 0] + torch.randn(90)) > 0).long().numpy()
    right, areas = [], []
    for train, test in StratifiedKFold(3, shuffle=True, random_state=4).split(x, y):
        mean, scale = x[train].mean(0), x[train].std(0, unbiased=False)
        model = LogisticRegression(C=0.5, max_iter=2000).fit(((x[train] - mean) / scale).numpy(), y[train])
        scaled = ((x[test] - mean) / scale).numpy()
        right += (model.predict(scaled) == y[test]).tolist()
        areas.append(roc_auc_score(y[test], model.decision_function(scaled)))
    found = probe(x, torch.tensor(y), folds=3, strength=0.5, seed=4)
    assert found.score == pytest.approx(np.mean(right), abs=1e-12) and found.auc == pytest.approx(
        np.mean(areas), abs=1e-12
    )


def test_groups_are_never_on_both_sides():
    """Labels that belong to groups, and features that say which group: known by heart, and not otherwise."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    labels = rng.permutation(np.repeat([0, 1], 20))[groups]
    x = torch.randn(40, 60)[groups] + 0.05 * torch.randn(400, 60)
    by_heart = probe(x, labels.tolist())
    honest = probe(x, labels.tolist(), groups=groups.tolist())
    assert by_heart.score > 0.95
    assert abs(honest.score - 0.5) < 0.25
    # Forty groups that are right or wrong as a whole: about 2 * 1.96 * sqrt(0.25 / 40) = 0.31, and not 0.1.
    assert honest.interval[1] - honest.interval[0] > 0.2
    values = torch.randn(40)[groups]
    assert probe(x, values).score > 0.9
    assert probe(x, values, groups=groups.tolist()).score < 0.3


def test_the_control_task_sees_through_learning_by_heart():
    """Features that name the type: any labelling of types can be learnt, so selectivity is near zero."""
    types = torch.arange(20).repeat(20)
    x = torch.nn.functional.one_hot(types, 20).float() + 0.05 * torch.randn(400, 20)
    by_type = (torch.randperm(20) % 2)[types]
    found = probe(x, by_type, types=types.tolist())
    assert found.score > 0.97 and found.control > 0.97 and abs(found.selectivity) < 0.03 and found.shuffled < 0.65
    other = torch.randint(0, 2, (400,))
    selective = probe(
        torch.cat([0.01 * x, 3 * other[:, None] + torch.randn(400, 1)], 1), other, types=types.tolist(), strength=1e-3
    )
    assert selective.score > 0.85
    few = probe(x, by_type, types=(types % 3).tolist())
    assert math.isnan(few.control) and math.isnan(few.selectivity)


def test_regression_and_several_classes():
    x = torch.randn(300, 6)
    found = probe(x, (2 * x[:, 1] - x[:, 4]).tolist())
    assert found.task == "regression" and found.score > 0.99 and math.isnan(found.auc) and found.classes == ()
    assert found.shuffled < 0.1 and found.control < 0.1
    assert float(found.direction @ torch.tensor([0, 2, 0, 0, -1.0, 0])) / math.sqrt(5) > 0.99
    three = probe(x, x[:, :3].argmax(1))
    assert three.direction.shape == (3, 6) and three.score > 0.85 and three.auc > 0.95 and three.classes == (0, 1, 2)
    assert three.direction[:, :3].argmax(1).tolist() == [0, 1, 2]
    forced = probe(x, (x[:, 0] > 0).long(), task="regression")
    assert forced.task == "regression" and 0.4 < forced.score < 1


def first_name_prompts():
    texts = [f"When {a} and {b} went to the" for a in SMALL for b in SMALL[:4] if a != b]
    return texts, [text.split()[1] for text in texts]


def test_in_a_model_the_previous_token_is_known_from_the_first_layer_on(bridge):
    """At " and" the embedding knows nothing; the heads of layer 0 bring the name before it."""
    texts, names = first_name_prompts()
    labels = [SMALL.index(name) % 2 for name in names]
    found = probe_layers(bridge, texts, labels, position=3, types=names)
    assert list(found.scores) == ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(4))]
    embed, first = found["hook_embed"], found["blocks.0.hook_resid_post"]
    assert embed.score < 0.6 and first.score > 0.97
    # The label is of the name alone, so it is learnt by heart, and the controls say so.
    assert first.control > 0.97 and abs(first.selectivity) < 0.03 and first.shuffled < 0.65
    apart = probe_layers(bridge, texts, labels, at=[0], position=3, types=names, groups=names)
    assert apart["blocks.0.hook_resid_post"].score < 0.75
    by_token = probe_layers(bridge, texts, labels, at=[0], position=2)["blocks.0.hook_resid_post"]
    assert by_token.score > 0.97 and by_token.control > 0.97
    assert found.best != "hook_embed" and "selectivity" in str(found) and "<table>" in found._repr_html_()


def planting(direction, labels):
    """A hook that writes each text's label along a direction, 16 texts at a time."""
    place = iter(range(0, len(labels), 16))

    def plant(x, hook):
        start = next(place)
        x[:, -1] += 30 * labels[start : start + 16, None] * direction

    return plant


def test_a_property_that_a_hook_puts_in_is_found_at_its_layer_and_the_direction_steers(bridge):
    texts, _ = first_name_prompts()
    labels = torch.randint(0, 2, (len(texts),))
    planted = torch.randn(128)
    planted /= planted.norm()
    with bridge.hooks([("blocks.2.hook_resid_post", planting(planted, labels))]):
        found = probe_layers(bridge, texts, labels, at=[1, 2, 3], batch_size=16)
    with bridge.hooks([("blocks.2.hook_resid_post", planting(planted, labels))]):
        stream = activations_at(bridge, texts, [2])["blocks.2.hook_resid_post"]
    scores = [found[f"blocks.{i}.hook_resid_post"].score for i in (1, 2, 3)]
    assert scores[0] < 0.65 and scores[1] > 0.97 and scores[2] > 0.97
    direction = found["blocks.2.hook_resid_post"].direction
    zeros, ones = ((stream @ direction)[labels == label] for label in (0, 1))
    assert ones.min() > zeros.max() and direction @ planted > 0
    with bridge.project_out(direction, 2):
        stream = bridge.run_with_cache(texts[0])[1]["resid_post", 2]
    assert (stream @ direction).abs().max() < 1e-3


def test_a_table_of_regressions(bridge):
    texts, names = first_name_prompts()
    found = probe_layers(bridge, texts, [float(len(name)) for name in names], at=[0], position=2)
    assert "R2" in str(found) and found["blocks.0.hook_resid_post"].score > 0.9
    with pytest.raises(KeyError, match="no probe of 'x'"):
        found["x"]


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"features": [[1.0]]}, TypeError, "features: got"),
        ({"features": torch.ones(20, 2).long()}, TypeError, "features: got a torch.int64 tensor"),
        ({"features": torch.full((20, 2), math.nan)}, ValueError, "40 of them are not finite"),
        ({"labels": [0, 1]}, ValueError, r"labels: got shape \[2\], expected one for each of the 20"),
        ({"labels": [1] * 20}, ValueError, "all 20 are the same"),
        ({"labels": [math.nan] * 20}, ValueError, "labels: some are not finite"),
        ({"labels": [0] * 18 + [1] * 2}, ValueError, "the rarest label has 2 examples"),
        ({"groups": [0] * 20}, ValueError, "groups: got 1 of them for 5 folds"),
        ({"groups": [0]}, ValueError, "groups: got 1, expected one for each"),
        ({"types": [0]}, ValueError, "types: got 1, expected one for each"),
        ({"task": "ranking"}, ValueError, "task: got 'ranking'"),
        ({"folds": 1}, ValueError, "folds 1"),
        ({"strength": 0}, ValueError, "strength: got 0, expected a finite number above 0$"),
        ({"confidence": 1.0}, ValueError, "confidence 1.0"),
    ],
)
def test_wrong_arguments(options, error, text):
    with pytest.raises(error, match=text):
        probe(**{"features": torch.randn(20, 2), "labels": [0, 1] * 10, **options})


def test_labels_of_another_length(bridge):
    with pytest.raises(ValueError, match="labels: got 1, expected one for each of the 2 texts"):
        probe_layers(bridge, ["Mary", "John"], [0])


def test_without_scikit_learn(bridge, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"transformer-lens-bridge\[probes\]"):
        probe_layers(bridge, ["Mary", "John"], [0, 1])
