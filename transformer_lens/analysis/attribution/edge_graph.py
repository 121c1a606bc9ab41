"""The graph of edges: what writes to the residual stream, what reads from it, and in which order.

Senders are the embedding, each head and each MLP or expert. Receivers are the query, key and value input of each query
head, each MLP's input, and the final norm's input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import part_label, refuse_shared_experts
from transformer_lens.checks import a_text, in_words, whole
from transformer_lens.model_bridge import Branch
from transformer_lens.text_table import Records

Edge = tuple[str, str]
"""The labels of a sender and of a receiver."""


@dataclass(frozen=True)
class Place:
    """A sender or a receiver."""

    label: str
    hook: str
    """The hook that shows its vectors."""
    index: int | None
    """The head or expert of that hook."""
    stage: int
    """Senders reach receivers of later stages; parallel branches share a stage."""
    node: str
    """Each head is its own node; an MLP, or all experts of a layer together, is one."""


@dataclass(frozen=True, eq=False, repr=False)
class EdgeGraph:
    """The graph of a model. Senders are labelled `embed`, `L0H1` (also `0.1` and `(0, 1)`), `0_mlp_out` and `L0E2` (an
    expert); `0_attn_out` where a norm or factor comes after the heads. Receivers are `L1H2.q`, `.k`, `.v`, `1_mlp_in`
    (the router's and experts' shared input) and `logits`.

    >>> graph = EdgeGraph.of(bridge)
    >>> graph
    EdgeGraph of 21 senders, 53 receivers and 463 edges
    >>> graph.senders[1].label, graph.receivers[0].label, graph.has_edge("L0H1", "0_mlp_in")
    ('L0H0', 'L0H0.q', False)
    """

    senders: tuple[Place, ...]
    receivers: tuple[Place, ...]

    @classmethod
    @checked
    def of(cls, bridge: TransformerBridge) -> Self:
        """The graph of a model. Raises `ValueError` for one with a shared expert, which no sender stands for."""
        refuse_shared_experts(bridge, "the graph of edges")
        senders = [Place("embed", "hook_embed", None, 0, "embed")]
        receivers: list[Place] = []
        stages = [(i, stage) for i, block in enumerate(bridge.blocks) for stage in block.stages]
        for number, (i, stage) in enumerate(stages, 1):
            for branch in stage:
                senders += _writing(bridge, i, branch, number)
                receivers += _reading(bridge, i, branch, number)
        last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
        return cls(tuple(senders), (*receivers, Place("logits", last, None, len(stages) + 1, "logits")))

    @cached_property
    def exists(self) -> Bool[Tensor, "sender receiver"]:
        """Which edges exist."""
        sent = torch.tensor([one.stage for one in self.senders])
        read = torch.tensor([one.stage for one in self.receivers])
        return sent[:, None] < read

    @cached_property
    def receiver_hooks(self) -> list[str]:
        """The hooks that show what receivers read, in the order of the model."""
        return list(dict.fromkeys(one.hook for one in self.receivers))

    @cached_property
    def _numbers(self) -> dict[str, dict[str, int]]:
        ends = {"sender": self.senders, "receiver": self.receivers}
        return {what: {one.label: number for number, one in enumerate(places)} for what, places in ends.items()}

    def sender(self, label: str | tuple[int, int]) -> int:
        """The number of a sender. Raises `KeyError` for an unknown label."""
        return self._number("sender", label)

    def receiver(self, label: str) -> int:
        """The number of a receiver. Raises `KeyError` for an unknown label."""
        return self._number("receiver", label)

    def _number(self, what: str, label: Any) -> int:
        label, numbers = a_text(what, part_label(label)), self._numbers[what]
        if label not in numbers:
            some = list(numbers)
            node = next((one.node for one in self.receivers if one.label == f"{label}.q"), None)
            joint = what == "sender" and node is not None
            why = f"; {node}_out sends for this head, for a norm or factor comes after it" if joint else ""
            raise KeyError(f"{what}: got {label!r}, expected one of {', '.join(some[:4])}, ..., {some[-1]}{why}")
        return numbers[label]

    def has_edge(self, sender: str | tuple[int, int], receiver: str) -> bool:
        """Whether this receiver reads what this sender writes."""
        return bool(self.exists[self.sender(sender), self.receiver(receiver)])

    def edges(self) -> list[Edge]:
        """Every edge."""
        return self._labels(self.exists)

    def _labels(self, mask: Bool[Tensor, "sender receiver"]) -> list[Edge]:
        """The edges of a mask."""
        return [(self.senders[s].label, self.receivers[r].label) for s, r in mask.nonzero().tolist()]

    def columns(self, places: Sequence[Place], hook: str) -> slice:
        """The slice of a hook's senders or receivers, which are adjacent."""
        found = [number for number, one in enumerate(places) if one.hook == hook]
        return slice(found[0], found[-1] + 1)

    @checked
    def mask(self, edges: Iterable[Edge]) -> Bool[Tensor, "sender receiver"]:
        """The mask of some edges. Raises `ValueError` for a pair without an edge."""
        kept = torch.zeros_like(self.exists)
        for edge in edges:
            place = self._place(edge)
            if not self.exists[place]:
                raise ValueError(f"edges: {edge[0]!r} does not come before {edge[1]!r}, so there is no edge")
            kept[place] = True
        return kept

    def _place(self, edge: Any) -> tuple[int, int]:
        """The numbers of an edge's sender and receiver."""
        if not isinstance(edge, (tuple, list)) or len(edge) != 2:
            raise TypeError(f"edge: got {in_words(edge)}, expected (sender, receiver)")
        return self.sender(edge[0]), self.receiver(edge[1])

    def __repr__(self) -> str:
        edges = int(self.exists.sum())
        return f"EdgeGraph of {len(self.senders)} senders, {len(self.receivers)} receivers and {edges} edges"


