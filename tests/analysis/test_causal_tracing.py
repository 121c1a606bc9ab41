"""Findings in the shipped models: what patching and causal tracing bring back of an indirect object."""

from __future__ import annotations

import pytest
import torch

from tests.support import falcon, tokens
from transformer_lens import TransformerBridge
from transformer_lens.data.generate import ioi_pair
from transformer_lens.patching import get_act_patch_attn_out, get_act_patch_resid_pre, noised_embeddings


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_second_subject_is_read_by_the_last_layer_at_the_end(bridge, seed):
    pair = ioi_pair(seed)
    clean, corrupted = bridge.to_tokens(pair.clean), bridge.to_tokens(pair.corrupted)
    (second,) = (clean != corrupted)[0].nonzero().flatten().tolist()
    right, wrong = (bridge.to_single_token(name) for name in (pair.answer, pair.wrong_answer))

    def difference(logits):
        return logits[0, -1, right] - logits[0, -1, wrong]

    logits, cache = bridge.run_with_cache(clean)
    best, worst = difference(logits), difference(bridge(corrupted))
    found = get_act_patch_resid_pre(bridge, corrupted, cache, difference, verbose=False)
    restored = (found - worst) / (best - worst)
    assert best > 1 and worst < -1
    # The prompts differ in the second subject alone: before it nothing can be restored, and at layer 0 it is all.
    assert not restored[:, :second].any()
    torch.testing.assert_close(restored[0, second], torch.tensor(1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        restored[0, second + 1 :], torch.zeros_like(restored[0, second + 1 :]), atol=1e-4, rtol=0
    )
    # There it stays until the last layer, whose attention carries it to the end of the prompt.
    assert (restored[:, second] > 0.95).all() and restored[:, -1].abs().max() < 0.05
    attention = (get_act_patch_attn_out(bridge, corrupted, cache, difference, verbose=False) - worst) / (best - worst)
    assert attention[-1, -1] > 0.95 and attention[:-1, -1].abs().max() < 0.05


@torch.no_grad()
def test_noise_on_the_second_subject_is_undone_where_it_was_put(bridge):
    pair = ioi_pair(0)
    clean = bridge.to_tokens(pair.clean)
    (second,) = (clean != bridge.to_tokens(pair.corrupted))[0].nonzero().flatten().tolist()
    answer = bridge.to_single_token(pair.answer)

    def probability(logits):
        return logits[:, -1].softmax(-1)[:, answer].mean()

    logits, cache = bridge.run_with_cache(clean)
    noised = noised_embeddings(bridge, clean, [second], samples=4)
    before, after = probability(logits), probability(bridge(noised))
    found = get_act_patch_resid_pre(bridge, noised, cache, probability, verbose=False)
    assert after < 0.8 * before
    torch.testing.assert_close(found[0, second], before, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[0, second - 1], after, atol=1e-4, rtol=0)


def test_noise_is_as_large_as_said_and_where_it_was_said():
    torch.manual_seed(0)
    model = falcon(hidden_size=512, initializer_range=0.05)
    bridge, x = TransformerBridge(model), tokens(1, 6)
    clean = model.transformer.word_embeddings(x)
    for noise in (1.0, 3.0):
        drawn = noised_embeddings(bridge, x, [1, -1], noise=noise, samples=20) - clean
        assert drawn.shape == (20, 6, 512) and not drawn[:, [0, 2, 3, 4]].any()
        spread = noise * model.transformer.word_embeddings.weight.std()
        torch.testing.assert_close(drawn[:, [1, 5]].std(), spread, rtol=0.02, atol=0)
        assert abs(drawn[:, [1, 5]].mean()) < 0.02 * spread
    first, again = (noised_embeddings(bridge, x, [1], seed=seed) for seed in (0, 0))
    assert torch.equal(first, again) and not torch.equal(first, noised_embeddings(bridge, x, [1], seed=1))
    assert torch.equal(noised_embeddings(bridge, x[0], [1], noise=0.0, samples=1), clean)


def test_wrong_noise_is_refused():
    bridge, x = TransformerBridge(falcon()), tokens(2, 6)
    with pytest.raises(ValueError, match="got 2 prompts and 10 samples"):
        noised_embeddings(bridge, x, [1])
    for positions in ([6], [-7], []):
        with pytest.raises(ValueError, match="positions: got .* expected -6 to 5"):
            noised_embeddings(bridge, x[:1], positions)
    with pytest.raises(ValueError, match="samples: got 0, expected 1 or more"):
        noised_embeddings(bridge, x[:1], [1], samples=0)
