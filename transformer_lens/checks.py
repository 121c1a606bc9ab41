"""What a caller means by a number, a word, a tensor: checked here, in one form of words.

Every function takes the name under which the value was passed, and returns the value as the code wants it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence, Sized
from difflib import get_close_matches
from importlib import import_module
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def in_words(value: object) -> str:
    """What an error says it got: a tensor by its dtype and shape, anything else as it is written, if that is short.

    >>> in_words(torch.zeros(2, 3)), in_words("left"), in_words(list(range(100)))
    ('a torch.float32 tensor of shape [2, 3]', "'left'", 'a list')
    """
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    written = repr(value)
    short = len(written) <= 60 and "\n" not in written and " at 0x" not in written
    return written if short else f"a {type(value).__name__}"


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """The names most like this one, itself never among them, as an error lists them.

    >>> nearest("verbos", ["verbose", "top_k", "verbos"], most=1)
    "'verbose'"
    """
    near = get_close_matches(name, sorted(set(known) - {name}), n=most, cutoff=0.0)
    return ", ".join(map(repr, near))


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `TypeError` for a keyword that nothing takes, with the nearest that something does.

    >>> refuse_unknown("boot_transformers", ["dtype"], ["device", "dtype"])
    """
    names = set(known)
    for name in given:
        if name not in names:
            raise TypeError(f"{where}: got an unknown keyword {name!r}; the nearest are {nearest(name, names)}")


def is_whole(value: object) -> bool:
    """Whether a value is one whole number: Python's, NumPy's or a tensor's, and no truth value."""
    if isinstance(value, Tensor):
        return (
            value.ndim == 0 and not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        )
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "iu"
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(what: str, value: Any, least: int | None = None, most: int | None = None, where: str = "") -> int:
    """A whole number within bounds, as a Python one.

    >>> whole("layer", torch.tensor(2), 0, 3)
    2

    Raises `TypeError` for what is none and `ValueError` for one beyond the bounds.
    """
    bounds = "a whole number" if least is None else f"{least} to {most}" if most is not None else f"{least} or more"
    if not is_whole(value):
        raise TypeError(f"{what}: got {in_words(value)}, expected {bounds}{where}")
    number = operator.index(value)
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{what}: got {number}, expected {bounds}{where}")
    return number


def from_end(what: str, value: Any, size: int, where: str = "", beyond: bool = False) -> int:
    """One of `size` places, counted from the end where it is negative, as a number from 0.

    >>> from_end("layer", -1, 4), from_end("layer", 4, 4, beyond=True)
    (3, 4)

    With `beyond`, `size` itself may be meant: what comes after the last.
    """
    number = whole(what, value, -size, size if beyond else size - 1, where)
    return number + size if number < 0 else number


def is_one_of(value: object, options: Iterable[Any]) -> bool:
    """Whether a value is one of a few, whatever it is: a list or an array is none of them, and no error.

    >>> is_one_of("first", ("first", "last")), is_one_of(["first"], ("first", "last"))
    (True, False)
    """
    return any(type(value) is type(option) and value == option for option in options)


def one_of(what: str, value: Any, options: Sequence[Any]) -> None:
    """Raise `ValueError` unless a value is one of a few.

    >>> one_of("mode", "first", ("first", "last"))
    """
    if not is_one_of(value, options):
        listed = ", ".join(map(repr, options[:-1])) + f" or {options[-1]!r}"
        raise ValueError(f"{what}: got {in_words(value)}, expected {listed}")


def a_number(what: str, value: Any, least: float = -math.inf, most: float = math.inf, above: bool = False) -> float:
    """A finite number within bounds (with `above`, larger than the lower one), as a Python one.

    >>> a_number("scale", torch.tensor(0.5), least=0)
    0.5

    Raises `TypeError` for what is no number and `ValueError` for one beyond the bounds.
    """
    one = value.item() if isinstance(value, (Tensor, np.generic)) and value.ndim == 0 else value
    end = f" to {most:g}" if most < math.inf else "" if above else " on"
    bounds = "" if least == -math.inf else f" {'above' if above else 'from'} {least:g}{end}"
    if isinstance(one, bool) or not isinstance(one, Real):
        raise TypeError(f"{what}: got {in_words(value)}, expected a finite number{bounds}")
    number = float(one)
    if not math.isfinite(number) or not least <= number <= most or (above and number == least):
        raise ValueError(f"{what}: got {number:g}, expected a finite number{bounds}")
    return number


