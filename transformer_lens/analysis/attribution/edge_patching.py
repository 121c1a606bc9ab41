"""Exact patching along edges: many experiments as rows of one forward, each with its own set of live edges.

Every receiver reads the corrupted run's stream, plus what changed of the senders whose edge to it is live. A
sender is computed from what it reads, or forced to what it writes in the clean run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.analysis.attribution.edge_graph import EdgeGraph
from transformer_lens.analysis.attribution.gradient_runs import one_number, prompt_pair, wide
from transformer_lens.analysis.attribution.senders import Vectors, read_senders, sender_hooks
from transformer_lens.analysis.patching.base_run import SweepInput
from transformer_lens.analysis.patching.engine import DEFAULT_BUDGET, Metric


@dataclass(frozen=True, eq=False)
class Experiment:
    """Which edges are live, and which senders write what they write in the clean run."""

    live: Bool[Tensor, "sender receiver"]
    forced: Bool[Tensor, " sender"]


@dataclass(frozen=True, eq=False)
class EdgeRuns:
    """A clean and a corrupted run, and what it takes to patch edges between them."""

    bridge: TransformerBridge
    graph: EdgeGraph
    input: Tensor
    """The corrupted one."""
    mask: Tensor | None
    clean_logits: Float[Tensor, "batch pos d_vocab"]
    corrupted_logits: Float[Tensor, "batch pos d_vocab"]
    clean: Vectors
    corrupted: Vectors
    """What every sender writes in either run."""
    streams: dict[str, Float[Tensor, "batch pos d_model"]]
    """Of the corrupted run, by the hook that reads it."""

    @classmethod
    def of(
        cls, bridge: TransformerBridge, clean: SweepInput, corrupted: SweepInput, attention_mask: Tensor | None = None
    ) -> EdgeRuns:
        """Run the model on both. Raises `ValueError` for inputs that do not fit one another."""
        pair = prompt_pair(bridge, clean, corrupted, attention_mask, "corrupted")
        graph = EdgeGraph.of(bridge)
        entering = [f"blocks.{i}.hook_resid_pre" for i in range(bridge.cfg.n_layers)]
        names = [*entering, *(one.hook for one in graph.receivers if one.index is None)]
        corrupted_logits, written, streams = read_senders(bridge, graph, pair.corrupted, pair.mask, names)
        clean_logits, clean_written, _ = read_senders(bridge, graph, pair.clean, pair.mask)
        inputs = (clean_logits, corrupted_logits, clean_written, written, streams)
        return cls(bridge, graph, pair.corrupted, pair.mask, *inputs)

    @torch.no_grad()
    def measure(
        self, experiments: Sequence[Experiment], metric: Metric, memory_budget: int = DEFAULT_BUDGET
    ) -> Float[Tensor, " experiment"]:
        """The metric of every experiment."""
        # Those that begin at the same layer go together, and none runs the layers below.
        order = sorted(range(len(experiments)), key=lambda number: self.first_layer(experiments[number]))
        size = max(1, memory_budget // (8 * self.corrupted.nbytes))
        values: dict[int, Tensor] = {}
        for first in range(0, len(order), size):
            some = order[first : first + size]
            logits = self.logits([experiments[number] for number in some])
            batches = logits.split(len(self.input))
            values |= {number: one_number(metric(rows)) for number, rows in zip(some, batches, strict=True)}
        if not values:
            return torch.zeros(0)
        return torch.stack([values[number] for number in range(len(experiments))])

    def first_layer(self, experiment: Experiment) -> int:
        """The first layer in which anything reads what changed."""
        readers = (experiment.live & experiment.forced[:, None] & self.graph.exists).any(0).nonzero()
        last = self.bridge.cfg.n_layers - 1
        hooks = [self.graph.receivers[int(number)].hook for number in readers]
        return min([last, *(self.bridge.hook_dict[hook].layer() for hook in hooks)])

    def logits(self, experiments: Sequence[Experiment]) -> Float[Tensor, "experiment_batch pos d_vocab"]:
        """The logits of some experiments, one after the other along the batch axis."""
        layer, copies = min(map(self.first_layer, experiments)), len(experiments)
        stream = self.streams[f"blocks.{layer}.hook_resid_pre"]
        logits: Tensor = self.bridge.run_with_hooks(
            stream.repeat(copies, 1, 1),
            fwd_hooks=_Together(self, experiments).hooks(layer),
            attention_mask=None if self.mask is None else self.mask.repeat(copies, 1),
            start_at_layer=layer,
        )
        return logits


class _Together:
    """Experiments in one forward: what has changed so far of every sender, in each of them."""

    def __init__(self, runs: EdgeRuns, experiments: Sequence[Experiment]) -> None:
        self.runs = runs
        device = runs.corrupted.device
        self.live = torch.stack([one.live & runs.graph.exists for one in experiments]).to(device, runs.corrupted.dtype)
        self.forced = torch.stack([one.forced for one in experiments]).to(device)[:, None, None, :, None]
        # The ones that are forced are known; the others have not changed until they are seen to.
        self.changed = torch.where(self.forced, (runs.clean - runs.corrupted)[None], 0)

    def hooks(self, layer: int) -> list[Any]:
        """In the order of the model: writers note what changed of them, readers are given their own streams."""
        graph = self.runs.graph
        writing = sender_hooks(self.runs.bridge, graph, self.note, first_layer=layer)
        reading: list[Any] = []
        for hook in dict.fromkeys(one.hook for one in graph.receivers):
            if self.runs.bridge.hook_dict[hook].layer() >= layer:
                reading.append((hook, self.reader(hook)))
        return [*writing, *reading]

    def note(self, columns: slice, written: Vectors) -> None:
        new = wide(written).unflatten(0, (len(self.live), -1)) - self.runs.corrupted[:, :, columns]
        self.changed[:, :, :, columns] = torch.where(
            self.forced[:, :, :, columns], self.changed[:, :, :, columns], new.to(self.changed.device)
        )

    def reader(self, hook: str) -> Any:
        graph = self.runs.graph
        columns = graph.columns(graph.receivers, hook)
        before = int(graph.exists[:, columns.start].sum())  # senders stand in the order of the model
        name = (
            hook if hook in self.runs.streams else f"blocks.{self.runs.bridge.hook_dict[hook].layer()}.hook_resid_pre"
        )
        live = self.live[:, :before, columns]

        def read(stream: Tensor, hook: HookPoint) -> Tensor:
            change = torch.einsum("cbpsd,csr->cbprd", self.changed[:, :, :, :before], live)
            base = self.runs.streams[name]
            own = wide(base)[None, :, :, None] + change.to(base.device)
            return own.flatten(0, 1).reshape(stream.shape).to(stream.dtype)

        return read
