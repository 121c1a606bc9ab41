"""Measures, contexts, logits and attribution, each computed a second time by its definition."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.dictionaries.models import MODELS, model, random_dictionary, tokens
from transformer_lens import TransformerBridge
from transformer_lens.dictionaries import feature_attribution, feature_logits, measure, top_contexts
from transformer_lens.utilities import lm_cross_entropy_loss

RESID = "blocks.1.hook_resid_post"
TEXTS = [f"When {one} and {two} went to the store, {one} gave" for one in ("Mary", "Tom") for two in ("John", "Noah")]
TEXTS += ["Mary", "Mary and John and Noah went to the church"]


@pytest.fixture(params=MODELS)
def bridge(request: Any) -> TransformerBridge:
    return model(request.param)


@pytest.fixture
def falcon() -> TransformerBridge:
    return model("tiny-falcon")


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5].sum() - logits[:, -1, 7].sum()


# -- measures ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_measures_by_their_definitions(falcon: TransformerBridge, batch_size: int) -> None:
    dictionary = random_dictionary(128, apply_b_dec_to_input=True)
    found = measure(falcon, dictionary, iter(TEXTS), RESID, batch_size=batch_size)
    # Text by text, without padding.
    losses, inputs = torch.zeros(3, dtype=torch.float64), []
    predictions = 0
    for text in TEXTS:
        ids = falcon.to_tokens(text)
        _, cache = falcon.run_with_cache(ids, names_filter=RESID)
        inputs.append(cache[RESID][0])
        runs = [falcon(ids)]
        for new in (dictionary(cache[RESID]), torch.zeros_like(cache[RESID])):
            runs.append(falcon.run_with_hooks(ids, fwd_hooks=[(RESID, lambda x, hook, new=new: new)]))
        losses += torch.stack([lm_cross_entropy_loss(logits, ids, per_token=True).sum() for logits in runs])
        predictions += ids.shape[1] - 1
    bare, spliced, ablated = (losses / predictions).tolist()
    x = torch.cat(inputs).double()
    y, features = dictionary(x.float()).double(), dictionary.encode(x.float())
    expected = {
        **{"loss": bare, "loss_spliced": spliced, "loss_ablated": ablated},
        "loss_recovered": (ablated - spliced) / (ablated - bare),
        "l0": float((features > 0).sum(-1).double().mean()),
        "explained_variance": float(1 - (x - y).square().sum() / (x - x.mean(0)).square().sum()),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert torch.equal(found.fired.long(), (features > 0).sum(0))


def test_dead_features(falcon: TransformerBridge) -> None:
    dictionary = random_dictionary(128)
    with torch.no_grad():
        dictionary.get_parameter("b_enc")[[3, 8]] = -1e6
    found = measure(falcon, dictionary, TEXTS, RESID)
    assert (found.fired == 0).nonzero().flatten().tolist() == [3, 8]


def test_a_perfect_dictionary_and_a_transcoder() -> None:
    bridge = model("llama")
    ids, eye = tokens(bridge), torch.eye(32)
    perfect = random_dictionary(32, d_sae=64)
    for name, value in {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye])}.items():
        perfect.get_parameter(name).copy_(value)
    for name in ("b_enc", "b_dec"):
        perfect.get_parameter(name).zero_()
    found = measure(bridge, perfect, ids, 1)
    assert found.loss_recovered == pytest.approx(1) and found.explained_variance == pytest.approx(1) and found.l0 == 32
    # It writes what it reads, so nothing of what the MLP does.
    found = measure(bridge, perfect, ids, ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"))
    _, cache = bridge.run_with_cache(ids)
    x, y = (cache[name].double().flatten(0, 1) for name in ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"))
    assert found.explained_variance == pytest.approx(
        float(1 - (x - y).square().sum() / (y - y.mean(0)).square().sum()), 1e-4
    )
    assert "features" not in " ".join(bridge.hook_dict)


def test_experts_are_measured() -> None:
    bridge = model("tiny-mixtral")
    place, dictionary = "blocks.1.mlp.hook_expert_out", random_dictionary(128)
    found = measure(bridge, dictionary, TEXTS[:2], place)
    _, cache = bridge.run_with_cache(bridge.to_tokens(TEXTS[:2]), names_filter=place)
    features = dictionary.encode(cache[place])
    assert found.l0 == pytest.approx(float((features > 0).sum(-1).double().mean()), rel=1e-5)
    best = top_contexts(bridge, dictionary, TEXTS[:2], 5, place, k=1)[5][0]
    assert best[0] == pytest.approx(float(features[..., 5].max()), rel=1e-4)


@pytest.mark.parametrize("texts", ["Mary and John", 5, torch.ones(3).long()])
def test_texts_that_are_none(falcon: TransformerBridge, texts: Any) -> None:
    with pytest.raises(TypeError, match=r"texts: got .*, expected texts, or token ids \[batch, pos\]"):
        measure(falcon, random_dictionary(128), texts, RESID)
    assert not any(point.has_hooks() for point in falcon.hook_points())


# -- contexts ----------------------------------------------------------------------------------------------------


def test_top_contexts_from_a_stream(falcon: TransformerBridge) -> None:
    dictionary, texts = random_dictionary(128), TEXTS * 3 + ["Mary and John " * 30]
    asked = []

    def stream() -> Any:
        for text in texts:
            asked.append(text)
            yield text

    found = top_contexts(falcon, dictionary, stream(), [4, 9], at=1, k=5)
    assert asked == texts
    everything: list[Any] = []
    for number, text in enumerate(texts):
        ids = falcon.to_tokens(text)
        _, cache = falcon.run_with_cache(ids, names_filter=RESID)
        words = falcon.to_str_tokens(ids)
        for position, values in enumerate(dictionary.encode(cache[RESID])[0]):
            everything.append((values, number, position, words[max(0, position - 8) : position + 9]))
    for feature in (4, 9):
        best = sorted((float(one[0][feature]) for one in everything), reverse=True)[:5]
        assert [context[0] for context in found[feature]] == pytest.approx(best, rel=1e-4)
        for value, text, position, words in found[feature]:
            (same,) = [one for one in everything if one[1:3] == (text, position)]
            assert float(same[0][feature]) == pytest.approx(value, rel=1e-4) and same[3] == words


def test_padding_has_no_contexts(falcon: TransformerBridge) -> None:
    dictionary = random_dictionary(128)
    with torch.no_grad():
        dictionary.get_parameter("b_enc")[3] = 1e4
    found = top_contexts(falcon, dictionary, TEXTS, 3, RESID, k=1000)[3]
    real = {(number, at) for number, text in enumerate(TEXTS) for at in range(falcon.to_tokens(text).shape[1])}
    assert {context[1:3] for context in found} == real and len(found) == len(real)


def test_a_feature_that_never_fires_has_no_contexts(falcon: TransformerBridge) -> None:
    dictionary = random_dictionary(128)
    with torch.no_grad():
        dictionary.get_parameter("b_enc")[3] = -1e6
    assert top_contexts(falcon, dictionary, TEXTS, 3, RESID) == {3: []}
    with pytest.raises(ValueError, match=r"features: got 50, expected 0 to 49 \(features\)"):
        top_contexts(falcon, dictionary, TEXTS, 50, RESID)


# -- logits ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_a_feature_writes(bridge: TransformerBridge) -> None:
    """Added to the last stream, with the final norm's scale held, a feature changes the logits by just that."""
    ids, dictionary, last = tokens(bridge), random_dictionary(bridge.cfg.d_model), bridge.cfg.n_layers - 1
    place = f"blocks.{last}.hook_resid_post"
    logits, plain = bridge.run_with_cache(ids)
    scale = plain["ln_final.hook_scale"]
    hold = ("ln_final.hook_scale", lambda x, hook: scale)
    with bridge.splice(dictionary, place, error=True) as spliced, bridge.steer(torch.eye(50)[7] * 2, spliced.features):
        edited = bridge.run_with_hooks(ids, fwd_hooks=[hold])
    wanted = 2 * feature_logits(bridge, dictionary, 7)[0] / scale
    torch.testing.assert_close(edited - logits, wanted, rtol=1e-3, atol=1e-3)
    assert feature_logits(bridge, dictionary, [7, 3]).shape == (2, bridge.cfg.d_vocab)
    with pytest.raises(
        ValueError, match=r"dictionary: got Dictionary.*8 -> 50 -> 8.*, expected one that writes \d+ numbers"
    ):
        feature_logits(bridge, random_dictionary(8), 1)


