"""The tree of a bridge's components, beside the modules that they stand for."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import nn

from transformer_lens.hooks.point import HookPoint
from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.access.views import whole
from transformer_lens.model_bridge.architecture_adapter import HEADS, NO_HEAD, ArchitectureAdapter, Preparation, head_of
from transformer_lens.model_bridge.generalized_components import BlockBridge, ComponentBridge, HookOwner, Part
from transformer_lens.model_bridge.generalized_components.base import is_replica
from transformer_lens.model_bridge.generalized_components.branches import READERS
from transformer_lens.model_bridge.wrapped_model import MODEL

PUT: WeakSet[nn.Module] = WeakSet()
"""The modules that a bridge has put in a component's place."""
Prepare = Callable[[ComponentBridge, nn.Module], Preparation]


@dataclass(eq=False, repr=False)
class Place:
    """One component's place: in the tree under its owner's role, in the model at its path."""

    owner: HookOwner
    role: str
    component: ComponentBridge
    prepare: Prepare
    changed: Callable[["Place"], None]
    preparation: Preparation = field(default_factory=Preparation)
    hidden: dict[str, nn.Module | None] = field(default_factory=dict)
    """The owner's own hook points that look into the component, while something else is in its place."""

    @property
    def taken(self) -> bool:
        """Whether another module is in the component's place."""
        return self.module is not self.component

    @property
    def module(self) -> nn.Module:
        """What is in the place now."""
        found = self.owner._modules[self.role]
        assert found is not None
        return found

    def put(self, module: Any) -> None:
        """Have the model run a module in the component's place, or the component's own again."""
        if module is self.module:
            return
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{self.component.name}: got {type(module).__name__}, expected a torch module, which the model then "
                "runs in this component's place"
            )
        if self.taken:
            self.undo()
        if module is not self.component:
            self._exchange(module)

    def undo(self) -> None:
        """Put the component's own module back."""
        before = self.component.displaced
        assert before is not None
        PUT.discard(self.module)
        nn.Module.__setattr__(self.owner, self.role, self.component)
        self.preparation.undo()
        self.component.take_back()
        self._in_model(before)
        for name, point in self.hidden.items():
            self.owner._modules[name] = point
        self.hidden = {}
        self.changed(self)

    def _exchange(self, module: nn.Module) -> None:
        # The owner's hooks that show what is inside the component, rather than what enters or leaves it.
        ports = {hook.name: hook.port for hook in self.owner.rows.values()}
        within, here = f"{self.role}.", self.role
        looking_in = [
            n for n, p in ports.items() if p.at.startswith(within) or (p.at == here and not isinstance(p, Port))
        ]
        self._refuse_hooks([(self.owner, name) for name in looking_in] + [*self._inside()])
        before = self.component.original_component
        if before in PUT:
            raise ValueError(f"{self.component.name}: another bridge has put a {type(before).__name__} in its place")
        self._in_model(module)
        with ExitStack() as if_it_fails:
            if_it_fails.callback(self._in_model, before)
            self.preparation = self.prepare(self.component, module)
            self.component.stand_for(before)
            if_it_fails.pop_all()
        PUT.add(module)
        nn.Module.__setattr__(self.owner, self.role, module)
        self.hidden = {name: self.owner._modules.pop(name) for name in looking_in}
        self.changed(self)

    def _in_model(self, module: nn.Module) -> None:
        host, _, name = self.component.path.rpartition(".")
        setattr(self.component.model.get_submodule(host), name, module)

    def ends(self) -> dict[str, HookPoint]:
        """The component's hook points at its input and its output, by name; they see any module in its place."""
        there = {
            name: self.component._modules.get(name) for name, row in self.component.rows.items() if _is_end(row.port)
        }
        return {f"{self.component.name}.{name}": p for name, p in there.items() if isinstance(p, HookPoint)}

    def _inside(self) -> Iterable[tuple[HookOwner, str]]:
        """The hooks inside the component, which are gone while another module is there."""
        for owner in self.component.modules():
            if isinstance(owner, ComponentBridge):
                for name, row in owner.rows.items():
                    if owner is not self.component or not _is_end(row.port):
                        yield owner, name

    def gone(self) -> set[str]:
        """The names of hooks that are not there while another module is."""
        names = {owner.full_names[name] for owner, name in self._inside()}
        return names | {self.owner.full_names[name] for name in self.hidden}

    def _refuse_hooks(self, slots: Iterable[tuple[HookOwner, str]]) -> None:
        points = {owner.full_names[name]: owner._modules[name] for owner, name in slots}
        busy = [name for name, point in points.items() if not isinstance(point, HookPoint) or point.has_hooks()]
        inner = [part for part in self.component.modules() if isinstance(part, ComponentBridge)]
        busy += [place.component.name for part in inner for place in part.exchanges.values() if place.taken]
        if busy:
            raise ValueError(
                f"{self.component.name}: another module in its place would leave these out: {', '.join(busy)}; take "
                "the hooks off first (bridge.reset_hooks(including_permanent=True)), and put back what is in places "
                "inside"
            )

    def __str__(self) -> str:
        return f"in place of component {self.component.name!r} sits a {type(self.module).__name__}"


