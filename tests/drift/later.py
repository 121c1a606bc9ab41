"""A model whose modules behave as those of a later release of transformers might, and compute what they do today."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

Change = Callable[[Any], None]
"""What is done to a model, or to something of it."""


def instances(model: nn.Module, kind: str) -> list[nn.Module]:
    found = [module for module in model.modules() if type(module).__name__ == kind]
    assert found, f"no {kind} in {type(model).__name__}"
    return found


def renamed(kind: str, old: str, new: str) -> Change:
    """The forward of a class calls an argument otherwise, and so do its callers."""

    def change(model: nn.Module) -> None:
        original: Any = type(instances(model, kind)[0])
        signature = inspect.signature(original.forward)
        assert old in signature.parameters, f"{kind}.forward has no {old}"
        parameters = [p.replace(name=new) if p.name == old else p for p in signature.parameters.values()]

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            assert old not in kwargs, f"{old} is not an argument any more"
            return original.forward(self, *args, **_exchanged(kwargs, new, old))

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return original.__call__(self, *args, **_exchanged(kwargs, old, new))

        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        later = type(kind, (original,), {"forward": forward, "__call__": call, "__module__": original.__module__})
        for module in instances(model, kind):
            module.__class__ = later

    return change


def _exchanged(kwargs: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in kwargs.items()}


def returning(kind: str, wrap: Callable[[Any], Any], unwrap: Callable[[Any], Any]) -> Change:
    """The forward of a class returns its result in another form, and its callers take it out of that."""

    def change(model: nn.Module) -> None:
        original: Any = type(instances(model, kind)[0])

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return wrap(original.forward(self, *args, **kwargs))

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return unwrap(original.__call__(self, *args, **kwargs))

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        later = type(kind, (original,), {"forward": forward, "__call__": call, "__module__": original.__module__})
        for module in instances(model, kind):
            module.__class__ = later

    return change


def without(kind: str, name: str) -> Change:
    """The modules of a class call an attribute otherwise."""

    def change(model: nn.Module) -> None:
        for module in instances(model, kind):
            value = getattr(module, name)
            delattr(module, name)
            setattr(module, f"other_{name}", value)

    return change


def without_key(name: str) -> Change:
    """The config has a key no more: not in itself, and not as a default of its class."""

    def missing(config: Any) -> Any:
        raise AttributeError(f"{type(config).__name__!r} object has no attribute {name!r}")

    def change(model: Any) -> None:
        config = model.config
        vars(config).pop(name, None)
        config.__class__ = type(type(config).__name__, (type(config),), {name: property(missing)})

    return change
