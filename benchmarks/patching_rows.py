"""The rows about activation patching: the loop everybody writes beside the engine, the same sweep on both sides.

python -m benchmarks.bench --row patching patching_one_token --size 100m --family falcon --threads 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.budgets import Row, Subject
from benchmarks.models import random_tokens
from benchmarks.timing import Effort, compare
from transformer_lens import TransformerBridge
from transformer_lens.patching import get_act_patch_resid_pre

POSITIONS = 20
BUDGET = 1 / 5
"""At least five times faster than the loop; set for the Falcon of 100M, single thread."""
PAIRS = {
    "patching": "prompts that differ everywhere",
    "patching_one_token": "prompts that differ in one token, half way",
}


def prompts(config: Any, device: torch.device, kind: str) -> tuple[Tensor, Tensor]:
    """A clean and a corrupted prompt."""
    clean, other = random_tokens(config, POSITIONS, device, batch=2).split(1)
    if kind == "patching":
        return clean, other
    corrupted = clean.clone()
    corrupted[0, POSITIONS // 2] = other[0, POSITIONS // 2]
    return clean, corrupted


def difference(logits: Tensor) -> Tensor:
    """A logit difference at the end of the prompt."""
    return logits[0, -1, 5] - logits[0, -1, 7]


def loop(bridge: TransformerBridge, corrupted: Tensor, cache: Any) -> Tensor:
    """A forward of the whole model for each layer and position."""
    found = torch.zeros(bridge.cfg.n_layers, corrupted.shape[1])
    for layer in range(bridge.cfg.n_layers):
        name = f"blocks.{layer}.hook_resid_pre"
        for pos in range(corrupted.shape[1]):

            def patch(resid: Tensor, hook: Any, pos: int = pos) -> Tensor:
                resid[:, pos] = cache[hook.name][:, pos]
                return resid

            found[layer, pos] = difference(bridge.run_with_hooks(corrupted, fwd_hooks=[(name, patch)]))
    return found


def patching(subject: Subject, kind: str) -> Row:
    """The sweep over every layer's incoming stream and every position."""
    bridge, place = subject.bridge, subject.place
    clean, corrupted = prompts(subject.config, place.device, kind)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(clean, names_filter=names)

    def engine() -> Tensor:
        found: Tensor = get_act_patch_resid_pre(bridge, corrupted, cache, difference, verbose=False)
        return found

    expected = loop(bridge, corrupted, cache)
    error = float((engine().cpu() - expected).abs().max())
    pairs = min(3, place.effort.min_pairs)  # a loop takes many forwards, so few pairs are steady
    effort = Effort(min_pairs=pairs, min_seconds=0.0, max_pairs=pairs, warm_up=0)
    found = compare(lambda: loop(bridge, corrupted, cache), engine, place.device, effort)
    what = f"patching resid_pre, {bridge.cfg.n_layers} layers x {POSITIONS} positions / loop; {PAIRS[kind]}"
    budget = BUDGET if subject.name == "falcon 100m" else None
    detail = {"largest_error": error, "spread_of_results": float(expected.std())}
    return subject.ratio_row(kind, what, found, budget, times_faster=1 / found.ratio.median, **detail)


PATCHING_ROWS: Mapping[str, Callable[[Subject], Row]] = {kind: partial(patching, kind=kind) for kind in PAIRS}
