"""Ports on and off an unchanged model: one torch hook for each place, there only while it is needed.

A torch hook is put on when the first user hook arrives at one of its ports, and taken off with the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transformer_lens.hook_point import HookPoint, nested_forward, state
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components import ComponentBridge, Hook, HookOwner
from transformer_lens.model_bridge.partial_run import covered
from transformer_lens.model_bridge.ports import Port, Side


class Tap:
    """One torch hook on one module, shared by the ports at that place."""

    def __init__(self, find: Callable[[], nn.Module], side: Side, arg: str, keyword: bool, layer: int) -> None:
        self.find = find
        self.side = side
        self.arg = arg
        self.keyword = keyword
        self.layer = layer
        self.ports: list[BoundPort] = []
        self.recall_for: list[BoundPort] = []
        self.handle: RemovableHandle | None = None

    def refresh(self) -> None:
        """Put the torch hook on, or take it off, as the ports need it."""
        needed = any(port.wanted for port in self.ports) or any(port.wanted for port in self.recall_for)
        if needed and self.handle is None:
            module = self.find()
            if self.side == "in":
                self.handle = module.register_forward_pre_hook(self.on_input, with_kwargs=True)
            else:
                self.handle = module.register_forward_hook(self.on_output)
        elif not needed and self.handle is not None:
            self.handle.remove()
            self.handle = None

    def on_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The forward pre-hook: may exchange the module's input."""
        by_name = self.keyword or self.arg in kwargs or not args
        x = kwargs.get(self.arg) if by_name else args[0]
        if not isinstance(x, Tensor) or not covered(self.layer):
            return None
        new = self.fire(x)
        for port in self.recall_for:
            if port.wanted:
                port.remember(new)
        if new is x:
            return None
        if by_name:
            return args, {**kwargs, self.arg: new}
        return (new, *args[1:]), kwargs

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The forward hook: may exchange the module's output, or one item of it."""
        if not covered(self.layer):
            return None
        if isinstance(output, Tensor):
            new = self.fire(output)
            return None if new is output else new
        changed = output
        for port in self.ports:
            item = changed[port.port.item]
            new = self.fire(item, (port,))
            if new is not item:
                at = port.port.item
                changed = (*changed[:at], new, *changed[at + 1 :])
        return None if changed is output else changed

    def fire(self, x: Tensor, ports: tuple[BoundPort, ...] | None = None) -> Tensor:
        """Show a tensor to the ports here, one after the other; returns what the model goes on with."""
        if not state.depth:
            for port in ports or self.ports:
                x = port.fire(x)
            return x
        with nested_forward():
            for port in ports or self.ports:
                x = port.fire(x)
        return x


