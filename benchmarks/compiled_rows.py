"""The rows about `bridge.compile`: a graph with declared reads and edits beside the compiled bare model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from benchmarks.budgets import Row, Subject
from transformer_lens.hook_points import Edit
from transformer_lens.model_bridge.upstream import CACHE

BACKEND = "inductor"
BUDGET = 1.03
STREAM = "blocks.{}.hook_resid_post"
CACHED = 64
"""The places of the static cache that a step of decoding reads."""


def compiled_bare(subject: Subject) -> Callable[..., Any]:
    """The bare model in one graph, which returns what a runner returns."""
    bare = subject.bare
    return torch.compile(lambda tokens, **cache: bare(tokens, **cache).logits, backend=BACKEND, fullgraph=True)


def declared(subject: Subject, reads: int | None, steered: bool) -> dict[str, Any]:
    """How many layers' streams are read (`None`: all), and whether a vector is added to half of them."""
    layers = subject.bridge.cfg.n_layers
    names = [STREAM.format(layer) for layer in range(layers if reads is None else min(reads, layers))]
    vector = torch.full((subject.config.hidden_size,), 0.1, device=subject.place.device, dtype=subject.place.dtype)
    edits = [([STREAM.format(layer) for layer in range(layers // 2)], Edit("add", vector))]
    return {"reads": names, "edits": edits if steered else [], "backend": BACKEND}


def forward(subject: Subject, key: str, reads: int | None, steered: bool, what: str) -> Row:
    """A forward of the runner beside one of the compiled bare model; bitwise equal unless it is steered."""
    bare, tokens = compiled_bare(subject), subject.tokens
    with subject.bridge.compile(**declared(subject, reads, steered), tokens=tokens) as runner:
        equal = torch.equal(runner(tokens), bare(tokens))
        found = subject.compare(lambda: bare(tokens), lambda: runner(tokens))
    what = f"compiled forward, {what}, {tokens.shape[1]} tokens / compiled bare"
    return subject.ratio_row(key, what, found, BUDGET, logits_equal=equal)


def decode(subject: Subject) -> Row:
    """One token on a static cache, with every layer read and half of them steered."""
    bare, token = compiled_bare(subject), subject.tokens[:, :1]
    caches = [StaticCache(config=subject.config, max_cache_len=CACHED) for _ in range(2)]
    given = subject.bridge.arguments.named({CACHE: caches[0]})

    def empty() -> None:
        for cache in caches:
            cache.reset()

    with subject.bridge.compile(**declared(subject, None, True)) as runner:
        found = subject.compare(
            lambda: bare(token, **given), lambda: runner(token, past_key_values=caches[1]), setup=empty
        )
    what = f"compiled one-token decode, every layer read, half of them steered, {CACHED} cached places / compiled bare"
    return subject.ratio_row("compiled_decode", what, found, BUDGET)


FORWARDS: Mapping[str, tuple[int | None, bool, str]] = {
    "compiled_nothing": (0, False, "nothing declared"),
    "compiled_read_1": (1, False, "one layer read"),
    "compiled_read_8": (8, False, "8 layers read"),
    "compiled_read_all": (None, False, "every layer read"),
    "compiled_steered": (None, True, "every layer read, half of them steered"),
}
COMPILED_ROWS: Mapping[str, Callable[[Subject], Row]] = {
    **{
        key: partial(forward, key=key, reads=reads, steered=steered, what=what)
        for key, (reads, steered, what) in FORWARDS.items()
    },
    "compiled_decode": decode,
}
