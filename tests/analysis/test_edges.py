"""Edges: sums that must hold, single paths computed by hand in float64, and circuits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import FAMILIES, LAYOUTS, falcon, family, tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import (
    AttributionScores,
    Circuit,
    EdgeGraph,
    EdgeScores,
    attribution_patching,
    circuit_metric,
    edge_attribution_patching,
    edge_attribution_patching_ig,
    edge_effects,
    expert_attribution_patching,
    faithfulness,
    integrated_gradients,
    path_patching,
)
from transformer_lens.analysis.patching.experts import expert_contributions


def metric(logits: Tensor) -> Tensor:
    """Unequal in the rows, not linear, reads two positions."""
    weights = torch.arange(1.0, len(logits) + 1, dtype=logits.dtype)
    return ((logits[:, -1, 7] - logits[:, -1, 9]) * weights).sum() + logits[:, -2].logsumexp(-1).sum()


def pair(name: str, batch: int = 2, pos: int = 4, **changes: Any) -> tuple[TransformerBridge, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "mixtral":
        changes["experts"] = "eager"
    bridge = TransformerBridge(family(name, **changes).double())
    return bridge, tokens(batch, pos), tokens(batch, pos)


def tolerance(layout: str) -> dict[str, float]:
    """Mixtral's norms, softmax and router round to float32."""
    return {"rtol": 0, "atol": 2e-4 if layout == "mixtral" else 1e-8}


