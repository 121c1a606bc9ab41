"""The mixture of experts: a router chooses experts for each token, and their outputs are summed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, StreamMatrix
from transformer_lens.model_bridge.generalized_components.weights import ExpertWeights
from transformer_lens.model_bridge.inside_call import InsideCall
from transformer_lens.model_bridge.ports import FlatTokensPort, Inside, Port
from transformer_lens.model_bridge.seams import ADD, MATMUL, Enough, FirstProduct, TorchCalls, beside
from transformer_lens.model_bridge.sharding import ALONE, Interior, Sharding, Shards
from transformer_lens.model_bridge.upstream import CHOICE_WEIGHTS, CHOSEN, STREAM, UpstreamError, eager_forward


class RouterBridge(ComponentBridge):
    """The router: chooses the experts of each token, and how much each counts."""

    attributes = ("weight",)

    def inside(self, call: InsideCall) -> Any:
        """The module's call; its first product are the logits, and by its own rule others choose other experts."""
        with FirstProduct(call.module, lambda logits: call.fire("hook_router_logits", logits)):
            return call.run()


class ExpertsBridge(ComponentBridge):
    """The experts: gated MLPs side by side, their weights stacked along the first axis."""

    takes = (STREAM, CHOSEN, CHOICE_WEIGHTS)
    attributes = ("gate_up_proj", "down_proj", "has_bias", "is_transposed")
    together: ClassVar[bool] = True
    """Whether gates and ungated neurons lie side by side in the hidden layer, or in turns."""

    def check_module(self) -> None:
        super().check_module()
        eager_forward(self.computing_module)

    def interior(self, sharding: Sharding) -> Interior:
        """Several processes share the neurons of each expert, or have some experts each."""
        return sharding.of_experts(self.path)

    def inside(self, call: InsideCall) -> Any:
        """The module's call. Its family's eager forward runs beside it, or in its place where a hook writes.

        That forward multiplies each chosen expert's tokens by two matrices. A hook is shown one value for all
        experts at once, so the forward runs again from what a hook was shown, and takes what is known for granted.
        """
        if any(call.writes(name) for stage in STAGES for name in stage.hooks):
            return ExpertsRun(self, call).written()
        output = call.run()
        with torch.no_grad():
            ExpertsRun(self, call).looked()
        return output


@dataclass(frozen=True)
class Stage:
    """A value on the way through each expert, and the hooks that show it."""

    name: str
    hooks: tuple[str, ...]


HIDDEN = Stage("hidden", ("hook_pre", "hook_pre_linear"))
NEURONS = Stage("neurons", ("hook_post",))
OUTPUTS = Stage("outputs", ("hook_expert_out",))
STAGES = (HIDDEN, NEURONS, OUTPUTS)


class ExpertsRun:
    """The family's eager forward of one call, and what is known of its inside: one tensor for each expert chosen."""

    def __init__(self, component: ExpertsBridge, call: InsideCall) -> None:
        self.component = component
        self.by_expert = "expert" in call.divided
        self.module: Any = call.module
        x, chosen, weights = (call.argument(word) for word in (STREAM, CHOSEN, CHOICE_WEIGHTS))
        self.x: Float[Tensor, "row d_model"] = call.shards.entering(x)
        self.pairs = Pairs(chosen, int(call.cfg.num_experts or 1), call.shards if self.by_expert else ALONE)
        names = dict(self.module.named_parameters(recurse=False))
        if call.shards.size > 1 or any(parameter.is_meta for parameter in names.values()):
            self.module = beside(self.module, _parameters={name: call.weight("", name) for name in names})
        arguments = {STREAM: self.x}
        if self.by_expert:  # each process has some of the pairs: for its forward, as many tokens with one choice
            weights = call.shards.entering(weights).T.reshape(-1)[self.pairs.here, None]
            arguments = {STREAM: self.x[self.pairs.row], CHOSEN: self.pairs.expert[:, None], CHOICE_WEIGHTS: weights}
        self.call = call.given(arguments)
        self.known: dict[str, list[Tensor]] = {}

    def looked(self) -> None:
        """Show what is inside to hooks that read only."""
        wanted = [stage for stage in STAGES if any(map(self.call.wants, stage.hooks))]
        self._forward(wanted[-1])
        for stage in wanted:
            self._show(stage)

    def written(self) -> Float[Tensor, "row d_model"]:
        """The output, hooks having written inside."""
        for stage in STAGES:
            if any(map(self.call.wants, stage.hooks)):
                self._forward(stage)
                self._show(stage)
        total = self._forward(None)
        if self.by_expert:
            total = torch.zeros_like(self.x).index_add(0, self.pairs.row, total)
        partial = self.by_expert or OUTPUTS.name not in self.known
        return self.call.shards.summed(total) if partial else total

    def _forward(self, until: Stage | None) -> Tensor:
        """Run the eager forward, as far as a stage is known for every expert, or to its end."""
        forward, call = eager_forward(self.module), self.call
        with suppress(Enough), ExpertProducts(self.module, self.known, len(self.pairs.counts), until):
            return forward(self.module, *call.args, **call.kwargs)  # type: ignore[no-any-return]
        return self.x

    def _show(self, stage: Stage) -> None:
        found = self.known[stage.name]
        value = torch.cat(found) if found else self.x.new_empty(0, self._width(stage))
        if stage is HIDDEN:
            new = self._show_hidden(value)
        else:
            # Where processes share the neurons, each has a part of every output.
            shown = value if stage is NEURONS or self.by_expert else self.call.shards.summed(value)
            new = self.pairs.fire(self.call, stage.hooks[0], shown)
        if new is not value:
            self.known[stage.name] = list(new.split(self.pairs.counts))

    def _show_hidden(self, value: Float[Tensor, "pair hidden"]) -> Float[Tensor, "pair hidden"]:
        """Both halves of the hidden layer, side by side or in turns."""
        together = self.component.together
        halves = value.chunk(2, dim=-1) if together else (value[..., ::2], value[..., 1::2])
        new = [self.pairs.fire(self.call, name, half) for name, half in zip(HIDDEN.hooks, halves, strict=True)]
        if all(one is other for one, other in zip(new, halves, strict=True)):
            return value
        # Laid out as the module's own hidden layer, or the activation rounds differently.
        return torch.cat(new, dim=-1) if together else torch.stack(new, dim=-1).flatten(-2)

    def _width(self, stage: Stage) -> int:
        """Of a value where no expert has a token."""
        weight = self.module.gate_up_proj if stage is HIDDEN else self.module.down_proj
        into, out = weight.shape[1:] if self.module.is_transposed else reversed(weight.shape[1:])
        return int(into if stage is NEURONS else out)


