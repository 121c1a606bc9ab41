"""Twins at work: a stand-in for a module's `forward`, there only while a hook inside it is.

For a run whose hooks only capture, the module works and its twin looks on; where a hook may write, or
a gradient has to pass through the inside, the twin computes the module's output for that call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_lens.hook_point import HookEntry, HookPoint, nested_forward, state
from transformer_lens.model_bridge.checkpointing import current_record, recalled
from transformer_lens.model_bridge.generalized_components import ComponentBridge, Hook, HookOwner
from transformer_lens.model_bridge.partial_run import covered
from transformer_lens.model_bridge.ports import Inside
from transformer_lens.model_bridge.sharding import Interior
from transformer_lens.model_bridge.slots import Slot
from transformer_lens.model_bridge.twin_call import ForwardInPlace, TwinCall, observing
from transformer_lens.model_bridge.views import TokenRows

_exchange = threading.Lock()
"""Held while a `forward` is exchanged: bridges and runs of several threads share a module's stand-in."""


class StandIn(ForwardInPlace):
    """Sits in a module's `forward` on behalf of every bridge that has hooks inside."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.had = "forward" in module.__dict__
        self.original = module.forward
        self.twins: list[BoundTwin] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with nested_forward():
            twins = [twin for twin in tuple(self.twins) if twin.active()]
            if not twins:
                return self.original(*args, **kwargs)
            if any(twin.writes() for twin in twins):
                return twins[0].compute(self.module, args, kwargs, twins)
            return self.look(args, kwargs, twins)

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any], twins: list[BoundTwin]) -> Any:
        """Let the module work, then show what is inside; the module's output stands."""
        component = twins[0].component
        call = twins[0].call(self.module, args, kwargs, twins, writing=False)
        component.begin(call)
        with observing({role: call.parts(role) for role in component.observes}, call.seen):
            call.output = self.original(*args, **kwargs)
        with torch.no_grad():
            component.twin(call)
        return call.output

    def remove(self) -> None:
        self.leave(self.module, self.had)


class BoundTwin:
    """The hooks of one bridge inside one module, by name."""

    def __init__(
        self, component: ComponentBridge, interior: Interior, layer: int, tell: Callable[[Any, bool], None]
    ) -> None:
        self.component = component
        self.tell = tell
        self.interior = interior
        self.layer = layer
        self.hooks: dict[str, BoundInside] = {}
        self.stand_in: StandIn | None = None

    def refresh(self) -> None:
        """Stand in for the module, or stop, as the hooks inside need it."""
        with _exchange:
            needed = any(hook.wanted for hook in self.hooks.values())
            if needed and self.stand_in is None:
                self._put_on()
                self.tell(self, True)
            elif not needed and self.stand_in is not None:
                self._take_off()
                self.tell(self, False)

    def follow(self) -> None:
        """Move to the module that is at this place now, if another one was put there."""
        if self.stand_in is not None and self.stand_in.module is not self.component.computing_module:
            with _exchange:
                self._take_off()
                self._put_on()

    def _put_on(self) -> None:
        self.component.check_module()
        module = self.component.computing_module
        found = StandIn.on(module)
        self.stand_in = found or StandIn(module)
        if found is None:
            module.forward = self.stand_in
        self.stand_in.twins.append(self)

    def _take_off(self) -> None:
        assert self.stand_in is not None
        self.stand_in.twins.remove(self)
        if not self.stand_in.twins:
            self.stand_in.remove()
        self.stand_in = None

    def release(self) -> None:
        """Stop standing in, whatever sits in the hooks' places."""
        self.hooks = {}
        self.refresh()

    def active(self) -> bool:
        """Whether any hook inside fires in what this thread is running."""
        record = current_record()
        if record is not None and record.replaying:
            return self in record.computed
        return covered(self.layer) and any(hook.fires() for hook in self.hooks.values())

    def writes(self) -> bool:
        """Whether any of them may change what it sees, or needs a gradient through it."""
        record = current_record()
        if record is not None and record.replaying:
            return self in record.computed
        return any(hook.writes() for hook in self.hooks.values())

    def call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], twins: list[BoundTwin], writing: bool
    ) -> TwinCall:
        """The call as the twin sees it; every bridge's hook of a name fires, one after the other."""
        rows: TokenRows | None = _first_recalled(twins, "rows")

        def fire(name: str, value: Tensor) -> Tensor:
            for twin in twins:
                value = twin.hooks[name].fire(value, rows)
            return value

        def wants(name: str) -> bool:
            return any(twin.hooks[name].fires() for twin in twins)

        parts = _Parts(self.component)
        stream: Tensor | None = _first_recalled(twins, "stream")
        inside = self.interior
        return TwinCall(
            module, inside.cfg, args, kwargs, writing, parts, fire, wants, stream, inside.shards, inside.axes
        )

    def compute(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], twins: list[BoundTwin]) -> Any:
        """The module's output, from its twin."""
        record = current_record()
        if record is not None and not record.replaying:
            record.computed.update(twins)
        return self.component.twin(self.call(module, args, kwargs, twins, writing=True))


