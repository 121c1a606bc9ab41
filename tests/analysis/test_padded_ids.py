"""Every tool on ids that were padded without a pad token of their own: what it finds for each text alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.bridge.texts import tokenizer
from tests.support import family
from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import attribution_patching, edge_attribution_patching, integrated_gradients
from transformer_lens.analysis.experts import logit_attribution, routing, routing_statistics
from transformer_lens.analysis.lenses import TunedLens
from transformer_lens.analysis.steering import activations_at
from transformer_lens.head_detector import detect_head
from transformer_lens.patching import run_interventions

TEXTS = ["John went to the store", "the dog ran on the mat and sat", "Mary and John ran"]
OTHERS = ["Mary went to the store", "the cat ran on the mat and sat", "John and Mary ran"]
SIDES = pytest.mark.parametrize("side", ["left", "right"])
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}
"""float32: masked kernels and other batch sizes round differently."""


def made(name: str, side: str) -> TransformerBridge:
    """Its tokenizer has no pad token, so texts are padded with the end token."""
    config = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    return TransformerBridge(family(name, **config), tokenizer(without=("pad_token",), padding_side=side))


def numbers(bridge: TransformerBridge, texts: list[str], side: str) -> torch.Tensor:
    """Nothing but the numbers: a copy, of which no mask is known."""
    return bridge.to_tokens(texts, padding_side=side).clone()


def last(bridge: TransformerBridge, side: str, texts: list[str]) -> Callable[[Any], Any]:
    """A metric: one logit at the last token of each text, summed."""
    lengths = [bridge.to_tokens(text).shape[1] for text in texts]
    columns = torch.tensor([length - 1 if side == "right" else -1 for length in lengths])
    return lambda logits: logits[torch.arange(len(lengths)), columns, 7].sum()


@SIDES
@pytest.mark.parametrize("name", ["7b", "mixtral"])
def test_sweeps(name: str, side: str) -> None:
    bridge = made(name, side)
    ids = numbers(bridge, TEXTS, side)
    changes: list[Any] = [
        ("blocks.0.attn.hook_v", lambda v, hook: 2 * v),
        ("blocks.1.attn.hook_z", lambda z, hook: z.index_fill(2, torch.tensor(1), 0)),
        ("blocks.1.hook_resid_pre", lambda x, hook: x.index_fill(1, torch.tensor([x.shape[1] - 1]), 0.5)),
        ("blocks.1.hook_mlp_out", lambda x, hook: x.index_fill(1, torch.tensor([x.shape[1] - 2]), 0.5)),
    ]
    changes = changes if side == "left" else changes[:2]
    found = run_interventions(bridge, ids, changes, last(bridge, side, TEXTS))
    wanted = torch.zeros(len(changes))
    for text in TEXTS:
        for number, change in enumerate(changes):
            with torch.no_grad():
                wanted[number] += bridge.run_with_hooks(bridge.to_tokens(text), fwd_hooks=[change])[0, -1, 7]
    torch.testing.assert_close(found, wanted, **ROUNDING)


@SIDES
def test_sweeps_are_the_loop_also_at_padding(side: str) -> None:
    bridge = made("40b", side)
    ids = numbers(bridge, TEXTS, side)
    changes: list[Any] = [
        ("blocks.1.hook_resid_pre", lambda x, hook, at=at: x.index_fill(1, torch.tensor([at]), 0.5)) for at in (7, 8)
    ]
    found = run_interventions(bridge, ids, changes, lambda logits: logits[:, -1, 7].sum())
    with torch.no_grad():
        loop = [bridge.run_with_hooks(ids, fwd_hooks=[change], padding_side=side)[:, -1, 7].sum() for change in changes]
    torch.testing.assert_close(found, torch.stack(loop), **ROUNDING)


@SIDES
def test_attribution(side: str) -> None:
    bridge = made("40b", side)
    ids = numbers(bridge, TEXTS, side), numbers(bridge, OTHERS, side)
    metric, name = last(bridge, side, TEXTS), "blocks.1.hook_mlp_out"
    edges = edge_attribution_patching(bridge, *ids, metric).scores
    patched = attribution_patching(bridge, *ids, metric, [name]).scores[name]
    integrated = integrated_gradients(bridge, ids[0], metric, name, steps=4)
    pairs = list(zip(TEXTS, OTHERS, strict=True))
    alone = [edge_attribution_patching(bridge, *pair, last(bridge, side, [pair[0]])).scores for pair in pairs]
    torch.testing.assert_close(edges, sum(alone), **ROUNDING)
    for row, pair in enumerate(pairs):
        one = attribution_patching(bridge, *pair, last(bridge, side, [pair[0]]), [name]).scores[name]
        where = slice(-one.shape[1], None) if side == "left" else slice(one.shape[1])
        torch.testing.assert_close(patched[row, where], one[0], **ROUNDING)
        scores = integrated_gradients(bridge, pair[0], last(bridge, side, [pair[0]]), name, steps=4).scores
        torch.testing.assert_close(integrated.scores[row, where], scores[0], **ROUNDING)


@SIDES
@pytest.mark.parametrize("size", [1, 3])
def test_patterns_lenses_and_features(size: int, side: str) -> None:
    """One row at a time does not show that it is padded; all of them do."""
    bridge = made("7b", side)
    ids = numbers(bridge, TEXTS, side)
    heads = detect_head(bridge, ids, "previous_token_head", batch_size=size)
    each = torch.stack([detect_head(bridge, text, "previous_token_head") for text in TEXTS])
    torch.testing.assert_close(heads, each.mean(0), **ROUNDING)
    lens = TunedLens(bridge)
    weights = torch.tensor([bridge.to_tokens(text).shape[1] for text in TEXTS])
    alone = torch.stack([lens.evaluate([text]).kl for text in TEXTS])
    together = lens.evaluate(ids, batch_size=size).kl
    torch.testing.assert_close(together, (weights[:, None] * alone).sum(0) / weights.sum(), **ROUNDING)
    for position in (-1, "mean"):
        found = activations_at(bridge, ids, [1], position, batch_size=size)["blocks.1.hook_resid_post"]
        wanted = [activations_at(bridge, [text], [1], position)["blocks.1.hook_resid_post"] for text in TEXTS]
        torch.testing.assert_close(found, torch.cat(wanted), **ROUNDING)


@SIDES
def test_experts(side: str) -> None:
    bridge = made("mixtral", side)
    ids = numbers(bridge, TEXTS, side)
    found = routing(bridge, ids)
    for row, text in enumerate(TEXTS):
        alone = routing(bridge, text)
        assert torch.equal(found.indices[:, row][:, found.mask[row]], alone.indices[:, 0])
    counted = routing_statistics(bridge, [ids], progress=False)
    apart = routing_statistics(bridge, TEXTS, progress=False)
    assert counted.n_tokens == apart.n_tokens and torch.equal(counted.load, apart.load)
    parts = logit_attribution(bridge, ids, 7)
    each = [logit_attribution(bridge, text, 7) for text in TEXTS]
    torch.testing.assert_close(parts.logit, torch.cat([one.logit for one in each]), **ROUNDING)
    torch.testing.assert_close(parts.experts, torch.cat([one.experts for one in each]), **ROUNDING)