class ExpertProducts(TorchCalls):
    """The two products with a matrix that eager experts compute for each expert chosen, in the experts' order.

    The first returns the hidden layer, the second receives the neurons and returns the output; where experts have
    biases, those are added to the products. What is `known` takes their place. `until` ends after a stage.
    """

    def __init__(self, module: Any, known: dict[str, list[Tensor]], experts: int, until: Stage | None) -> None:
        super().__init__()
        self.module = module
        self.given = {name: list(values) for name, values in known.items()}
        self.known = known
        self.experts = experts
        self.until = until
        self.products = 0
        self.adds_to: str | None = None
        for stage in STAGES[: STAGES.index(until) + 1] if until else ():
            known.setdefault(stage.name, [])

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.adds_to is not None and function in ADD:
            name, self.adds_to = self.adds_to, None
            return self._value(name, lambda: function(*args, **kwargs))
        if function not in MATMUL:
            return function(*args, **kwargs)
        second = self.products % 2
        self.products += 1
        if second:
            args = (self._value(NEURONS.name, lambda: args[0]), *args[1:])
        name = (OUTPUTS if second else HIDDEN).name
        if self.module.has_bias:
            self.adds_to = name
            return function(*args, **kwargs)
        return self._value(name, lambda: function(*args, **kwargs))

    def _value(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A value of the expert whose turn it is: the known one, or a new one, kept if its stage is to be known."""
        expert = (self.products - 1) // 2
        if name in self.given:
            return self.given[name][expert]
        value = compute()
        if name in self.known:
            self.known[name].append(value)
            if self.until is not None and name == self.until.name and expert == self.experts - 1:
                raise Enough
        return value

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None and self.products != 2 * self.experts:
            made = f"two products for each of the {self.experts} experts chosen (it made {self.products})"
            raise UpstreamError(type(self.module).__name__, made, ())


class Pairs:
    """The chosen (token, expert) pairs sorted by expert; within one, first choices come first.

    Where processes have some experts each, `here`, `row`, `expert` and `counts` are those of this one's pairs.
    """

    def __init__(self, chosen: Int[Tensor, "row chosen"], experts: int, shards: Shards) -> None:
        self.shape = chosen.shape
        self.shards = shards
        flat = chosen.T.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        counts: list[int] = torch.bincount(flat, minlength=experts).tolist()
        each = experts // shards.size
        first = each * shards.rank
        self.sizes = [sum(counts[each * rank : each * (rank + 1)]) for rank in range(shards.size)]
        start = sum(self.sizes[: shards.rank])
        self.here = self.order[start : start + self.sizes[shards.rank]]
        self.row = self.here % len(chosen)
        self.expert = flat[self.here] - first
        self.counts = [count for count in counts[first : first + each] if count]

    def whole(self, pairs: Float[Tensor, "here width"]) -> Float[Tensor, "pair width"]:
        """The pairs of all processes."""
        return self.shards.gather(pairs, 0, self.sizes)

    def by_token(self, pairs: Float[Tensor, "pair width"]) -> Float[Tensor, "row chosen width"]:
        """Back in the order of the tokens and their choices."""
        rows, chosen = self.shape
        places = torch.empty_like(pairs).index_put((self.order,), pairs)
        return places.unflatten(0, (chosen, rows)).transpose(0, 1)  # type: ignore[no-any-return]

    def fire(self, call: InsideCall, name: str, pairs: Float[Tensor, "here width"]) -> Float[Tensor, "here width"]:
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
