"""`attribution_graph`: the graph of a prompt, one backward pass for a batch of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Input
from transformer_lens.checks import a_number, whole
from transformer_lens.dictionaries.graphs.graph import AttributionGraph, influence_of
from transformer_lens.dictionaries.graphs.local_model import LOGITS, STREAM, LocalModel, Node, Transcoders
from transformer_lens.factored_matrix import wide


@checked
def attribution_graph(
    bridge: TransformerBridge,
    input: Input,
    transcoders: Transcoders,
    *,
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int | None = None,
    skip: int = 0,
    batch_size: int = 64,
) -> AttributionGraph:
    """The graph of direct effects on one prompt between active features, errors, experts, tokens and logits, with
    attention patterns, norms' scales and routing held (Ameisen et al. 2025, "Circuit Tracing").

    >>> from transformer_lens.dictionaries import Dictionary
    >>> eye, zeros = torch.eye(128), torch.zeros(128)
    >>> transcoder = Dictionary({"W_enc": eye, "b_enc": zeros, "W_dec": eye, "b_dec": zeros})
    >>> graph = attribution_graph(bridge, "Mary and John", {1: transcoder, 2: transcoder}, max_features=30)
    >>> graph.edges.shape, graph.missing() < 1e-5  # rows are features and logits
    (torch.Size([40, 65]), True)

    Nodes, in this order: every active feature; for each layer and position the error, what the MLP writes beside its
    features (in a layer without a transcoder, all it writes); in a mixture each chosen expert's share of that; each
    position's embedding; and of the logits at the last position the largest, until their probabilities add up to
    `logit_mass`, at most `max_logits`, each less the mean of all. `transcoders` are those of a set, which say where
    they read and write, `{layer: transcoder}` from `mlp.hook_in` to `hook_mlp_out`, or a cross-layer one.

    `max_features` keeps the most influential features, and so many experts' router logits; edges from features that
    were left out add up in `rest`. The features of the first `skip` positions are left to the errors (1 for BOS, whose
    activations are outliers, as circuit-tracer does). Memory grows with `batch_size` times the length of the prompt,
    and with rows times nodes. Raises `ValueError` for transcoders that do not replace MLPs, for a prompt on which no
    feature is active, and for a model that is quantised, remote, or not linear once attention and norms are held.
    """
    most, mass = whole("max_logits", max_logits, 1), a_number("logit_mass", logit_mass, 0, 1)
    wanted = None if max_features is None else whole("max_features", max_features, 1)
    local = LocalModel(bridge, input, transcoders, skip)
    return _Rows(local, local.nodes(most, mass), batch_size).graph(wanted)


class _Rows:
    """The rows of a graph, from the linear model's backward passes."""

    def __init__(self, local: LocalModel, nodes: list[Node], batch_size: int) -> None:
        self.local, self.nodes, self.batch_size = local, nodes, batch_size
        self.stream, *leaves = (
            local.kept[name].detach().clone().requires_grad_() for name in (STREAM, *local.writes.values())
        )
        self.leaves = dict(zip(local.writes, leaves, strict=True))
        self.written = {
            (source, target): local.decoder(source, target)[active.number] * active.value[:, None]
            for source, active in local.active.items()
            for target in local.writes_at(source)
        }
        with torch.enable_grad():
            self.run = local.run(self.stream, lambda layer, x: self.leaves[layer] + local.skipped(layer, x))
        with torch.no_grad():
            self.without = local.run(torch.zeros_like(self.stream), local.constant)

    def graph(self, max_features: int | None) -> AttributionGraph:
        nodes, local, features = self.nodes, self.local, sum(node.kind == "feature" for node in self.nodes)
        logits = [i for i, node in enumerate(nodes) if node.kind == "logit"]
        wanted = features if max_features is None else min(max_features, features)
        chosen, edges = logits, self.rows(logits)
        weights = edges.new_tensor([node.value if node.kind == "logit" else 0.0 for node in nodes])
        while left := wanted + len(logits) - len(chosen):
            some = list(range(features))
            if wanted < features:
                influence = influence_of(edges, chosen, weights)[:features]
                influence[[i for i in chosen if i < features]] = -1
                some = influence.topk(min(left, 4 * self.batch_size)).indices.tolist()
            chosen, edges = chosen + some, torch.cat([edges, self.rows(some)])
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        rows, edges = sorted(chosen), edges[order]
        experts = [i for i, node in enumerate(nodes) if node.kind == "expert"]
        if max_features is not None and len(experts) > max_features:
            strength = influence_of(edges, rows, weights)[experts]
            experts = sorted(experts[i] for i in strength.topk(max_features).indices.tolist())
        routing = self.rows(experts)
        kept = [*(i for i in rows if i < features), *range(features, len(nodes))]
        new = {old: at for at, old in enumerate(kept)}
        graph = AttributionGraph(
            nodes=[nodes[i] for i in kept],
            rows=[new[i] for i in rows],
            edges=edges[:, kept],
            values=self.values(rows, self.run),
            bias=self.values(rows, self.without),
            rest=edges.sum(1) - edges[:, kept].sum(1),
            routing_rows=[new[i] for i in experts],
            routing=routing[:, kept],
            routing_values=self.values(experts, self.run),
            routing_bias=self.values(experts, self.without),
            tokens=local.words(local.ids[0]),
            logit_tokens=local.words([nodes[i].number for i in logits]),
            local=local,
        )
        # Norms compute in float32 in many families.
        allowed = max(torch.finfo(dtype).eps for dtype in (self.stream.dtype, torch.float32)) ** 0.5
        if graph.missing() > allowed:
            raise ValueError(
                f"attribution_graph: edges miss values by up to {graph.missing():.1e} of the largest, where rounding "
                f"explains {allowed:.0e}: {local.bridge.cfg.architecture} is not linear with attention and norms held"
            )
        return graph

    @torch.no_grad()
    def values(self, rows: Sequence[int], run: dict[str, Tensor]) -> Float[Tensor, " row"]:
        return self.local.read(run, [self.nodes[i] for i in rows], active=False)

    def rows(self, wanted: Sequence[int]) -> Float[Tensor, "row node"]:
        """The edges into some nodes."""
        found = wide(self.stream.detach()).new_zeros(len(wanted), len(self.nodes))
        targets = [self.nodes[i] for i in wanted]
        for hook, places in self.local.by_hook(targets).items():
            for first in range(0, len(places), self.batch_size):
                some = places[first : first + self.batch_size]
                found[some] = self.batch(hook, [targets[at] for at in some])
        return found

    def batch(self, hook: str, targets: list[Node]) -> Float[Tensor, "row node"]:
        """One backward pass from several nodes at a hook, and what every node below adds along it."""
        outputs = self.run[hook]
        positions = [0 if hook == LOGITS else node.position for node in targets]
        injected = outputs.new_zeros(len(targets), *outputs.shape)
        injected[range(len(targets)), 0, positions] = self.local.directions_of(targets).to(outputs.dtype)
        below = [layer for layer in self.leaves if layer < targets[0].layer]
        gradients = torch.autograd.grad(
            outputs,
            [self.stream, *(self.leaves[layer] for layer in below)],
            injected,
            retain_graph=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        with torch.no_grad():
            first, *others = (wide(gradient[:, 0]) for gradient in gradients)
            return self.columns(first, dict(zip(below, others, strict=True)))

    def columns(self, stream: Tensor, below: dict[int, Tensor]) -> Float[Tensor, "row node"]:
        """What each node adds, from the gradients at the embeddings and at what the MLPs below write."""
        local, parts = self.local, []
        for source, active in local.active.items():
            found = stream.new_zeros(len(stream), len(active.value))
            ends = active.position.bincount().cumsum(0).tolist()
            for target in below.keys() & set(local.writes_at(source)):
                written = self.written[source, target].to(stream)
                for at, (first, end) in enumerate(pairwise([0, *ends])):  # features stand by position
                    if first < end:
                        found[:, first:end] += below[target][:, at] @ written[first:end].T
            parts.append(found)
        parts += [_products(below.get(layer), error, stream) for layer, error in local.errors.items()]
        for layer, experts in local.experts.items():
            every = [_products(below.get(layer), one, stream) for one in experts.unbind(1)]
            parts.append(torch.stack(every, -1)[:, local.chosen[layer].position, local.chosen[layer].number])
        parts.append(_products(stream, local.kept[STREAM][0], stream))
        logits = len(self.nodes) - sum(part.shape[1] for part in parts)
        return torch.cat([*parts, stream.new_zeros(len(stream), logits)], 1)


def _products(gradient: Tensor | None, written: Tensor, like: Tensor) -> Float[Tensor, "row pos"]:
    if gradient is None:
        return like.new_zeros(like.shape[:2])
    return torch.einsum("bpd,pd->bp", gradient, written.to(gradient.dtype))
