"""A graph as the JSON that circuit-tracer's and Neuronpedia's viewers read, and as a page of its own."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import torch

from transformer_lens.checks import a_text, directory_to_write, file_to_write, in_words
from transformer_lens.dictionaries.features import feature_logits
from transformer_lens.dictionaries.graphs.graph import AttributionGraph

TEMPLATE = Path(__file__).with_name("page.html")
SCHEMA: dict[str, Any] = tomllib.loads(Path(__file__).with_name("viewers.toml").read_text("utf-8"))


def as_viewers_read(
    graph: AttributionGraph, slug: str, scan: str, node_threshold: float, edge_threshold: float
) -> dict[str, Any]:
    """The pruned graph in the schema of circuit-tracer 0.5."""
    influence = graph.influence()
    order = influence.argsort(descending=True)
    share = torch.empty_like(influence)
    share[order] = influence[order].cumsum(0) / influence.sum()
    shares, part = dict(zip(graph.nodes, share.tolist(), strict=True)), graph.prune(node_threshold, edge_threshold)
    logits = [node for node in part.nodes if node.kind == "logit"]
    nodes: list[dict[str, Any]] = []
    for node in part.nodes:
        number, both, is_logit = node.number, node.layer + node.number, node.kind == "logit"
        counted = {"error": -1, "expert": -2 - number, "token": node.position, "logit": number}
        token = graph.logit_tokens[logits.index(node)] if is_logit else ""
        told = node._asdict() | {"layer": node.layer + is_logit, "token": token}
        said = {key: text.format(**told) for key, text in SCHEMA["nodes"][node.kind].items()}
        said |= {"feature": counted.get(node.kind, both * (both + 1) // 2 + number)}  # layer and number as one number
        said |= {"ctx_idx": node.position, "run_idx": 0, "reverse_ctx_idx": 0, "is_target_logit": node == logits[0]}
        said |= {"token_prob": node.value if is_logit else 0.0, "influence": None if is_logit else shares[node]}
        nodes.append(said | {"activation": node.value if node.kind == "feature" else None})
    ids = [node["node_id"] for node in nodes]
    links = [
        {"source": ids[source], "target": ids[part.rows[row]], "weight": float(part.edges[row, source])}
        for row, source in part.edges.nonzero().tolist()
    ]
    told = {"slug": slug, "scan": scan, "prompt_tokens": graph.tokens, "prompt": "".join(graph.tokens)}
    meta = SCHEMA["metadata"] | told | {"node_threshold": node_threshold}
    return {"metadata": meta, "qParams": SCHEMA["qParams"], "nodes": nodes, "links": links}


def save_for_viewers(
    graph: AttributionGraph,
    directory: str | Path,
    slug: str = "graph",
    *,
    scan: str = "",
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> Path:
    """Write the pruned graph as circuit-tracer 0.5's `create_graph_files` does: `<slug>.json`, and its entry in
    `graph-metadata.json`. `scan` names the transcoders where a viewer knows their features. Returns the first file.

    Errors and experts are `mlp reconstruction error` there, under ids of their own: circuit-tracer's id of an error may
    be that of a feature of layer 0.
    """
    made = as_viewers_read(_a_graph(graph), a_text("slug", slug), a_text("scan", scan), node_threshold, edge_threshold)
    folder = directory_to_write("directory", directory)
    folder.mkdir(parents=True, exist_ok=True)
    file, listing = folder / f"{slug}.json", folder / "graph-metadata.json"
    file.write_text(json.dumps(made), encoding="utf-8")
    known = json.loads(listing.read_text("utf-8"))["graphs"] if listing.exists() else []
    others = [one for one in known if one["slug"] != slug]
    listing.write_text(json.dumps({"graphs": [*others, made["metadata"]]}, indent=1), encoding="utf-8")
    return file


def save_page(
    graph: AttributionGraph, path: str | Path, *, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> Path:
    """Write the pruned graph as one self-contained HTML page: layers by positions, what feeds a node and what it feeds,
    and the tokens towards which a feature writes directly.
    """
    file, bridge = file_to_write("path", path), _a_graph(graph).local.bridge
    made = as_viewers_read(graph, "graph", "", node_threshold, edge_threshold)
    for layer, (dictionary, _) in graph.local.placed.items():
        here = [node for node in made["nodes"] if node["layer"] == str(layer) and node["feature"] >= 0]
        numbers = [int(node["node_id"].split("_")[1]) for node in here]
        best = feature_logits(bridge, dictionary, numbers).topk(4).indices if here else torch.zeros(0, 4)
        for node, ids in zip(here, best, strict=True):
            node["note"] = graph.local.words(ids)
    made["layers"] = bridge.cfg.n_layers
    shown = TEMPLATE.read_text("utf-8").replace("GRAPH_DATA", json.dumps(made).replace("</", "<\\/"))
    file.write_text(shown, encoding="utf-8")
    return file


def _a_graph(graph: Any) -> AttributionGraph:
    if not isinstance(graph, AttributionGraph):
        raise TypeError(f"graph: got {in_words(graph)}, expected an AttributionGraph; attribution_graph makes one")
    return graph
