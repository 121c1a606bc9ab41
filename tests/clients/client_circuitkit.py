"""EAP-IG as circuitkit carries it: scores of edges by its methods, and what a circuit of them keeps.

The package's own `__init__` refuses any `transformer_lens` but the one whose inside it patches, so its backend is
imported by itself, as it is.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import distribution
from typing import Any

import torch

sys.path.insert(0, str(distribution("circuitkit").locate_file("circuitkit/backends")))

from eap.attribute import attribute
from eap.evaluate import evaluate_baseline, evaluate_graph
from eap.graph import Graph

from tests.clients.steps import plain, run
from transformer_lens.analysis.attribution import (
    EdgeScores,
    edge_attribution_patching,
    edge_attribution_patching_ig,
)
from transformer_lens.data.generate import ioi_pair

PAIR = ioi_pair(3)


@cache
def model(name: str) -> Any:
    bridge = plain(name)
    for switch in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(bridge, f"set_use_{switch}")(True)
    bridge.set_ungroup_grouped_query_attention(True)
    return bridge


def data(bridge: Any) -> list[Any]:
    answers = [bridge.to_single_token(text) for text in (PAIR.answer, PAIR.wrong_answer)]
    return [([PAIR.clean], [PAIR.corrupted], torch.tensor([answers]))]


def difference(logits: torch.Tensor, _: Any, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    last = logits[torch.arange(len(logits)), lengths - 1]
    right, wrong = last.gather(1, labels).T
    return (right - wrong).mean()


@cache
def scored(name: str, method: str, steps: int = 3) -> Any:
    graph = Graph.from_model(model(name))
    attribute(model(name), graph, data(model(name)), difference, method, ig_steps=steps, quiet=True)
    return graph


def label(edge: str) -> tuple[str, str]:
    """An edge in this package's words: `a0.h1->m2`, `input->a1.h0<q>`."""

    def end(node: str, part: str) -> str:
        if node.startswith("a"):
            return "L{}H{}".format(*node[1:].split(".h")) + (f".{part[:1]}" if part else "")
        layer = node[1:]
        return {"input": "embed", "logits": "logits"}.get(node) or (f"{layer}_mlp_in" if part else f"{layer}_mlp_out")

    sender, receiver = edge.split("->")
    node, _, part = receiver.partition("<")
    return end(sender, ""), end(node, part or "in")


def metric(bridge: Any) -> Any:
    ((right, wrong),) = data(bridge)[0][2].tolist()
    return lambda logits: (logits[:, -1, right] - logits[:, -1, wrong]).mean()


def both(graph: Any, ours: EdgeScores, bridge: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Their scores and ours; of mixtures without edges from MLPs, for ours are from each expert."""
    edges = [edge for edge in graph.edges if bridge.cfg.num_experts is None or not edge.startswith("m")]
    assert len(edges) > 100
    # Theirs tell what corrupting does.
    return -torch.tensor([float(graph.edges[edge].score) for edge in edges]), torch.tensor(
        [ours[label(edge)] for edge in edges]
    )


def eap(name: str) -> None:
    """EAP scores every edge of the baseline as `edge_attribution_patching` does"""
    bridge = model(name)
    ours = edge_attribution_patching(bridge, PAIR.clean, PAIR.corrupted, metric(bridge), at="clean")
    theirs, mine = both(scored(name, "EAP"), ours, bridge)
    torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-3)
    assert mine.abs().max() > 0.1


def integrated(name: str) -> None:
    """EAP-IG scores them as `edge_attribution_patching_ig` does, up to where each takes its steps"""
    bridge = model(name)
    ours = edge_attribution_patching_ig(bridge, PAIR.clean, PAIR.corrupted, metric(bridge), steps=8)
    theirs, mine = both(scored(name, "EAP-IG-inputs", 20), ours, bridge)
    assert (theirs - mine).norm() < 0.1 * mine.norm()


def other_methods(name: str) -> None:
    """its other methods find edges: over activations, of both ends, by information flow"""
    for method in ("EAP-IG-activations", "clean-corrupted", "information-flow-routes"):
        scores = scored(name, method).scores
        assert torch.isfinite(scores).all() and scores.abs().max() > 0.1, method


def circuits(name: str) -> None:
    """a circuit of all edges predicts as the clean run, one of none as the corrupted run"""
    bridge, graph = model(name), scored(name, "EAP")
    clean, corrupted = (evaluate_baseline(bridge, data(bridge), [difference], bool(run), True) for run in (0, 1))
    for count, expected in ((len(graph.edges), clean), (0, corrupted)):
        graph.apply_topn(count, True)
        found = evaluate_graph(bridge, graph, data(bridge), difference, quiet=True, skip_clean=False)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


if __name__ == "__main__":
    run(eap, integrated, other_methods, circuits)
