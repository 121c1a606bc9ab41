"""One call of a mixture's experts, opened: by the kernel that computes them all at once, or expert by expert."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens.model_bridge.access.inside_call import InsideCall
from transformer_lens.model_bridge.access.seams import MATMUL, Enough, FirstCall, TorchCalls, beside
from transformer_lens.model_bridge.access.sharding import ALONE, Shards
from transformer_lens.model_bridge.upstream import CHOICE_WEIGHTS, CHOSEN, STREAM, UpstreamError, eager_forward

Stage = tuple[str, ...]
"""A value inside each expert: the hooks that show it."""
HIDDEN: Stage = ("hook_pre", "hook_pre_linear")
NEURONS: Stage = ("hook_post",)
OUTPUTS: Stage = ("hook_expert_out",)
STAGES = (HIDDEN, NEURONS, OUTPUTS)


def show_hidden(
    module: Any, value: Float[Tensor, "pair hidden"], fire: Callable[[str, Tensor], Tensor]
) -> Float[Tensor, "pair hidden"]:
    """Show both halves of the hidden layer, side by side or interleaved."""
    aside = module.is_concatenated
    halves = value.chunk(2, dim=-1) if aside else (value[..., ::2], value[..., 1::2])
    new = [fire(name, half) for name, half in zip(HIDDEN, halves, strict=True)]
    if all(one is other for one, other in zip(new, halves, strict=True)):
        return value
    # In the layout of the module's own hidden layer, or the activation rounds differently.
    return torch.cat(new, dim=-1) if aside else torch.stack(new, dim=-1).flatten(-2)


SORTS = {"grouped_mm": True, "batched_mm": False}
"""The kernels of transformers for all experts at once, and whether they sort the pairs by expert."""


class KernelRun:
    """A call of a kernel that computes all pairs at once, with the module's own gate between its products."""

    def __init__(self, call: InsideCall) -> None:
        self.call = call
        self.module: Any = call.module
        self.shape = call.argument(CHOSEN).shape
        config: Any = self.module.config
        self.sorts = SORTS[config._experts_implementation]
        self.place: Tensor | None = None
        """The kernel's row of each (token, choice) pair."""
        self.order: Tensor | None = None
        self.step = "sort" if self.sorts else "gate"

    @staticmethod
    def fits(call: InsideCall) -> bool:
        """Whether the module's own forward calls such a kernel, and no other process has a shard."""
        own = isinstance(call.original, MethodType) and call.original.__func__ is type(call.module).forward
        config: Any = call.module.config
        here = call.shards.size == 1 and not any(weight.is_meta for weight in call.module.parameters(recurse=False))
        return own and here and config._experts_implementation in SORTS

    def run(self) -> Any:
        module = beside(self.module, _apply_gate=self._gate)
        with ExitStack() as self.watched:
            if self.sorts:
                self.watched.enter_context(FirstCall((torch.sort,), self._sorted))
            output = type(module).forward(module, *self.call.args, **self.call.kwargs)
        if self.step != "done":
            raise UpstreamError(type(self.module).__name__, f"{self.step} of its pairs where its kernel had one", ())
        return output

    def _sorted(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        self.order, self.step = result[1], "gate"
        return result

    def _gate(self, hidden: Float[Tensor, "pair hidden"]) -> Float[Tensor, "pair d_mlp"]:
        self.watched.close()
        if self.step != "gate":
            return self.module._apply_gate(hidden)  # type: ignore[no-any-return]
        if self.order is not None:
            self.place = torch.argsort(self.order)
        neurons = self._fire(NEURONS[0], self.module._apply_gate(show_hidden(self.module, hidden, self._fire)))
        self.step = "weighting" if self.call.wants(OUTPUTS[0]) else "done"
        if self.step != "done":
            self.watched.enter_context(FirstCall((Tensor.mul,), self._weighted))
        return neurons

    def _weighted(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.step = "done"
        return function(self._fire(OUTPUTS[0], args[0]), *args[1:], **kwargs)

    def _fire(self, name: str, pairs: Float[Tensor, "pair width"]) -> Float[Tensor, "pair width"]:
        """Show a value to its hook by token, if any hook wants it."""
        if not self.call.wants(name):
            return pairs
        with self.call.graph_of(name):
            shown = (pairs if self.place is None else pairs[self.place]).unflatten(0, self.shape)
        new = self.call.fire(name, shown)
        if new is shown:
            return pairs
        return new.flatten(0, 1) if self.order is None else new.flatten(0, 1)[self.order]


class EagerRun:
    """The family's eager forward of one call, expert by expert, and the values known so far.

    A hook sees one value for all experts at once, so the forward runs again from what a hook returned, with known
    values taken as given.
    """

    def __init__(self, call: InsideCall) -> None:
        self.own = call
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
        self.known: dict[Stage, list[Tensor]] = {}

    def looked(self) -> Any:
        """The module's output for hooks that only read: its own eager forward, or one beside it."""
        wanted = [stage for stage in STAGES if any(map(self.call.wants, stage))]
        if self.module.config._experts_implementation == "eager" and self.call.shards.size == 1:
            with ExpertProducts(self.module, self.known, len(self.pairs.counts), wanted[-1], stops=False):
                output = self.own.run()
        else:
            output = self.own.run()
            with torch.no_grad():
                self._forward(wanted[-1])
        with torch.no_grad():
            for stage in wanted:
                self._show(stage)
        return output

    def written(self) -> Float[Tensor, "row d_model"]:
        """The module's output for hooks that write inside."""
        for stage in STAGES:
            if any(map(self.call.wants, stage)):
                self._forward(stage)
                self._show(stage)
        total = self._forward(None)
        if self.by_expert:
            total = torch.zeros_like(self.x).index_add(0, self.pairs.row, total)
        partial = self.by_expert or OUTPUTS not in self.known
        return self.call.shards.summed(total) if partial else total

    def _forward(self, until: Stage | None) -> Tensor:
        """Run the eager forward until a stage is known for every expert, or to its end."""
        forward, call = eager_forward(self.module), self.call
        with suppress(Enough), ExpertProducts(self.module, self.known, len(self.pairs.counts), until):
            return forward(self.module, *call.args, **call.kwargs)  # type: ignore[no-any-return]
        return self.x

    def _show(self, stage: Stage) -> None:
        found = self.known[stage]
        value = torch.cat(found) if found else self.x.new_empty(0, self._width(stage))
        if stage is HIDDEN:
            new = show_hidden(self.module, value, partial(self.pairs.fire, self.call))
        else:
            # Where processes share the neurons, each has a part of every output.
            shown = value if stage is NEURONS or self.by_expert else self.call.shards.summed(value)
            new = self.pairs.fire(self.call, stage[0], shown)
        if new is not value:
            self.known[stage] = list(new.split(self.pairs.counts))

    def _width(self, stage: Stage) -> int:
        shape = (self.module.gate_up_proj if stage is HIDDEN else self.module.down_proj).shape[1:]
        out, into = reversed(shape) if self.module.is_transposed else shape
        return int(into if stage is NEURONS else out)


class ExpertProducts(TorchCalls):
    """The two matrix products of each chosen expert, in the experts' order.

    The first returns the hidden layer; the second receives the neurons and returns the output. `known` values replace
    theirs, and `until` keeps the values up to a stage and ends after it.
    """

    def __init__(
        self, module: Any, known: dict[Stage, list[Tensor]], experts: int, until: Stage | None, stops: bool = True
    ) -> None:
        super().__init__()
        self.module = module
        self.given = {name: list(values) for name, values in known.items()}
        self.known = known
        self.experts = experts
        self.until = until if stops else None
        self.products = 0
        self.product: Tensor | None = None
        """The latest product, before its bias."""
        for stage in STAGES[: STAGES.index(until) + 1] if until else ():
            known.setdefault(stage, [])

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stage = OUTPUTS if self.products % 2 else HIDDEN
        if self.product is not None and function is Tensor.add and args[0] is self.product:
            self.product = None
            stage = HIDDEN if self.products % 2 else OUTPUTS
            return self._value(stage, lambda: function(*args, **kwargs))
        if function not in MATMUL:
            return function(*args, **kwargs)
        self.products += 1
        if stage is OUTPUTS:
            args = (self._value(NEURONS, lambda: args[0]), *args[1:])
        if self.module.has_bias:
            self.product = function(*args, **kwargs)
            return self.product
        return self._value(stage, lambda: function(*args, **kwargs))

    def _value(self, stage: Stage, compute: Callable[[], Tensor]) -> Tensor:
        """The known value of the current expert, or a new one, kept if its stage is to be known."""
        expert = (self.products - 1) // 2
        if stage in self.given:
            return self.given[stage][expert]
        value = compute()
        if stage in self.known:
            self.known[stage].append(value)
            if stage == self.until and expert == self.experts - 1:
                raise Enough
        return value

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None and self.products != 2 * self.experts:
            made = f"two products for each of the {self.experts} experts chosen (it made {self.products})"
            raise UpstreamError(type(self.module).__name__, made, ())


class Pairs:
    """The chosen (token, expert) pairs sorted by expert; within one, first choices come first.

    With expert parallelism `here`, `row`, `expert` and `counts` are of this process's pairs.
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

    def by_token(self, pairs: Float[Tensor, "pair width"]) -> Float[Tensor, "row chosen width"]:
        """Back in the order of the tokens and their choices."""
        rows, chosen = self.shape
        places = torch.empty_like(pairs).index_put((self.order,), pairs)
        return places.unflatten(0, (chosen, rows)).transpose(0, 1)  # type: ignore[no-any-return]

    def fire(self, call: InsideCall, name: str, pairs: Float[Tensor, "here width"]) -> Float[Tensor, "here width"]:
        """Show a value to its hook by token, if any hook wants it."""
        if not call.wants(name):
            return pairs
        shown = self.by_token(self.shards.gather(pairs, 0, self.sizes))
        new = call.fire(name, shown)
        if new is shown:
            return pairs
        return self.shards.slice(new.transpose(0, 1).reshape(-1, new.shape[-1])[self.order], 0, self.sizes)