def _first_recalled(twins: list[BoundTwin], what: str) -> Any:
    """What the hooks of any of the bridges remembered of this call, taken out of memory."""
    found = [recalled(twin, len(state.executing), what) for twin in twins]
    return next((value for value in found if value is not None), None)


class _Parts:
    """The Hugging Face module of a role of a component."""

    def __init__(self, component: ComponentBridge) -> None:
        self.component = component

    def __call__(self, role: str) -> nn.Module:
        return self.component.module_of(role)


class BoundInside(Slot):
    """One hook inside a module."""

    def __init__(
        self, hook: Hook, inside: Inside, owner: HookOwner, twin: BoundTwin, on_replaced: Callable[[], None]
    ) -> None:
        super().__init__(hook, owner, on_replaced)
        self.inside = inside
        self.twin = twin
        self.divided = twin.interior.dim(hook.axes)

    def entries(self) -> list[HookEntry] | None:
        """The hooks that fire now; `None` where another module sits in the place."""
        place = self.place
        if not isinstance(place, HookPoint):
            return None
        record = current_record()
        graph = torch.is_grad_enabled() or (record is not None and record.reentrant)
        backward = place.bwd_hooks if graph else []
        return [entry for entry in (*place.fwd_hooks, *backward) if entry.applies()]

    def fires(self) -> bool:
        """Whether anything here sees the value in what this thread is running."""
        record = current_record()
        if record is not None and record.replaying:
            return self in record.outcomes
        entries = self.entries()
        return entries is None or bool(entries)

    def writes(self) -> bool:
        """Whether it may change the value, or needs a gradient through it."""
        entries = self.entries()
        place = self.place
        if entries is None or not isinstance(place, HookPoint):
            return True
        return any(not entry.reads_only or entry in place.bwd_hooks for entry in entries)

    def remember(self, x: Tensor) -> None:
        """Keep what the module itself does not see: batch and position, or the block's stream."""
        if self.fires():
            what, value = ("stream", x) if self.inside.stream_of is not None else ("rows", TokenRows(*x.shape[:2]))
            state.recalled[id(self.twin), len(state.executing), what] = value

    def fire(self, value: Tensor, rows: TokenRows | None) -> Tensor:
        """Run the hook on the value, as batch and positions where the module has rows."""
        if not self.fires():
            return value
        shards, dim = self.twin.interior.shards, self.divided
        whole = value if dim is None else shards.gather(value, dim)
        shown = whole if rows is None else rows.get(whole)
        new = self.show(shown)
        if new is shown:
            return value
        put = new if rows is None else rows.put(whole, new)
        return put if dim is None else shards.slice(put, dim)
