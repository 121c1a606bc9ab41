"""Path patching, edge effects and circuit faithfulness, measured exactly by running the model.

Sources: Wang et al. 2022 (path patching); Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path
Patching"; Hanna et al. 2024 (faithfulness).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import transformer_lens.analysis.attribution.gradient_runs as gradient_runs
from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.edge_graph import Circuit, Edge, EdgeGraph, EdgeScores
from transformer_lens.analysis.attribution.gradient_runs import Vectors, one_number
from transformer_lens.analysis.patching.engine import DEFAULT_BUDGET, Metric, SweepInput
from transformer_lens.asking import is_pair, part_label
from transformer_lens.checks import in_words
from transformer_lens.factored_matrix import wide

Stop = str | Sequence[int] | Sequence[str | tuple[int, int]]
"""The label of a sender or a receiver, a head also as `"3.2"` or `(3, 2)`; or several in parallel."""


@checked
def path_patching(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    paths: Sequence[Sequence[Stop]],
    *,
    attention_mask: Tensor | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Float[Tensor, " path"]:
    """The metric of the corrupted run when the clean run's change travels along one path only.

    >>> metric = lambda logits: logits[0, -1, 5]
    >>> paths = [("embed", "L3H2.k"), ("embed", "L3H2"), ("L0H1", ["L3H2.q", "L3H2.v"]), ("embed", "L3H2", "logits")]
    >>> path_patching(bridge, "Mary and John", "Mary and Mary", metric, paths).shape
    torch.Size([4])

    A path starts at a sender, which writes its clean output, and goes on through receivers. Up to the last of them only
    the path carries the change; everything after it is recomputed (so a path that ends at `"logits"` is that path
    alone). Each step may be a list of senders or receivers; a head as receiver (`"L3H2"`, `"3.2"`, `(3, 2)`) means its
    query, key and value inputs. Labels as in `EdgeGraph`; an MLP's input leads to all experts of its layer.

    It is exact: each head's input is edited separately, even where heads share keys, and the final norm, softmaxes and
    routers run. It costs two forwards, and one batch row per path and text from the first layer that reads the path.
    Raises `KeyError` for unknown labels, `ValueError` for a step without an edge.
    """
    runs = _EdgeRuns.of(bridge, clean, corrupted, attention_mask)
    return runs.measure([along_path(runs.graph, path) for path in paths], metric, memory_budget)


@checked
def edge_effects(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    edges: Iterable[Edge] | None = None,
    *,
    attention_mask: Tensor | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> EdgeScores:
    """The exact effect of each edge alone: the metric when the edge carries its sender's clean output and everything
    after is recomputed, minus the corrupted run's metric. `edges=None` means every edge; the others score 0. It is what
    `edge_attribution_patching` estimates, at one batch row per edge.

    >>> metric = lambda logits: logits[0, -1, 5]
    >>> effects = edge_effects(bridge, "Mary and John", "Mary and Mary", metric, [("embed", "L3H2.k")])
    >>> len(effects.top(1)), effects["embed", "L3H2.v"]
    (1, 0.0)
    """
    runs = _EdgeRuns.of(bridge, clean, corrupted, attention_mask)
    chosen = runs.graph.edges() if edges is None else list(edges)
    experiments = [along_path(runs.graph, edge) for edge in chosen]
    effects = runs.measure(experiments, metric, memory_budget) - one_number(metric(runs.corrupted_logits)).detach()
    scores = effects.new_zeros(runs.graph.exists.shape)
    for edge, effect in zip(chosen, effects, strict=True):
        scores[runs.graph._place(edge)] = effect
    return EdgeScores(runs.graph, scores)


@checked
def circuit_metric(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    circuits: Sequence[Circuit],
    *,
    attention_mask: Tensor | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Float[Tensor, " circuit"]:
    """The metric of the clean run when every edge outside a circuit carries its value from the corrupted run.

    >>> metric = lambda logits: logits[0, -1, 5]
    >>> whole = Circuit(EdgeGraph.of(bridge), EdgeGraph.of(bridge).exists)
    >>> found = circuit_metric(bridge, "Mary and John", "Mary and Mary", metric, [whole])
    >>> torch.allclose(found[0], metric(bridge("Mary and John")), atol=1e-4)
    True
    """
    runs = _EdgeRuns.of(bridge, clean, corrupted, attention_mask)
    return runs.measure(_of_circuits(runs.graph, circuits), metric, memory_budget)


@checked
def faithfulness(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    circuits: Sequence[Circuit],
    *,
    attention_mask: Tensor | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> Float[Tensor, " circuit"]:
    """The faithfulness of circuits, `(metric(circuit) - metric(corrupted)) / (metric(clean) - metric(corrupted))`: 1 if
    a circuit does all the model does, 0 if nothing (Hanna et al. 2024). Raises `ValueError` if the metrics are equal.

    >>> metric = lambda logits: logits[0, -1, 5]
    >>> graph = EdgeGraph.of(bridge)
    >>> nothing, whole = Circuit.of(graph, []), Circuit(graph, graph.exists)
    >>> found = faithfulness(bridge, "Mary and John", "Mary and Mary", metric, [nothing, whole])
    >>> torch.allclose(found, torch.tensor([0.0, 1.0]), atol=1e-3)
    True
    """
    runs = _EdgeRuns.of(bridge, clean, corrupted, attention_mask)
    best, worst = (one_number(metric(logits)).detach() for logits in (runs.clean_logits, runs.corrupted_logits))
    if bool(best == worst):
        raise ValueError(f"faithfulness: the metric is {float(best)} in the clean and in the corrupted run")
    found = runs.measure(_of_circuits(runs.graph, circuits), metric, memory_budget)
    return (found - worst) / (best - worst)


def _of_circuits(graph: EdgeGraph, circuits: Sequence[Circuit]) -> list[_Experiment]:
    embed = torch.tensor([one.label == "embed" for one in graph.senders])
    for one in circuits:
        if not isinstance(one, Circuit):
            raise TypeError(f"circuits: got {in_words(one)} among them, expected Circuits")
        if one.graph.senders != graph.senders or one.graph.receivers != graph.receivers:
            raise ValueError(f"circuits: got {one!r} of another model, expected edges of {graph!r}")
    return [_Experiment(one.kept, embed) for one in circuits]


@checked
def along_path(graph: EdgeGraph, path: Sequence[Stop]) -> _Experiment:
    """The experiment in which one path, and everything after it, is live."""
    if not isinstance(graph, EdgeGraph):
        raise TypeError(f"graph: got {in_words(graph)}, expected an EdgeGraph")
    if len(path) < 2:
        raise ValueError(f"path: got {path!r}, expected a sender and at least one receiver")
    stops: list[list[Any]] = [
        [stop] if isinstance(stop, str) or is_pair(stop) else list(stop) if isinstance(stop, (list, tuple)) else []
        for stop in path
    ]
    if not all(stops):
        raise ValueError(f"path: got {path!r}, in which a step is empty")
    forced = torch.zeros(len(graph.senders), dtype=torch.bool)
    forced[[graph.sender(label) for label in stops[0]]] = True
    live, writing = graph.exists.clone(), forced
    for step in stops[1:]:
        readers = torch.zeros(len(graph.receivers), dtype=torch.bool)
        readers[[number for label in step for number in _receivers(graph, label)]] = True
        if not (graph.exists & writing[:, None])[:, readers].any(0).all():
            raise ValueError(f"path: got {path!r}, but nothing of the step before reaches {step}")
        live[writing] = readers
        nodes = {graph.receivers[int(number)].node for number in readers.nonzero()}
        writing = torch.tensor([one.node in nodes for one in graph.senders])
    return _Experiment(live & graph.exists, forced)


def _receivers(graph: EdgeGraph, label: Any) -> list[int]:
    """A receiver, or a head's three."""
    names = [(one.label, one.node, one.label.partition(".")[0]) for one in graph.receivers]
    label = part_label(label)
    return [number for number, known in enumerate(names) if label in known] or [graph.receiver(label)]


