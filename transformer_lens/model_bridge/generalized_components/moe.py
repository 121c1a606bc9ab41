"""The mixture of experts: a router chooses experts for each token, and their outputs are summed."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, StreamMatrix
from transformer_lens.model_bridge.generalized_components.weights import ExpertWeights
from transformer_lens.model_bridge.ports import FlatTokensPort, Inside, Port
from transformer_lens.model_bridge.sharding import ALONE, Interior, Sharding, Shards
from transformer_lens.model_bridge.twin_call import TwinCall
from transformer_lens.model_bridge.upstream import CHOICE_WEIGHTS, CHOSEN, STREAM, item


class RouterBridge(ComponentBridge):
    """The router: chooses the experts of each token, and how much each counts."""

    attributes = ("weight",)

    def twin(self, call: TwinCall) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax over all experts in float32, the best k, weights scaled to sum to one (`MixtralTopKRouter`)."""
        x: Float[Tensor, "row d_model"] = call.first.reshape(-1, call.cfg.d_model)
        if not call.writing:
            call.fire("hook_router_logits", item(call.output, 0, call.module))
            return call.output  # type: ignore[no-any-return]
        logits = call.fire("hook_router_logits", F.linear(x, call.weight("")))
        probabilities = logits.float().softmax(-1)
        best = probabilities.topk(int(call.cfg.experts_per_token or 1), dim=-1)
        return logits, best.values / best.values.sum(-1, keepdim=True), best.indices


class ExpertsBridge(ComponentBridge):
    """The experts: gated MLPs side by side, their weights stacked along the first axis."""

    takes = (STREAM, CHOSEN, CHOICE_WEIGHTS)
    attributes = ("gate_up_proj", "down_proj", "act_fn")

    def interior(self, sharding: Sharding) -> Interior:
        """Several processes share the neurons of each expert, or have some experts each."""
        return sharding.of_experts(self.path)

    def twin(self, call: TwinCall) -> Float[Tensor, "row d_model"] | None:
        """Each chosen expert's gated MLP on its own tokens, weighted and summed (`MixtralExperts`).

        Tokens are grouped by expert in the order of eager transformers, and outputs are added in the
        order of the experts, so that the sum is bitwise the same. Processes that share the experts each
        have some of the pairs, or some of every pair's neurons.
        """
        x: Float[Tensor, "row d_model"] = call.shards.entering(call.argument(STREAM))
        chosen: Int[Tensor, "row chosen"] = call.argument(CHOSEN)
        weights: Float[Tensor, "row chosen"] = call.argument(CHOICE_WEIGHTS)
        module: Any = call.module
        by_expert = "expert" in call.divided
        groups = _Groups(chosen, int(call.cfg.num_experts or 1), call.shards if by_expert else ALONE)
        hidden = groups.linear(x[groups.row], call.weight("", "gate_up_proj"))
        before, straight = hidden.chunk(2, dim=-1)
        gate, linear = groups.fire(call, "hook_pre", before), groups.fire(call, "hook_pre_linear", straight)
        if gate is not before:
            # Laid out as the module's own hidden layer, or the activation rounds differently.
            gate, linear = torch.cat([gate, linear], dim=-1).chunk(2, dim=-1)
        post = groups.fire(call, "hook_post", module.act_fn(gate) * linear)
        if not (call.writing or call.wants("hook_expert_out")):
            return None
        out = groups.linear(post, call.weight("", "down_proj"))
        out = groups.fire(call, "hook_expert_out", out if by_expert else call.shards.summed(out))
        if not call.writing:
            return None
        weighted = (groups.by_token(groups.whole(out)) * weights[..., None]).to(x.dtype)
        ordered = weighted.gather(1, torch.argsort(chosen, dim=-1, stable=True)[..., None].expand_as(weighted))
        total = torch.zeros_like(x)
        for nth in range(chosen.shape[1]):
            total = total + ordered[:, nth]
        return total


