"""`Hook` rows, `Part` placements and `ComponentBridge`, the node that they describe.

A component class declares its hooks once; names, axes, meanings, errors, docs and tests come from these rows. A `Part`
says where in the Hugging Face model the component is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import getattr_static, isdatadescriptor
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from transformer_lens.hooks.point import HookPoint
from transformer_lens.model_bridge.access.inside_call import InsideCall
from transformer_lens.model_bridge.access.ports import Inside, Port
from transformer_lens.model_bridge.access.sharding import Interior, Sharding
from transformer_lens.model_bridge.access.views import times
from transformer_lens.model_bridge.access.weights import computing_module
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.branches import Stages
from transformer_lens.model_bridge.upstream import Word, arguments_of, attribute

MADE = (
    "it describes the model and was made with the bridge; for another model make a new TransformerBridge(model), and "
    "put modules in the places of a block's components (bridge.blocks[0].mlp = module)"
)
FIXED = {
    **dict.fromkeys(("adapter", "root", "attachment", "arguments", "aliases", "spellings", "absent_names"), MADE),
    **dict.fromkeys(("exchanged", "exchanges", "full_names", "rows", "watchers", "hook_dict", "mod_dict"), MADE),
    **dict.fromkeys(("name", "parent", "path", "model", "sizes", "declared", "missing", "stages", "run"), MADE),
    **dict.fromkeys(("hooks", "absent", "reads", "writes", "takes", "attributes", "root_hooks"), MADE),
    **dict.fromkeys(("scales", "number", "sinks", "closes", "chooses", "late_keys"), MADE),
    "original_model": "the hooks of a bridge are on the model it was made for; for another model make a new "
    "TransformerBridge(model), for other weights use load_state_dict",
    "blocks": "they are the layers of the model; put modules in the places of a block's components "
    "(bridge.blocks[0].mlp = module)",
    "cfg": "it describes the model and follows it; its own fields can be set (bridge.cfg.default_prepend_bos = True)",
}
"""Attributes of a bridge or a component that cannot be set, and what to do instead."""
CLOSED = "it is computed inside a module, and this architecture does not say where it passes there"


@dataclass(frozen=True)
class Hook:
    """One row of the hook table: `axes` names the dimensions, `aliases` are relative to the component."""

    name: str
    axes: str
    meaning: str
    port: Port | Inside
    aliases: tuple[str, ...] = ()
    read_only: str = ""
    integer: bool = False
    on_request: bool = False


@dataclass(frozen=True)
class StreamMatrix:
    """A weight that reads or writes the residual stream: its part, and the names of its parameters.

    A reading weight has d_model as its last axis, a writing one second to last or, with `rows` (an embedding), last.
    `bias=""`: the module has no place for one.
    """

    role: str = ""
    weight: str = "weight"
    bias: str = "bias"
    rows: bool = False


@dataclass(frozen=True)
class Part:
    """Where a component is: its class, its path below its parent's module, and its own parts by role."""

    kind: type["ComponentBridge"]
    at: str = ""
    parts: Mapping[str, "Part"] = field(default_factory=dict)
    stages: Stages = ()
    """The branches of a block."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Lengths of axes of its hooks, such as `d_mlp`, that differ from those of the model's config."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Factors by which the module multiplies the outputs of parts, by role."""

    def __post_init__(self) -> None:
        unknown = {role for stage in self.stages for branch in stage for role in branch.roles} - set(self.parts)
        if unknown:
            raise ValueError(
                f"Part at {self.at!r}: its branches name {', '.join(sorted(unknown))}, expected roles of its parts: "
                f"{', '.join(self.parts)}"
            )


def _multiplied(hook: Hook, scales: Mapping[str, float]) -> Hook:
    """A hook that shows a part's output times the module's factor."""
    port = hook.port
    if not isinstance(port, Port) or port.side == "in" or port.at not in scales:
        return hook
    return replace(hook, port=replace(port, view=partial(times, scales[port.at], port.view)), aliases=())


class Watcher(Protocol):
    """What is told when a hook point changes."""

    def refresh(self) -> None:
        """A hook was added or removed."""

    def replaced(self) -> None:
        """Another module replaced the hook point."""


class Exchange(Protocol):
    """Replaces a component's module in the model."""

    component: "ComponentBridge"

    @property
    def taken(self) -> bool: ...

    def put(self, module: Any) -> None:
        """Have the model run another module in the component's place, or its own again."""


def is_replica(module: nn.Module) -> bool:
    """Whether `DataParallel` made this module: its parts are assigned, and its parameters are plain tensors."""
    return "_is_replica" in module.__dict__


