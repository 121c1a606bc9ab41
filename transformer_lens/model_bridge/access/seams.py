"""Seams: places inside a module's own forward where it passes a value to a function.

For one call, in one thread, that function is replaced: hooks see the value, or another goes on in its place. The
arithmetic stays the module's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from transformer_lens.hooks.point import state
from transformer_lens.model_bridge.access.inside_call import replaced
from transformer_lens.model_bridge.upstream import UpstreamError, attention_functions

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
DROPOUT = (F.dropout, torch.dropout)
MATMUL = (F.linear, torch.matmul, Tensor.matmul)

Step = Callable[[Tensor], Tensor]
"""What happens to a value at a seam: it is read, or replaced."""


IN_PLACE: dict[Any, Callable[[Tensor, Any], Tensor]] = {
    Tensor.mul: Tensor.mul_,
    Tensor.div: Tensor.div_,
    Tensor.add: Tensor.add_,
}
"""Functions that make a sum or a multiple of a tensor, and their in-place versions."""


class Enough(BaseException):
    """Ends a computation that runs beside the module, once everything wanted has been seen."""


@contextmanager
def until_enough() -> Iterator[None]:
    """A computation beside the module, which may end early and leaves no graph."""
    with torch.no_grad(), suppress(Enough):
        yield


class TorchCalls(TorchFunctionMode):
    """The torch functions that a module calls in this thread, except those that hooks call."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = len(state.executing)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make one call, or another one in its place."""
        raise NotImplementedError(f"{type(self).__name__} has to say what it does with a call")

    def __torch_function__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(state.executing) != self.depth:  # a hook runs here, and what it computes is its own
            return function(*args, **(kwargs or {}))
        return self.call(function, args, kwargs or {})


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], tuple[Any, Any]]]:
    """The tensor argument of a torch function, and a way to replace it."""
    if args:
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    return kwargs["input"], lambda x: (args, {**kwargs, "input": x})


