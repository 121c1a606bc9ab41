"""Attribution graphs: complete to rounding, and right about what happens when a node is changed."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dictionaries.models import MODELS, llama, model, random_dictionary, tokens
from tests.families.models import ESSENCE, build
from tests.families.models import MODELS as MODELS_OF_FAMILIES
from tests.support import LAYOUTS, falcon
from transformer_lens import TransformerBridge
from transformer_lens.dictionaries import Dictionary
from transformer_lens.dictionaries.graphs import AttributionGraph, Node, attribution_graph, save_for_viewers, save_page


def transcoders(bridge: TransformerBridge, without: tuple[int, ...] = (), **facets: Any) -> dict[int, Dictionary]:
    """One for each layer, one of them with a skip connection."""
    layers = [layer for layer in range(bridge.cfg.n_layers) if layer not in without]
    made = {i: random_dictionary(bridge.cfg.d_model, d_sae=20 + i, skip=i == 1, **facets) for i in layers}
    return {i: one.to(bridge.W_U.dtype) for i, one in made.items()}


def prompt(bridge: TransformerBridge) -> torch.Tensor:
    return tokens(bridge)[:1, :8]


@cache
def graph_of(name: str) -> AttributionGraph:
    """tiny-mixtral's layer 1 and the others' layer 2 have no transcoder."""
    bridge = model(name)
    without = (1,) if name == "tiny-mixtral" else (2,)
    return attribution_graph(bridge, prompt(bridge), transcoders(bridge, without))


def best(graph: AttributionGraph, kind: str) -> int:
    return int((graph.influence() * graph.of_kind(kind)).argmax())


KINDS = [("tiny-falcon", kind) for kind in ("feature", "error", "token")]
KINDS += [("tiny-mixtral", kind) for kind in ("feature", "error", "expert", "token")] + [("llama", "feature")]


# -- completeness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_row_adds_up(name: str) -> None:
    graph, bridge = graph_of(name), model(name)
    found = graph.edges.sum(1) + graph.bias
    scale = float(graph.values.abs().max())
    torch.testing.assert_close(found, graph.values, rtol=0, atol=1e-5 * scale)
    assert graph.missing() < 1e-5 and not graph.rest.any()
    # The values are the model's and the transcoders' own.
    ids = prompt(bridge)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    for row, number in enumerate(graph.rows):
        node = graph.nodes[number]
        if node.kind == "logit":
            expected = logits[0, -1, node.number] - logits[0, -1].mean()
            assert node.value == pytest.approx(float(logits[0, -1].softmax(-1)[node.number]), rel=1e-4)
        else:
            dictionary = graph.local.placed[node.layer][0]
            expected = dictionary.encode(cache[f"blocks.{node.layer}.mlp.hook_in"])[0, node.position, node.number]
            assert node.value == pytest.approx(float(expected), rel=1e-4)
        assert float(graph.values[row]) == pytest.approx(float(expected), rel=1e-3, abs=1e-5 * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_double_precision_it_adds_up_to_1e_9(layout: str) -> None:
    bridge = TransformerBridge(falcon(dtype=torch.float64, **LAYOUTS[layout]))
    graph = attribution_graph(bridge, torch.randint(3, 61, (1, 9)), transcoders(bridge))
    assert graph.edges.dtype == torch.float64 and len(graph.rows) > 100
    torch.testing.assert_close(graph.edges.sum(1) + graph.bias, graph.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("facets", [{"activation": "topk", "k": 5}, {"rescale_acts_by_decoder_norm": True}])
def test_other_transcoders_add_up(facets: dict[str, Any]) -> None:
    bridge = model("llama")
    graph = attribution_graph(bridge, prompt(bridge), transcoders(bridge, **facets))
    assert graph.missing() < 1e-5
    effect = graph.intervene({best(graph, "feature"): 0.0})
    torch.testing.assert_close(effect.direct, effect.direct_measured, rtol=1e-3, atol=1e-4)


def test_gated_transcoders_add_up() -> None:
    bridge = model("llama")
    weights = dict(random_dictionary(32).named_parameters())
    bias = weights.pop("b_enc")
    weights |= {"b_gate": bias, "b_mag": 0.3 + bias, "r_mag": bias}
    graph = attribution_graph(
        bridge, prompt(bridge), {0: Dictionary(weights, activation="gated"), 2: random_dictionary(32)}
    )
    assert graph.missing() < 1e-5


def test_routers_add_up() -> None:
    """What moves the routing is beside the graph: each chosen expert's router logit, less the mean of its router's."""
    graph, bridge = graph_of("tiny-mixtral"), model("tiny-mixtral")
    assert [graph.nodes[i] for i in graph.routing_rows] == [node for node in graph.nodes if node.kind == "expert"]
    torch.testing.assert_close(graph.routing.sum(1) + graph.routing_bias, graph.routing_values, rtol=1e-4, atol=1e-4)
    _, cache = bridge.run_with_cache(prompt(bridge))
    for row, number in enumerate(graph.routing_rows):
        node = graph.nodes[number]
        logits = cache[f"blocks.{node.layer}.mlp.hook_router_logits"].reshape(8, -1)[node.position]
        expected = float(logits[node.number] - logits.mean())
        assert float(graph.routing_values[row]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert graph.routing[:, graph.of_kind("feature")].any() and not graph.edges[:, graph.of_kind("logit")].any()


def test_experts_are_what_their_layer_writes_beside_features() -> None:
    graph = graph_of("tiny-mixtral")
    _, cache = graph.local.bridge.run_with_cache(prompt(graph.local.bridge))
    for layer in range(3):
        written = cache["mlp_out", layer][0]
        x = cache[f"blocks.{layer}.mlp.hook_in"]
        explained = graph.local.placed[layer][0](x)[0] if layer in graph.local.placed else torch.zeros_like(written)
        experts = graph.local.experts[layer].sum(1)
        torch.testing.assert_close(explained + experts, written, rtol=1e-4, atol=1e-4)
    assert sum(node.kind == "expert" for node in graph.nodes) == 3 * 8 * 2


def test_the_size_of_a_batch_changes_nothing() -> None:
    bridge = model("llama")
    parts = transcoders(bridge)
    one, many = (attribution_graph(bridge, prompt(bridge), parts, batch_size=size) for size in (1, 50))
    torch.testing.assert_close(one.edges, many.edges, rtol=1e-4, atol=1e-5)
    assert one.nodes == many.nodes


@pytest.mark.parametrize("name", ["llama", "tiny-mixtral"])
def test_the_most_influential_features(name: str) -> None:
    bridge = model(name)
    whole = attribution_graph(bridge, prompt(bridge), transcoders(bridge))
    some = attribution_graph(bridge, prompt(bridge), transcoders(bridge), max_features=20, batch_size=4)
    assert sum(node.kind == "feature" for node in some.nodes) == 20 and some.missing() < 1e-5 and some.rest.any()
    kept = [whole.index(node) for node in some.nodes]
    rows = [whole.rows.index(kept[i]) for i in some.rows]
    torch.testing.assert_close(some.edges, whole.edges[rows][:, kept], rtol=1e-4, atol=1e-5)
    influence = whole.influence()[whole.of_kind("feature")]
    best_twenty = influence.topk(20).values.sum()
    assert float(whole.influence()[kept][some.of_kind("feature")].sum() / best_twenty) > 0.9
    if name == "tiny-mixtral":
        assert len(some.routing_rows) == 20


def test_positions_without_features() -> None:
    bridge = model("llama")
    graph = attribution_graph(bridge, prompt(bridge), transcoders(bridge), skip=3)
    assert min(node.position for node in graph.nodes if node.kind == "feature") == 3 and graph.missing() < 1e-5


@pytest.mark.parametrize("name", [*ESSENCE, "olmo2", "gpt_oss", "qwen2_moe", "granitemoe", "cohere"])
def test_families_add_up(name: str) -> None:
    """Norms before, after and both, learned positions, multipliers, sinks, shared experts, parallel branches."""
    if name not in MODELS_OF_FAMILIES:
        pytest.skip(f"this release of transformers has no {name}")
    bridge = TransformerBridge(build(name))
    parts = {0: random_dictionary(bridge.cfg.d_model, d_sae=12)}
    graph = attribution_graph(bridge, torch.randint(3, 61, (1, 6)), parts, max_logits=2)
    assert graph.missing() < 1e-5
    effect = graph.intervene({best(graph, "feature"): 0.0})
    torch.testing.assert_close(effect.direct, effect.direct_measured, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["falcon_h1", "deepseek_v3"])
def test_families_without_queries_and_keys_to_hold(name: str) -> None:
    if name not in MODELS_OF_FAMILIES:
        pytest.skip(f"this release of transformers has no {name}")
    bridge = TransformerBridge(build(name))
    with pytest.raises(ValueError, match="layer 0 of .* has no queries and keys that can be held; its"):
        attribution_graph(bridge, torch.randint(3, 61, (1, 6)), {0: random_dictionary(bridge.cfg.d_model)})


# -- interventions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_change_of_a_node_changes_what_its_edges_say(name: str, kind: str) -> None:
    graph = graph_of(name)
    number = best(graph, kind)
    effect = graph.intervene({number: 0.0, graph.nodes[number]: 0.25})
    torch.testing.assert_close(effect.direct, -0.75 * graph.edges[:, number], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(effect.direct_measured, effect.direct, rtol=1e-3, atol=1e-4)
    assert float(effect.in_model.abs().max()) > 0


@pytest.mark.parametrize("name", MODELS)
def test_small_changes_follow_the_graph_through_features(name: str) -> None:
    graph = graph_of(name)
    features = (graph.influence() * graph.of_kind("feature")).topk(4).indices.tolist()
    effect = graph.intervene(dict.fromkeys(features, 0.99))
    logits = graph.of_kind("logit")[graph.rows]
    torch.testing.assert_close(effect.total_measured, effect.total, rtol=0.05, atol=3e-4)
    assert not torch.allclose(effect.total[logits], effect.direct[logits], rtol=0.01) or name == "tiny-mixtral"


def test_what_would_move_the_routing() -> None:
    """Held routing aside: with MLPs held, a router's logits move by what the routing's edges say."""
    graph = graph_of("tiny-mixtral")
    number = best(graph, "token")
    effect = graph.intervene({number: 0.0})
    run = graph.local.intervened({graph.nodes[number]: -1.0})[0]
    experts = [graph.nodes[i] for i in graph.routing_rows]
    measured = graph.local.read(run, experts) - graph.routing_values
    torch.testing.assert_close(effect.routing, measured, rtol=1e-3, atol=1e-4)
    assert effect.rerouted > 0 and graph.intervene({number: 1.0}).rerouted == 0


def test_the_bridge_is_as_before() -> None:
    bridge = model("tiny-mixtral")
    before = bridge(prompt(bridge))
    graph = attribution_graph(bridge, prompt(bridge), transcoders(bridge))
    graph.intervene({best(graph, "feature"): 0.0})
    assert torch.equal(bridge(prompt(bridge)), before)
    assert not any(point.has_hooks() for point in bridge.hook_points())
    assert all(parameter.grad is None for parameter in bridge.original_model.parameters())


# -- pruning -----------------------------------------------------------------------------------------------------


def test_influence_is_that_of_all_paths() -> None:
    graph = graph_of("llama")
    shares = graph.adjacency().abs()
    shares /= shares.sum(1, keepdim=True).clamp(min=1e-10)
    every = torch.linalg.inv(torch.eye(len(shares), dtype=torch.float64) - shares.double())
    expected = graph.weights().double() @ every - graph.weights()
    torch.testing.assert_close(graph.influence().double(), expected, rtol=1e-4, atol=1e-6)


def test_a_pruned_graph_still_adds_up() -> None:
    graph = graph_of("tiny-falcon")
    small = graph.prune(0.6, 0.9)
    assert len(small.nodes) < len(graph.nodes) / 2 and small.missing() < 1e-5 and small.rest.any()
    assert graph.prune(1.0, 1.0).missing() < 1e-5
    ends = [node for node in graph.nodes if node.kind in ("token", "logit")]
    assert [node for node in small.nodes if node.kind in ("token", "logit")] == ends
    fed = small.edges.any(0) | small.of_kind("token") | small.of_kind("logit")
    assert bool(fed.all()) and bool(small.edges.any(1)[small.of_kind("feature")[small.rows]].all())


def test_scores_by_their_definitions() -> None:
    graph = graph_of("tiny-mixtral")
    replacement, completeness = graph.scores()
    assert 0 < replacement < completeness < 1
    bare = attribution_graph(graph.local.bridge, prompt(graph.local.bridge), {2: transcoders(graph.local.bridge)[2]})
    assert bare.scores()[0] < 0.5


# -- long prompts ------------------------------------------------------------------------------------------------

LONG = """
import resource, torch
from tests.dictionaries.models import random_dictionary
from transformer_lens import TransformerBridge
from transformer_lens.dictionaries.graphs import attribution_graph
torch.manual_seed(0)
bridge = TransformerBridge.boot_transformers("tiny-mixtral")
parts = {{layer: random_dictionary(128, d_sae=64, activation="topk", k=4) for layer in range(3)}}
ids = torch.randint(3, 735, (1, {length}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
graph = attribution_graph(bridge, ids, parts, max_features=8, max_logits=2, batch_size={batch})
print(graph.missing() < 1e-4, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak(length: int, batch: int) -> float:
    """MiB beyond the loaded model, in a process of its own."""
    script = LONG.format(length=length, batch=batch)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    complete, found = run.stdout.split()
    assert complete == "True"
    return float(found)


@pytest.mark.slow
def test_6000_tokens_fit() -> None:
    assert peak(6000, 4) < 1000


# -- what is refused ---------------------------------------------------------------------------------------------


def test_sets_that_do_not_suit() -> None:
    bridge = model("llama")
    ids, good = prompt(bridge), random_dictionary(32)

    def refused(parts: Any, error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            attribution_graph(bridge, options.pop("input", ids), parts, **options)

    refused(good, TypeError, "transcoders: got Dictionary.*, expected a list of transcoders, or {layer: transcoder}")
    refused([], TypeError, "transcoders: got .*, expected a list of transcoders")
    refused([5], TypeError, "transcoders: got 5 among them, expected Dictionary; load_dictionary makes it")
    refused([good], ValueError, "whose file does not say where it reads and writes; pass {layer: transcoder} instead")
    refused({9: good}, ValueError, "transcoders: got 9, expected -3 to 2 in a model of 3 layers")
    refused(
        {0: random_dictionary(16)}, ValueError, "got a relu autoencoder 16 -> 50 -> 16 for layer 0 of a model of 32"
    )
    refused({0: good, -3: good}, ValueError, "transcoders: got two for layer 0, expected one for each layer")

    def placed(read: str, write: str) -> Dictionary:
        made = random_dictionary(32)
        made.metadata |= {"hook_name": read, "hook_name_out": write}
        return made

    wrong = "expected one that reads a layer and writes that layer's hook_mlp_out"
    refused([placed("blocks.0.mlp.hook_in", "blocks.1.hook_mlp_out")], ValueError, wrong)
    refused([placed("blocks.0.hook_resid_pre", "blocks.0.hook_attn_out")], ValueError, wrong)
    refused(
        {1: placed("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")}, ValueError, "got one for layer 1 from 'blocks.0"
    )
    silent = random_dictionary(32)
    silent.get_parameter("b_enc").fill_(-1e6)
    refused({1: silent}, ValueError, r"none of the features of layers \[1\] is active on this prompt")
    refused(
        {1: good},
        ValueError,
        "input: got 2 texts or padding, expected one text without padding",
        input=ids.repeat(2, 1),
    )
    refused({1: good}, TypeError, "expected text or token ids", input=torch.randn(1, 3, 32))
    refused({1: good}, ValueError, "max_logits: got 0, expected 1 or more", max_logits=0)
    refused({1: good}, ValueError, "logit_mass: got 2, expected a finite number from 0 to 1", logit_mass=2)
    refused({1: good}, ValueError, "skip: got 9, expected 0 to 8", skip=9)
    with torch.inference_mode():
        refused({1: good}, ValueError, r"it needs gradients, which torch.inference_mode\(\) rules out; leave it")


def test_models_that_do_not_suit() -> None:
    bridge = TransformerBridge(llama())
    bridge.original_model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(
        ValueError, match="the model is quantised, and rounds where a graph needs sums; load it unquant"
    ):
        attribution_graph(bridge, prompt(bridge), transcoders(bridge))


def test_nodes_that_are_not_there() -> None:
    graph = graph_of("llama")
    with pytest.raises(KeyError, match=r"node: got L7F3@2, which is not in AttributionGraph of"):
        graph.index(Node("feature", 7, 2, 3, 0.0))
    with pytest.raises(ValueError, match=r"node: got 9999, expected 0 to \d+ \(nodes\)"):
        graph.intervene({9999: 0.0})
    for factors in ({}, {len(graph.nodes) - 1: 0.0}):
        with pytest.raises(ValueError, match="factors: got .*, expected {node: factor} for other nodes than logits"):
            graph.intervene(factors)
    with pytest.raises(ValueError, match="node_threshold: got 2, expected a finite number from 0 to 1"):
        graph.prune(2)
    with pytest.raises(TypeError, match="graph: got 5, expected an AttributionGraph; attribution_graph makes one"):
        save_page(5, "page.html")  # type: ignore[arg-type]


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_page_is_one_file(name: str, tmp_path: Path) -> None:
    graph = graph_of(name)
    text = save_page(graph, tmp_path / "graph.html").read_text()
    assert "GRAPH_DATA" not in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert ('"note": [' in text) == any(node.kind == "feature" for node in graph.prune().nodes)
    save_for_viewers(graph, tmp_path, "one")
    save_for_viewers(graph, tmp_path, "two")
    save_for_viewers(graph, tmp_path, "one")
    listed = (tmp_path / "graph-metadata.json").read_text()
    assert listed.count('"slug": "one"') == 1 and listed.count('"slug": "two"') == 1
