"""The rows about `bridge.compile`, beside the compiled bare model, and about continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation import ContinuousBatchingConfig

from benchmarks.budgets import Row, Subject
from benchmarks.timing import Figure
from transformer_lens.hook_points import Edit
from transformer_lens.model_bridge.generating.many import FIXED
from transformer_lens.model_bridge.upstream import CACHE

BACKEND = "inductor"
MODE: str | None = None
"""What `torch.compile` is told besides: "reduce-overhead", on CUDA, replays CUDA graphs."""
BUDGET = 1.03
STREAM = "blocks.{}.hook_resid_post"
CACHED = 64
"""The places of the static cache that a step of decoding reads."""


def compiled_bare(subject: Subject) -> Callable[..., Any]:
    """The bare model in one graph, which returns what a runner returns."""
    bare = subject.bare
    return torch.compile(
        lambda tokens, **cache: bare(tokens, **cache).logits, backend=BACKEND, mode=MODE, fullgraph=True
    )


def declared(subject: Subject, reads: int | None, steered: bool) -> dict[str, Any]:
    """How many layers' streams are read (`None`: all), and whether a vector is added to half of them."""
    layers = subject.bridge.cfg.n_layers
    names = [STREAM.format(layer) for layer in range(layers if reads is None else min(reads, layers))]
    vector = torch.full((subject.config.hidden_size,), 0.1, device=subject.place.device, dtype=subject.place.dtype)
    edits = [([STREAM.format(layer) for layer in range(layers // 2)], Edit("add", vector))]
    return {"reads": names, "edits": edits if steered else [], "backend": BACKEND, "mode": MODE}


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


def inside(subject: Subject) -> Row:
    """A forward that reads one layer's pattern, and a mixture's router logits in every layer."""
    bare, tokens, bridge = compiled_bare(subject), subject.tokens, subject.bridge
    names = ["blocks.0.attn.hook_pattern", *(name for name in bridge.hook_dict if name.endswith("hook_router_logits"))]
    with bridge.compile(reads=[names], backend=BACKEND, mode=MODE, tokens=tokens) as runner:
        found = subject.compare(lambda: bare(tokens), lambda: runner(tokens))
    what = f"compiled forward, one pattern and all router logits read, {tokens.shape[1]} tokens / compiled bare"
    return subject.ratio_row("compiled_inside", what, found, None)


def generation(subject: Subject) -> Row:
    """Steered generation by a runner, beside Hugging Face's own of the bare model, compiled and on a static cache."""
    bare, bridge, prompt = subject.bare, subject.bridge, subject.tokens[:, :16]
    with bridge.compile(**declared(subject, None, True)) as runner:
        given = {
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "max_new_tokens": subject.place.new_tokens,
        }
        compiled = CompileConfig(backend=BACKEND, mode=MODE, fullgraph=True)
        compiled._compile_all_devices = True
        theirs = {**given, "cache_implementation": "static", "compile_config": compiled}
        found = subject.compare(
            lambda: bare.generate(prompt, **theirs), lambda: bridge.generate(prompt, runner=runner, **given)
        )
    what = f"generation by a runner, every layer read, half of them steered, {subject.place.new_tokens} tokens"
    return subject.ratio_row("compiled_generation", f"{what} / compiled bare generate", found, BUDGET)


def many_requests(subject: Subject) -> Row:
    """Continuous batching with an edit and a read of each request, beside the bare engine."""
    key, what = "batch_edited", "eight requests by generate_batch, each steered and read / transformers' generate_batch"
    bare, bridge = subject.bare, subject.bridge
    if not type(bare).is_backend_compatible():
        return subject.row(key, f"{what}: no paged cache for this family", Figure.of([0.0]), "x", None)
    requests = [subject.tokens[0, : 8 + 4 * number].tolist() for number in range(8)]
    vector = torch.full((subject.config.hidden_size,), 0.1, device=subject.place.device, dtype=subject.place.dtype)
    edits = {number: [(STREAM.format(0), Edit("add", vector))] for number in range(8)}
    chosen = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=subject.place.new_tokens)
    sizes = {"num_blocks": 16, "max_batch_tokens": 256}
    engine = ContinuousBatchingConfig(**sizes, **FIXED, auto_switch_to_flash=False)
    ours = {"do_sample": False, "stop_at_eos": False, "engine": sizes}
    found = subject.compare(
        lambda: bare.generate_batch(requests, chosen, engine, warmup=False),
        lambda: bridge.generate_batch(requests, chosen.max_new_tokens, reads=STREAM.format(0), edits=edits, **ours),
    )
    return subject.ratio_row(key, what, found, 1.05)


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
    "compiled_inside": inside,
    "compiled_generation": generation,
    "batch_edited": many_requests,
}
