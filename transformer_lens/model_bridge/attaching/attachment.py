"""Ports on and off an unchanged model: one torch hook per place, there only while a user hook needs it."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transformer_lens.hooks.point import nested_forward, state
from transformer_lens.model_bridge.access.checkpointing import current_record, recalled
from transformer_lens.model_bridge.access.ports import Inside, Port, Side
from transformer_lens.model_bridge.access.sharding import Sharding, Shards
from transformer_lens.model_bridge.attaching.inside_hooks import (
    BoundInside,
    BoundModule,
    Slot,
    attaching,
    check_replacement,
)
from transformer_lens.model_bridge.attaching.partial_run import Watch, covered
from transformer_lens.model_bridge.attaching.remote_blocks import BlockElsewhere, HookElsewhere
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components import ComponentBridge, Hook, HookOwner
from transformer_lens.model_bridge.upstream import Arguments, UpstreamError, Word, arguments_of, item, with_item


@dataclass(eq=False)
class Root:
    """The base model, the part below the head, as a place for ports."""

    model: nn.Module
    path: str

    @property
    def in_place(self) -> nn.Module:
        return self.model.get_submodule(self.path)


Find = Callable[[str], ComponentBridge | Root]
"""The part of a component in some role."""


class Tap:
    """One torch hook on one module, shared by the ports at that place."""

    def __init__(
        self, component: ComponentBridge | Root, port: Port, layer: int, tell: Callable[[Any, bool], None]
    ) -> None:
        self.component = component
        self.tell = tell
        self.module: nn.Module | None = None
        self.arguments: Arguments
        self.side = port.side
        self.arg = port.arg
        self.shared = port.shared
        self.layer = layer
        self.ports: list[BoundPort] = []
        self.recall_for: list[BoundPort | BoundInside] = []
        self.live: tuple[BoundPort, ...] = ()
        self.live_recalls: tuple[BoundPort | BoundInside, ...] = ()
        self.handle: RemovableHandle | None = None

    def refresh(self) -> None:
        """Put the torch hook on, or take it off, as the ports need it."""
        with attaching:
            self.live = tuple([port for port in self.ports if port.wanted()])
            self.live_recalls = tuple([port for port in self.recall_for if port.wanted()])
            needed = bool(self.live or self.live_recalls)
            if needed and self.handle is None:
                self._put_on()
                self.tell(self, True)
            elif not needed and self.handle is not None:
                self._take_off()
                self.tell(self, False)

    def follow(self) -> None:
        """Move to the module that is at this place now."""
        module = self.component.in_place
        with attaching:
            if self.handle is not None and self.module is not module:
                self._take_off()
                self._put_on()

    def _put_on(self) -> None:
        self.module = module = self.component.in_place
        self.arguments = arguments_of(type(module))
        if self.side == "in":
            self.handle = module.register_forward_pre_hook(self.on_input, with_kwargs=True, prepend=self.shared)
        else:
            self.handle = module.register_forward_hook(self.on_output, prepend=self.shared)

    def _take_off(self) -> None:
        assert self.handle is not None
        self.handle.remove()
        self.handle, self.module = None, None

    # The code below runs for every tensor, so it reads state where a helper would read better; a hook is four frames of
    # ours from the module: here, the port's `fire`, and two of the hook point's.

    def on_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook: may replace the module's input."""
        if kwargs is None:  # torch calls it so while another thread is putting it on or taking it off
            return None
        if not covered(self.layer):
            return None
        if state.depth:
            with nested_forward():
                return self.on_input(module, args, kwargs)
        arguments = self.arguments
        if self.arg is None:
            x = arguments.first_value(args, kwargs)
            if not isinstance(x, Tensor):
                raise UpstreamError(arguments.owner, f"tensor as its first argument, got {type(x).__name__}", kwargs)
        else:
            x = arguments.value(self.arg, args, kwargs)
            if x is None:
                return None
        new = x
        for port in self.live:
            new = port.fire(new)
        for recall in self.live_recalls:
            recall.remember(new)
        if new is x:
            return None
        if self.arg is None:
            return arguments.with_first(new, args, kwargs)
        return arguments.with_value(self.arg, new, args, kwargs)

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The forward hook: may replace the module's output, or one item of it."""
        if not covered(self.layer):
            return None
        if state.depth:
            with nested_forward():
                return self.on_output(module, args, output)
        changed = None  # a compiler knows this one from a tuple, and not two tuples from one another
        for port in self.live:
            before = output if changed is None else changed
            at = port.port.item
            value = before if isinstance(before, Tensor) else item(before, at, module)
            new = port.fire(value)
            if new is not value:
                changed = new if value is before else with_item(before, at, new)
        return changed


