"""Slots, the places of a component's hook points, which any other module may take; and hooks inside modules, which
replace a module's `forward` while they are attached.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transformer_lens.checks import in_words, unusable
from transformer_lens.hooks.point import HookEntry, HookPoint, Listener, nested_forward, state, tell
from transformer_lens.model_bridge.access.checkpointing import current_record, recalled
from transformer_lens.model_bridge.access.inside_call import ForwardInPlace, InsideCall
from transformer_lens.model_bridge.access.ports import Inside
from transformer_lens.model_bridge.access.sharding import Interior
from transformer_lens.model_bridge.access.views import TokenRows
from transformer_lens.model_bridge.attaching.partial_run import covered
from transformer_lens.model_bridge.generalized_components import ComponentBridge, Hook, HookOwner
from transformer_lens.model_bridge.upstream import arguments_of

attaching = threading.Lock()
"""Held while a model is changed, which bridges and threads share."""


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


class InsideForward(ForwardInPlace):
    """Replaces a module's `forward` on behalf of every bridge that has hooks inside."""

    users: list["BoundModule"]

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.arguments = arguments_of(type(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if state.depth:
            with nested_forward():
                return self(*args, **kwargs)
        users = {user: user.wanted() for user in tuple(self.users)}
        users = {user: wanted for user, wanted in users.items() if wanted}
        if not users:
            return self.original(*args, **kwargs)
        return next(iter(users)).component.inside(self.call(args, kwargs, users))

    def call(self, args: Any, kwargs: Any, users: "dict[BoundModule, dict[str, BoundInside]]") -> InsideCall:
        """The call as the component sees it; every bridge's hook of a name fires, one after the other."""
        user = next(iter(users))
        rows: TokenRows | None = _first_recalled(users, "rows") if user.recalls else None
        stream: Tensor | None = _first_recalled(users, "stream") if user.recalls else None
        wanted = {name for hooks in users.values() for name in hooks}
        written = {name for user, hooks in users.items() for name in user.written(hooks)}
        each = tuple(users.values())

        def fire(name: str, value: Tensor) -> Tensor:
            for hooks in each:
                if name in hooks:
                    value = hooks[name].fire(value, rows)
            return value

        call = (self.module, self.original, self.arguments, user.interior.cfg, args, kwargs, user.component.module_of)
        hooks = (fire, wanted.__contains__, written.__contains__)
        return InsideCall(*call, *hooks, stream, user.interior.shards, user.interior.axes)


@dataclass(eq=False)
class BoundModule:
    """The hooks of one bridge inside one module, by name."""

    component: ComponentBridge
    interior: Interior
    layer: int
    tell: Callable[[Any, bool], None]
    hooks: dict[str, "BoundInside"] = field(default_factory=dict)
    recalls: bool = False
    """Whether any of them needs the input of another place."""
    in_place: InsideForward | None = None

    def refresh(self) -> None:
        """Replace the module's forward, or restore it, as the hooks inside need it."""
        with attaching:
            needed = any(hook.wanted() for hook in self.hooks.values())
            if needed and self.in_place is None:
                self._put_on()
                self.tell(self, True)
            elif not needed and self.in_place is not None:
                self._take_off()
                self.tell(self, False)

    def follow(self) -> None:
        """Move to the module that is at this place now."""
        with attaching:
            if self.in_place is not None and self.in_place.module is not self.component.computing_module:
                self.component.check_module()  # before anything is taken off
                self._take_off()
                self._put_on()

    @property
    def module(self) -> nn.Module | None:
        return None if self.in_place is None else self.in_place.module

    def _put_on(self) -> None:
        self.component.check_module()
        self.in_place = InsideForward.join(self.component.computing_module, self)

    def _take_off(self) -> None:
        assert self.in_place is not None
        self.in_place.leave(self)
        self.in_place = None

    def release(self) -> None:
        """Restore the module's forward."""
        self.hooks = {}
        self.refresh()

    def wanted(self) -> dict[str, "BoundInside"]:
        """The hooks inside that fire in this thread's run."""
        record = current_record()
        if record is not None and record.replaying:
            again = any(hook in record.computed for hook in self.hooks.values())
            return {name: hook for name, hook in self.hooks.items() if again and hook in record.outcomes}
        return {name: hook for name, hook in self.hooks.items() if hook.fires()} if covered(self.layer) else {}

    def written(self, wanted: dict[str, "BoundInside"]) -> list[str]:
        """The names of those that may change their value; a block's record keeps which."""
        record = current_record()
        if record is not None and record.replaying:
            return [name for name, hook in wanted.items() if hook in record.computed]
        found = [name for name, hook in wanted.items() if hook.writes()]
        if record is not None:
            record.computed.update(wanted[name] for name in found)
        return found


def _first_recalled(users: Iterable[BoundModule], what: str) -> Any:
    """Take what the hooks of any bridge remembered of this call."""
    found = [recalled(user, len(state.executing), what) for user in users]
    return next((value for value in found if value is not None), None)


class BoundInside(Slot):
    def __init__(
        self, hook: Hook, inside: Inside, owner: HookOwner, module: BoundModule, on_replaced: Callable[[], None]
    ) -> None:
        super().__init__(hook, owner, on_replaced)
        self.inside = inside
        self.module = module
        self.divided = module.interior.dim(hook.axes)

    def entries(self) -> tuple[list[HookEntry], list[HookEntry]] | None:
        """The hooks that fire now, forward and backward; `None` where another module replaces the hook point."""
        place = self.owner._modules.get(self.slot)
        if not isinstance(place, HookPoint):
            return None
        forward = [entry for entry in place.fwd_hooks if entry.applies()]
        if not place.bwd_hooks:
            return forward, []
        record = current_record()
        graph = torch.is_grad_enabled() or (record is not None and record.reentrant)
        return forward, [entry for entry in place.bwd_hooks if graph and entry.applies()]

    def fires(self) -> bool:
        """Whether anything here sees the value in this thread's run."""
        if not self.wanted():
            return False
        record = current_record()
        if record is not None and record.replaying:
            return self in record.outcomes
        entries = self.entries()
        return entries is None or any(entries)

    def writes(self) -> bool:
        """Whether it may change the value, or needs a gradient through it."""
        entries = self.entries()
        return entries is None or bool(entries[1]) or not all(entry.reads_only for entry in entries[0])

    def remember(self, x: Tensor) -> None:
        """Keep what the module does not see: batch and position, or the block's stream."""
        if self.fires():
            what, value = ("stream", x) if self.inside.stream_of is not None else ("rows", TokenRows(*x.shape[:2]))
            state.recalled[id(self.module), len(state.executing), what] = value

    def fire(self, value: Tensor, rows: TokenRows | None) -> Tensor:
        """Run the hook on the value, with batch and position axes where the module has flat tokens."""
        shards, dim = self.module.interior.shards, self.divided
        whole = value if dim is None else shards.gather(value, dim)
        shown = whole if rows is None else rows.get(whole)
        place: Any = self.owner._modules[self.slot]
        record = current_record()
        new = place(shown) if record is None else record.show(self, place, shown)
        if new is shown:
            return value
        new = check_replacement(self.name, new, shown)
        put = new if rows is None else rows.put(whole, new)
        return put if dim is None else shards.slice(put, dim)
