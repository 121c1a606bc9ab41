"""Modules put in components' places: `bridge.blocks[3].mlp = module` has the model run that module.

The old component still stands for its own module, so that the new one may call it. Putting it back, or `detach()`,
undoes the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from transformer_lens.hook_point import HookPoint
from transformer_lens.model_bridge.architecture_adapter import Preparation
from transformer_lens.model_bridge.generalized_components import BlockBridge, ComponentBridge, HookOwner
from transformer_lens.model_bridge.generalized_components.base import is_replica
from transformer_lens.model_bridge.ports import Port
from transformer_lens.model_bridge.views import whole


class Place:
    """One component's place: in the tree under its owner's role, in the model at its path."""

    def __init__(
        self,
        owner: HookOwner,
        role: str,
        component: ComponentBridge,
        prepare: Callable[[ComponentBridge, nn.Module], Preparation],
        changed: Callable[[Place], None],
    ) -> None:
        self.owner, self.role, self.component = owner, role, component
        self.prepare, self.changed = prepare, changed
        self.preparation = Preparation()
        self.hidden: dict[str, nn.Module | None] = {}
        """The owner's hook points inside the component, while something else is in its place."""

    @property
    def taken(self) -> bool:
        """Whether another module is in the component's place."""
        return self.module is not self.component

    @property
    def module(self) -> nn.Module:
        found = self.owner._modules[self.role]
        assert found is not None
        return found

    def put(self, module: Any) -> None:
        """Have the model run a module in the component's place, or its own again."""
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
        nn.Module.__setattr__(self.owner, self.role, self.component)
        self.preparation.undo()
        self.component.take_back()
        self._in_model(before)
        for name, point in self.hidden.items():
            self.owner._modules[name] = point
        self.hidden = {}
        self.changed(self)

    def _exchange(self, module: nn.Module) -> None:
        looking_in = [hook.name for hook in self.owner.rows.values() if self._looks_in(hook.port)]
        self._refuse_hooks([(self.owner, name) for name in looking_in] + [*self._inside()])
        before = self.component.original_component
        self._in_model(module)
        self.preparation = self.prepare(self.component, module)
        self.component.stand_for(before)
        nn.Module.__setattr__(self.owner, self.role, module)
        self.hidden = {name: self.owner._modules.pop(name) for name in looking_in}
        self.changed(self)

    def _in_model(self, module: nn.Module) -> None:
        host, _, name = self.component.path.rpartition(".")
        setattr(self.component.model.get_submodule(host), name, module)

    def _looks_in(self, port: Any) -> bool:
        """Whether a hook of the owner shows a value inside the component."""
        inside = port.at.startswith(f"{self.role}.")
        return inside or (port.at == self.role and not isinstance(port, Port))

    def ends(self) -> dict[str, HookPoint]:
        """The component's hook points at its input and output, by name; they see any module in its place."""
        found = {}
        for name, row in self.component.rows.items():
            point = self.component._modules.get(name)
            if isinstance(point, HookPoint) and _is_end(row.port):
                found[f"{self.component.name}.{name}"] = point
        return found

    def _inside(self) -> Iterable[tuple[HookOwner, str]]:
        """The hooks inside the component, absent while another module is there."""
        for owner in self.component.modules():
            if isinstance(owner, ComponentBridge):
                for name, row in owner.rows.items():
                    if owner is not self.component or not _is_end(row.port):
                        yield owner, name

    def gone(self) -> set[str]:
        """The names of those absent hooks."""
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

    def describe(self) -> str:
        """What is in the place, in words."""
        return f"in place of component {self.component.name!r} sits a {type(self.module).__name__}"


class Exchanged:
    """The replaced components of a bridge, by name."""

    def __init__(
        self,
        owners: Iterable[HookOwner],
        prepare: Callable[[ComponentBridge, nn.Module], Preparation],
        changed: Callable[[], None],
    ) -> None:
        self.changed = changed
        self.places: dict[str, Place] = {}
        for owner in owners:
            for role, child in owner.named_children():
                if isinstance(child, ComponentBridge):
                    owner.exchanges[role] = Place(owner, role, child, prepare, self.tell)

    def tell(self, place: Place) -> None:
        """Note that a component was replaced, or put back."""
        self.places.pop(place.component.name, None)
        if place.taken:
            self.places[place.component.name] = place
        self.changed()

    def undo(self) -> None:
        """Put every component back, the last one first."""
        for place in reversed([*self.places.values()]):
            place.undo()

    def listed(self, points: dict[str, HookPoint]) -> dict[str, HookPoint]:
        """The hook points of a tree, except those of replaced components, with those at the ends of their places."""
        silent = {module for place in self.places.values() for module in place.component.modules()}
        found = {name: point for name, point in points.items() if point not in silent}
        for place in self.places.values():
            for name, point in place.ends().items():
                found.setdefault(name, point).name = name
        return found

    def why_gone(self, name: str) -> str | None:
        """Why a hook is absent while its component is replaced, in words."""
        for place in self.places.values():
            if name in place.gone():
                return (
                    f"{place.describe()}, and what is inside it are its own hook points, after bridge.setup(); put the "
                    "component back to have this one"
                )
        return None

    def refuse(self, name: str | None = None) -> None:
        """Raise `ValueError` if this component, or any, is replaced."""
        for place in self.places.values():
            if name in (None, place.component.name):
                raise ValueError(
                    f"{place.describe()}, which has none of the component's numbers; put the component back for this"
                )


def _is_end(port: Any) -> bool:
    return type(port) is Port and not port.at and port.view is whole and port.arg is None


class Layers(nn.ModuleList):
    """A model's blocks, a list that cannot be changed here."""

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