class Exchanged:
    """The components of a bridge that have another module in their place, by name."""

    def __init__(self, owners: Iterable[HookOwner], prepare: Prepare, changed: Callable[[], None]) -> None:
        self.changed = changed
        self.places: dict[str, Place] = {}
        for owner in owners:
            for role, child in owner.named_children():
                if isinstance(child, ComponentBridge):
                    owner.exchanges[role] = Place(owner, role, child, prepare, self.tell)

    def tell(self, place: Place) -> None:
        """Another module is in a component's place, or the component is back."""
        self.places.pop(place.component.name, None)
        if place.taken:
            self.places[place.component.name] = place
        self.changed()

    def undo(self) -> None:
        """Put every component back, the last one first."""
        for place in reversed([*self.places.values()]):
            place.undo()

    def listed(self, points: dict[str, HookPoint]) -> dict[str, HookPoint]:
        """The hook points of a tree: without those of displaced components, with those at the ends of their places."""
        silent = {module for place in self.places.values() for module in place.component.modules()}
        found = {name: point for name, point in points.items() if point not in silent}
        for place in self.places.values():
            for name, point in place.ends().items():
                found.setdefault(name, point).name = name
        return found

    def why_gone(self, name: str) -> str | None:
        """Why a hook is not there while its component is not, in words."""
        for place in self.places.values():
            if name in place.gone():
                return (
                    f"{place}, and what is inside it are its own hook points, after bridge.setup(); put the "
                    "component back to have this one"
                )
        return None

    def refuse(self, name: str | None = None) -> None:
        """Raise `ValueError` if another module is in the place of this component, or of any."""
        for place in self.places.values():
            if name in (None, place.component.name):
                raise ValueError(f"{place}, which has none of the component's numbers; put the component back for this")


def _is_end(port: Any) -> bool:
    return type(port) is Port and not port.at and port.view is whole and port.arg is None


class Layers(nn.ModuleList):
    """A model's blocks. The list is the model's; what is in it is changed in the model, or inside a block."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        for number, module in enumerate(modules):
            self.add_module(str(number), module)

    def __iter__(self) -> Iterator[BlockBridge]:
        return super().__iter__()  # type: ignore[return-value]  # what it is made of

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "bridge.blocks lists the layers of the model and cannot be changed: put modules in the places of a block's "
            "components (bridge.blocks[0].mlp = module), or exchange the layer in bridge.original_model and make a new "
            "TransformerBridge"
        )

    append = extend = insert = pop = __setitem__ = __delitem__ = __iadd__ = _refuse

    def __setattr__(self, name: str, value: Any) -> None:
        if name.isdigit() and not is_replica(self):
            self._refuse()
        super().__setattr__(name, value)


def make_components(bridge: HookOwner, adapter: ArchitectureAdapter, model: nn.Module, place: str, inner: Any) -> str:
    """Put every component into the tree; returns the path of the base model, which may be inside adapters."""
    base = ".".join(filter(None, (place, "" if inner.base_model is inner else inner.base_model_prefix)))

    def path(part: Part) -> str:
        return f"{base}.{part.at}" if base else part.at

    outside = adapter.outside()
    for role in adapter.component_mapping:
        if role == "blocks":
            parts = [adapter.block(i) for i in range(adapter.cfg.n_layers)]
            blocks = [part.kind(part, model, f"{path(part)}.{i}", f"blocks.{i}") for i, part in enumerate(parts)]
            for block in blocks:
                block.__dict__["run"] = bridge  # not a submodule of its own part
            bridge.add_module(role, Layers(blocks))
        else:
            bridge.add_module(role, outside[role].kind(outside[role], model, path(outside[role]), role))
    head = head_of(inner)
    if head is not None:
        role, part = HEADS[head]
        bridge.add_module(role, part.kind(part, model, f"{place}.{part.at}" if place else part.at, role))
    for component in components_in(bridge):
        component.cfg = adapter.cfg
    return base


def components_in(bridge: HookOwner) -> Iterator[ComponentBridge]:
    """Every component that is in its place in the tree."""
    for name, child in bridge.named_children():
        if name != MODEL:
            parts = (module for module in child.modules() if isinstance(module, ComponentBridge))
            yield from (part for part in parts if part.displaced is None)


def absent_names(bridge: HookOwner, adapter: ArchitectureAdapter, inner: Any) -> dict[str, str]:
    """Hooks of other models, and why this one has none."""
    absent, head = dict(adapter.absent), head_of(inner)
    present = f"that of {head!r}" if head else "the final stream, ln_final.hook_out"
    for role, missing in (("unembed", "unembedding"), ("head", "classification or answering head")):
        if role not in bridge._modules:
            absent[f"{role}.hook_out"] = NO_HEAD.format(missing=missing, present=present)
    if "unembed" not in bridge._modules:
        absent["hook_logits"] = absent["unembed.hook_out"]
    elif not adapter.changes_logits():
        absent["hook_logits"] = "the logits are what the head returns, at unembed.hook_out"
    for component in components_in(bridge):
        absent |= {f"{component.name}.{name}": why for name, why in component.missing.items()}
    return _parts_of_other_blocks(bridge) | absent


def _parts_of_other_blocks(bridge: Any) -> dict[str, str]:
    """The hooks of parts that only some blocks have, for the blocks without, and why."""
    blocks = [[part for part in block.modules() if isinstance(part, ComponentBridge)] for block in bridge.blocks]
    places = [{part.name.split(".", 2)[2]: part.declared for part in parts[1:]} for parts in blocks]
    every = {place: hooks for block in places for place, hooks in block.items()}
    return {
        f"blocks.{layer}.{place}.{hook.name}": f"this block has no {READERS.get(place, place).removeprefix('the ')}"
        for layer, block in enumerate(places)
        for place, hooks in every.items()
        if place not in block
        for hook in hooks
    }
