"""The rows of the budget table: each measures one promise of design section 5 on one model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import make_config, make_model, random_tokens, twin_of
from benchmarks.port_cost import port_cost
from benchmarks.timing import Comparison, Effort, Figure, compare, live_tensor_bytes, timed
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.upstream import CACHE, output_name

FORWARD_TOKENS = 128
LONG_TOKENS = 2048
NEW_TOKENS = 32


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured on which model, and what it may be."""

    key: str
    what: str
    model: str
    measured: Figure
    unit: str
    budget: float | None
    """`None` where the design sets no budget for this model: the figure stands for itself."""
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ok, over, or - where there is no budget."""
        if self.budget is None:
            return "-"
        return "ok" if self.measured.median <= self.budget else "over"

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return {**asdict(self), "detail": dict(self.detail), "verdict": self.verdict}


@dataclass(frozen=True)
class Place:
    """Where and how much is measured."""

    device: torch.device
    dtype: torch.dtype
    effort: Effort
    long_tokens: int = LONG_TOKENS
    new_tokens: int = NEW_TOKENS


class Subject:
    """A bare model and, on the same weights, one that a bridge has wrapped."""

    def __init__(self, name: str, bare: nn.Module, place: Place, exact_size: str = "") -> None:
        self.name = name
        self.size = exact_size
        self.place = place
        self.bare: Any = bare
        self.config: Any = bare.config
        self.wrapped: Any = twin_of(bare)
        self.bridge = TransformerBridge(self.wrapped)

    @classmethod
    def of(cls, family: str, size: str, place: Place) -> Subject:
        """A subject of the tables in `models`."""
        bare = make_model(make_config(family, size), place.device, place.dtype)
        return cls(f"{family} {size}", bare, place, size)

    @cached_property
    def tokens(self) -> Tensor:
        return random_tokens(self.config, FORWARD_TOKENS, self.place.device)

    @cached_property
    def long(self) -> Tensor:
        return random_tokens(self.config, self.place.long_tokens, self.place.device)

    def compare(self, bare: Callable[[], Any], other: Callable[[], Any], **options: Any) -> Comparison:
        """Time bare transformers against the bridge."""
        return compare(bare, other, self.place.device, self.place.effort, **options)

    def row(self, key: str, what: str, measured: Figure, unit: str, budget: float | None, **detail: Any) -> Row:
        """A line about this subject."""
        return Row(key, what, self.name, measured, unit, budget, detail)

    def ratio_row(self, key: str, what: str, found: Comparison, budget: float | None, **detail: Any) -> Row:
        """A line that holds a ratio, with the seconds it came from."""
        seconds = {"bare_s": found.bare.to_dict(), "bridge_s": found.other.to_dict()}
        return self.row(key, what, found.ratio, "x", budget, **seconds, **detail)


# -- rows --------------------------------------------------------------------------------------------


def noise(subject: Subject) -> Row:
    """The same work on both sides: what a ratio is worth on this machine now."""
    found = subject.compare(lambda: subject.bare(subject.tokens), lambda: subject.bare(subject.tokens))
    return subject.ratio_row("noise", "bare / bare: what the machine adds by itself", found, None)


def untouched_forward(subject: Subject) -> Row:
    """A forward with nothing hooked."""
    bare, bridge, tokens = subject.bare, subject.bridge, subject.tokens
    found = subject.compare(lambda: bare(tokens), lambda: bridge(tokens))
    what = f"forward, nothing hooked, {FORWARD_TOKENS} tokens / bare"
    return subject.ratio_row("untouched_forward", what, found, 1.02)


def untouched_decode(subject: Subject) -> Row:
    """One more token with a KV cache, nothing hooked."""
    bare, bridge, tokens = subject.bare, subject.bridge, subject.tokens
    output = bare(tokens, use_cache=True)
    held = getattr(output, output_name(output, CACHE))
    given = bridge.arguments.named({CACHE: held})
    token = tokens[:, :1]
    found = subject.compare(
        lambda: bare(token, **given),
        lambda: bridge(token, past_key_values=held),
        setup=lambda: _forget_new(held, tokens.shape[1]),
    )
    return subject.ratio_row("untouched_decode", "one-token decode, nothing hooked / bare", found, 1.05)


def _forget_new(held: Any, length: int) -> None:
    """Cut a KV cache back to its first positions, so that every sample decodes the same one.

    `DynamicCache.crop` takes other arguments in other releases of transformers.
    """
    for layer in held.layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def parameter_bytes(subject: Subject) -> Row:
    """Tensors alive after wrapping and a forward, over those alive before: a copy hidden anywhere counts."""
    place = subject.place
    model = twin_of(subject.bare)
    own = sum(parameter.nbytes for parameter in model.parameters())
    tokens = subject.tokens
    model(tokens)  # what the bare model and its libraries hold on to is not ours
    before = live_tensor_bytes(place.device)
    bridge = TransformerBridge(model)
    bridge(tokens)
    grown = live_tensor_bytes(place.device) - before
    bridge.detach()
    measured = Figure.of([(own + grown) / own])
    what = "unique parameter bytes after wrapping / before"
    return subject.row("parameter_bytes", what, measured, "x", 1.0, parameter_bytes=own, grown_bytes=grown)


def wrapping(subject: Subject) -> Row:
    """Putting a bridge on a loaded model and taking it off again; only the putting on is timed."""
    model = twin_of(subject.bare)
    seconds = []
    for _ in range(max(5, subject.place.effort.min_pairs)):
        made: list[TransformerBridge] = []
        seconds.append(timed(lambda made=made: made.append(TransformerBridge(model)), subject.place.device))
        made.pop().detach()
    budget = 0.1 if subject.size == "250m" else None
    return subject.row("wrapping", "wrapping a loaded model", Figure.of(seconds), "s", budget)


def names_by_predicate(subject: Subject) -> Row:
    """Choosing hooks of 96 layers by a predicate, which is asked for every spelling of every hook."""
    config = copy.deepcopy(subject.config)
    config.num_hidden_layers = 96
    with torch.device("meta"):
        bridge = TransformerBridge(type(subject.bare)(config))
    bridge.hook_dict  # noqa: B018  named once for each model
    choose = partial(bridge.select_names, lambda name: name.endswith("hook_resid_post"))
    assert len(choose()) == config.num_hidden_layers
    seconds = [timed(choose, subject.place.device) for _ in range(20)]
    what = f"choosing one of {len(bridge.hook_dict) // 96} hooks in each of 96 layers by a predicate"
    return subject.row("names_by_predicate", what, Figure.of(seconds), "s", 0.002)


def resid_cache(subject: Subject) -> Row:
    """Every `hook_resid_post` of a long text."""
    bare, bridge, tokens = subject.bare, subject.bridge, subject.long
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    found = subject.compare(lambda: bare(tokens), lambda: bridge.run_with_cache(tokens, names_filter=names))
    what = f"caching every hook_resid_post, {tokens.shape[1]} tokens / bare sdpa"
    return subject.ratio_row("resid_cache", what, found, 1.10)


def full_cache(subject: Subject) -> Row:
    """Everything a cache takes by default. The budget is for 24 tiny layers, where overhead weighs most."""
    bare, bridge, tokens = subject.bare, subject.bridge, subject.tokens
    found = subject.compare(lambda: bare(tokens), lambda: bridge.run_with_cache(tokens))
    budget = 2.0 if subject.size == "tiny" else None
    what = f"caching everything, {tokens.shape[1]} tokens / bare"
    return subject.ratio_row("full_cache", what, found, budget, captured=len(bridge.default_names()))


def port_cache(subject: Subject) -> Row:
    """Every port, so that what is inside modules adds to `full_cache` can be told from what the hooks cost."""
    bare, bridge, tokens = subject.bare, subject.bridge, subject.tokens
    kinds = {row.name: row.kind for row in bridge.hook_table().present()}
    ports = [name for name in bridge.default_names() if kinds[re.sub(r"^blocks\.\d+", "blocks.{i}", name)] == "port"]
    found = subject.compare(lambda: bare(tokens), lambda: bridge.run_with_cache(tokens, names_filter=ports))
    what = f"caching every port, {tokens.shape[1]} tokens / bare"
    return subject.ratio_row("port_cache", what, found, None, captured=len(ports))


def pattern_cache(subject: Subject) -> Row:
    """One layer's attention pattern from a model that runs sdpa."""
    bare, bridge, tokens = subject.bare, subject.bridge, subject.long
    name = f"blocks.{bridge.cfg.n_layers // 2}.attn.hook_pattern"
    found = subject.compare(lambda: bare(tokens), lambda: bridge.run_with_cache(tokens, names_filter=name))
    what = f"caching one layer's pattern, {tokens.shape[1]:,} tokens / bare sdpa"
    return subject.ratio_row("pattern_cache", what, found, None)