# -- attribution -------------------------------------------------------------------------------------------------


def test_attribution_at_all_layers_in_one_backward_pass(bridge: TransformerBridge) -> None:
    ids, dictionary = tokens(bridge), random_dictionary(bridge.cfg.d_model)
    plain: dict[str, torch.Tensor] = {}
    places = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    keep = lambda x, hook: plain.update({hook.name: x})  # noqa: E731
    value = metric(bridge.run_with_hooks(ids, fwd_hooks=[(places, keep)]))
    gradients = dict(zip(places, torch.autograd.grad(value, [plain[place] for place in places]), strict=True))
    with ExitStack() as stack:
        spliced = [stack.enter_context(bridge.splice(dictionary, place, error=True)) for place in places]
        found = feature_attribution(bridge, ids, metric)
    assert float(found.value) == pytest.approx(value.item(), rel=1e-5)
    assert list(found.scores) == [name for one in spliced for name in (one.features, one.error)]
    for one, place in zip(spliced, places, strict=True):
        features = dictionary.encode(plain[place])
        wanted = features * (gradients[place] @ dictionary.W_dec.T)
        torch.testing.assert_close(found.scores[one.features], wanted, rtol=1e-3, atol=1e-3)
        # Features, error and the decoder's bias are all of the stream.
        whole = (plain[place] * gradients[place]).sum()
        rest = (dictionary.b_dec * gradients[place]).sum()
        parts = found.scores[one.features].sum() + found.scores[one.error].sum()
        torch.testing.assert_close(parts + rest, whole, rtol=1e-3, atol=1e-3)
    assert found.axes[spliced[0].features] == ("batch", "pos", "feature")
    with pytest.raises(
        ValueError, match="feature_attribution: no dictionary is in the model; put one there with bridge"
    ):
        feature_attribution(bridge, ids, metric)


def test_attribution_predicts_an_ablation(falcon: TransformerBridge) -> None:
    """By a small change of one feature, which is what a first-order score is about."""
    ids, dictionary = tokens(falcon), random_dictionary(128)
    with falcon.splice(dictionary, 2, error=True) as spliced:
        scores = feature_attribution(falcon, ids, metric).scores[spliced.features]
        number = int(scores.sum((0, 1)).abs().argmax())
        shrink = lambda x, hook: x * torch.where(torch.arange(50) == number, 0.999, 1.0)  # noqa: E731
        with torch.no_grad():
            change = metric(falcon.run_with_hooks(ids, fwd_hooks=[(spliced.features, shrink)])) - metric(falcon(ids))
    assert float(change) / -0.001 == pytest.approx(float(scores[..., number].sum()), rel=0.03)
