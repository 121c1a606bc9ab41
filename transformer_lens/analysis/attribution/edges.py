"""Edge attribution patching: a first-order estimate of the effect of patching each edge, for all edges at once.

Sources: Syed et al. 2023 (EAP); Hanna et al. 2024, "Have Faith in Faithfulness" (EAP-IG).
"""

from __future__ import annotations

import torch
from torch import Tensor

import transformer_lens.analysis.attribution.gradient_runs as runs
from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.activations import mean_gradients
from transformer_lens.analysis.attribution.edge_graph import EdgeGraph, EdgeScores
from transformer_lens.analysis.attribution.gradient_runs import At
from transformer_lens.analysis.patching.engine import Metric, SweepInput
from transformer_lens.factored_matrix import wide


@checked
def edge_attribution_patching(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    *,
    at: At = "corrupted",
    attention_mask: Tensor | None = None,
) -> EdgeScores:
    """Score every edge by `(sender's clean output - corrupted output) . d metric / d receiver's input`, summed over
    texts and positions. With `at` as in `attribution_patching`, it estimates what `edge_effects` measures.

    >>> clean = "When Noah and Adam went to the church, Adam bought a ball for"
    >>> corrupted = "When Noah and Adam went to the church, Noah bought a ball for"
    >>> noah, adam = bridge.to_single_token(" Noah"), bridge.to_single_token(" Adam")
    >>> metric = lambda logits: (logits[:, -1, noah] - logits[:, -1, adam]).mean()
    >>> scores = edge_attribution_patching(bridge, clean, corrupted, metric)
    >>> sender, receiver, score = scores.top(1)[0]
    >>> sender, receiver
    ('embed', '0_mlp_in')

    Senders and receivers are those of `EdgeGraph`, with queries, keys and values by query head even where heads share
    keys. It costs two forwards and one backward, and one product per layer of receivers. Memory holds every head's and
    expert's output: texts x positions x senders x d_model numbers. Errors as in `attribution_patching`.
    """
    pair = runs.prompt_pair(bridge, clean, corrupted, attention_mask, at)
    graph = EdgeGraph.of(bridge)
    here = runs.SenderValues()
    hooks = runs.sender_hooks(bridge, graph, here)
    run = runs.gradient_run(bridge, pair.base, pair.mask, metric, graph.receiver_hooks, fwd_hooks=hooks)
    gradients = run.gradients()
    _, there, _ = runs.read_senders(bridge, graph, pair.other, pair.mask)
    return _scores(graph, (there - here.all()) * pair.sign, gradients)


@checked
def edge_attribution_patching_ig(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    *,
    steps: int = 5,
    steps_per_batch: int = 5,
    attention_mask: Tensor | None = None,
) -> EdgeScores:
    """`edge_attribution_patching` with integrated gradients (EAP-IG): the gradient at each receiver is averaged over
    embeddings between the corrupted and the clean ones, at the points of `line_steps` (Hanna et al. space them evenly,
    for the same integral). If the final norm were linear, scores of edges into the logits would sum to the metric's
    difference.

    >>> metric = lambda logits: logits[0, -1, 5]
    >>> edge_attribution_patching_ig(bridge, "Mary and John", "Mary and Mary", metric, steps=2)
    EdgeScores of 463 edges

    It costs two forwards, and `steps` forwards and backwards, `steps_per_batch` at a time.
    """
    pair = runs.prompt_pair(bridge, clean, corrupted, attention_mask, "corrupted")
    graph = EdgeGraph.of(bridge)
    _, here, embeds = runs.read_senders(bridge, graph, pair.base, pair.mask, ["hook_embed"])
    _, there, others = runs.read_senders(bridge, graph, pair.other, pair.mask, ["hook_embed"])
    ends, names = (embeds["hook_embed"], others["hook_embed"]), graph.receiver_hooks
    how = (steps, steps_per_batch)
    mean = mean_gradients(bridge, pair.base, pair.mask, metric, names, "hook_embed", ends, how)
    return _scores(graph, there - here, mean)


def _scores(graph: EdgeGraph, change: Tensor, gradients: dict[str, Tensor]) -> EdgeScores:
    """Every sender's change times every receiver's gradient, one product for each hook of receivers."""
    flat, parts = change.movedim(2, 0).flatten(1), []  # of each sender, laid out once for all products
    for hook in graph.receiver_hooks:
        gradient = runs.by_part(wide(gradients[hook]).to(change.device))
        parts.append(flat.to(gradient.dtype) @ gradient.movedim(2, 0).flatten(1).T)
    return EdgeScores(graph, torch.cat(parts, 1).masked_fill(~graph.exists.to(change.device), 0))
