"""Checks of numbers, words, tensors and paths, with errors in one form.

Each function takes the name under which the value was passed, and returns the value in the form the code needs.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from difflib import get_close_matches
from importlib import import_module
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

MOST_WHOLE = torch.iinfo(torch.long).max
"""The largest integer a tensor holds."""
LONGEST_NAME = 255
"""The most bytes in a file or directory name on common file systems."""
UNUSABLE: Mapping[str, Callable[[Tensor], bool]] = {
    "nested": lambda tensor: tensor.is_nested,
    "sparse": lambda tensor: tensor.layout != torch.strided,
    "quantised": lambda tensor: tensor.is_quantized,
    "meta": lambda tensor: tensor.is_meta,
}
"""Kinds of tensor that most torch operations reject, each with the word for it."""


def unusable(tensor: Tensor) -> str:
    """Why a tensor cannot be computed with, in a word ("sparse", "meta"); "" for a dense one with values."""
    return next((kind for kind, is_so in UNUSABLE.items() if is_so(tensor)), "")


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor on a device that holds values."""
    return isinstance(value, Tensor) and not unusable(value)


def in_words(value: object) -> str:
    """How an error describes a value: a tensor by dtype and shape, anything else by its `repr` if that is short."""
    if isinstance(value, Tensor):
        kind = unusable(value)
        shape = "" if kind == "nested" else f" of shape {list(value.shape)}"
        return f"a {kind + ' ' if kind else ''}{value.dtype} tensor{shape}"
    written = repr(value)
    short = len(written) <= 60 and "\n" not in written and " at 0x" not in written
    return written if short else f"a {type(value).__name__}"


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """The known names most similar to `name`, itself excluded, as an error lists them."""
    near = get_close_matches(name, sorted(set(known) - {name}), n=most, cutoff=0.0)
    return ", ".join(map(repr, near))


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `TypeError` for an unknown keyword, with the nearest known ones."""
    names = set(known)
    for name in given:
        if name not in names:
            raise TypeError(f"{where}: got an unknown keyword {name!r}; the nearest are {nearest(name, names)}")


def is_whole(value: object) -> bool:
    """Whether a value is one integer (Python's, NumPy's or a tensor's) and not a bool."""
    if isinstance(value, Tensor):
        numbers = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        return numbers and value.ndim == 0 and is_tensor(value)
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "iu"
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(what: str, value: Any, least: int | None = None, most: int | None = None, where: str = "") -> int:
    """An integer within bounds, as a Python `int`. Raises `TypeError` for anything else, `ValueError` out of bounds."""
    bounds = "a whole number" if least is None else f"{least} to {most}" if most is not None else f"{least} or more"
    if not is_whole(value):
        raise TypeError(f"{what}: got {in_words(value)}, expected {bounds}{where}")
    number = operator.index(value)
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{what}: got {number}, expected {bounds}{where}")
    if abs(number) > MOST_WHOLE:
        raise ValueError(f"{what}: got {in_words(value)}, expected at most {MOST_WHOLE}{where}")
    return number


def from_end(what: str, value: Any, size: int, where: str = "", beyond: bool = False) -> int:
    """An index below `size`, counted from the end if negative; `beyond` also allows `size` itself."""
    number = whole(what, value, -size, size if beyond else size - 1, where)
    return number + size if number < 0 else number


def is_one_of(value: object, options: Iterable[Any]) -> bool:
    """Whether a value is among the options; a list or an array never is, and is no error."""
    return any(type(value) is type(option) and value == option for option in options)


def one_of(what: str, value: Any, options: Sequence[Any]) -> None:
    """Raise `ValueError` unless a value is one of the options."""
    if not is_one_of(value, options):
        listed = ", ".join(map(repr, options[:-1])) + f" or {options[-1]!r}"
        raise ValueError(f"{what}: got {in_words(value)}, expected {listed}")


def a_number(what: str, value: Any, least: float = -math.inf, most: float = math.inf, above: bool = False) -> float:
    """A finite number within bounds (above the lower one with `above`), as a Python number."""
    one = value.item() if (is_tensor(value) or isinstance(value, np.generic)) and value.ndim == 0 else value
    end = f" to {most:g}" if most < math.inf else "" if above else " on"
    bounds = "" if least == -math.inf else f" {'above' if above else 'from'} {least:g}{end}"
    if isinstance(one, bool) or not isinstance(one, Real):
        raise TypeError(f"{what}: got {in_words(value)}, expected a finite number{bounds}")
    number = float(one)
    if not math.isfinite(number) or not least <= number <= most or (above and number == least):
        raise ValueError(f"{what}: got {number:g}, expected a finite number{bounds}")
    return number


def a_path(what: str, value: Any) -> Path:
    """A path. Raises `TypeError` for anything else, and `ValueError` for names that no file can have."""
    if not isinstance(value, (str, PathLike)) or not isinstance(written := os.fspath(value), str):
        raise TypeError(f"{what}: got {in_words(value)}, expected a path")
    try:
        longest = max(map(len, os.fsencode(written).split(b"/")))
    except UnicodeEncodeError:  # half of a character
        longest = LONGEST_NAME + 1
    if "\0" in written or not written or longest > LONGEST_NAME:  # "" would be the current directory
        raise ValueError(f"{what}: got {in_words(written)}, expected the name of a file or directory")
    return Path(value)


def file_to_write(what: str, value: Any) -> Path:
    """The path of a file to write. Raises `ValueError` for a directory, or if its directory does not exist."""
    path = a_path(what, value)
    if path.is_dir():
        raise ValueError(f"{what}: {str(path)!r} is a directory, expected the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"{what}: {str(path.parent)!r} is no directory, expected one to write {path.name!r} in")
    return path


def directory_to_write(what: str, value: Any) -> Path:
    """The path of a directory that exists or can be made. Raises `ValueError` if a file is in its way."""
    path = a_path(what, value)
    taken = next((place for place in (path, *path.parents) if place.exists()), None)
    if taken is not None and not taken.is_dir():
        raise ValueError(f"{what}: {str(taken)!r} is a file, expected a directory")
    return path


def a_text(what: str, value: Any) -> str:
    """A text. Raises `TypeError` for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{what}: got {in_words(value)}, expected a str")
    return value


def is_several(value: object) -> bool:
    """Whether a value can be iterated over and is not text: a list, a tuple, a tensor with an axis..."""
    if isinstance(value, Tensor):
        return is_tensor(value) and value.ndim > 0
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def a_list(what: str, value: Any) -> Any:
    """A collection with a length. Raises `TypeError` for anything else, and for text."""
    if not is_several(value) or not isinstance(value, Sized):
        raise TypeError(f"{what}: got {in_words(value)}, expected a list")
    return value


def listed(what: str, value: Any) -> list[Any]:
    """The items of a list, an array or a generator, as a list. Raises `TypeError` for anything else."""
    if not is_several(value):
        raise TypeError(f"{what}: got {in_words(value)}, expected a list")
    return list(value)


def a_tensor(what: str, value: Any) -> Tensor:
    """A tensor that can be computed with. Raises `TypeError` for anything else."""
    if not is_tensor(value):
        dense = ", dense and on a device that holds numbers" if isinstance(value, Tensor) else ""
        raise TypeError(f"{what}: got {in_words(value)}, expected a tensor{dense}")
    return value


def function(what: str, value: Any, form: str) -> Callable[..., Any]:
    """Raise `TypeError` unless a value can be called; `form` shows how it will be called."""
    if not callable(value):
        raise TypeError(f"{what}: got {in_words(value)}, expected a function {form}")
    return value  # type: ignore[no-any-return]


def as_array(what: str, value: Any, expected: str) -> np.ndarray:
    """A NumPy array of a tensor, an array or lists; bfloat16 becomes float32. Raises `TypeError` for ragged rows and
    for tensors that cannot be computed with.
    """
    if isinstance(value, Tensor):
        value = a_tensor(what, value).detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what}: got {in_words(value)}, expected {expected}") from error


def as_numbers(what: str, value: Any) -> Tensor:
    """A tensor of real numbers, made from a list or an array if need be. Raises `TypeError` for anything else."""
    expected = "a tensor, an array or a list of numbers"
    array = None if isinstance(value, Tensor) else as_array(what, value, expected)
    if array is not None and (array.dtype.kind not in "biufc" or not isinstance(value, (np.ndarray, list, tuple))):
        raise TypeError(f"{what}: got {in_words(value)}, expected {expected}")
    made = a_tensor(what, value) if array is None else torch.as_tensor(array)
    if made.is_complex():
        raise TypeError(f"{what}: got {in_words(value)}, expected real numbers")
    return made


def whole_numbers(
    what: str, value: Any, least: int | None = None, most: int | None = None, where: str = ""
) -> list[int]:
    """One integer or several, each within bounds, as a list."""
    if is_whole(value):
        return [whole(what, value, least, most, where)]
    if not is_several(value) or isinstance(value, dict) or getattr(value, "ndim", 1) != 1:
        expected = "whole numbers" if least is None else f"{least} to {most}"
        raise TypeError(f"{what}: got {in_words(value)}, expected {expected}{where}")
    return [whole(what, one, least, most, where) for one in value]


def needed(module: str, why: str) -> Any:
    """An optional module. Raises `ImportError`, with the reason it is needed, if it is not installed."""
    library = module.partition(".")[0]
    try:
        import_module(library)
        return import_module(module)
    except ImportError as error:
        raise ImportError(why, name=library) from error


def device_of(what: str, value: Any) -> torch.device:
    """A device that exists. Raises `ValueError` for one that does not, and for what names none."""
    try:
        return torch.empty(0, device=value).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{what}: got {in_words(value)}, expected a device that is here, such as 'cpu'") from error