class BoundPort(Slot):
    """A port of one component: connects the model's tensor with the hook point."""

    def __init__(
        self, hook: Hook, owner: HookOwner, cfg: BridgeConfig, find: Find, on_replaced: Callable[[], None]
    ) -> None:
        super().__init__(hook, owner, on_replaced)
        assert isinstance(hook.port, Port)
        self.port = hook.port
        self.view = self.port.view(cfg)
        self.find = find
        self.recalls = self.port.recalls is not None

    def modules(self, role: str) -> nn.Module:
        return self.find(role).in_place

    def remember(self, x: Tensor) -> None:
        state.recalled[id(self), len(state.executing), "input"] = self.port.remember(x)

    def fire(self, x: Tensor) -> Tensor:
        """Show the view of a tensor to the hook; returns the tensor itself unless a hook changed it."""
        known = None
        if self.recalls:
            known = recalled(self, len(state.executing), "input")
            if known is None:  # attached by a hook of this very layer: it fires from the next forward on
                return x
        value = self.port.read(x, self.view, known)
        place: Any = self.owner._modules[self.slot]
        record = current_record()
        new = place(value) if record is None else record.show(self, place, value)
        if new is value:
            return x
        return self.port.write(x, check_replacement(self.name, new, value), self.view, known, self.modules)


class EdgePort(BoundPort):
    """The input or output of a block that another process computes."""

    def __init__(self, elsewhere: HookElsewhere, *here: Any) -> None:
        super().__init__(*here)
        self.elsewhere = elsewhere

    def wanted(self) -> bool:
        """Whether any hook here needs the tensor; those that the other process runs do not."""
        return super().wanted() and not self.elsewhere.takes_all()


class DividedPort(BoundPort):
    """A port whose tensor is sharded across processes: hooks see the whole."""

    def __init__(self, shards: Shards, *here: Any) -> None:
        super().__init__(*here)
        self.shards = shards

    def fire(self, x: Tensor) -> Tensor:
        module: Any = self.modules(self.port.at)
        sizes = self.shards.even(module.in_features if self.port.side == "in" else module.out_features)
        whole = self.shards.gather(x, -1, sizes)
        new = super().fire(whole)
        return x if new is whole else self.shards.slice(new, -1, sizes)


class KnownModules:
    """The module at each place of a model when last seen, to notice replaced ones."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self.links: list[tuple[weakref.ref[nn.Module], str, int]] = []
        """Module, child name, and the child's id, so that replaced modules are not kept alive."""

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownModules, ()  # a copy of a bridge has modules of its own

    def check(self, path: str, module: nn.Module | None) -> None:
        """Forget everything if another module is at this place."""
        if self.at.get(path) != id(module):
            self.links.clear()

    def all_in_place(self) -> bool:
        """Whether every known module is still at its place."""
        for parent, name, child in self.links:
            module = parent()
            if module is None or id(module._modules.get(name)) != child:
                return False
        return bool(self.links)

    def note(self, components: Iterable[ComponentBridge | Root]) -> None:
        self.at, links = {}, {}
        for component in components:
            found: nn.Module = component.model
            for part in component.path.split(".") if component.path else ():
                child = found._modules.get(part)
                links[id(found), part] = (weakref.ref(found), part, id(child))
                if child is None:  # cut down, or computed elsewhere: what is attached there says so itself
                    break
                found = child
            else:
                self.at[component.path] = id(found)
        self.links = list(links.values())