class _Groups:
    """The chosen (token, expert) pairs sorted by expert; within one, first choices come first.

    Where processes have some experts each, `row` and `counts` are those of this one's pairs.
    """

    def __init__(self, chosen: Int[Tensor, "row chosen"], experts: int, shards: Shards) -> None:
        self.shape = chosen.shape
        self.shards = shards
        self.order = torch.argsort(chosen.T.reshape(-1), stable=True)
        counts: list[int] = torch.bincount(chosen.reshape(-1), minlength=experts).tolist()
        each = experts // shards.size
        self.sizes = [sum(counts[each * rank : each * (rank + 1)]) for rank in range(shards.size)]
        start = sum(self.sizes[: shards.rank])
        self.row = (self.order % len(chosen))[start : start + self.sizes[shards.rank]]
        self.counts = counts[each * shards.rank : each * (shards.rank + 1)]

    def linear(self, x: Float[Tensor, "pair in"], weights: Float[Tensor, "expert out in"]) -> Float[Tensor, "pair out"]:
        """Every pair through its expert's weight."""
        if not len(x):
            return F.linear(x, weights[0])
        parts = enumerate(x.split(self.counts))
        return torch.cat([F.linear(rows, weights[expert]) for expert, rows in parts if len(rows)])

    def whole(self, pairs: Float[Tensor, "here width"]) -> Float[Tensor, "pair width"]:
        """The pairs of all processes."""
        return self.shards.gather(pairs, 0, self.sizes)

    def by_token(self, pairs: Float[Tensor, "pair width"]) -> Float[Tensor, "row chosen width"]:
        """Back in the order of the tokens and their choices."""
        rows, chosen = self.shape
        places = torch.empty_like(pairs).index_put((self.order,), pairs)
        return places.unflatten(0, (chosen, rows)).transpose(0, 1)  # type: ignore[no-any-return]

    def fire(self, call: TwinCall, name: str, pairs: Float[Tensor, "pair width"]) -> Float[Tensor, "pair width"]:
        """Show a value to its hook by token, where any hook wants it."""
        if not call.wants(name):
            return pairs
        shown = self.by_token(self.whole(pairs))
        new = call.fire(name, shown)
        if new is shown:
            return pairs
        return self.shards.slice(new.transpose(0, 1).reshape(-1, new.shape[-1])[self.order], 0, self.sizes)


def _inside_experts(name: str, axes: str, meaning: str) -> Hook:
    return Hook(name, axes, meaning, Inside("experts", rows_of=""))


class MoEBridge(ExpertWeights, ComponentBridge):
    """A mixture of experts with the roles `gate` (the router) and `experts`.

    The router returns `(logits, weights, indices)` over flattened tokens; the experts use the weights
    and indices alone (source: `MixtralSparseMoeBlock` in transformers >= 5.13).
    """

    reads = (StreamMatrix("gate", bias=""), StreamMatrix("experts", "gate_up_proj", bias=""))
    writes = (StreamMatrix("experts", "down_proj", bias=""),)
    hooks = (
        Hook(
            "hook_in",
            "batch pos d_model",
            "the normalised stream that enters the router and the experts",
            # With router jitter a training forward multiplies this tensor in place.
            Port(side="in", aliased=True),
        ),
        Hook(
            "hook_router_logits",
            "batch pos expert",
            "the router's score of every expert; a write re-routes",
            Inside("gate", rows_of=""),
        ),
        # Before the weights, so that a hook on those can know which expert each counts.
        Hook(
            "hook_expert_indices",
            "batch pos chosen",
            "which experts were chosen, the best first; a write re-routes",
            FlatTokensPort("gate", "out", item=2, rows_of=""),
            integer=True,
        ),
        Hook(
            "hook_expert_weights",
            "batch pos chosen",
            "how much each chosen expert counts; they sum to one",
            FlatTokensPort("gate", "out", item=1, rows_of=""),
        ),
        _inside_experts("hook_pre", "batch pos chosen d_mlp", "each chosen expert's gate before its activation"),
        _inside_experts("hook_pre_linear", "batch pos chosen d_mlp", "each chosen expert's ungated hidden layer"),
        _inside_experts(
            "hook_post", "batch pos chosen d_mlp", "each chosen expert's neurons: activated gate times linear"
        ),
        _inside_experts(
            "hook_expert_out", "batch pos chosen d_model", "each chosen expert's output, before its weight"
        ),
    )
