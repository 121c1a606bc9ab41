"""Replaces a model's `forward` while hooks are attached.

Before each forward pass it lets the hooks follow replaced modules (as by PEFT), and it runs the model outside
`torch.compile`, whose compiled code ignores hooks that came after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transformer_lens.hooks.point import state
from transformer_lens.model_bridge.access.checkpointing import recording
from transformer_lens.model_bridge.access.inside_call import ForwardInPlace

_exchange = threading.Lock()
"""Held while a model's `forward` is replaced, which its bridges share."""


COMPILED = "_compiled_call_impl"
"""Where torch keeps what `module.compile()` made."""


Follow = Callable[[], None]
"""Moves something to the modules that are in the model now."""


class Watch(ForwardInPlace):
    """Replaces a model's `forward` on behalf of every bridge that has hooks in it."""

    users: list[Follow]

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.__wrapped__ = self.original  # generate() and PEFT read the signature
        # Parts compiled by themselves (`layer.compile()`) would run their compiled code inside an eager model.
        self.compiled: list[tuple[nn.Module, Any]] = []
        every = [model]
        for module in every:  # not `modules()`: it drops repeats, at several times the cost
            if module.__dict__.get(COMPILED) is not None:
                self.compiled.append((module, module.__dict__.pop(COMPILED)))
            if module._modules:
                every += [child for child in module._modules.values() if child is not None]

    @torch.compiler.disable(reason="a model runs eagerly while hooks are on it")  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for follow in tuple(self.users):
            follow()
        outer, state.memo = state.memo, {}
        try:
            with recording(self.module):
                return self.original(*args, **kwargs)
        finally:
            state.memo = outer

    def remove(self) -> None:
        for module, compiled in self.compiled:
            module.__dict__.setdefault(COMPILED, compiled)
        super().remove()


def watch(model: nn.Module, follow: Follow) -> None:
    """Call `follow` before every forward pass of a model."""
    with _exchange:
        Watch.join(model, follow)


def unwatch(model: nn.Module, follow: Follow) -> None:
    """Undo `watch`."""
    with _exchange:
        here = Watch.on(model)
        if here is not None:  # else accelerate's hooks were taken off, and what they found with them
            here.leave(follow)