def caches(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> list[Any]:
    everything = lambda name: True  # noqa: E731
    with torch.no_grad():
        return [bridge.run_with_cache(x, names_filter=everything)[1] for x in (clean, corrupted)]


def written(bridge: TransformerBridge, cache: Any, label: str) -> Tensor:
    """What a sender writes, read from a cache."""
    if label == "embed":
        return cache["hook_embed"]
    if label.endswith("_mlp_out"):
        return cache["mlp_out", int(label.split("_")[0])]
    layer, number = map(int, label[1:].replace("E", "H").split("H"))
    if "E" in label:
        return expert_contributions(cache, layer, bridge.cfg.num_experts)[:, :, number]
    return cache["result", layer][:, :, number]


def hooked(bridge: TransformerBridge, x: Tensor, name: str, write: Any) -> Tensor:
    with torch.no_grad():
        return bridge.run_with_hooks(x, fwd_hooks=[(name, write)])


# -- the graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FAMILIES)
def test_edges_are_those_of_the_model(layout):
    """A sender reaches a receiver if what is added to its output shows in what the receiver reads."""
    bridge, x, _ = pair(layout)
    graph = EdgeGraph.of(bridge)
    hooks = list(dict.fromkeys(one.hook for one in graph.receivers))
    with torch.no_grad():
        _, base = bridge.run_with_cache(x, names_filter=hooks)
    for number, sender in enumerate(graph.senders):
        hook = sender.hook.replace("mlp.hook_expert_out", "hook_mlp_out")

        def add(value, hook, index=sender.index):
            part = value if value.ndim == 3 else value[:, :, index]
            part += 1.0 + torch.arange(part.shape[-1])

        seen: dict[str, Tensor] = {}
        with torch.no_grad(), bridge.hooks(fwd_hooks=[(hook, add)]):
            _, seen = bridge.run_with_cache(x, names_filter=hooks)
        reached = []
        for receiver in graph.receivers:
            difference = seen[receiver.hook] - base[receiver.hook]
            reached.append(
                bool((difference if receiver.index is None else difference[:, :, receiver.index]).abs().max() > 1e-9)
            )
        assert graph.exists[number].tolist() == reached, sender.label
    assert len(graph.senders) == 1 + 2 * (8 + (4 if layout == "mixtral" else 1))
    assert len(graph.receivers) == 2 * 25 + 1
    assert graph.has_edge("L0H3", "0_mlp_in") == (layout in ("rw", "rw-rope", "mixtral"))


def test_labels_and_masks():
    graph = EdgeGraph.of(TransformerBridge(falcon()))
    assert graph.edges()[0] == ("embed", "L0H0.q") and ("1_mlp_out", "logits") in graph.edges()
    assert ("L1H0", "L0H0.q") not in graph.edges()
    with pytest.raises(KeyError, match="sender: got 'L9H9', expected one of embed, L0H0"):
        graph.mask([("L9H9", "logits")])
    with pytest.raises(KeyError, match="receiver: got 'L0H0', expected one of L0H0.q"):
        graph.has_edge("embed", "L0H0")
    with pytest.raises(ValueError, match="'L1H0' does not come before 'L0H0.q'"):
        Circuit.of(graph, [("L1H0", "L0H0.q")])


def test_scores_are_ranked_and_pruned():
    graph = EdgeGraph.of(TransformerBridge(falcon()))
    table = torch.zeros(graph.exists.shape)
    wanted = {("embed", "L0H1.q"): 2.0, ("L0H1", "L1H2.v"): -5.0, ("L1H2", "logits"): 1.0, ("L0H4", "L1H2.k"): 3.0}
    for (sender, receiver), score in wanted.items():
        table[graph.sender(sender), graph.receiver(receiver)] = score
    scores = EdgeScores(graph, table)
    assert scores.top(2) == [("L0H1", "L1H2.v", -5.0), ("L0H4", "L1H2.k", 3.0)]
    assert scores["embed", "L0H1.q"] == 2.0 and len(scores.values()) == len(graph.edges()) == len(scores.top(10**6))
    assert set(scores.keep(2).edges()) == {("L0H1", "L1H2.v"), ("L0H4", "L1H2.k")}
    # Nothing leads to L0H4, so its edge goes; above 1 nothing leads to the logits.
    path = [("embed", "L0H1.q"), ("L0H1", "L1H2.v"), ("L1H2", "logits")]
    assert scores.prune(1.0).edges() == path and len(scores.prune(1.5)) == 0
    assert Circuit.of(graph, path).without(path[:1]).edges() == path[1:]
    assert len(scores.keep(0)) == 0
    for n in (-1, len(graph.edges()) + 1):
        with pytest.raises(ValueError, match=f"keep: got {n}, expected 0 to"):
            scores.keep(n)
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold: got"):
            scores.prune(threshold)


# -- edge attribution ----------------------------------------------------------------------------------------


def by_place(found: AttributionScores, name: str) -> Tensor:
    """The scores of a hook by head, or its one score."""
    scores = found.scores[name]
    return scores.sum((0, 1, 3)) if scores.ndim == 4 else scores.sum().reshape(1)


@pytest.mark.parametrize("at", ["corrupted", "clean"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_edges_sum_to_their_receivers_and_to_their_senders(layout, at):
    """All that a receiver reads, and all that reads a sender: attribution patching of either."""
    bridge, clean, corrupted = pair(layout)
    found = edge_attribution_patching(bridge, clean, corrupted, metric, at=at)
    graph = found.graph
    readers = list(dict.fromkeys(one.hook for one in graph.receivers))
    inputs = attribution_patching(bridge, clean, corrupted, metric, readers, at=at)
    expected = [by_place(inputs, name) for name in readers]
    torch.testing.assert_close(found.scores.sum(0), torch.cat(expected), **tolerance(layout))
    writers = [name for name in dict.fromkeys(one.hook for one in graph.senders) if "expert" not in name]
    outputs = attribution_patching(bridge, clean, corrupted, metric, writers, at=at)
    experts = None if layout != "mixtral" else expert_attribution_patching(bridge, clean, corrupted, metric, at=at)
    rows = []
    for name in dict.fromkeys(one.hook for one in graph.senders):
        if "expert" in name:
            rows.append(experts[int(name.split(".")[1])].sum((0, 1)))
        else:
            rows.append(by_place(outputs, name))
    torch.testing.assert_close(found.scores.sum(1), torch.cat(rows), **tolerance(layout))
    assert not found.scores[~graph.exists].any() and (found.values().abs() > 1e-6).float().mean() > 0.8


@pytest.mark.parametrize("layout", ["7b", "40b", "rw"])
def test_an_edges_score_is_the_derivative_of_patching_it(layout):
    """Patching a little of an edge: the effect, by the size of the patch."""
    bridge, clean, corrupted = pair(layout)
    found = edge_attribution_patching(bridge, clean, corrupted, metric)
    ours, theirs = caches(bridge, clean, corrupted)
    base = metric(bridge(corrupted)).item()
    for sender, receiver, hook, head in [
        ("embed", "L1H3.k", "blocks.1.hook_k_input", 3),
        ("L0H5", "L1H2.v", "blocks.1.hook_v_input", 2),
        ("0_mlp_out", "L1H0.q", "blocks.1.hook_q_input", 0),
        ("L0H1", "logits", "blocks.1.hook_resid_post", None),
    ]:
        change = 1e-6 * (written(bridge, ours, sender) - written(bridge, theirs, sender))

        def add(stream, hook, change=change, head=head):
            (stream if head is None else stream[:, :, head]).add_(change)

        effect = (metric(hooked(bridge, corrupted, hook, add)).item() - base) / 1e-6
        assert found[sender, receiver] == pytest.approx(effect, abs=1e-3), (sender, receiver)


@pytest.mark.parametrize("layout", ["11b", "rw-rope"])
def test_integrated_edges_sum_to_the_whole_difference(layout):
    """The edges out of the embedding carry all that differs: integrated gradients of the embedding."""
    bridge, clean, corrupted = pair(layout)
    found = edge_attribution_patching_ig(bridge, clean, corrupted, metric, steps=96, steps_per_batch=40)
    whole = (metric(bridge(clean)) - metric(bridge(corrupted))).item()
    assert float(found.scores[0].sum()) == pytest.approx(whole, rel=2e-2) and abs(whole) > 0.5
    start = caches(bridge, clean, corrupted)[1]["hook_embed"]
    few = edge_attribution_patching_ig(bridge, clean, corrupted, metric, steps=5, steps_per_batch=2)
    gradients = integrated_gradients(bridge, clean, metric, "hook_embed", baseline=start, steps=5)
    assert float(few.scores[0].sum()) == pytest.approx(float(gradients.scores.sum()), abs=1e-7)


# -- path patching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FAMILIES)
def test_along_all_edges_it_is_activation_patching(layout):
    bridge, clean, corrupted = pair(layout)
    ours, theirs = caches(bridge, clean, corrupted)
    graph = EdgeGraph.of(bridge)
    senders = [one.label for one in graph.senders]
    everywhere = [[r.label for r, there in zip(graph.receivers, row, strict=True) if there] for row in graph.exists]
    found = path_patching(bridge, clean, corrupted, metric, list(zip(senders, everywhere, strict=True)))
    for sender, value in zip(senders, found.tolist(), strict=True):
        change = written(bridge, ours, sender) - written(bridge, theirs, sender)
        layer = (
            sender[1:].split("E")[0] if "E" in sender else sender[0] if "mlp" in sender else sender[1:].split("H")[0]
        )
        branch = "hook_embed" if sender == "embed" else f"blocks.{layer}.hook_{'attn' if 'H' in sender else 'mlp'}_out"
        expected = metric(hooked(bridge, corrupted, branch, lambda value, hook, change=change: value + change)).item()
        assert value == pytest.approx(expected, abs=tolerance(layout)["atol"]), sender
    assert len({round(value, 6) for value in found.tolist()}) == len(senders)


def by_hand(bridge: TransformerBridge, corrupted: Tensor, theirs: Any, change: Tensor, part: str, head: int) -> Tensor:
    """What a head of layer 1 writes if `part` of what it reads changed: from its weights and Hugging Face's norm."""
    block: Any = bridge.blocks[1]
    weights, bias = getattr(block.attn, f"W_{part.upper()}"), getattr(block.attn, f"b_{part.upper()}")
    group = head if part == "q" else head // (bridge.cfg.n_heads // weights.shape[0])
    normed = block.ln1.original_component(theirs["resid_pre", 1] + change)
    new = F.linear(normed, weights[group].T, bias[group])

    def put(value, hook):  # all heads of the group see it; only this head's output is used
        value[:, :, group] = new

    seen: dict[str, Tensor] = {}

    def keep(z, hook):
        seen["z"] = z.clone()

    with torch.no_grad():
        bridge.run_with_hooks(
            corrupted, fwd_hooks=[(f"blocks.1.attn.hook_{part}", put), ("blocks.1.attn.hook_z", keep)]
        )
    return seen["z"][:, :, head] @ block.attn.W_O[head]


def to_logits(bridge: TransformerBridge, stream: Tensor) -> Tensor:
    """Hugging Face's own final norm and head."""
    return bridge.unembed.original_component(bridge.ln_final.original_component(stream))


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("layout", FAMILIES)
@torch.no_grad()
def test_one_path_by_hand(layout, part):
    bridge, clean, corrupted = pair(layout)
    ours, theirs = caches(bridge, clean, corrupted)
    senders = ["embed", "L0H6", "L0E2" if layout == "mixtral" else "0_mlp_out"]
    found = path_patching(bridge, clean, corrupted, metric, [(s, f"L1H5.{part}", "logits") for s in senders])
    for sender, value in zip(senders, found.tolist(), strict=True):
        change = written(bridge, ours, sender) - written(bridge, theirs, sender)
        head = by_hand(bridge, corrupted, theirs, change, part, head=5)
        stream = theirs["resid_post", 1] + head - theirs["result", 1][:, :, 5]
        assert value == pytest.approx(metric(to_logits(bridge, stream)).item(), abs=tolerance(layout)["atol"])
    assert len({round(value, 6) for value in [*found.tolist(), metric(bridge(corrupted)).item()]}) == 4


@pytest.mark.parametrize("layout", FAMILIES)
@torch.no_grad()
def test_paths_through_the_mlp_and_to_the_end_by_hand(layout):
    bridge, clean, corrupted = pair(layout)
    ours, theirs = caches(bridge, clean, corrupted)
    paths = [("L0H6", "1_mlp_in", "logits"), ("L0H6", "logits"), ("embed", ["L1H5.q", "1_mlp_in"], "logits")]
    found = path_patching(bridge, clean, corrupted, metric, paths).tolist()
    block: Any = bridge.blocks[1]
    norm = (block.ln2 if "ln2" in dict(block.named_children()) else block.ln1).original_component

    def mlp(change: Tensor) -> Tensor:
        output = block.mlp.original_component(norm(theirs["mlp_in", 1] + change))
        return output - theirs["mlp_out", 1]

    end = theirs["resid_post", 1]
    head = ours["result", 0][:, :, 6] - theirs["result", 0][:, :, 6]
    embed = ours["hook_embed"] - theirs["hook_embed"]
    query = by_hand(bridge, corrupted, theirs, embed, "q", 5) - theirs["result", 1][:, :, 5]
    expected = [end + mlp(head), end + head, end + mlp(embed) + query]
    for value, stream in zip(found, expected, strict=True):
        assert value == pytest.approx(metric(to_logits(bridge, stream)).item(), abs=tolerance(layout)["atol"])


@pytest.mark.parametrize("layout", FAMILIES)
def test_what_follows_a_path_is_computed_anew(layout):
    bridge, clean, corrupted = pair(layout)
    ours, theirs = caches(bridge, clean, corrupted)
    receivers = {"L0H3.k": ("hook_k_input", 3), "0_mlp_in": ("hook_mlp_in", None), "L0H7.v": ("hook_v_input", 7)}
    found = path_patching(bridge, clean, corrupted, metric, [("embed", label) for label in receivers])
    effects = edge_effects(bridge, clean, corrupted, metric, [("embed", label) for label in receivers])
    change = ours["hook_embed"] - theirs["hook_embed"]
    for value, (label, (hook, head)) in zip(found.tolist(), receivers.items(), strict=True):

        def add(stream, hook, head=head):
            (stream if head is None else stream[:, :, head]).add_(change)

        expected = metric(hooked(bridge, corrupted, f"blocks.0.{hook}", add)).item()
        assert value == pytest.approx(expected, abs=tolerance(layout)["atol"])
        base = metric(bridge(corrupted)).item()
        assert effects["embed", label] == pytest.approx(expected - base, abs=tolerance(layout)["atol"])
    assert int((effects.scores != 0).sum()) == 3


def test_batches_of_paths_are_single_paths():
    bridge, clean, corrupted = pair("40b", num_hidden_layers=3)
    paths = [("L1H1", "L2H0"), ("embed", "L0H2.k"), ("L0H4", "1_mlp_in"), (["embed", "L0H0"], "L2H1.q", "logits")]
    together = path_patching(bridge, clean, corrupted, metric, paths)
    few = path_patching(bridge, clean, corrupted, metric, paths, memory_budget=1)
    alone = [path_patching(bridge, clean, corrupted, metric, [path]) for path in paths]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)
    torch.testing.assert_close(together, few, rtol=0, atol=1e-9)
    head = path_patching(bridge, clean, corrupted, metric, [("L1H1", [f"L2H0.{part}" for part in "qkv"])])
    torch.testing.assert_close(head, together[:1])
    assert path_patching(bridge, clean, corrupted, metric, []).shape == (0,)


def test_left_padding_changes_nothing():
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    bridge.tokenizer.padding_side = "left"
    clean = ["When Noah and Adam went to the church, Adam bought a ball for", "Then Mary and John met. John told"]
    corrupted = ["When Noah and Adam went to the church, Noah bought a ball for", "Then Mary and John met. Mary told"]

    def measure(logits):
        return (logits[:, -1, 100] - logits[:, -1, 200]).sum()

    pairs = [(bridge.to_tokens(clean), bridge.to_tokens(corrupted)), *zip(clean, corrupted, strict=True)]
    edges = [edge_attribution_patching(bridge, *one, measure).scores for one in pairs]
    torch.testing.assert_close(edges[0], edges[1] + edges[2], rtol=1e-3, atol=1e-3)
    paths = [("embed", "L0H1.k"), ("L0H2", "L2H1"), ("embed", "0_mlp_in", "L3H3.q", "logits")]
    values = [path_patching(bridge, *one, measure, paths) for one in pairs]
    torch.testing.assert_close(values[0], values[1] + values[2], rtol=1e-3, atol=1e-3)
    integrated = [edge_attribution_patching_ig(bridge, *one, measure, steps_per_batch=2).scores for one in pairs]
    torch.testing.assert_close(integrated[0], integrated[1] + integrated[2], rtol=1e-3, atol=2e-3)
    # A mask says the same as a tokenizer that pads on the left.
    mask = (pairs[0][0] != bridge.tokenizer.pad_token_id).long()
    assert mask.min() == 0
    bridge.tokenizer.padding_side = "right"
    masked = edge_attribution_patching(bridge, *pairs[0], measure, attention_mask=mask).scores
    torch.testing.assert_close(masked, edges[0])
    torch.testing.assert_close(path_patching(bridge, *pairs[0], measure, paths, attention_mask=mask), values[0])


def test_frozen_parameters_and_gradients_left_behind():
    bridge, clean, corrupted = pair("40b")
    expected = edge_attribution_patching(bridge, clean, corrupted, metric).scores
    assert all(parameter.grad is None for parameter in bridge.original_model.parameters())
    bridge.original_model.requires_grad_(False)
    with torch.no_grad():
        found = edge_attribution_patching(bridge, clean, corrupted, metric)
        integrated = edge_attribution_patching_ig(bridge, clean, corrupted, metric, steps=2)
    torch.testing.assert_close(found.scores, expected)
    assert not found.scores.requires_grad and not integrated.scores.requires_grad


# -- circuits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FAMILIES)
def test_whole_and_empty_circuits(layout):
    bridge, clean, corrupted = pair(layout)
    graph = EdgeGraph.of(bridge)
    whole = Circuit(graph, graph.exists)
    direct = Circuit.of(graph, [("embed", "logits")])
    found = circuit_metric(bridge, clean, corrupted, metric, [whole, Circuit.of(graph, []), direct])
    ours, theirs = caches(bridge, clean, corrupted)
    with torch.no_grad():
        through = to_logits(bridge, theirs["resid_post", 1] + ours["hook_embed"] - theirs["hook_embed"])
        expected = torch.stack([metric(bridge(clean)), metric(bridge(corrupted)), metric(through)])
    torch.testing.assert_close(found, expected, **tolerance(layout))
    shares = faithfulness(bridge, clean, corrupted, metric, [whole, direct])
    assert shares[0].item() == pytest.approx(1, abs=1e-4)
    assert shares[1].item() == pytest.approx(((found[2] - found[1]) / (found[0] - found[1])).item(), abs=1e-4)


@pytest.mark.parametrize("layout", FAMILIES)
def test_a_circuit_less_one_edge(layout):
    """The clean run, with one receiver given what the sender writes in the corrupted run."""
    bridge, clean, corrupted = pair(layout)
    ours, theirs = caches(bridge, clean, corrupted)
    graph = EdgeGraph.of(bridge)
    whole = Circuit(graph, graph.exists)
    cut = {("L0H2", "L1H4.k"): ("blocks.1.hook_k_input", 4), ("embed", "1_mlp_in"): ("blocks.1.hook_mlp_in", None)}
    found = circuit_metric(bridge, clean, corrupted, metric, [whole.without([edge]) for edge in cut]).tolist()
    for value, ((sender, _), (hook, head)) in zip(found, cut.items(), strict=True):
        change = written(bridge, theirs, sender) - written(bridge, ours, sender)

        def add(stream, hook, head=head, change=change):
            (stream if head is None else stream[:, :, head]).add_(change)

        expected = metric(hooked(bridge, clean, hook, add)).item()
        assert value == pytest.approx(expected, abs=tolerance(layout)["atol"])
        assert abs(value - metric(bridge(clean)).item()) > 1e-3


def test_edges_that_lead_nowhere_do_nothing():
    bridge, clean, corrupted = pair("rw", num_hidden_layers=3)
    scores = edge_attribution_patching(bridge, clean, corrupted, metric)
    circuits = [scores.keep(n) for n in (3, 10, 30, 60, 120)]
    values = circuit_metric(bridge, clean, corrupted, metric, circuits)
    connected = circuit_metric(bridge, clean, corrupted, metric, [one.connected() for one in circuits])
    torch.testing.assert_close(values, connected, rtol=0, atol=1e-8)
    assert any(len(one.connected()) < len(one) for one in circuits) and len(circuits[-1].connected()) > 0


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "text"),
    [
        ("embed", TypeError, "path: got 'embed', expected a list"),
        (("embed",), ValueError, "at least one receiver"),
        (("embed", []), ValueError, "in which a step is empty"),
        (("L0H0.q", "logits"), KeyError, "sender: got 'L0H0.q'"),
        (("embed", "L0H9"), KeyError, "receiver: got 'L0H9'"),
        (("embed", "logi"), KeyError, "receiver: got 'logi'"),
        (("embed", "1_mlp_"), KeyError, "receiver: got '1_mlp_'"),
        (("L1H0", "L0H0.q"), ValueError, r"nothing of the step before reaches \['L0H0.q'\]"),
        (("embed", "L1H0.q", "L0H1.k"), ValueError, r"nothing of the step before reaches \['L0H1.k'\]"),
        (("embed", "logits", "logits"), ValueError, "nothing of the step before reaches"),
    ],
)
def test_paths_that_are_none(path, kind, text):
    bridge = TransformerBridge(falcon(**LAYOUTS["7b"]))
    with pytest.raises(kind, match=text):
        path_patching(bridge, tokens(), tokens(), metric, [path])