def kept_memory(subject: Subject) -> Row:
    """What is still alive after runs whose cache nobody keeps."""
    bridge, tokens, device = subject.bridge, subject.tokens, subject.place.device
    everything = [(name, _look) for name in bridge.default_names()]

    def runs() -> None:
        bridge(tokens)
        bridge.run_with_hooks(tokens, fwd_hooks=everything)
        bridge.run_with_cache(tokens)

    runs()  # what libraries set up once, such as cuBLAS's workspace, is not ours
    before = live_tensor_bytes(device)
    runs()
    kept = live_tensor_bytes(device) - before
    return subject.row("kept_memory", "memory kept after runs without a cache", Figure.of([float(kept)]), "bytes", 0)


def verifying(subject: Subject) -> Row:
    """`bridge.verify()` as it comes: every layer, hook and component, with and without a KV cache."""
    report = subject.bridge.verify(progress=False)
    if not report.passed:
        raise ValueError(f"verify on {subject.name} failed:\n{report}")
    what, budget = "bridge.verify()", 30.0 if subject.size == "135m" else None
    measured = Figure.of([report.seconds])
    return subject.row("verify", what, measured, "s", budget, comparisons=len(report.results))


def _look(tensor: Tensor, hook: Any) -> None:
    """A hook that edits nothing."""


