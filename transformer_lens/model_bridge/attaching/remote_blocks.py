"""Blocks that another process computes: which hooks wait inside them, and how they get their tensors.

A `BlockElsewhere` replaces such a block in the model. It asks for its hooks before each run and delivers their tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from transformer_lens.hooks.point import Direction, HookEntry, HookFunction, HookPoint, nested_forward
from transformer_lens.model_bridge.attaching.inside_hooks import Slot
from transformer_lens.model_bridge.attaching.partial_run import covered
from transformer_lens.model_bridge.generalized_components import Hook, HookOwner, PartsElsewhere


@dataclass(frozen=True)
class HookRequest:
    """One hook that waits at a name inside a remote block."""

    name: str
    point: HookPoint
    entry: HookEntry
    direction: Direction

    def deliver(self, tensor: Tensor | None) -> None:
        """Deliver the tensor that the hook was to see, if any."""
        self.entry.fired = True
        if tensor is not None and not self.entry.removed:
            self.entry.fn(tensor, hook=self.point)


class BlockElsewhere(PartsElsewhere):
    """A module in the model that stands for a block of another process."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[HookElsewhere] = []

    def refusal(self, name: str, entry: HookEntry, direction: Direction) -> Exception | None:
        """Why a hook cannot work inside; `None` if it can."""
        raise NotImplementedError(f"{type(self).__name__} has to say which hooks the other process knows")

    def editing(self, operation: Literal["scale", "set"], value: Tensor | float) -> HookFunction:
        """A hook that multiplies by a value, or sets it, and that the other process can run."""
        raise NotImplementedError(f"{type(self).__name__} has to say how the other process edits")

    @staticmethod
    def begins_at_embedding() -> bool:
        return covered(-1)

    def requests(self) -> list[HookRequest]:
        """The hooks that fire inside in this thread's run, in their order at each name."""
        with nested_forward():
            return [request for slot in self.waiting for request in slot.requests()]


class HookElsewhere(Slot):
    """One declared hook of a remote block; hooks that cannot work there are refused when they are attached.

    `edge`: the block's input or output is also here, so functions may run at its port.
    """

    def __init__(
        self,
        hook: Hook,
        owner: HookOwner,
        block: BlockElsewhere,
        layer: int,
        told: Callable[[], None],
        edge: bool = False,
    ) -> None:
        super().__init__(hook, owner, told)
        self.block, self.layer, self.edge = block, layer, edge
        point = owner._modules[hook.name]
        assert isinstance(point, HookPoint)
        self.point = point
        block.waiting.append(self)

    def admit(self, entry: HookEntry, direction: Direction) -> None:
        """Raise for a hook that the other process cannot run."""
        refusal = self.block.refusal(self.name, entry, direction)
        if refusal is not None:
            raise refusal

    def begin(self) -> None:
        super().begin()
        self.point.admit = self.admit

    def replaced(self) -> None:
        place = self.place
        if not isinstance(place, HookPoint):
            self.owner._modules[self.slot] = self.point
            raise TypeError(
                f"{self.name}: got a {type(place).__name__} in the hook's place, and this block runs in another "
                "process; only hook points can stand here"
            )
        self.point = place
        place.admit = self.admit
        super().replaced()

    def entries(self) -> list[tuple[HookEntry, Direction]]:
        """The hooks here, and the direction of each."""
        forward: list[tuple[HookEntry, Direction]] = [(entry, "fwd") for entry in self.point.fwd_hooks]
        return [*forward, *((entry, "bwd") for entry in self.point.bwd_hooks)]

    def takes_all(self) -> bool:
        """Whether every hook here can run in the other process."""
        refused = (self.block.refusal(self.name, *entry) is not None for entry in self.entries())
        return self.place is self.point and not any(refused)

    def requests(self) -> Iterator[HookRequest]:
        """The hooks here that fire now."""
        if self.place is not self.point or not covered(self.layer) or (self.edge and not self.takes_all()):
            return
        for entry, direction in self.entries():
            if (direction == "fwd" or torch.is_grad_enabled()) and entry.applies():
                yield HookRequest(self.name, self.point, entry, direction)

    def release(self) -> None:
        self.block.waiting.remove(self)
