"""Whether a state fits a model, said with names, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

SHOWN = 5
"""How many names of each kind an error lists."""

Misfits = Mapping[str, tuple[Any, Any]]
"""Key -> what it has, and what the model expects."""


class StateError(ValueError, RuntimeError):
    """A state that does not fit. torch raises `RuntimeError` for it, the rest of this package `ValueError`."""


def describe(
    title: str, missing: Sequence[str], unexpected: Sequence[str], shapes: Misfits, known: Sequence[str]
) -> str:
    """The text of a `StateError`: every kind of misfit with the nearest names."""
    lines = [
        _names("missing", missing, "nearest given", unexpected),
        _names("unexpected", unexpected, "nearest in the model", known),
        _listed("shape", [f"{key!r} is {_shape(got)}, expected {_shape(want)}" for key, (got, want) in shapes.items()]),
    ]
    return "\n".join([title, *(line for line in lines if line)])


def _names(kind: str, names: Sequence[str], where: str, others: Sequence[str]) -> str:
    told = []
    for name in names[:SHOWN]:
        near = get_close_matches(name, others, n=1, cutoff=0.5)
        told.append(f"{name!r}" + (f" ({where}: {near[0]!r})" if near else ""))
    return _listed(kind, [*told, *names[SHOWN:]])


def _listed(kind: str, told: Sequence[str]) -> str:
    if not told:
        return ""
    more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return f"  {kind}: {', '.join(told[:SHOWN])}{more}"


def _shape(size: Any) -> str:
    return str(list(size))


def tied_names(model: nn.Module) -> list[list[str]]:
    """The groups of keys that are one and the same tensor.

    >>> from transformer_lens.model_bridge.state_check import tied_names
    >>> tied_names(model)
    [['transformer.word_embeddings.weight', 'lm_head.weight']]
    """
    groups: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def fitted_state(model: nn.Module, state: Mapping[str, Any], strict: bool, assign: bool) -> dict[str, Any]:
    """The state as `load_state_dict` takes it: a tied tensor may be given once.

    Raises `StateError` for what does not fit, so that a load either does all or changes nothing.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"load_state_dict: got {type(state).__name__}, expected a mapping of names to tensors")
    own = model.state_dict()
    full = dict(state)
    for names in tied_names(model):
        given = [name for name in names if name in state]
        _refuse_contradiction(given, state)
        if given:
            full |= dict.fromkeys(names, state[given[0]])
    missing = [name for name in own if name not in full] if strict else []
    unexpected = [name for name in full if name not in own] if strict else []
    shapes: dict[str, tuple[Any, Any]] = {}
    for name in own.keys() & full.keys():
        value, expected = full[name], own[name]
        if not isinstance(expected, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"load_state_dict: {name!r} is {type(value).__name__}, expected a tensor; nothing was loaded"
            )
        if value.shape != expected.shape:
            shapes[name] = (value.shape, expected.shape)
        elif value.is_meta or (expected.is_meta and not assign):
            raise StateError(
                f"load_state_dict: {name!r} of the {'state' if value.is_meta else 'model'} is on the meta device, it "
                "has no numbers (it is offloaded, or was never loaded), and nothing was loaded; load before "
                "offloading, or give tensors with numbers"
            )
    if missing or unexpected or shapes:
        title = f"load_state_dict: the state does not fit {type(model).__name__}, and nothing was loaded"
        raise StateError(describe(title, missing, unexpected, shapes, list(own)))
    return full


def _refuse_contradiction(names: Sequence[str], state: Mapping[str, Any]) -> None:
    """A tensor with two names cannot take two values."""
    values = [state[name] for name in names if isinstance(state[name], Tensor) and not state[name].is_meta]
    for value in values[1:]:
        if value.shape == values[0].shape and not bool((value.to(values[0].device) == values[0]).all()):
            raise StateError(
                f"load_state_dict: {' and '.join(map(repr, names))} are one tied tensor in this model, and the state "
                "gives them different values; nothing was loaded"
            )
