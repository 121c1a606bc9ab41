"""The patching engine: many interventions on one run, as few batched forwards.

A forward starts at the first layer and position that an intervention changes; everything before comes from the base
run. Interventions on higher layers join the batch when it reaches their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from transformer_lens import TransformerBridge, on_each, on_rows
from transformer_lens.analysis.arguments import checked, metric_number
from transformer_lens.analysis.patching.lazy_logits import LazyLogits
from transformer_lens.checks import in_words
from transformer_lens.model_bridge import PrefixCache

SweepInput = str | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"]
"""Text, token ids, or embeddings (for example noised ones)."""
Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]
"""Any Python function from logits to one number."""
Intervention = tuple[str, Callable[..., Any]]
"""The name of a hook inside a block, and a hook function `fn(tensor, hook)`."""

DEFAULT_BUDGET = 1 << 30
"""Bytes a batch of interventions may take in addition to the model."""
ENOUGH_TOKENS = 192
"""A batch of this many tokens keeps the processor busy, so no longer rows are added to fill it."""


@checked
@torch.no_grad()
def run_interventions(
    model: TransformerBridge,
    tokens: SweepInput,
    interventions: Sequence[Intervention],
    metric: Metric,
    *,
    attention_mask: Tensor | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    verbose: bool = False,
    each_text: bool = False,
) -> Float[Tensor, "intervention ..."]:
    """The metric of the logits under each of many interventions, equal up to rounding to a loop over
    `run_with_hooks(tokens, fwd_hooks=[intervention])`. An intervention is the name of a hook inside a block and a hook
    function, called once, on the whole activation of the run without interventions. The metric is called once for each,
    in no particular order, under `torch.no_grad()`, with its own logits [batch pos d_vocab]; positions it never reads
    are not computed (`LazyLogits`).

    >>> tokens = bridge.to_tokens("When Mary and John went to the store")
    >>> def without(head):
    ...     return lambda z, hook: z.index_fill(2, torch.tensor(head), 0)
    >>> heads = [("blocks.1.attn.hook_z", without(head)) for head in range(bridge.cfg.n_heads)]
    >>> metric = lambda logits: logits[0, -1].logsumexp(-1)
    >>> found = run_interventions(bridge, tokens, heads, metric)
    >>> alone = metric(bridge.run_with_hooks(tokens, fwd_hooks=[heads[2]]))
    >>> found.shape, torch.allclose(found[2], alone, atol=1e-5)
    (torch.Size([4]), True)

    `tokens` may be embeddings; `attention_mask` as in `bridge.forward`. `memory_budget` limits a batch, in bytes, by an
    estimate from the model's sizes (at least one intervention runs; the base run's activations come on top). `verbose`
    shows a progress bar. With `each_text` the metric returns one number for each text, [batch]. While user hooks are
    attached, and in a model with state-space layers or that predicts no next token, each intervention is a forward of
    its own. Raises `KeyError` for unknown hooks and `ValueError` for hooks outside the blocks.
    """
    for one in interventions:
        if not isinstance(one, (tuple, list)) or len(one) != 2 or not callable(one[1]):
            raise TypeError(f"interventions: got {in_words(one)}, expected (name, function) pairs")
    named = [(model.canonical_name(name), fn) for name, fn in interventions]
    outside = [name for name, _ in named if not name.startswith("blocks.")]
    if outside:
        raise ValueError(f"interventions: {outside[0]!r} is not inside a block, and a sweep runs blocks again")

    def measured(logits: Tensor) -> Tensor:
        return metric_number(metric(logits), len(logits) if each_text else None)

    hooked = any(point.has_hooks("fwd") for point in model.hook_points())
    stateful = any(name.endswith("hook_mixer_out") for name in model.hook_dict)  # no state to go on from
    # What is made of all positions in each call cannot be changed at later positions alone.
    whole = any({"pos", "query_pos"}.isdisjoint(model.hook_dict[name].axes.split()) for name, _ in named)
    if hooked or stateful or whole or "unembed.hook_out" not in model.hook_dict:
        input, _, mask = model.input_and_mask(tokens, attention_mask=attention_mask)
        runs = (model.run_with_hooks(input, fwd_hooks=[one], attention_mask=mask) for one in named)
        found: Iterable[tuple[int, Tensor]] = enumerate(map(measured, runs))
    else:
        base = _BaseRun.of(model, tokens, attention_mask, (name for name, _ in named))
        found = _Sweep(base, measured, memory_budget, torch.zeros(base.pos, dtype=torch.bool)).run(named)
    numbers = dict(tqdm(found, total=len(named), disable=not verbose, desc="interventions", leave=False))
    values = [numbers[i] for i in range(len(named))]
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    return torch.tensor([value.tolist() for value in values], dtype=dtype, device=model.cfg.device)


@dataclass(eq=False)
class _Sweep:
    base: _BaseRun
    measured: Callable[[Tensor], Tensor]
    budget: int
    read: Bool[Tensor, " pos"]
    """The positions that the metric has read so far."""

    def run(self, interventions: Sequence[Intervention]) -> Iterator[tuple[int, Tensor]]:
        """Each intervention's number and metric."""
        waiting: list[_Change] = []
        for number, (name, fn) in enumerate(interventions):
            found = _change(self.base, number, name, fn)
            if found is None:
                yield number, self.measured(self.base.logits.clone())
                continue
            waiting.append(found)
            if sum(one.values.nbytes for one in waiting) > self.budget // 4:
                yield from self.run_changes(waiting)
                waiting = []
        yield from self.run_changes(waiting)

    def run_changes(self, changes: list[_Change]) -> Iterator[tuple[int, Tensor]]:
        """Run changes as batches of rows that start at about the same position."""
        left = sorted(changes, key=lambda one: (one.first, one.layer))
        while left:
            start = left[0].first
            size, tokens = 1, self.base.pos - start
            # A row that could start later joins a small batch, or if it starts hardly later.
            while size < min(len(left), self.most_rows(start)) and (
                size * self.base.batch * tokens < ENOUGH_TOKENS or self.base.pos - left[size].first > 0.9 * tokens
            ):
                size += 1
            yield from self.batch(left[:size], start)
            left = left[size:]

    def batch(self, changes: Sequence[_Change], start: int) -> Iterator[tuple[int, Tensor]]:
        """One pass through the layers; each change joins at its own."""
        ordered = sorted(changes, key=lambda one: (one.layer, one.name))
        layers = {layer: list(members) for layer, members in groupby(ordered, key=lambda one: one.layer)}
        stream: Tensor | None = None
        for layer in range(min(layers), self.base.bridge.cfg.n_layers):
            joining = layers.get(layer, [])
            if joining:
                below = self.base.streams[layer][:, start:].repeat(len(joining), 1, 1)
                stream = below if stream is None else torch.cat([stream, below])
            stream = self.layer(stream, layer, start, joining)
        yield from self.metrics(ordered, stream, start)

    def layer(self, stream: Any, layer: int, start: int, joining: Sequence[_Change]) -> Tensor:
        """One layer of the model, with the joining changes written into its last rows."""
        batch = self.base.batch
        copies = len(stream) // batch
        row = len(stream) - len(joining) * batch
        hooks = []
        for name, members in groupby(joining, key=lambda one: one.name):
            writers = [partial(one.write, start) for one in members]
            rows = slice(row, row + len(writers) * batch)
            hooks.append((name, on_rows(rows, on_each(writers, rows_each=batch))))
            row = rows.stop
        return self.base.bridge.run_with_hooks(  # type: ignore[no-any-return]
            stream,
            fwd_hooks=hooks,
            attention_mask=self.base.mask_of_copies(copies, start),
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            past_key_values=PrefixCache(self.base.past, start, copies, layer) if start else None,
        )

    def metrics(self, changes: Sequence[_Change], stream: Any, start: int) -> Iterator[tuple[int, Tensor]]:
        """Each change's metric, from the stream after the last layer."""
        rows = stream.unflatten(0, (len(changes), self.base.batch))
        left = [(one, resid[:, one.first - start :]) for one, resid in zip(changes, rows, strict=True)]
        most = self.budget // (4 * self.base.bridge.cfg.d_vocab_out * stream.element_size() * stream.shape[1])
        while left:
            # The positions that the metric reads are known after its first call.
            size = max(1, most // self.base.batch) if self.read.any() else 1
            yield from self.group_metrics(left[:size])
            left = left[size:]

    def group_metrics(self, group: Sequence[tuple[_Change, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        """The metrics of some changes, whose expected logits are computed together."""
        positions = torch.arange(self.base.pos)
        needed = [self.read & (positions >= one.first) for one, _ in group]
        parts = [resid[:, wanted[one.first :]] for (one, resid), wanted in zip(group, needed, strict=True)]
        logits = self.unembed(torch.cat([part.flatten(0, 1) for part in parts]))
        computed = logits.split([part.shape[0] * part.shape[1] for part in parts])
        for (one, resid), wanted, part, new in zip(group, needed, parts, computed, strict=True):
            values = torch.full_like(self.base.logits, torch.nan)
            values[:, : one.first] = self.base.logits[:, : one.first]
            values[:, wanted] = new.unflatten(0, part.shape[:2])
            lazy = LazyLogits.of(values, wanted | (positions < one.first), partial(self.further, one.first, resid))
            yield one.number, self.looked_at(lazy)

    def further(self, first: int, resid: Tensor, wanted: Tensor) -> Float[Tensor, "batch wanted d_vocab"]:
        """The logits at further positions of a change whose stream begins at `first`."""
        part = resid[:, wanted[first:]]
        return self.unembed(part.flatten(0, 1)).unflatten(0, part.shape[:2])  # type: ignore[no-any-return]

    def unembed(self, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """The logits of final-stream vectors."""
        if not len(vectors):
            return vectors.new_empty(0, self.base.bridge.cfg.d_vocab_out)
        # Each as a text of one token: nothing mixes positions here.
        logits: Tensor = self.base.bridge(vectors[:, None], start_at_layer=self.base.bridge.cfg.n_layers)
        return logits[:, 0].to(self.base.logits.device)

    def looked_at(self, logits: LazyLogits) -> Tensor:
        """The metric of partly computed logits."""
        value = self.measured(logits)
        missed = bool(value.isnan().any()) and not logits.there.all()
        if missed or not logits.read.any():  # it may have gone around torch's functions, as vmap and dlpack do
            value = self.measured(logits.plain(torch.ones_like(logits.there)))
        self.read = self.read | logits.read
        return value

    def most_rows(self, start: int) -> int:
        """How many interventions fit the budget at once, at least one, estimated from the model's sizes."""
        cfg, base = self.base.bridge.cfg, self.base
        new = base.pos - start
        mlp = 4 * cfg.d_mlp * (cfg.experts_per_token or 1)
        heads = cfg.n_heads * cfg.d_head
        numbers = new * (8 * cfg.d_model + mlp + 6 * heads) + base.pos * 4 * heads + 2 * cfg.n_heads * new * base.pos
        return max(1, self.budget // (2 * base.batch * numbers * base.logits.element_size()))


@dataclass(frozen=True, eq=False)
class _BaseRun:
    """One run without interventions, and what is needed to rerun its upper layers and later positions."""

    bridge: TransformerBridge
    mask: Int[Tensor, "batch pos"] | None
    """Set only if the padding is on the left or the caller gave a mask, as in a plain call of the bridge."""
    seen: Bool[Tensor, "batch pos"]
    """False at padding."""
    logits: Float[Tensor, "batch pos d_vocab"]
    streams: dict[int, Float[Tensor, "batch pos d_model"]]
    """The stream that enters each layer with an intervention."""
    activations: dict[str, Tensor]
    past: DynamicCache

    @classmethod
    def of(cls, bridge: TransformerBridge, input: SweepInput, mask: Tensor | None, names: Iterable[str]) -> _BaseRun:
        """Run the model once, keeping the named activations and the streams that enter their layers."""
        input, seen, mask = bridge.input_and_mask(input, attention_mask=mask)
        wanted = list(dict.fromkeys(names))
        layers = dict.fromkeys(bridge.hook_dict[name].layer() for name in wanted)
        streams = {layer: f"blocks.{layer}.hook_resid_pre" for layer in layers}
        past = DynamicCache()  # given no config, it keeps every position, also of a model with sliding windows
        logits, cache = bridge.run_with_cache(
            input,
            names_filter=[*wanted, *streams.values()],
            return_cache_object=False,
            attention_mask=mask,
            past_key_values=past,
        )
        kept = {layer: cache[name] for layer, name in streams.items()}
        return cls(bridge, mask, seen, logits, kept, {name: cache[name] for name in wanted}, past)

    def mask_of_copies(self, copies: int, start: int) -> Int[Tensor, "copies_batch pos"] | None:
        """The mask of copies run from position `start` on; where the base run had none, they also attend to padding."""
        everything = start and self.mask is None and not bool(self.seen.all())
        mask = torch.ones_like(self.seen, dtype=torch.long) if everything else self.mask
        return None if mask is None else mask.repeat(copies, 1)

    @property
    def batch(self) -> int:
        return self.logits.shape[0]

    @property
    def pos(self) -> int:
        return self.logits.shape[1]


@dataclass(frozen=True, eq=False)
class _Change:
    """One intervention's new values for an activation, at the positions where they differ."""

    number: int
    name: str
    layer: int
    axis: int
    positions: Int[Tensor, " changed"]
    values: Shaped[Tensor, "batch ..."]
    """The new values at those positions, [batch ... changed ...] along `axis`."""

    @property
    def first(self) -> int:
        """The first changed position; a causal model computes earlier ones as before."""
        return int(self.positions[0])

    def write(self, start: int, activation: Tensor, hook: Any) -> None:
        """Write the values, in a run that starts at position `start`."""
        activation.index_copy_(self.axis, self.positions - start, self.values)


def _change(base: _BaseRun, number: int, name: str, fn: Any) -> _Change | None:
    """What an intervention changes in the base run, or `None`; `fn` gets its own copy of the activation."""
    point = base.bridge.hook_dict[name]
    before = base.activations[name]
    own = before.clone()
    result = fn(own, hook=point)
    after = own if result is None else result
    if not isinstance(after, Tensor):
        raise TypeError(f"intervention at {name!r}: got {type(after).__name__}, expected a Tensor or None")
    got, expected = (f"{list(one.shape)} and {one.dtype}" for one in (after, before))
    if got != expected:
        raise ValueError(f"intervention at {name!r}: got shape {got}, expected {expected}")
    axis = point.position_axis
    differs = (after != before).movedim(axis, 0).flatten(1).any(1)
    positions = differs.nonzero().flatten()
    if not len(positions):
        return None
    if point.read_only:
        raise ValueError(f"hook {name!r} cannot be written: {point.read_only}")
    return _Change(number, name, point.layer(), axis, positions, after.detach().index_select(axis, positions))
