"""What a user can call: everything on docs/api.md up to its part for those who add architectures, found by looking."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

API = Path(__file__).parent.parent.parent / "docs" / "api.md"
MADE_BY_USERS = {"Heatmap", "Heatmaps", "Patchscope", "Slice", "TokenText", "Waterfall"}
"""Dataclasses that users make themselves; the others are results, and made by the package."""
DUNDER = ("__call__", "__getitem__", "__init__", "__matmul__", "__mul__")


def listed() -> list[str]:
    """The objects that the page shows, before its last parts: adapters, components, remote blocks."""
    return re.findall(r"^::: (\S+)$", API.read_text().split("\n## Describing an architecture")[0], re.M)


def found(name: str) -> Any:
    """The object of a full name."""
    module, _, last = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), last)


def functions() -> dict[str, Callable[..., Any]]:
    """Every public function and method that takes something, by `module.name` without the package."""
    every: dict[str, Callable[..., Any]] = {}
    for name in listed():
        owner = found(name)
        if inspect.ismodule(owner):
            names = getattr(owner, "__all__", None) or [n for n, o in vars(owner).items() if _at_home(o, owner)]
            for one in names:
                every |= dict(_of(getattr(owner, one), one))
        else:
            every |= dict(_of(owner, name.rpartition(".")[2]))
    inherited = {id(function): name for name, function in reversed(every.items())}
    return {name: function for name, function in sorted(every.items()) if inherited[id(function)] == name}


def _at_home(value: Any, module: Any) -> bool:
    name = getattr(value, "__name__", "_")
    return not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)


def _of(value: Any, name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    if inspect.isclass(value):
        yield from _of_class(value)
    elif inspect.isfunction(value):
        if parameters(value):
            yield f"{_module(value)}.{value.__name__}", value
    elif callable(value) and _module(value) != "typing":  # an object that is called, such as a sweep
        yield f"{_module(value)}.{name}", value


def _of_class(kind: type[Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    result = dataclasses.is_dataclass(kind) and kind.__name__ not in MADE_BY_USERS
    for name in dir(kind):
        if (name.startswith("_") and name not in DUNDER) or (name == "__init__" and result):
            continue
        static = inspect.getattr_static(kind, name)
        method = getattr(kind, name, None)
        ours = str(getattr(method, "__module__", "")).startswith("transformer_lens")
        if isinstance(static, (property, cached_property)) or not ours or not inspect.isroutine(method):
            continue
        if parameters(method):
            yield f"{kind.__name__}.{name}", method


def _module(value: Any) -> str:
    return str(getattr(value, "__module__", type(value).__module__)).removeprefix("transformer_lens.")


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """What a caller passes."""
    return [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