# Every receiver reads the corrupted run's stream, plus the change of each sender whose edge to it is live. A sender
# is computed from what it reads, or forced to its clean output.


class _Experiment(NamedTuple):
    """Which edges are live, and which senders are forced to their clean output."""

    live: Bool[Tensor, "sender receiver"]
    forced: Bool[Tensor, " sender"]


@dataclass(frozen=True, eq=False)
class _EdgeRuns:
    """A clean and a corrupted run, for patching edges between them."""

    bridge: TransformerBridge
    graph: EdgeGraph
    mask: Tensor | None
    clean_logits: Float[Tensor, "batch pos d_vocab"]
    corrupted_logits: Float[Tensor, "batch pos d_vocab"]
    clean: Vectors
    """Every sender's output."""
    corrupted: Vectors
    streams: dict[str, Float[Tensor, "batch pos d_model"]]
    """The corrupted run's stream at each hook that reads it."""

    @classmethod
    def of(cls, bridge: TransformerBridge, clean: SweepInput, corrupted: SweepInput, mask: Tensor | None) -> _EdgeRuns:
        """Run the model on both inputs. Raises `ValueError` if they do not match."""
        pair = gradient_runs.prompt_pair(bridge, clean, corrupted, mask, "corrupted")
        graph = EdgeGraph.of(bridge)
        entering = [f"blocks.{i}.hook_resid_pre" for i in range(bridge.cfg.n_layers)]
        names = [*entering, *(one.hook for one in graph.receivers if one.index is None)]
        corrupted_logits, written, streams = gradient_runs.read_senders(bridge, graph, pair.base, pair.mask, names)
        logits, clean_written, _ = gradient_runs.read_senders(bridge, graph, pair.other, pair.mask)
        return cls(bridge, graph, pair.mask, logits, corrupted_logits, clean_written, written, streams)

    @torch.no_grad()
    def measure(self, experiments: Sequence[_Experiment], metric: Metric, budget: int) -> Float[Tensor, " experiment"]:
        """The metric of every experiment, in batches of so many bytes."""
        # Experiments that start at the same layer share a batch, and skip the layers below.
        order = sorted(range(len(experiments)), key=lambda number: self.first_layer(experiments[number]))
        size = max(1, budget // (8 * self.corrupted.nbytes))
        values: dict[int, Tensor] = {}
        for first in range(0, len(order), size):
            some = order[first : first + size]
            batches = self.logits([experiments[number] for number in some]).split(len(self.corrupted))
            values |= {number: one_number(metric(rows)) for number, rows in zip(some, batches, strict=True)}
        return torch.stack([values[number] for number in sorted(values)]) if values else torch.zeros(0)

    def first_layer(self, experiment: _Experiment) -> int:
        """The first layer that reads a change."""
        readers = (experiment.live & experiment.forced[:, None] & self.graph.exists).any(0).nonzero()
        last = self.bridge.cfg.n_layers - 1
        hooks = [self.graph.receivers[int(number)].hook for number in readers]
        return min([last, *(self.bridge.hook_dict[hook].layer() for hook in hooks)])

    def logits(self, experiments: Sequence[_Experiment]) -> Float[Tensor, "experiment_batch pos d_vocab"]:
        """The logits of some experiments, concatenated along the batch axis."""
        layer, copies = min(map(self.first_layer, experiments)), len(experiments)
        stream = self.streams[f"blocks.{layer}.hook_resid_pre"]
        return self.bridge.run_with_hooks(  # type: ignore[no-any-return]
            stream.repeat(copies, 1, 1),
            fwd_hooks=self.hooks(experiments, layer),
            attention_mask=None if self.mask is None else self.mask.repeat(copies, 1),
            start_at_layer=layer,
        )

    def hooks(self, experiments: Sequence[_Experiment], layer: int) -> list[Any]:
        """Experiments in one forward from a layer on: writers record their change, readers get their own stream."""
        graph, points, device = self.graph, self.bridge.hook_dict, self.corrupted.device
        live = torch.stack([one.live & graph.exists for one in experiments]).to(self.corrupted)
        forced = torch.stack([one.forced for one in experiments]).to(device)[:, None, None, :, None]
        # Each sender's change in each experiment: known if forced, unknown at first otherwise.
        changed = torch.where(forced, (self.clean - self.corrupted)[None], 0)

        def note(columns: slice, written: Vectors) -> None:
            new = wide(written).unflatten(0, (len(live), -1)) - self.corrupted[:, :, columns]
            here = changed[:, :, :, columns]
            here.copy_(torch.where(forced[:, :, :, columns], here, new.to(device)))

        def read(stream: Tensor, hook: HookPoint) -> Tensor:
            columns = graph.columns(graph.receivers, str(hook.name))
            before = int(graph.exists[:, columns.start].sum())  # senders stand in the order of the model
            # Most readers read the same senders, and share one sum.
            wanted, which = live[:, :before, columns].unique(dim=2, return_inverse=True)
            change: Tensor = (wanted.mT[:, None, None] @ changed[:, :, :, :before])[:, :, :, which]
            entering = f"blocks.{hook.layer()}.hook_resid_pre"
            base = self.streams[str(hook.name) if hook.name in self.streams else entering]
            own = wide(base)[None, :, :, None] + change.to(base.device)
            return own.flatten(0, 1).reshape(stream.shape).to(stream.dtype)

        reading = [hook for hook in graph.receiver_hooks if points[hook].layer() >= layer]
        return [*gradient_runs.sender_hooks(self.bridge, graph, note, first_layer=layer), (reading, read)]
