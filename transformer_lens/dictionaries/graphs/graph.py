"""`AttributionGraph`: what feeds what on one prompt, its completeness, its most influential part, and interventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens.checks import a_number, in_words, one_of, whole
from transformer_lens.dictionaries.graphs.local_model import LocalModel, Node

KINDS = ("feature", "error", "expert", "token", "logit")


class Intervention(NamedTuple):
    """The change of each row's value, in the order of `graph.rows`: predicted by the graph, and measured."""

    direct: Float[Tensor, " row"]
    """The edges from the changed nodes."""
    direct_measured: Float[Tensor, " row"]
    """With all other features, attention and norms held."""
    total: Float[Tensor, " row"]
    """Through the graph's features, as if none switched on or off."""
    total_measured: Float[Tensor, " row"]
    """In the local replacement model, whose features do switch; attention and norms held."""
    in_model: Float[Tensor, " row"]
    """In the model itself, with nothing held."""
    routing: Float[Tensor, " row"]
    """The direct change of the routers' logits that the graph predicts, in the order of `graph.routing_rows`."""
    rerouted: int
    """For how many tokens of how many layers, in the model itself, other experts were chosen."""


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph:
    """The direct effects between nodes: `edges[i, j]` is what node `j` adds to the value of node `rows[i]`.

    A row's edges, its `bias` and the `rest` of features that were left out add up to its value: a feature's activation,
    a logit less the mean of all logits.
    """

    nodes: list[Node]
    rows: list[int]
    """The nodes that have incoming edges: features, then logits."""
    edges: Float[Tensor, "row node"]
    values: Float[Tensor, " row"]
    bias: Float[Tensor, " row"]
    rest: Float[Tensor, " row"]
    routing_rows: list[int]
    """The experts whose router logit `routing` is about: the routing is held, and this is what would move it."""
    routing: Float[Tensor, "expert node"]
    """What each node adds to an expert's router logit, less the mean of the router's logits."""
    routing_values: Float[Tensor, " expert"]
    routing_bias: Float[Tensor, " expert"]
    tokens: list[str]
    logit_tokens: list[str]
    local: LocalModel

    def __repr__(self) -> str:
        counts = ", ".join(f"{sum(node.kind == kind for node in self.nodes)} {kind}s" for kind in KINDS)
        return f"AttributionGraph of {counts}, {int(self.edges.count_nonzero())} edges"

    def of_kind(self, kind: str) -> Bool[Tensor, " node"]:
        """Which nodes are of a kind: "feature", "error", "expert", "token" or "logit"."""
        one_of("kind", kind, KINDS)
        return torch.tensor([node.kind == kind for node in self.nodes])

    def index(self, node: Any) -> int:
        """The number of a node, given as that or as a `Node`. Raises `KeyError` for one that is not there."""
        if isinstance(node, Node):
            same = [i for i, one in enumerate(self.nodes) if one[:4] == node[:4]]
            if not same:
                raise KeyError(f"node: got {node.label()}, which is not in {self!r}")
            return same[0]
        return whole("node", node, 0, len(self.nodes) - 1, " (nodes)")

    def adjacency(self) -> Float[Tensor, "node node"]:
        """All edges as a square: targets are rows, sources are columns."""
        found = self.edges.new_zeros(len(self.nodes), len(self.nodes))
        found[self.rows] = self.edges
        return found

    def missing(self) -> float:
        """How far edges, bias and rest are from the values, at most, as a share of the largest value."""
        wrong = self.edges.sum(1) + self.bias + self.rest - self.values
        return float(wrong.abs().max() / self.values.abs().max())

    def weights(self) -> Float[Tensor, " node"]:
        """The probability of each logit; zero for other nodes."""
        return torch.tensor([node.value if node.kind == "logit" else 0.0 for node in self.nodes]).to(self.edges)

    def influence(self) -> Float[Tensor, " node"]:
        """How much of the logits goes back to each node, along all paths: the sum over their lengths of the logits'
        probabilities times powers of the edges' sizes, each row divided by its sum (Ameisen et al. 2025).
        """
        return influence_of(self.edges, self.rows, self.weights())

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The nodes and then the edges that have so much of the influence, and all tokens and logits; what loses its
        last edge in or out goes too. What was cut is in `rest`.
        """
        keep = [a_number("node_threshold", node_threshold, 0, 1), a_number("edge_threshold", edge_threshold, 0, 1)]
        influence, ends = self.influence(), self.of_kind("token") | self.of_kind("logit")
        nodes = (influence >= _least(influence, keep[0])) | ends
        rows = torch.tensor(self.rows)
        edges = self.edges * nodes * nodes[rows][:, None]
        shares = _normalised(edges)
        scores = shares * (influence_of(edges, self.rows, self.weights()) + self.weights())[rows][:, None]
        kept = scores >= _least(scores.flatten(), keep[1])
        features = self.of_kind("feature")
        while True:
            kept &= nodes & nodes[rows][:, None]
            fed = ~features
            fed[rows] |= kept.any(1)
            left = nodes & (ends | (kept.any(0) & fed))
            if bool((left == nodes).all()):
                return self._part(nodes, kept)
            nodes = left

    def _part(self, nodes: Tensor, kept: Tensor) -> AttributionGraph:
        chosen = nodes.nonzero().flatten().tolist()
        new = {old: at for at, old in enumerate(chosen)}
        rows = [i for i, row in enumerate(self.rows) if row in new]
        routers = [i for i, row in enumerate(self.routing_rows) if row in new]
        edges = (self.edges * kept)[rows][:, chosen]
        return replace(
            self,
            nodes=[self.nodes[i] for i in chosen],
            rows=[new[self.rows[i]] for i in rows],
            edges=edges,
            values=self.values[rows],
            bias=self.bias[rows],
            rest=self.rest[rows] + self.edges[rows].sum(1) - edges.sum(1),
            routing_rows=[new[self.routing_rows[i]] for i in routers],
            routing=self.routing[routers][:, chosen],
            routing_values=self.routing_values[routers],
            routing_bias=self.routing_bias[routers],
        )

    def scores(self) -> tuple[float, float]:
        """How well features explain the prompt, from 0 to 1: the share of influence that reaches tokens and not errors
        or experts (replacement), and of all edges, weighted by influence, that do not come from those (completeness).
        """
        influence, missed = self.influence(), self.of_kind("error") | self.of_kind("expert")
        token, wrong = float(influence[self.of_kind("token")].sum()), float(influence[missed].sum())
        weight, explained = influence + self.weights(), torch.ones_like(influence)
        explained[self.rows] -= _normalised(self.edges)[:, missed].sum(1)
        return token / (token + wrong), float((explained * weight).sum() / weight.sum())

    @torch.no_grad()
    def intervene(self, factors: Mapping[Any, float]) -> Intervention:
        """Multiply what some nodes write (0 ablates a feature), and compare what the graph says with what happens.

        `graph.intervene({3: 0.0}).direct` is minus the column of node 3 in the edges, and `direct_measured` the same by
        running the model. Nodes are given as numbers or as `Node`. Raises `ValueError` for a logit.
        """
        given: Any = factors if isinstance(factors, Mapping) else {}
        changes = {self.index(node): a_number("factor", factor) - 1 for node, factor in given.items()}
        if not changes or any(self.nodes[i].kind == "logit" for i in changes):
            raise ValueError(f"factors: got {in_words(factors)}, expected {{node: factor}} for other nodes than logits")
        moved = self.edges.new_zeros(len(self.nodes))
        moved[[*changes]] = torch.tensor([*changes.values()]).to(moved)
        total, fixed = moved.clone(), moved != 0
        features = self.of_kind("feature")[self.rows]
        rows = torch.tensor(self.rows)[features]
        for _ in self.local.writes:
            response = self.edges[features] @ total / self.values[features]
            total[rows] = torch.where(fixed[rows], moved[rows], response)
        local, targets = self.local, [self.nodes[i] for i in self.rows]
        held, followed, free = local.intervened({self.nodes[i]: change for i, change in changes.items()})
        return Intervention(
            direct=self.edges @ moved,
            direct_measured=local.read(held, targets, active=False) - self.values,
            total=self.edges @ total,
            total_measured=local.read(followed, targets) - self.values,
            in_model=local.read(free, targets) - self.values,
            routing=self.routing @ moved,
            rerouted=local.rerouted(free),
        )


def influence_of(edges: Tensor, rows: list[int], weights: Tensor) -> Float[Tensor, " node"]:
    """The influence of every node, along paths of all lengths; no path is longer than the layers."""
    shares, now = _normalised(edges), weights
    found = torch.zeros_like(weights)
    while bool(now[rows].any()):
        now = now[rows] @ shares
        found = found + now
    return found


def _normalised(edges: Tensor) -> Float[Tensor, "row node"]:
    return edges.abs() / edges.abs().sum(1, keepdim=True).clamp(min=1e-10)


def _least(scores: Tensor, share: float) -> Tensor:
    """The smallest score that is needed for so much of their sum."""
    ordered = scores.sort(descending=True).values
    reached = (ordered.cumsum(0) / ordered.sum()).ge(share).nonzero()
    return ordered[int(reached[0]) if len(reached) else -1]
