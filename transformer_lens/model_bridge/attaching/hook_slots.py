"""A slot: the place of a component's hook point, which any other module may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_lens.checks import in_words, unusable
from transformer_lens.hooks.point import HookPoint, Listener, tell
from transformer_lens.model_bridge.generalized_components import Hook, HookOwner


class Slot:
    """One declared hook of one component: what is there now, and how it is shown a tensor."""

    def __init__(self, hook: Hook, owner: HookOwner, on_replaced: Callable[[], None]) -> None:
        self.name = owner.full_names[hook.name]
        self.slot = hook.name
        self.owner = owner
        self.on_replaced = on_replaced
        self.listeners: list[Listener] = []
        self.replays = 0

    @property
    def place(self) -> nn.Module | None:
        """The hook point, or its replacement; `None` while the component it looks into is replaced."""
        return self.owner._modules.get(self.slot)

    def wanted(self) -> bool:
        """Whether anything here has to see the tensor."""
        place = self.owner._modules.get(self.slot)
        if isinstance(place, HookPoint):
            return bool(place.fwd_hooks or place.bwd_hooks or self.replays)
        return place is not None

    def begin(self) -> None:
        """Let the hook point tell of its hooks."""
        self.owner._modules[self.slot].__dict__["on_change"] = self.refresh

    def refresh(self) -> None:
        """Called when a hook is added or removed: puts the torch hooks on and off."""
        tell(self.listeners)

    def replaced(self) -> None:
        """Called when another module replaces the hook point."""
        self.on_replaced()
        self.refresh()


def check_replacement(name: str, new: Any, old: Tensor) -> Tensor:
    """A replacement has to return what the model expects."""
    if not isinstance(new, Tensor):
        raise TypeError(f"{name}: the module in the hook's place returned {type(new).__name__}, not a Tensor")
    if unusable(new) not in ("", "meta"):  # another device is told below
        raise TypeError(
            f"hook at {name!r}: got a replacement that is {in_words(new)}, expected a dense one with numbers"
        )
    got, expected = (new.shape, new.dtype, new.device), (old.shape, old.dtype, old.device)
    for what, one, other in zip(("shape", "dtype", "device"), got, expected, strict=True):
        if one != other:
            here = list(one) if isinstance(one, torch.Size) else one
            there = list(other) if isinstance(other, torch.Size) else other
            raise ValueError(
                f"hook at {name!r}: got a replacement of {what} {here}, expected {there}; "
                "use .expand, .to(tensor.dtype) or .to(tensor.device) in the hook"
            )
    return new
