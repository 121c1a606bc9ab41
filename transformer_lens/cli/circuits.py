"""The measurements of the demo, on the public API: which heads repeat, and what patching restores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.data.generate import IOIPair, ioi_pair, repeated_random_tokens

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable in a progress bar with a description."""


@dataclass(frozen=True)
class HeadEffect:
    """What a head does for the repeated half of a random sequence."""

    layer: int
    head: int
    estimate: float
    """First-order estimate of the loss it saves, in nats per token."""
    loss_rise: float
    """How much the loss rises when the head's output is replaced by its mean, in nats per token."""


def repeated_tokens(bridge: TransformerBridge, length: int = 16, batch: int = 16, seed: int = 0) -> Tensor:
    """Random tokens, twice in a row: what only copying from the past can predict. [batch, 1 + 2 * length]"""
    special = set(bridge.tokenizer.all_special_ids)
    ordinary = [token for token in range(bridge.cfg.d_vocab) if token not in special and token < len(bridge.tokenizer)]
    bos = bridge.to_tokens("")[0, 0].item() if bridge.cfg.default_prepend_bos else ordinary[0]
    return repeated_random_tokens(ordinary, length, batch, int(bos), Random(seed))


def second_half_loss(bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"], **hooks: Any) -> Tensor:
    """Mean next-token loss over the repeat, from its second token on, in nats."""
    per_token: Tensor = bridge.run_with_hooks(tokens, return_type="loss", loss_per_token=True, **hooks)
    return per_token[:, tokens.shape[1] // 2 + 1 :].mean()


def estimated_head_effects(bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "layer head"]:
    """One forward and one backward pass: the loss each head saves, to first order.

    The estimate is gradient times (mean output - output), summed over positions (attribution patching).
    """
    outputs: dict[int, Tensor] = {}
    gradients: dict[int, Tensor] = {}
    requires = [parameter.requires_grad for parameter in bridge.parameters()]
    bridge.original_model.requires_grad_(False)
    try:
        with torch.enable_grad():
            loss = second_half_loss(
                bridge,
                tokens,
                fwd_hooks=[
                    ("hook_embed", lambda tensor, hook: tensor.requires_grad_()),
                    (_every_z, lambda tensor, hook: outputs.update({hook.layer(): tensor.detach()})),
                ],
                bwd_hooks=[(_every_z, lambda grad, hook: gradients.update({hook.layer(): grad}))],
            )
            loss.backward()
    finally:
        for parameter, required in zip(bridge.parameters(), requires, strict=True):
            parameter.requires_grad_(required)
    rows = [((z.mean((0, 1)) - z) * gradients[layer]).float().sum((0, 1, 3)) for layer, z in sorted(outputs.items())]
    return torch.stack(rows)


def _every_z(name: str) -> bool:
    return name.endswith("attn.hook_z")


def heads_that_repeat(bridge: TransformerBridge, progress: Progress, candidates: int = 8) -> list[HeadEffect]:
    """The heads that repetition depends on: the best by estimate, each confirmed by ablating it."""
    tokens = repeated_tokens(bridge)
    estimates = estimated_head_effects(bridge, tokens)
    best = estimates.flatten().topk(min(candidates, estimates.numel())).indices.tolist()
    found: list[HeadEffect] = []
    with torch.no_grad():
        baseline = second_half_loss(bridge, tokens)
        for index in progress(best, "ablating heads"):
            layer, head = divmod(index, bridge.cfg.n_heads)
            ablated = second_half_loss(bridge, tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", mean_ablation(head))])
            found.append(HeadEffect(layer, head, float(estimates[layer, head]), float(ablated - baseline)))
    return sorted(found, key=lambda effect: -effect.loss_rise)


def mean_ablation(head: int) -> Callable[[Tensor, HookPoint], None]:
    """A hook that replaces one head's output by its mean over the batch and the positions."""

    def ablate(z: Float[Tensor, "batch pos head d_head"], hook: HookPoint) -> None:
        z[:, :, head] = z[:, :, head].mean((0, 1))

    return ablate


@dataclass(frozen=True)
class PatchedPair:
    """What patching the residual stream restores of the clean answer."""

    pair: IOIPair
    tokens: list[str]
    clean: float
    corrupted: float
    restored: Float[Tensor, "layer pos"]
    """0: as corrupted, 1: as clean."""


def suitable_pair(bridge: TransformerBridge, tries: int = 50) -> tuple[IOIPair, Tensor, Tensor]:
    """An indirect-object pair whose two prompts have the same number of this model's tokens."""
    for seed in range(tries):
        pair = ioi_pair(seed)
        clean, corrupted = bridge.to_tokens(pair.clean), bridge.to_tokens(pair.corrupted)
        answers = [bridge.to_tokens(answer, prepend_bos=False)[0, 0] for answer in (pair.answer, pair.wrong_answer)]
        if clean.shape == corrupted.shape and answers[0] != answers[1]:
            return pair, clean, corrupted
    raise ValueError(f"none of {tries} indirect-object pairs has prompts of equal length under this tokenizer")


def patch_residual_stream(bridge: TransformerBridge, progress: Progress) -> PatchedPair:
    """Put the clean residual stream into the corrupted run, one layer and position at a time.

    All positions of a layer go in one batch: row `i` is patched at position `i`.
    """
    pair, clean, corrupted = suitable_pair(bridge)
    right, wrong = (int(bridge.to_tokens(a, prepend_bos=False)[0, 0]) for a in (pair.answer, pair.wrong_answer))

    def difference(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        return (logits[:, -1, right] - logits[:, -1, wrong]).float()

    positions = torch.arange(clean.shape[1], device=clean.device)
    with torch.no_grad():
        clean_logits, cache = bridge.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_resid_pre"))
        best, worst = difference(clean_logits)[0], difference(bridge(corrupted))[0]

        def patch(stream: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
            stream[positions, positions] = cache[str(hook.name)][0]

        rows = []
        for layer in progress(range(bridge.cfg.n_layers), "patching layers"):
            name = f"blocks.{layer}.hook_resid_pre"
            logits = bridge.run_with_hooks(corrupted.expand(len(positions), -1), fwd_hooks=[(name, patch)])
            rows.append((difference(logits) - worst) / (best - worst))
    return PatchedPair(
        pair, list(map(str, bridge.to_str_tokens(clean))), float(best), float(worst), torch.stack(rows).cpu()
    )


@dataclass(frozen=True)
class Routing:
    """Which experts a model chose for the tokens of a text."""

    tokens: list[str]
    experts: Int[Tensor, "layer pos chosen"]
    weights: Float[Tensor, "layer pos chosen"]


def routing(bridge: TransformerBridge, text: str) -> Routing:
    """The experts chosen for every token of a text, in every layer."""
    with torch.no_grad():
        _, cache = bridge.run_with_cache(text, names_filter=lambda name: ".mlp.hook_expert_" in name)
    chosen = [cache["expert_indices", layer][0] for layer in range(bridge.cfg.n_layers)]
    weights = [cache["expert_weights", layer][0] for layer in range(bridge.cfg.n_layers)]
    return Routing(
        list(map(str, bridge.to_str_tokens(text))), torch.stack(chosen).cpu(), torch.stack(weights).float().cpu()
    )
