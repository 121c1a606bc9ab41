"""The measurements of the demo, on the public API: which heads repeat, and what patching restores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.analysis.heads import ablate_heads, induction_scores, previous_token_scores, random_repeats
from transformer_lens.data.generate import IOIPair, ioi_pair

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable in a progress bar with a description."""


@dataclass(frozen=True)
class HeadEffect:
    """What a head does when a random sequence repeats."""

    layer: int
    head: int
    induction: float
    """Mean attention, over the repeat, to the token that followed the same token before."""
    previous: float
    """Mean attention to the token before."""
    loss_rise: float
    """How much the loss on the repeat rises when the head's output is replaced by its mean, in nats per token."""


def second_half_loss(bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"], **hooks: Any) -> Tensor:
    """Mean next-token loss over the repeat, from its second token on, in nats."""
    per_token: Tensor = bridge.run_with_hooks(tokens, return_type="loss", loss_per_token=True, **hooks)
    return per_token[:, tokens.shape[1] // 2 + 1 :].mean()


def heads_that_repeat(bridge: TransformerBridge, progress: Progress, candidates: int = 6) -> list[HeadEffect]:
    """The heads that attend most to induction targets and previous tokens, each ablated to see what it is worth."""
    tokens = random_repeats(bridge)
    induction, previous = induction_scores(bridge), previous_token_scores(bridge)
    best = dict.fromkeys(
        index
        for scores in (induction, previous)
        for index in scores.flatten().topk(min(candidates, scores.numel())).indices.tolist()
    )
    found: list[HeadEffect] = []
    with torch.no_grad():
        baseline = second_half_loss(bridge, tokens)
        for index in progress(best, "ablating heads"):
            layer, head = divmod(index, bridge.cfg.n_heads)
            ablated = second_half_loss(bridge, tokens, fwd_hooks=ablate_heads(bridge, (layer, head), mean=True))
            scores = float(induction[layer, head]), float(previous[layer, head])
            found.append(HeadEffect(layer, head, *scores, float(ablated - baseline)))
    return sorted(found, key=lambda effect: -max(effect.induction, effect.previous))[: 2 * candidates]


@dataclass(frozen=True)
class PatchedPair:
    """What patching the residual stream restores of the clean answer."""

    pair: IOIPair
    tokens: list[str]
    clean: float
    corrupted: float
    restored: Float[Tensor, "place pos"]
    """0: as corrupted, 1: as clean; the stream that enters each layer, then the one that leaves the last."""


def suitable_pair(bridge: TransformerBridge, tries: int = 50) -> tuple[IOIPair, Tensor, Tensor]:
    """An indirect-object pair whose two prompts have as many of this model's tokens, and whose answers are one."""
    for seed in range(tries):
        pair = ioi_pair(seed)
        clean, corrupted = bridge.to_tokens(pair.clean), bridge.to_tokens(pair.corrupted)
        right, wrong = (bridge.to_answer_tokens(answer) for answer in (pair.answer, pair.wrong_answer))
        if clean.shape == corrupted.shape and len(right) == len(wrong) == 1 and right != wrong:
            return pair, clean, corrupted
    raise ValueError(f"none of {tries} indirect-object pairs has prompts of equal length and answers of one token here")


def patch_residual_stream(bridge: TransformerBridge, progress: Progress) -> PatchedPair:
    """Put the clean residual stream into the corrupted run, one layer and position at a time.

    All positions of a layer go in one batch: row `i` is patched at position `i`.
    """
    pair, clean, corrupted = suitable_pair(bridge)
    right, wrong = map(bridge.to_single_token, (pair.answer, pair.wrong_answer))

    def difference(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        return (logits[:, -1, right] - logits[:, -1, wrong]).float()

    positions = torch.arange(clean.shape[1], device=clean.device)
    with torch.no_grad():
        places = [f"blocks.{layer}.hook_resid_pre" for layer in range(bridge.cfg.n_layers)]
        places.append(f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post")
        clean_logits, cache = bridge.run_with_cache(clean, names_filter=places)
        best, worst = difference(clean_logits)[0], difference(bridge(corrupted))[0]

        def patch(stream: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
            stream[positions, positions] = cache[str(hook.name)][0]

        rows = []
        for name in progress(places, "patching layers"):
            logits = bridge.run_with_hooks(corrupted.expand(len(positions), -1), fwd_hooks=[(name, patch)])
            rows.append((difference(logits) - worst) / (best - worst))
    return PatchedPair(
        pair, list(map(str, bridge.to_str_tokens(clean))), float(best), float(worst), torch.stack(rows).cpu()
    )