def steering(subject: Subject) -> Row:
    """A vector added at one layer during a generation, with Hugging Face's own `generate`."""
    bare, bridge, place = subject.bare, subject.bridge, subject.place
    prompt = subject.tokens[:, :16]
    vector = torch.full((subject.config.hidden_size,), 0.1, device=place.device, dtype=place.dtype)
    name = f"blocks.{bridge.cfg.n_layers // 2}.hook_resid_post"
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": place.new_tokens,
        "min_new_tokens": place.new_tokens,
        "do_sample": False,
    }

    def steered() -> Any:
        with bridge.hooks(fwd_hooks=[(name, lambda resid, hook: resid + vector)]):
            return bridge.original_model.generate(prompt, **options)

    found = subject.compare(lambda: bare.generate(prompt, **options), steered)
    what = f"steering one layer in a {place.new_tokens}-token generation / bare generate"
    return subject.ratio_row("steering", what, found, 1.10)


def port_hot_path(subject: Subject) -> Row:
    """The time one capturing port adds to one call of a block; a property of Python, so measured on tiny models."""
    cost = port_cost(subject.bridge, subject.tokens, subject.place.device, subject.place.effort)
    others = {"with_a_user_hook_us": cost.looking.to_dict(), "attach_and_remove_us": cost.attaching.to_dict()}
    what = "one capturing port, per call of its block"
    return subject.row("port_hot_path", what, cost.capturing, "us", 20.0, **others)


ROWS: Mapping[str, Callable[[Subject], Row]] = {
    "noise": noise,
    "untouched_forward": untouched_forward,
    "untouched_decode": untouched_decode,
    "parameter_bytes": parameter_bytes,
    "wrapping": wrapping,
    "names_by_predicate": names_by_predicate,
    "resid_cache": resid_cache,
    "full_cache": full_cache,
    "port_cache": port_cache,
    "pattern_cache": pattern_cache,
    "kept_memory": kept_memory,
    "steering": steering,
    "port_hot_path": port_hot_path,
    "verify": verifying,
}