@dataclass(eq=False)
class Probabilities(TorchCalls):
    """Attention's one softmax: its input is the scores, and its output the pattern.

    `drops`: dropout follows, and the pattern is taken at its input, after the model cast and cropped it; else it is
    what the softmax returns. `queries`: the first factor of the first product. `reuses`: the steps from the product to
    the softmax share one tensor's memory, for a run beside the module.
    """

    module: nn.Module
    scores: Step
    pattern: Step
    drops: bool = field(kw_only=True)
    queries: Step | None = field(default=None, kw_only=True)
    reuses: bool = field(default=False, kw_only=True)
    armed: bool = field(default=True, init=False)
    latest: Tensor | None = field(default=None, init=False)
    """The result of the latest step."""
    seen: int = field(default=0, init=False)
    waits: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__init__()

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.armed:
            return function(*args, **kwargs)
        if function in SOFTMAX:
            return self._softmax(function, args, kwargs)
        if self.waits and function in DROPOUT:
            self.waits = False
            x, with_other = _first(args, kwargs)
            args, kwargs = with_other(self.pattern(x))
        elif self.queries is not None and function in MATMUL:
            queries, self.queries = self.queries, None
            x, with_other = _first(args, kwargs)
            args, kwargs = with_other(queries(x))
        return self._step(function, args, kwargs) if self.reuses and not self.seen else function(*args, **kwargs)

    def _softmax(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen += 1
        x, with_other = _first(args, kwargs)
        scores = self.scores(x)
        args, kwargs = with_other(scores)
        widens = any(isinstance(given, torch.dtype) and given != scores.dtype for given in kwargs.values())
        if self.reuses and scores is self.latest and len(args) == 1 and not widens:
            result = torch.softmax(scores, kwargs["dim"], out=scores)
        else:
            result = function(*args, **kwargs)
        self.waits = self.armed = self.drops
        return result if self.drops else self.pattern(result)

    def _step(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step from the product to the softmax; a sum or a multiple of the latest result goes into its memory."""
        latest, in_place = self.latest, IN_PLACE.get(function)
        if in_place is not None and latest is not None and args[0] is latest and not kwargs:
            other = args[1]
            fits = not isinstance(other, Tensor) or torch.broadcast_shapes(other.shape, latest.shape) == latest.shape
            if fits and torch.result_type(latest, other) == latest.dtype:
                return in_place(latest, other)
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result is not latest:  # `x /= 2` gives the same tensor back
            self.latest = result if function in MATMUL or function in IN_PLACE else None
        return result

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if error is None and (self.seen != 1 or self.waits):
            missing = f"one softmax in its attention (it made {self.seen})"
            raise UpstreamError(type(self.module).__name__, missing + " with dropout after it" * self.waits, ())


class BesideSinks(Probabilities):
    """The softmax of attention with sinks, whose scores are what the module concatenates with them."""

    def __init__(self, module: nn.Module, scores: Step, pattern: Step, *, drops: bool, reuses: bool = False) -> None:
        super().__init__(module, lambda both: both, pattern, drops=drops)
        self.alone = scores

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.armed and not self.seen and function is torch.cat:
            scores, *sinks = args[0]
            args = ([self.alone(scores), *sinks], *args[1:])
        return super().call(function, args, kwargs)


class FirstCall(TorchCalls):
    """The first call of one of some functions, which `act` makes or replaces."""

    def __init__(self, functions: tuple[Any, ...], act: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.functions = functions
        self.act = act
        self.made = False

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.made or function not in self.functions:
            return function(*args, **kwargs)
        self.made = True
        return self.act(function, args, kwargs)


Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function of transformers: module, queries, keys, values and mask -> output, and the pattern or none."""


@contextmanager
def attention_function(module: nn.Module, instead: Callable[[Attend, Attend], Attend]) -> Iterator[None]:
    """For one call of an attention module in this thread, replace the attention function it asks transformers for.

    `instead` is given the function that the model's config names and the family's own eager one. A compiled graph
    holds no lock: its runner keeps `asking` open for it.
    """
    state.attending.append((module, len(state.executing), instead))
    try:
        if torch.compiler.is_compiling():
            yield
        else:
            with asking(attention_functions(module)):
                yield
    finally:
        state.attending.pop()


def asking(registry: Any) -> AbstractContextManager[None]:
    """Replace a registry's look-up by one that sees `attention_function`, until the last thread has left."""
    return replaced(registry, "get_interface", partial(_asking, registry))


def _asking(registry: Any) -> Callable[[str, Attend], Attend]:
    """A look-up that returns the replacement for the waiting module, and the real function for every other."""
    look_up = type(registry).get_interface

    def get_interface(implementation: str, default: Attend) -> Attend:
        real: Attend = look_up(registry, implementation, default)
        if not state.attending or state.attending[-1][1] != len(state.executing):
            return real
        waiting, _, instead = state.attending[-1]

        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            function = instead(real, default) if module is waiting else real
            return function(module, *args, **kwargs)

        return attend

    return get_interface


KeysAndValues = tuple[Tensor, Tensor]


class PassingBy:
    """A KV cache for attention without one: new keys and values pass through."""

    def __init__(self, step: Callable[[Tensor, Tensor], KeysAndValues]) -> None:
        self.step = step

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysAndValues:
        """The only method that an attention module calls."""
        return self.step(keys, values)


@contextmanager
def cache_update(
    cache: Any, before: Callable[[Tensor, Tensor], KeysAndValues], after: Callable[[Tensor, Tensor], KeysAndValues]
) -> Iterator[Any]:
    """A cache whose new keys and values pass `before`, and all of them `after`."""
    if cache is None:
        yield PassingBy(lambda keys, values: after(*before(keys, values)))
        return
    update = cache.update

    def amended(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> KeysAndValues:
        return after(*update(*before(keys, values), *args, **kwargs))

    had = cache.__dict__.get("update")
    cache.__dict__["update"] = amended
    try:
        yield cache
    finally:
        if had is None:
            del cache.__dict__["update"]
        else:
            cache.__dict__["update"] = had


class Handed(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.value


def beside(module: nn.Module, parts: Mapping[str, nn.Module] | None = None, **attributes: Any) -> Any:
    """A copy of a module that shares its parameters and parts, with some of them, or some attributes, replaced.

    The copy's `forward` is its class's, so no hook of the module fires, and the module is unchanged.
    """
    copied = type(module).__new__(type(module))
    copied.__dict__ = {**module.__dict__, **attributes, "_modules": {**module._modules, **(parts or {})}}
    return copied


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where torch keeps the hooks of a module."""


def unhooked(module: nn.Module) -> Any:
    """A copy of a module and its parts without hooks, sharing their parameters."""
    parts = {name: unhooked(part) for name, part in module._modules.items() if part is not None}
    return beside(module, parts, **{name: OrderedDict() for name in HOOKS})
