"""The tasks of `make bench-peers`: the same work and the same questions for every package.

A question is answered by plain torch hooks on the bare model, written here by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import FALCON_7B, make_config, make_model, random_tokens, twin_of
from benchmarks.peer_packages import NotOffered, generation_options
from benchmarks.timing import Comparison, Effort, Figure, compare, live_tensor_bytes, timed

CPU = torch.device("cpu")
Answer = dict[str, Any]
SMALL: Mapping[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    # Larger than the default, so that a wrong value is far above rounding.
    "initializer_range": 0.2,
}
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "7b": FALCON_7B,
    # Published configs of this layout say multi_query=True; the model class ignores it, and not everybody does.
    "40b": {"num_kv_heads": 2, "multi_query": True},
    "40b, multi_query=False": {"num_kv_heads": 2, "multi_query": False},
    "rw": {**FALCON_7B, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
}
GROUPED = tuple(layout for layout in LAYOUTS if layout != "rw")


class Bench:
    """One package and a bare model of the same weights."""

    def __init__(self, package: type[Any], family: str, size: str, effort: Effort, long_tokens: int) -> None:
        self.package = package
        self.effort = effort
        self.bare = make_model(make_config(family, size), CPU)
        self.long = random_tokens(self.bare.config, long_tokens, CPU)
        self.tokens = random_tokens(self.bare.config, 128, CPU)
        self.middle = self.bare.config.num_hidden_layers // 2
        self._subject: Any = None

    @property
    def subject(self) -> Any:
        """The wrapped model; made when first needed, so that a package that cannot is asked about nothing else."""
        if self._subject is None:
            self._subject = self.package(twin_of(self.bare))
        return self._subject

    def ratio(self, bare: Callable[[], Any], other: Callable[[], Any], **more: Any) -> Answer:
        """Time in pairs."""
        found: Comparison = compare(bare, other, CPU, self.effort)
        seconds = {"bare_s": found.bare.to_dict(), "other_s": found.other.to_dict()}
        return {"unit": "x", **found.ratio.to_dict(), **seconds, **more}


def untouched_forward(bench: Bench) -> Answer:
    subject, tokens = bench.subject, bench.tokens
    return bench.ratio(lambda: bench.bare(tokens), lambda: subject.forward(tokens))


def resid_cache(bench: Bench) -> Answer:
    subject, tokens = bench.subject, bench.long
    return bench.ratio(lambda: bench.bare(tokens), lambda: subject.resid(tokens), tokens=tokens.shape[1])


def full_cache(bench: Bench) -> Answer:
    subject, tokens = bench.subject, bench.tokens
    captured = subject.everything(tokens)
    return bench.ratio(lambda: bench.bare(tokens), lambda: subject.everything(tokens), captured=captured)


def head_patch(bench: Bench) -> Answer:
    subject, tokens, layer = bench.subject, bench.tokens, bench.middle
    with zeroed_head(bench.bare, layer, 1):
        expected = bench.bare(tokens).logits
    error = largest_error(subject.zero_head(tokens, layer, 1), expected)
    return bench.ratio(lambda: bench.bare(tokens), lambda: subject.zero_head(tokens, layer, 1), largest_error=error)


def steering(bench: Bench) -> Answer:
    subject, layer, new = bench.subject, bench.middle, 32
    prompt = bench.tokens[:, :16]
    vector = torch.full((bench.bare.config.hidden_size,), 0.1)
    options = generation_options(prompt, new)
    with added_vector(bench.bare, layer, vector):
        expected = bench.bare.generate(prompt, **options)
    same = torch.equal(subject.steered(prompt, layer, vector, new), expected)
    return bench.ratio(
        lambda: bench.bare.generate(prompt, **options),
        lambda: subject.steered(prompt, layer, vector, new),
        same_tokens_as_torch_hooks=same,
    )


def patching(bench: Bench) -> Answer:
    """A sweep over layers and positions, beside a loop with torch hooks on the bare model."""
    subject, (clean, corrupted) = bench.subject, random_tokens(bench.bare.config, 20, CPU, batch=2).split(1)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 5] - logits[0, -1, 7]

    def loop() -> Tensor:
        return patched_by_hooks(bench.bare, clean, corrupted, metric)

    try:
        error = largest_error(subject.patched(clean, corrupted, metric), loop())
    except NotOffered as reason:
        return {"unit": "x", "not_offered": str(reason)}
    pairs = min(2, bench.effort.min_pairs)
    effort = Effort(min_pairs=pairs, min_seconds=0.0, max_pairs=pairs, warm_up=0)
    found = compare(loop, lambda: subject.patched(clean, corrupted, metric), CPU, effort)
    seconds = {"bare_s": found.bare.to_dict(), "other_s": found.other.to_dict()}
    return {"unit": "x", **found.ratio.to_dict(), **seconds, "largest_error": error}


def wrapping(bench: Bench) -> Answer:
    seconds = []
    for _ in range(max(3, min(7, bench.effort.min_pairs))):
        model = twin_of(bench.bare)
        seconds.append(timed(lambda model=model: bench.package(model), CPU))
    return {"unit": "s", **Figure.of(seconds).to_dict()}


def parameter_bytes(bench: Bench) -> Answer:
    model = twin_of(bench.bare)
    own = sum(parameter.nbytes for parameter in model.parameters())
    bench.bare(bench.tokens)
    before = live_tensor_bytes(CPU)
    subject = bench.package(model)
    grown = live_tensor_bytes(CPU) - before
    subject.forward(bench.tokens)
    kept = live_tensor_bytes(CPU) - before - grown
    figure = Figure.of([(own + grown) / own]).to_dict()
    return {"unit": "x", **figure, "parameter_bytes": own, "kept_after_a_forward_bytes": kept}


TIMINGS: Mapping[str, Callable[[Bench], Answer]] = {
    "untouched_forward": untouched_forward,
    "resid_cache": resid_cache,
    "full_cache": full_cache,
    "head_patch": head_patch,
    "steering": steering,
    "patching": patching,
    "wrapping": wrapping,
    "parameter_bytes": parameter_bytes,
}


# -- questions with one right answer ---------------------------------------------------------------------


def ask(package: type[Any], question: str) -> Answer:
    """`<layout>:<what>`: the largest error of what a package shows, against plain torch hooks."""
    layout, what = question.split(":")
    bare = make_model(make_config("falcon", **{**SMALL, **LAYOUTS[layout]}), CPU)
    tokens = random_tokens(bare.config, 12, CPU, batch=2)
    subject = package(twin_of(bare))
    if what == "logits":
        return {"unit": "error", "largest_error": largest_error(subject.forward(tokens), bare(tokens).logits)}
    expected = true_inside(bare, tokens, what)
    try:
        shown = subject.inside(tokens, what)
    except NotOffered as reason:
        return {"unit": "error", "not_offered": str(reason)}
    if shown.numel() != expected.numel():
        return {"unit": "error", "wrong_shape": [list(shown.shape), list(expected.shape)]}
    return {"unit": "error", "largest_error": largest_error(shown.reshape(expected.shape), expected)}


QUESTIONS = (
    *(f"{layout}:logits" for layout in LAYOUTS),
    *(f"{layout}:{what}" for layout in GROUPED for what in ("mlp_out", "q", "k", "v")),
)


def true_inside(bare: Any, tokens: Tensor, what: str) -> Tensor:
    """What the first layer of a bare Falcon computes, by a hook that clones."""
    block, config = bare.transformer.h[0], bare.config
    kept: list[Tensor] = []
    module = block.mlp if what == "mlp_out" else block.self_attention.query_key_value
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    try:
        bare(tokens)
    finally:
        handle.remove()
    if what == "mlp_out":
        return kept[0]
    heads = config.num_attention_heads
    groups = config.num_kv_heads if config.new_decoder_architecture else 1
    grouped = kept[0].unflatten(-1, (groups, heads // groups + 2, config.hidden_size // heads))
    part = {"q": grouped[..., :-2, :], "k": grouped[..., -2:-1, :], "v": grouped[..., -1:, :]}[what]
    return part.flatten(-3, -2)


def largest_error(shown: Tensor, expected: Tensor) -> float:
    """The largest difference between two tensors."""
    return float((shown - expected).abs().max())


@contextmanager
def zeroed_head(bare: Any, layer: int, head: int) -> Any:
    """A plain torch hook that zeroes what one head puts into the output projection."""
    module, size = output_projection(bare, layer)

    def zero(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        changed = args[0].clone()
        changed[..., head * size : (head + 1) * size] = 0
        return (changed, *args[1:])

    handle = module.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def added_vector(bare: Any, layer: int, vector: Tensor) -> Any:
    """A plain torch hook that adds a vector to what a layer returns."""

    def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = layers_of(bare)[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def patched_by_hooks(bare: Any, clean: Tensor, corrupted: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
    """Patching the stream that enters each layer at each position: a forward of the bare model for each."""
    found = torch.zeros(len(layers_of(bare)), clean.shape[1])
    streams = bare(clean, output_hidden_states=True).hidden_states
    for layer, block in enumerate(layers_of(bare)):
        for pos in range(clean.shape[1]):

            def patch(_: nn.Module, args: tuple[Any, ...], layer: int = layer, pos: int = pos) -> tuple[Any, ...]:
                stream = args[0].clone()
                stream[:, pos] = streams[layer][:, pos]
                return (stream, *args[1:])

            handle = block.register_forward_pre_hook(patch)
            try:
                found[layer, pos] = metric(bare(corrupted).logits)
            finally:
                handle.remove()
    return found


def layers_of(bare: Any) -> Any:
    """The blocks of a bare model."""
    return bare.transformer.h if bare.config.model_type == "falcon" else bare.model.layers


def output_projection(bare: Any, layer: int) -> tuple[nn.Module, int]:
    """The module that mixes the heads, and the size of a head."""
    block = layers_of(bare)[layer]
    module = block.self_attention.dense if bare.config.model_type == "falcon" else block.self_attn.o_proj
    return module, bare.config.hidden_size // bare.config.num_attention_heads
