"""One call of a Hugging Face module, as the twin of that module sees it.

When the twin only looks, the module has already worked: `through` gives what its parts handed over.
When the twin writes, `through` runs those parts, so that their own hooks fire.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transformer_lens.model_bridge.config import BridgeConfig


class ForwardInPlace:
    """What sits in a module's `forward` in place of its own."""

    original: Callable[..., Any]


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
    output: Any = None
    kept: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def argument(self, name: str, position: int | None = None) -> Any:
        """An argument by name, or by position where it was passed so; `None` if it was left out."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[position] if position is not None and position < len(self.args) else None

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

    def weight(self, role: str) -> Tensor:
        """The weight of a linear part, or of the module itself (""). Raises `ValueError` if it was offloaded."""
        module: Any = self.parts(role)
        weight: Tensor = module.weight
        if weight.is_meta:
            raise ValueError(
                f"the weight of {type(module).__name__} is offloaded (on the meta device), so hooks inside "
                "it cannot be computed; load the model without offloading this layer"
            )
        return weight


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
                seen[role] = (args[0], output)

        return hook

    try:
        for role, module in modules.items():
            handles.append(module.register_forward_hook(note(role)))
        yield
    finally:
        for handle in handles:
            handle.remove()