class HookOwner(nn.Module):
    """A module with declared hooks; assigning a module to a hook's or a component's name replaces that.

    The forward then calls the new module instead; assigning a `HookPoint()`, or the component, undoes it.
    """

    full_names: dict[str, str]
    rows: dict[str, Hook]
    watchers: dict[str, Watcher]
    exchanges: dict[str, Exchange]

    def __init__(self) -> None:
        super().__init__()
        self.full_names = {}
        self.rows = {}
        self.watchers = {}
        self.exchanges = {}

    def declare(self, prefix: str, hooks: tuple[Hook, ...]) -> None:
        for hook in hooks:
            self.full_names[hook.name] = prefix + hook.name
            self.rows[hook.name] = hook
            self._modules[hook.name] = HookPoint(prefix + hook.name, hook.axes, hook.read_only, hook.integer)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and not is_replica(self):
            of_class = getattr(type(self), name, value)
            if self.__dict__.get(name, self.__dict__.get("_modules", {}).get(name, of_class)) is not value:
                raise AttributeError(f"{name}: {FIXED[name]}")
        place = self.__dict__.get("exchanges", {}).get(name)
        if place is not None:
            place.put(value)
            return
        full_name = self.__dict__.get("full_names", {}).get(name)
        if full_name is not None and not isinstance(value, nn.Module):
            raise TypeError(
                f"hook {full_name!r}: got {type(value).__name__}, expected a module to run in its place, or a "
                "HookPoint() to go back; functions are attached with add_hook"
            )
        if full_name is None:
            self._set(name, value)
            return
        super().__setattr__(name, value)
        watcher = self.watchers.get(name)
        if isinstance(value, HookPoint):
            row = self.rows[name]
            value.name, value.axes, value.read_only, value.integer = full_name, row.axes, row.read_only, row.integer
            value.on_change = watcher.refresh if watcher is not None else None
        if watcher is not None:
            watcher.replaced()

    def _set(self, name: str, value: Any) -> None:
        """Set an attribute that is no hook's; torch would hide a module or parameter behind a class attribute."""
        defined = getattr_static(type(self), name, None) if isinstance(value, (nn.Module, Tensor)) else None
        if defined is None:
            super().__setattr__(name, value)
        elif isdatadescriptor(defined):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(
                f"{name}: got {type(value).__name__}, which cannot stand for this method; places for modules "
                "are the components and hooks (bridge.hook_table() lists them)"
            )

    def _replicate_for_data_parallel(self) -> Any:
        """Assign a replica's parts without replacing anything."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__ |= {"exchanges": {}, "full_names": {}}
        return replica

    def __delattr__(self, name: str) -> None:
        if name in self.full_names or name in self.exchanges:
            raise AttributeError(
                f"{name} cannot be deleted: put a HookPoint() in a hook's place, or a module in a component's"
            )
        super().__delattr__(name)


class PartsElsewhere(nn.Module):
    """A module in the model that stands for one whose parts and weights are in another process."""


class ComponentBridge(HookOwner):
    """A component: its hook points and parts, beside the Hugging Face module that it stands for."""

    hooks: ClassVar[tuple[Hook, ...]] = ()
    absent: ClassVar[Mapping[str, str]] = {}
    """Hooks that other architectures have here, and why this component has none."""
    closes: ClassVar[Mapping[str, str]] = {}
    """Hooks of the block around it that this component does not serve, and why."""
    declared: tuple[Hook, ...]
    """The hooks of this component: those of its class, except those inside a part that is not opened."""
    missing: Mapping[str, str]
    """`absent`, and the hooks inside a part that is not opened."""
    parent: "ComponentBridge"
    """The component this one is a part of; not a submodule, to avoid a cycle."""
    reads: ClassVar[tuple[StreamMatrix, ...]] = ()
    """The weights that read the output of the norm in front of this component."""
    writes: ClassVar[tuple[StreamMatrix, ...]] = ()
    """The weights whose outputs are added to the residual stream as they are."""
    takes: ClassVar[tuple[Word, ...]] = ()
    """The arguments that the module's forward must have."""
    attributes: ClassVar[tuple[str, ...]] = ()
    cfg: BridgeConfig
    model: nn.Module
    """The Hugging Face model; not a submodule, since its parameters are not this component's."""

    def __init__(self, part: Part, model: nn.Module, path: str, name: str) -> None:
        super().__init__()
        self.name = name
        self.path = path
        self.__dict__["model"] = model
        for role, sub in part.parts.items():
            below = f"{path}.{sub.at}" if path and sub.at else path or sub.at
            child = sub.kind(sub, model, below, f"{name}.{role}")
            child.__dict__["parent"] = self
            self.add_module(role, child)
        self.sizes = part.sizes
        self.scales = {role: scale for role, scale in part.scales.items() if scale != 1.0}
        hooks, absent = self.table(part)
        hooks = tuple(_multiplied(hook, self.scales) for hook in hooks)
        self.declared = tuple(hook for hook in hooks if self._opens(hook))
        self.missing = {hook.name: CLOSED for hook in hooks if hook not in self.declared} | dict(absent)
        self.declare(f"{name}.", self.declared)

    def table(self, part: Part) -> tuple[tuple[Hook, ...], Mapping[str, str]]:
        """The hooks of this component, and the absent ones with their reasons."""
        return self.hooks, self.absent

    def _opens(self, hook: Hook) -> bool:
        if not isinstance(hook.port, Inside):
            return True
        return type(self.role(hook.port.at)).inside is not ComponentBridge.inside

    def size(self, name: str) -> int:
        """One of this component's own sizes, or that of the model's config."""
        return int(self.sizes[name] if name in self.sizes else getattr(self.cfg, name))

    @property
    def displaced(self) -> nn.Module | None:
        """The module this component stands for while another one replaces it in the model."""
        return self.__dict__.get("_displaced")

    def stand_for(self, module: nn.Module) -> None:
        """Hold a module that is no longer in the model, so that its weights stay readable here."""
        for part in self.modules():
            if isinstance(part, ComponentBridge):
                inside = part.path.removeprefix(self.path).lstrip(".")
                part.__dict__["_displaced"] = module.get_submodule(inside)
        self.add_module("displaced_module", module)

    def take_back(self) -> None:
        """Undo `stand_for`."""
        del self._modules["displaced_module"]
        for part in self.modules():
            if isinstance(part, ComponentBridge):
                del part.__dict__["_displaced"]

    @property
    def original_component(self) -> nn.Module:
        """The Hugging Face module this component stands for, as it is in the model now."""
        return self.in_place if self.displaced is None else self.displaced

    @property
    def in_place(self) -> nn.Module:
        """The module at this component's place in the model: its own, or its replacement."""
        found: nn.Module = self.model
        for part in self.path.split(".") if self.path else ():
            if isinstance(found, PartsElsewhere):
                raise ValueError(
                    f"{self.name}: its block runs in another process, where its modules and weights are; its "
                    "activations can be read and edited by name, its weights only in a model that is here"
                )
            found = found._modules.get(part)  # type: ignore[assignment]  # much faster than get_submodule
            if found is None:
                raise RuntimeError(
                    f"{self.name}: the model has no module at {self.path!r} any more; if a part of it was exchanged "
                    "for torch.compile(part), call part.compile() instead, and for other surgery make a new bridge"
                )
        return found

    @property
    def computing_module(self) -> nn.Module:
        """That module inside wrappers that only adapt its parameters: where the hooks inside are."""
        return computing_module(self.original_component)

    def check_module(self) -> None:
        """Raise `UpstreamError` unless the module has everything that this component relies on."""
        if self.takes or self.attributes:
            module = self.computing_module
            for word in self.takes:
                arguments_of(type(module)).name(word)
            for name in self.attributes:
                attribute(module, name)

    def interior(self, sharding: Sharding) -> Interior:
        """How processes share what is inside the module."""
        sharding.style(self.path)
        return Interior(sharding.cfg)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the Hugging Face module this component stands for; its hooks fire as in a run of the model.

        >>> stream = bridge.embed(bridge.to_tokens("Mary and John"))
        >>> bridge.blocks[0].ln1(stream).shape, bridge.unembed(bridge.ln_final(stream)).shape
        (torch.Size([1, 5, 128]), torch.Size([1, 5, 735]))

        It takes and returns what the module does, except that a block takes and returns the residual stream alone.
        Attention needs mask and positions too, and raises `ValueError` without them.
        """
        return self.original_component(*args, **kwargs)

    def inside(self, call: InsideCall) -> Any:
        """Compute the module's call while hooks inside it wait; `call.fire` shows them its values."""
        raise NotImplementedError(f"{type(self).__name__} declares hooks inside its module and does not open it")

    def role(self, role: str) -> "ComponentBridge":
        """This component (""), one of its parts, or what it is a part of ("parent")."""
        found: Any = self
        for name in role.split(".") if role else ():
            if name == "parent":
                found = found.parent
                continue
            found = found.exchanges[name].component if name in found.exchanges else found.get_submodule(name)
        assert isinstance(found, ComponentBridge)
        return found

    def module_of(self, role: str) -> nn.Module:
        """The module that runs in a role: a part's own or its replacement; this component's own for ""."""
        part = self.role(role)
        taken = role and "displaced_module" in part._modules
        return part.in_place if taken else part.original_component

    def extra_repr(self) -> str:
        return f"at {self.path!r}"
