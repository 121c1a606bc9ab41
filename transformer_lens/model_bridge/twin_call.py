"""One call of a Hugging Face module, as the twin of that module sees it.

When the twin only looks, the module has already worked: `through` gives what its parts handed over.
When the twin writes, `through` runs those parts, so that their own hooks fire.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.peft_layers import is_adapted
from transformer_lens.model_bridge.quantised import is_quantised
from transformer_lens.model_bridge.sharding import ALONE, Shards
from transformer_lens.model_bridge.upstream import UpstreamError, Word, arguments_of
from transformer_lens.model_bridge.weight_access import read_weight

DISPATCHED = "_old_forward"
"""Where accelerate keeps the forward that it found in a module, and that its own forward calls."""


class ForwardInPlace:
    """What sits in a module's `forward` in place of its own."""

    original: Callable[..., Any]

    @classmethod
    def on(cls, module: nn.Module) -> Self | None:
        """The one that is there already, in the module's forward or in the one accelerate's forward calls."""
        places = (module.__dict__.get(name) for name in ("forward", DISPATCHED))
        return next((forward for forward in places if isinstance(forward, cls)), None)

    def leave(self, module: nn.Module, had: bool) -> None:
        """Put back what was there, at the place where this one is now; `had`: in the module's own dictionary."""
        here = module.__dict__
        if here.get(DISPATCHED) is self:
            here[DISPATCHED] = self.original
        elif here.get("forward") is self:
            if had:
                module.forward = self.original
            else:
                del here["forward"]


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own computation, whatever stands in for it."""
    forward: Callable[..., Any] = module.forward
    return forward.original if isinstance(forward, ForwardInPlace) else forward


@dataclass
class TwinCall:
    """The arguments of the call, the module's numbers, and the hooks that wait inside."""

    module: nn.Module
    cfg: BridgeConfig
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    writing: bool
    parts: Callable[[str], nn.Module]
    fire: Callable[[str, Tensor], Tensor]
    wants: Callable[[str], bool]
    stream: Tensor | None = None
    """The stream that enters the block, where a hook shows it."""
    shards: Shards = ALONE
    """The processes that share the inside of the module; `cfg` has the numbers of this one's part."""
    divided: tuple[str, ...] = ()
    """The axes along which they share it."""
    output: Any = None
    kept: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def argument(self, word: Word) -> Any:
        """An argument of the module's forward, however it was passed; its default if it was left out."""
        return arguments_of(type(self.module)).value(word, self.args, self.kwargs)

    @property
    def first(self) -> Any:
        """The first argument."""
        return arguments_of(type(self.module)).first_value(self.args, self.kwargs)

    def through(self, role: str, x: Tensor, amend: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """What the part in this role received and returned, after the hooks on it.

        `amend` changes what it returns before any hook sees that.
        """
        if not self.writing:
            return self.seen[role]
        part = self.parts(role)
        with observing({role: part}, self.seen), amending(part, amend):
            part(x)
        return self.seen[role]

    def weight(self, role: str, name: str = "weight") -> Tensor:
        """A weight of a part, or of the module itself (""): this process's part of it where the inside is divided."""
        # A part's module may be a wrapper that adapts it for the length of a call: in this call it did so already.
        module = self.parts(role) if role else self.module
        weight = read_weight(module, name, shard=self.shards.size > 1)
        computed = is_adapted(module) or is_quantised(getattr(module, name))
        return weight.to(self.cfg.dtype) if computed else weight


@contextmanager
def amending(module: nn.Module, amend: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Change what a module returns in this thread, before every other hook on it."""
    if amend is None:
        yield
        return
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return amend(output) if threading.get_ident() == thread else None

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def observing(modules: Mapping[str, nn.Module], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Note what some modules receive and return in this thread, after every other hook on them."""
    thread = threading.get_ident()
    handles: list[RemovableHandle] = []

    def note(role: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == thread:
                if not isinstance(output, Tensor):
                    raise UpstreamError(type(module).__name__, f"tensor as its output, got {type(output).__name__}", ())
                seen[role] = (args[0], output)

        return hook

    try:
        for role, module in modules.items():
            handles.append(module.register_forward_hook(note(role)))
        yield
    finally:
        for handle in handles:
            handle.remove()
