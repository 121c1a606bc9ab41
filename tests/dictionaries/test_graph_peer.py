"""Attribution graphs beside circuit-tracer's, on the models, transcoders and graphs that `make_graphs.py` keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformer_lens import TransformerBridge
from transformer_lens.dictionaries import load_dictionary
from transformer_lens.dictionaries.cross_layer import load_cross_layer
from transformer_lens.dictionaries.graphs import AttributionGraph, attribution_graph, save_for_viewers

FILES = Path(__file__).parent / "files" / "graphs"
CASES = ("llama", "gemma2", "cross_layer")


def ours(case: str, **options: Any) -> AttributionGraph:
    # Gemma 2's cap of the scores is there in eager attention alone.
    hf_model = AutoModelForCausalLM.from_pretrained(FILES / case / "model", attn_implementation="eager")
    bridge = TransformerBridge(hf_model.eval())
    place, layers = FILES / case / "transcoders", range(bridge.cfg.n_layers)
    parts: Any = [load_dictionary(place, f"layer_{i}.safetensors") for i in layers] if case != "cross_layer" else None
    parts = load_cross_layer(place) if parts is None else parts
    return attribution_graph(bridge, theirs(case)["tokens"], parts, skip=1, **options)


def theirs(case: str) -> dict[str, torch.Tensor]:
    return load_file(FILES / case / "graph.safetensors")


def without_first_errors(graph: AttributionGraph) -> torch.Tensor:
    """circuit-tracer leaves out the errors of the first position, whose features it leaves out as well."""
    return torch.tensor([node.kind != "error" or node.position > 0 for node in graph.nodes])


@pytest.mark.parametrize("case", CASES)
def test_the_adjacency_is_circuit_tracers(case: str) -> None:
    graph, peer = ours(case), theirs(case)
    features = [list(node[1:4]) for node in graph.nodes if node.kind == "feature"]
    assert features == peer["features"].tolist() and len(features) > 40
    logits = [node for node in graph.nodes if node.kind == "logit"]
    assert [node.number for node in logits] == peer["logits"].tolist()
    torch.testing.assert_close(
        torch.tensor([node.value for node in logits]), peer["probabilities"], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(graph.values[: len(features)], peer["values"], rtol=1e-4, atol=1e-5)
    mine, other = graph.adjacency() * without_first_errors(graph), peer["adjacency"]
    assert not other[:, ~without_first_errors(graph)].any()
    assert float(torch.cosine_similarity(mine.flatten(), other.flatten(), dim=0)) >= 0.999999
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_pruning_and_scores_are_circuit_tracers(case: str) -> None:
    graph, peer = ours(case), theirs(case)
    graph = replace(graph, edges=peer["adjacency"][graph.rows])
    assert graph.scores() == pytest.approx(peer["scores"].tolist(), rel=1e-4)
    pruned, nodes = graph.prune(), peer["node_mask"]
    assert pruned.nodes == [node for node, kept in zip(graph.nodes, nodes.tolist(), strict=True) if kept]
    edges = peer["adjacency"] * peer["edge_mask"]
    assert torch.equal(pruned.adjacency(), edges[nodes][:, nodes])
    assert 20 < len(pruned.nodes) < len(graph.nodes)


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_circuit_tracers(case: str, tmp_path: Path) -> None:
    graph = replace(ours(case), edges=theirs(case)["adjacency"][ours(case).rows])
    words = [f"w{number}" for number in theirs(case)["tokens"].tolist()]
    outputs = [f"w{number}" for number in theirs(case)["logits"].tolist()]
    graph = replace(graph, tokens=words, logit_tokens=outputs)
    made = json.loads(save_for_viewers(graph, tmp_path, scan="none").read_text())
    peer = json.loads((FILES / case / "viewer" / "graph.json").read_text())
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert listed == [made["metadata"]]
    assert made["metadata"] | {"prompt": " ".join(words)} == peer["metadata"] and made["qParams"] == peer["qParams"]
    ids = {}
    for mine, other in zip(made["nodes"], peer["nodes"], strict=True):
        ids[mine["node_id"]] = other["node_id"]
        assert mine.keys() == other.keys()
        same = mine | {key: other[key] for key in ("activation", "influence", "token_prob")}
        if other["feature_type"] == "mlp reconstruction error":  # its ids may be those of features
            same |= {key: other[key] for key in ("node_id", "jsNodeId")}
        assert (
            same | {"clerp": other["clerp"]} == other and mine["clerp"].split("p=")[0] == other["clerp"].split("p=")[0]
        )
        for key in ("activation", "influence", "token_prob"):
            assert mine[key] == (None if other[key] is None else pytest.approx(other[key], rel=1e-3, abs=1e-5))
    links = [(ids[link["source"]], ids[link["target"]], link["weight"]) for link in made["links"]]
    assert links == [(link["source"], link["target"], pytest.approx(link["weight"])) for link in peer["links"]]