class BoundPort:
    """A port of one component: between the model's tensor and the module that sits in the hook's place."""

    def __init__(
        self,
        hook: Hook,
        owner: HookOwner,
        cfg: BridgeConfig,
        modules: Callable[[str], nn.Module],
        on_replaced: Callable[[], None],
    ) -> None:
        self.port: Port = hook.port
        self.on_replaced = on_replaced
        self.name = owner.full_names[hook.name]
        self.slot = hook.name
        self.owner = owner
        self.view = hook.port.view(cfg)
        self.modules = modules
        self.taps: list[Tap] = []

    @property
    def wanted(self) -> bool:
        """Whether anything sits here that has to see the tensor."""
        place = self.owner._modules[self.slot]
        return bool(place.fwd_hooks or place.bwd_hooks) if isinstance(place, HookPoint) else place is not None

    def refresh(self) -> None:
        """Called when a hook came or went, or the hook point was replaced."""
        for tap in self.taps:
            tap.refresh()

    def replaced(self) -> None:
        """Called when another module was put in the hook's place."""
        self.on_replaced()
        self.refresh()

    def remember(self, x: Tensor) -> None:
        """Keep what a later place has to know."""
        state.recalled[id(self), len(state.executing)] = self.port.remember(x)

    def fire(self, x: Tensor) -> Tensor:
        """Hand the tensor over; returns it as it is unless a hook changed it."""
        if not self.wanted:
            return x
        known = None
        if self.port.recalls is not None:
            known = state.recalled.pop((id(self), len(state.executing)), None)
            if known is None:  # attached by a hook of this very layer: it fires from the next forward on
                return x
        value = self.port.read(x, self.view, known)
        place = self.owner._modules[self.slot]
        assert place is not None
        new = place(value)
        if new is value:
            return x
        return self.port.write(x, self.checked(new, value), self.view, known, self.modules)

    def checked(self, new: Any, old: Tensor) -> Tensor:
        """A replacement has to be what the model expects in its place."""
        if not isinstance(new, Tensor):
            raise TypeError(f"{self.name}: the module in the hook's place returned {type(new).__name__}, not a Tensor")
        got, expected = (new.shape, new.dtype, new.device), (old.shape, old.dtype, old.device)
        for what, one, other in zip(("shape", "dtype", "device"), got, expected, strict=True):
            if one != other:
                here = list(one) if isinstance(one, torch.Size) else one
                there = list(other) if isinstance(other, torch.Size) else other
                raise ValueError(
                    f"hook at {self.name!r}: got a replacement of {what} {here}, expected {there}; "
                    "use .expand, .to(tensor.dtype) or .to(tensor.device) in the hook"
                )
        return new


class Attachment:
    """All ports of a bridge, and the taps they share."""

    def __init__(self, cfg: BridgeConfig, on_replaced: Callable[[], None]) -> None:
        self.cfg = cfg
        self.on_replaced = on_replaced
        self.taps: dict[tuple[str, Side, str], Tap] = {}

    def bind(
        self,
        owner: HookOwner,
        hooks: tuple[Hook, ...],
        component: Callable[[str], ComponentBridge | Root],
        layer: int,
    ) -> None:
        """Bind the hooks of one component; `component` finds its parts by role."""
        for hook in hooks:
            bound = BoundPort(hook, owner, self.cfg, _ModuleOf(component), self.on_replaced)
            places = [hook.port] + ([hook.port.instead] if hook.port.instead else [])
            for port in places:
                tap = self.tap(component(port.at), port, layer)
                tap.ports.append(bound)
                bound.taps.append(tap)
            if hook.port.recalls is not None:
                tap = self.tap(component(hook.port.recalls), Port(side="in"), layer)
                tap.recall_for.append(bound)
                bound.taps.append(tap)
            owner.watchers[hook.name] = bound
            setattr(owner, hook.name, owner._modules[hook.name])

    def tap(self, component: ComponentBridge | Root, port: Port, layer: int) -> Tap:
        """The tap at a port's place, made when first needed. Only keyword ports have one to themselves."""
        key = (component.path, port.side, port.arg if port.keyword else "")
        if key not in self.taps:
            self.taps[key] = Tap(_Find(component), port.side, port.arg, port.keyword, layer)
        return self.taps[key]

    def remove(self) -> None:
        """Take every torch hook off."""
        for tap in self.taps.values():
            for port in tap.ports:
                port.owner.watchers.clear()
            if tap.handle is not None:
                tap.handle.remove()
                tap.handle = None


class Root:
    """The base model itself as a place for ports: the part of the model below its head."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model = model
        self.path = path

    @property
    def original_component(self) -> nn.Module:
        """The base model."""
        return self.model.get_submodule(self.path)


class _Find:
    """Looks a component's module up when a hook is put on; an object, so that it can be copied."""

    def __init__(self, component: ComponentBridge | Root) -> None:
        self.component = component

    def __call__(self) -> nn.Module:
        return self.component.original_component


class _ModuleOf:
    """The Hugging Face module of a role."""

    def __init__(self, component: Callable[[str], ComponentBridge | Root]) -> None:
        self.component = component

    def __call__(self, role: str) -> nn.Module:
        return self.component(role).original_component