@dataclass(eq=False)
class Attachment:
    """All ports of a bridge, and the torch hooks they share."""

    cfg: BridgeConfig
    on_replaced: Callable[[], None]
    sharding: Sharding
    model: nn.Module
    blocks_elsewhere: Mapping[int, tuple[str, BlockElsewhere]]
    taps: dict[tuple[str, Side, Word | None, bool], Tap] = field(default_factory=dict)
    opened: dict[str, BoundModule] = field(default_factory=dict)
    elsewhere: list[HookElsewhere] = field(default_factory=list)
    runners: list[Any] = field(default_factory=list)  # compiled ones, whose torch hooks are their own
    attached: dict[Tap | BoundModule, None] = field(default_factory=dict)
    known: KnownModules = field(default_factory=KnownModules)

    def tell(self, place: Tap | BoundModule, attached: bool) -> None:
        """Something was put on the model or taken off; the model is watched while anything is on it."""
        before = bool(self.attached)
        if attached:
            self.attached[place] = None
            self.known.check(place.component.path, place.module)
        else:
            del self.attached[place]
        if attached and not before:
            Watch.join(self.model, self.follow)
        elif not self.attached:
            here = Watch.on(self.model)
            if here is not None:  # else accelerate's hooks were taken off, and what they found with them
                here.leave(self.follow)

    def follow(self) -> None:
        """Move everything to the modules that are in the model now."""
        if not self.known.all_in_place():
            for place in tuple(self.attached):
                place.follow()
            places: list[Tap | BoundModule] = [*self.taps.values(), *self.opened.values()]
            self.known.note([place.component for place in places])

    def bind(self, owner: HookOwner, hooks: tuple[Hook, ...], find: Find, layer: int) -> None:
        """Bind the hooks of one component; `find` gives its parts by role."""
        for hook in hooks:
            path, block = self.blocks_elsewhere.get(layer, ("", None))
            slot: Slot
            if block is not None and find(hook.port.at).path != path:
                slot = HookElsewhere(hook, owner, block, layer, self.on_replaced)
                self.elsewhere.append(slot)
            elif isinstance(hook.port, Inside):
                slot = self._bind_inside(hook, owner, find, layer)
            else:
                slot = self._bind_port(hook, owner, find, layer, block)
            owner.watchers[hook.name] = slot
            slot.begin()

    def _bind_port(
        self, hook: Hook, owner: HookOwner, find: Find, layer: int, block: BlockElsewhere | None
    ) -> BoundPort:
        port, here = hook.port, (hook, owner, self.cfg, find, self.on_replaced)
        assert isinstance(port, Port)
        bound: BoundPort
        if block is not None:
            waiting = HookElsewhere(hook, owner, block, layer, self.on_replaced, edge=True)
            self.elsewhere.append(waiting)
            bound = EdgePort(waiting, *here)
        elif self.sharding.divides(find(port.at).path, port.side):
            bound = DividedPort(self.sharding.shards, *here)
        else:
            bound = BoundPort(*here)
        for place in filter(None, (port, port.instead)):
            tap = self.tap(find(place.at), place, layer)
            tap.ports.append(bound)
            bound.listeners.append(tap.refresh)
        if port.recalls is not None:
            self._recall(bound, find(port.recalls), layer)
        return bound

    def _bind_inside(self, hook: Hook, owner: HookOwner, find: Find, layer: int) -> BoundInside:
        place, inside = hook.port, find(hook.port.at)
        assert isinstance(place, Inside) and isinstance(inside, ComponentBridge)
        if inside.path not in self.opened:
            self.opened[inside.path] = BoundModule(inside, inside.interior(self.sharding), layer, self.tell)
        module = self.opened[inside.path]
        bound = BoundInside(hook, place, owner, module, self.on_replaced)
        module.hooks[hook.name] = bound
        bound.listeners.append(module.refresh)
        for role in (place.rows_of, place.stream_of):
            if role is not None:
                module.recalls = True
                self._recall(bound, find(role), layer)
        return bound

    def _recall(self, bound: BoundPort | BoundInside, component: ComponentBridge | Root, layer: int) -> None:
        """Keep the input of another place for a hook."""
        tap = self.tap(component, Port(side="in"), layer)
        tap.recall_for.append(bound)
        bound.listeners.append(tap.refresh)

    def tap(self, component: ComponentBridge | Root, port: Port, layer: int) -> Tap:
        """The tap at a port's place; ports of other arguments, and shared ports, have their own."""
        key = (component.path, port.side, port.arg, port.shared)
        if key not in self.taps:
            self.taps[key] = Tap(component, port, layer, self.tell)
        return self.taps[key]

    def remove(self) -> None:
        """Remove every torch hook and every replaced forward, also below modules put in hooks' places."""
        for runner in tuple(self.runners):
            runner.close()
        for module in self.opened.values():
            module.release()
        for slot in self.elsewhere:
            slot.release()
        self.elsewhere = []
        for tap in self.taps.values():
            for port in tap.ports:
                port.owner.watchers.clear()
            tap.ports, tap.recall_for = [], []
            tap.refresh()