def a_path(what: str, value: Any) -> Path:
    """A path. Raises `TypeError` for what is none, and `ValueError` for names that nothing on a disk has."""
    if not isinstance(value, (str, PathLike)):
        raise TypeError(f"{what}: got {in_words(value)}, expected a path")
    if value == "" or "\0" in str(value):  # "" would be the current directory
        raise ValueError(f"{what}: got {in_words(str(value))}, expected the name of a file or directory")
    return Path(value)


def a_text(what: str, value: Any) -> None:
    """Raise `TypeError` for what is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{what}: got {in_words(value)}, expected a str")


def is_several(value: object) -> bool:
    """Whether a value can be gone through, and is no text: a list, a tuple, a tensor with an axis..."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def a_list(what: str, value: Any) -> None:
    """Raise `TypeError` for what is not several: text, and what has no length."""
    if not is_several(value) or not isinstance(value, Sized):
        raise TypeError(f"{what}: got {in_words(value)}, expected a list")


def listed(what: str, value: Any) -> list[Any]:
    """What is in a list, an array or a generator, as a list. Raises `TypeError` for what is not several."""
    if not is_several(value):
        raise TypeError(f"{what}: got {in_words(value)}, expected a list")
    return list(value)


def a_tensor(what: str, value: Any) -> None:
    """Raise `TypeError` for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what}: got {in_words(value)}, expected a tensor")


def function(what: str, value: Any, form: str) -> Callable[..., Any]:
    """Raise `TypeError` unless a value can be called; `form` shows how it will be."""
    if not callable(value):
        raise TypeError(f"{what}: got {in_words(value)}, expected a function {form}")
    return value  # type: ignore[no-any-return]


def as_numbers(what: str, value: Any) -> Tensor:
    """A tensor of real numbers, made of a list or an array where it is none. Raises `TypeError` for what holds none.

    >>> as_numbers("values", [1.0, 2.0])
    tensor([1., 2.], dtype=torch.float64)
    """
    if not isinstance(value, (Tensor, np.ndarray, list, tuple)):
        raise TypeError(f"{what}: got {in_words(value)}, expected a tensor, an array or a list of numbers")
    try:
        made = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what}: got {in_words(value)}, expected a tensor, an array or a list of numbers") from error
    if made.is_complex():
        raise TypeError(f"{what}: got {in_words(value)}, expected real numbers")
    return made


def whole_numbers(
    what: str, value: Any, least: int | None = None, most: int | None = None, where: str = ""
) -> list[int]:
    """One whole number or several, each within bounds, as a list.

    >>> whole_numbers("layer", np.arange(2), 0, 3), whole_numbers("layer", -1)
    ([0, 1], [-1])
    """
    if is_whole(value):
        return [whole(what, value, least, most, where)]
    if not is_several(value) or isinstance(value, dict) or getattr(value, "ndim", 1) != 1:
        expected = "whole numbers" if least is None else f"{least} to {most}"
        raise TypeError(f"{what}: got {in_words(value)}, expected {expected}{where}")
    return [whole(what, one, least, most, where) for one in value]


def needed(module: str, why: str) -> Any:
    """A module of an optional library. Raises `ImportError`, saying why it is needed, where it is not installed.

    >>> needed("json", "settings need json").loads("1")
    1
    """
    library = module.partition(".")[0]
    try:
        import_module(library)
        return import_module(module)
    except ImportError as error:
        raise ImportError(why, name=library) from error


def device_of(what: str, value: Any) -> torch.device:
    """A device that is there.

    >>> device_of("device", "cpu")
    device(type='cpu')

    Raises `ValueError` for one that is not, and for what names none.
    """
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{what}: got {in_words(value)}, expected a device that is here, such as 'cpu'") from error
