"""One call of a Hugging Face module, as the component that opens it sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transformer_lens.model_bridge.access.sharding import ALONE, Shards
from transformer_lens.model_bridge.access.weights import is_adapted, is_quantised, read_weight
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.upstream import Arguments, UpstreamError, Word

DISPATCHED = "_old_forward"
"""Where accelerate keeps the original forward that its own calls."""


_exchange = threading.Lock()
"""Held while a `forward`, or another attribute of a module, is replaced, which threads and bridges share."""


class ForwardInPlace:
    """Replaces a module's `forward` on behalf of its users, until the last of them leaves."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.had = "forward" in module.__dict__
        self.original: Callable[..., Any] = module.forward
        self.users: list[Any] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if not self.had:  # a method is pickled by its name, under which this one is found
            self.original = MethodType(type(self.module).forward, self.module)

    @classmethod
    def on(cls, module: nn.Module) -> Self | None:
        """The one that is in the module's forward already, or in the one that accelerate's calls."""
        places = (module.__dict__.get(name) for name in ("forward", DISPATCHED))
        return next((forward for forward in places if isinstance(forward, cls)), None)

    @classmethod
    def join(cls, module: nn.Module, user: Any) -> Self:
        """The one in the module's forward, put there if there is none, with one more user."""
        with _exchange:
            found = cls.on(module)
            here = found or cls(module)
            if found is None:
                module.forward = here  # type: ignore[assignment]
            here.users.append(user)
            return here

    def leave(self, user: Any) -> None:
        """Without this user; after the last one the original forward is back."""
        with _exchange:
            self.users.remove(user)
            if not self.users:
                self.remove()

    def remove(self) -> None:
        here = self.module.__dict__
        if here.get(DISPATCHED) is self:
            here[DISPATCHED] = self.original
        elif here.get("forward") is self:
            if self.had:
                self.module.forward = self.original
            else:
                del here["forward"]


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own computation, whatever replaces its forward."""
    forward: Callable[..., Any] = module.forward
    return forward.original if isinstance(forward, ForwardInPlace) else forward


@dataclass
class InsideCall:
    """The arguments of the call, the model's config, and the hooks that wait inside."""

    module: nn.Module
    original: Callable[..., Any]
    arguments: Arguments
    cfg: BridgeConfig
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parts: Callable[[str], nn.Module]
    fire: Callable[[str, Tensor], Tensor]
    wants: Callable[[str], bool]
    """Whether a hook of this name fires in this call."""
    writes: Callable[[str], bool]
    """Whether one may change its value, or needs a gradient through it."""
    stream: Tensor | None = None
    """The stream that enters the block, where a hook shows it."""
    shards: Shards = ALONE
    """The processes that share the inside of the module; `cfg` describes this process's part."""
    divided: tuple[str, ...] = ()
    """The axes along which they share it."""

    def argument(self, word: Word) -> Any:
        """An argument of the module's forward, however it was passed; its default if it was left out."""
        return self.arguments.value(word, self.args, self.kwargs)

    def given(self, values: Mapping[Word, Any]) -> InsideCall:
        """The call with other arguments."""
        args, kwargs = self.args, self.kwargs
        for word, value in values.items():
            args, kwargs = self.arguments.with_value(word, value, args, kwargs)
        return replace(self, args=args, kwargs=kwargs)

    @property
    def first(self) -> Any:
        return self.arguments.first_value(self.args, self.kwargs)

    def graph_of(self, name: str) -> AbstractContextManager[object]:
        """Record a graph only where a hook of this name may write."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.writes(name))

    def run(self) -> Any:
        """What the module's own forward returns."""
        return self.original(*self.args, **self.kwargs)

    def weight(self, role: str, name: str = "weight") -> Tensor:
        """A weight of a part, or of the module itself (""): this process's shard where the inside is sharded."""
        # A part's module may be a wrapper that adapts it during a call, and in this call it did so already.
        module = self.parts(role) if role else self.module
        weight = read_weight(module, name, shard=self.shards.size > 1)
        computed = is_adapted(module) or is_quantised(getattr(module, name))
        return weight.to(self.cfg.dtype) if computed else weight


_replaced: dict[tuple[int, str], tuple[int, Any]] = {}
"""By object and attribute: how many asked for it, and what was there."""


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[], Any]) -> Iterator[None]:
    """Replace an object's attribute, which threads share, until the last that asked for it has left."""
    here, key = owner.__dict__, (id(owner), name)
    with _exchange:
        users, had = _replaced.get(key, (0, here.get(name)))
        if not users:
            here[name] = make()
        _replaced[key] = users + 1, had
    try:
        yield
    finally:
        with _exchange:
            users, had = _replaced.pop(key)
            if users > 1:
                _replaced[key] = users - 1, had
            elif had is None:
                del here[name]
            else:
                here[name] = had


@contextmanager
def on_output(
    module: nn.Module, act: Callable[[Tensor, Tensor], Tensor | None], *, first: bool = False
) -> Iterator[None]:
    """Pass what a module receives and returns in this thread to `act`, whose result, if any, replaces the output.

    Before every other hook on the module, or after them.
    """
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        if not isinstance(output, Tensor):
            raise UpstreamError(type(module).__name__, f"tensor as its output, got {type(output).__name__}", ())
        return act(args[0], output)

    handle: RemovableHandle = module.register_forward_hook(hook, prepend=first)
    try:
        yield
    finally:
        handle.remove()