def test_other_refusals():
    bridge = TransformerBridge(falcon())
    x, y = tokens(), tokens()
    other = EdgeGraph.of(TransformerBridge(falcon(num_hidden_layers=3)))
    with pytest.raises(ValueError, match="circuits: got Circuit of 0 of .* of another model"):
        circuit_metric(bridge, x, y, metric, [Circuit.of(other, [])])
    with pytest.raises(ValueError, match="faithfulness: the metric is"):
        faithfulness(bridge, x, x, metric, [])
    with pytest.raises(ValueError, match=r"got \[2, 7\] and \[1, 7\]"):
        edge_effects(bridge, x, y[:1], metric)
    with pytest.raises(ValueError, match="steps_per_batch: got 0"):
        edge_attribution_patching_ig(bridge, x, y, metric, steps_per_batch=0)
    with pytest.raises(ValueError, match="returned nan"):
        edge_effects(bridge, x, y, lambda logits: logits.sum() * torch.nan, [("embed", "logits")])
    assert not any(point.has_hooks() for point in bridge.hook_points())


def test_half_precision_runs():
    bridge = TransformerBridge(falcon(dtype=torch.bfloat16))
    scores = edge_attribution_patching(bridge, tokens(), tokens(), metric)
    assert scores.scores.dtype == torch.float32 and scores.scores.isfinite().all()
    assert edge_effects(bridge, tokens(), tokens(), metric, [("embed", "L1H0.k")]).scores.isfinite().all()