def _node(layer: int, branch: Branch, head: int) -> str:
    return f"L{layer}H{head}" if branch.mixer == "attn" and branch.direct else f"{layer}_{branch.mixer}"


def _writing(bridge: TransformerBridge, layer: int, branch: Branch, stage: int) -> list[Place]:
    """Each head or expert of a branch, or the whole branch if a norm or scale lies between them and the stream."""
    block, mixer = f"blocks.{layer}.", branch.mixer
    if branch.direct and mixer == "attn":
        hook, label, many = "attn.hook_result", "H", bridge.cfg.n_heads
    elif branch.direct and f"{block}mlp.hook_expert_out" in bridge.hook_dict and mixer == "mlp":
        hook, label, many = "mlp.hook_expert_out", "E", int(bridge.cfg.num_experts or 0)
    else:
        return [Place(f"{layer}_{mixer}_out", f"{block}hook_{mixer}_out", None, stage, _node(layer, branch, 0))]
    return [Place(f"L{layer}{label}{n}", block + hook, n, stage, _node(layer, branch, n)) for n in range(many)]


def _reading(bridge: TransformerBridge, layer: int, branch: Branch, stage: int) -> list[Place]:
    """Each head's query, key and value input, or the branch's input as a whole."""
    block = f"blocks.{layer}."
    if branch.mixer != "attn":
        label = f"{branch.mixer}_in"
        return [Place(f"{layer}_{label}", f"{block}hook_{label}", None, stage, _node(layer, branch, 0))]
    return [
        Place(f"L{layer}H{head}.{part}", f"{block}hook_{part}_input", head, stage, _node(layer, branch, head))
        for part in "qkv"
        for head in range(bridge.cfg.n_heads)
    ]


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """A subset of a graph's edges.

    >>> circuit = Circuit.of(EdgeGraph.of(bridge), [("embed", "L0H1.v"), ("L0H1", "logits"), ("embed", "L3H0.q")])
    >>> circuit, circuit.connected().edges()
    (Circuit of 3 of 463 edges, [('embed', 'L0H1.v'), ('L0H1', 'logits')])
    """

    graph: EdgeGraph
    kept: Bool[Tensor, "sender receiver"]

    @classmethod
    @checked
    def of(cls, graph: EdgeGraph, edges: Iterable[Edge]) -> Self:
        """A circuit from edge labels. Raises `KeyError` and `ValueError` for edges that do not exist."""
        if not isinstance(graph, EdgeGraph):
            raise TypeError(f"graph: got {in_words(graph)}, expected an EdgeGraph")
        return cls(graph, graph.mask(edges))

    def edges(self) -> list[Edge]:
        """The kept edges."""
        return self.graph._labels(self.kept)

    @checked
    def without(self, edges: Iterable[Edge]) -> Circuit:
        """The circuit minus some edges."""
        return Circuit(self.graph, self.kept & ~self.graph.mask(edges))

    def connected(self) -> Circuit:
        """The circuit without edges that lie on no path from the embedding to the logits."""
        same = torch.tensor([[s.node == r.node for s in self.graph.senders] for r in self.graph.receivers])
        kept = self.kept
        while True:
            fed = torch.tensor([s.node == "embed" for s in self.graph.senders]) | (kept.any(0)[:, None] & same).any(0)
            used = torch.tensor([r.node == "logits" for r in self.graph.receivers]) | (kept.any(1) & same).any(1)
            fewer = kept & fed[:, None] & used
            if torch.equal(fewer, kept):
                return Circuit(self.graph, kept)
            kept = fewer

    def __len__(self) -> int:
        return int(self.kept.sum())

    def __repr__(self) -> str:
        return f"Circuit of {len(self)} of {int(self.graph.exists.sum())} edges"


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Records):
    """A score for every edge; zero for pairs without an edge."""

    graph: EdgeGraph
    scores: Float[Tensor, "sender receiver"]

    def __getitem__(self, edge: Edge) -> float:
        """The score of one edge, by its labels."""
        return float(self.scores[self.graph._place(edge)])

    def values(self) -> Float[Tensor, " edge"]:
        """The scores of all edges, in the order of `graph.edges()`."""
        return self.scores[self.graph.exists]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One row for each edge."""
        each = zip(self.graph.edges(), self.values().tolist(), strict=True)
        return [{"sender": sender, "receiver": receiver, "score": score} for (sender, receiver), score in each]

    @checked
    def top(self, n: int) -> list[tuple[str, str, float]]:
        """The `n` edges with the largest absolute scores, largest first."""
        places = [divmod(int(at), len(self.graph.receivers)) for at in self._order()[:n]]
        senders, receivers = self.graph.senders, self.graph.receivers
        return [(senders[s].label, receivers[r].label, float(self.scores[s, r])) for s, r in places]

    def keep(self, n: int) -> Circuit:
        """The circuit of the `n` edges with the largest absolute scores."""
        n = whole("keep", n, 0, int(self.graph.exists.sum()), " edges")
        kept = torch.zeros_like(self.graph.exists).flatten()
        kept[self._order()[:n]] = True
        return Circuit(self.graph, kept.view_as(self.graph.exists))

    @checked
    def prune(self, threshold: float) -> Circuit:
        """The circuit of edges with an absolute score of at least `threshold`, without dead ends."""
        return Circuit(self.graph, self.graph.exists & (self.scores.abs().cpu() >= threshold)).connected()

    def _order(self) -> Tensor:
        sizes = self.scores.abs().cpu().masked_fill(~self.graph.exists, -1).flatten()
        return sizes.argsort(descending=True, stable=True)[: int(self.graph.exists.sum())]

    def __repr__(self) -> str:
        return f"EdgeScores of {len(self.values())} edges"
