"""Activations at one place of each text, and differences of their means: against runs one text at a time."""

import pytest
import torch

from tests.support import VOCAB, falcon
from transformer_lens import TransformerBridge
from transformer_lens.analysis.steering import activations_at, steering_vector, tokens_at
from transformer_lens.asking import place_name

TEXTS = ["Mary and John went", "When Alice and Tom went to the park, Tom", "John", "Tom and Mary gave"]


@pytest.fixture(scope="module", params=["right", "left"])
def bridge(request):
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    bridge.tokenizer.padding_side = request.param
    return bridge


def one_by_one(bridge, name, position):
    rows = []
    for number, text in enumerate(TEXTS):
        x = bridge.run_with_cache(text, names_filter=name)[1][name][0].flatten(1)
        wanted = position if isinstance(position, (int, str)) else position[number]
        rows.append(x.mean(0) if wanted == "mean" else x[wanted])
    return torch.stack(rows)


@pytest.mark.parametrize("position", [-1, 1, "mean", [0, 3, -1, 2]], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_activations_are_those_of_each_text_alone(bridge, position, batch_size):
    names = ["blocks.1.hook_resid_post", "blocks.2.attn.hook_k", "hook_embed"]
    found = activations_at(bridge, TEXTS, [1, *names[1:]], position, batch_size=batch_size)
    assert set(found) == set(names)
    for name in names:
        torch.testing.assert_close(found[name], one_by_one(bridge, name, position), atol=1e-4, rtol=1e-4)


def test_padded_ids_are_texts(bridge):
    ids = bridge.to_tokens(TEXTS)
    for position in (-1, "mean"):
        by_ids = activations_at(bridge, ids, [0], position)["blocks.0.hook_resid_post"]
        torch.testing.assert_close(
            by_ids, one_by_one(bridge, "blocks.0.hook_resid_post", position), atol=1e-4, rtol=1e-4
        )
    last = [int(bridge.to_tokens(text)[0, -1]) for text in TEXTS]
    assert tokens_at(bridge, ids, -1) == tokens_at(bridge, TEXTS, -1) == last


def test_only_the_layers_below_run(bridge):
    ran = []
    with bridge.hooks([(f"blocks.{i}.hook_resid_post", lambda x, hook: ran.append(hook.layer())) for i in range(4)]):
        activations_at(bridge, TEXTS, ["blocks.1.attn.hook_z"], batch_size=4)
        assert ran == [0, 1]
        activations_at(bridge, TEXTS, [3], batch_size=4)
    assert ran[-4:] == [0, 1, 2, 3]


def test_the_difference_of_means_and_its_lengths(bridge):
    name = "blocks.2.hook_resid_post"
    x = one_by_one(bridge, name, -1).double()
    difference = x[:2].mean(0) - x[2:].mean(0)
    found = steering_vector(bridge, TEXTS[:2], TEXTS[2:], 2)
    torch.testing.assert_close(found.double(), difference, atol=1e-4, rtol=1e-4)
    unit = steering_vector(bridge, TEXTS[:2], TEXTS[2:], name, normalize="unit")
    torch.testing.assert_close(unit.double(), difference / difference.norm(), atol=1e-5, rtol=1e-4)
    stream = steering_vector(bridge, TEXTS[:2], TEXTS[2:], 2, normalize="stream")
    assert float(stream.norm()) == pytest.approx(float(x.norm(dim=-1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    "name, shape",
    [("blocks.0.attn.hook_z", (4, 32)), ("blocks.0.attn.hook_v", (2, 32)), ("blocks.0.mlp.hook_post", (256,))],
)
def test_a_vector_fits_the_hook_it_was_made_for(bridge, name, shape):
    vector = steering_vector(bridge, TEXTS[:2], TEXTS[2:], name)
    assert vector.shape == shape
    torch.testing.assert_close(
        vector.flatten(),
        (one_by_one(bridge, name, -1)[:2].mean(0) - one_by_one(bridge, name, -1)[2:].mean(0)),
        atol=1e-4,
        rtol=1e-4,
    )
    with bridge.steer(vector, name):
        bridge("Mary")


def test_steering_toward_a_name_gives_that_name():
    """Mary and John, told apart by the texts that ask for them, as an answer to a question about Alice and Tom."""
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    others = ("Tom", "Paul", "Emma", "Anna")
    sets = [
        [f"When {name} and {o} went to the store, {o} gave a drink to" for o in others] for name in ("Mary", "John")
    ]
    prompt = "When Alice and Tom went to the park, Tom gave a ball to"
    mary, john = bridge.to_single_token(" Mary"), bridge.to_single_token(" John")
    with torch.no_grad():
        plain = bridge(prompt)[0, -1]
        for layer in (1, 2, 3):
            vector = steering_vector(bridge, *sets, layer)
            with bridge.steer(vector, layer, positions=-1):
                toward = bridge(prompt)[0, -1]
            with bridge.steer(vector, layer, scale=-1.0, positions=-1):
                away = bridge(prompt)[0, -1]
            assert toward[mary] - plain[mary] > 5 and away[john] - plain[john] > 5
            with bridge.steer(vector, layer, scale=4.0, positions=-1):
                assert bridge.generate(prompt, max_new_tokens=1).endswith(" Mary")


def test_without_a_tokenizer():
    bridge = TransformerBridge(falcon())
    ids = torch.randint(3, VOCAB, (6, 5))
    found = steering_vector(bridge, ids[:3], ids[3:], 0)
    x = bridge.run_with_cache(ids)[1]["resid_post", 0][:, -1]
    torch.testing.assert_close(found, x[:3].mean(0) - x[3:].mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda b: activations_at(b, [], [0]), ValueError, "got 0 texts"),
        (lambda b: activations_at(b, TEXTS, []), ValueError, "0 places"),
        (lambda b: activations_at(b, "Mary", [0]), TypeError, "expected a list of texts"),
        (
            lambda b: activations_at(b, TEXTS, [0], 4),
            ValueError,
            "got 4, expected -4 to 3 in text 2, which has",
        ),
        (lambda b: activations_at(b, TEXTS, [0], -5), ValueError, "position: got -5, expected -4 to 3 in text 2"),
        (lambda b: activations_at(b, TEXTS, [0], "last"), ValueError, "position: got 'last'"),
        (lambda b: activations_at(b, TEXTS, [0], [1]), ValueError, "got 1 numbers for 4 texts"),
        (lambda b: activations_at(b, TEXTS, ["blocks.0.attn.hook_pattern"]), ValueError, "expected batch and pos"),
        (lambda b: place_name(b, 9), ValueError, "at: got 9, expected -4 to 3"),
        (lambda b: place_name(b, None), TypeError, "at: got None"),
        (lambda b: steering_vector(b, TEXTS, TEXTS, 0, normalize="unit"), ValueError, "have the same mean"),
        (lambda b: steering_vector(b, TEXTS, TEXTS, 0, normalize="max"), ValueError, "normalize: got 'max'"),
        (lambda b: steering_vector(b, TEXTS, [], 0), ValueError, "got 0 texts"),
    ],
)
def test_wrong_arguments(bridge, call, error, text):
    with pytest.raises(error, match=text):
        call(bridge)
