"""Every public function, with every wrong value: one of our sentences, never Python's or torch's, and never an answer.

`surface` finds the functions, `table` says what is right and wrong for each parameter. A sentence of ours is an error
that a `raise` of this package raised, and says what was expected.
"""

from __future__ import annotations

import dis
import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch

import transformer_lens
from tests.audit.surface import functions, parameters
from tests.audit.table import (
    KEYWORDS,
    NOT_AUDITED,
    ODD,
    OF_OTHERS,
    ROWS,
    SWITCHES,
    WORDS,
    Row,
    World,
    given,
    wrong_values,
)

PACKAGE = str(Path(transformer_lens.__file__).parent)
OURS = (ValueError, KeyError, TypeError, IndexError, OSError, ImportError)
PYTHONS = re.compile(r"unexpected keyword argument|missing \d+ required|takes .* positional arguments? but")
"""What Python itself says well: it names the function and the keyword."""
SURFACE = functions()
AUDITED = [entry for entry in SURFACE if entry not in NOT_AUDITED]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    return World(tmp_path_factory.mktemp("audit"))


def raised_on_purpose(trace: TracebackType | None) -> bool:
    """Whether the last frame is ours, and stands at a `raise`."""
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    at = {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}
    return code.co_filename.startswith(PACKAGE) and at[trace.tb_lasti] in ("RAISE_VARARGS", "RERAISE")


def complaint(call: Callable[[], Any]) -> str | None:
    """What is wrong with how a call ends; `None` if it ends in a sentence of ours."""
    try:
        result = call()
        if isinstance(result, AbstractContextManager) and hasattr(result, "gen"):
            with result:
                pass
        elif isinstance(result, Iterator):
            next(result)
    except OURS as error:
        text = str(error.args[0]) if error.args else ""
        if PYTHONS.search(text):
            return None
        if not raised_on_purpose(error.__traceback__):
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"bare {type(error).__name__}: {text[:100]} [{Path(where.filename).name}:{where.lineno}]"
        return None if len(text.split()) > 3 else f"no sentence: {text!r}"
    except Exception as error:  # noqa: BLE001  any other error is a finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"bare {type(error).__name__}: {str(error)[:100]} [{Path(where.filename).name}:{where.lineno}]"
    return "accepted"


def callable_of(world: World, entry: str) -> Callable[..., Any]:
    """The function, bound to an object where it is a method."""
    function = SURFACE[entry]
    owner, _, method = entry.partition(".")
    if not entry[0].isupper() or inspect.ismethod(function):
        return function
    if method == "__init__":
        return function.__globals__[owner] if owner in function.__globals__ else _class_of(function, owner)
    if ROWS.get(entry, Row()).fresh:
        return getattr(transformer_lens.TransformerBridge.boot_transformers("tiny-falcon"), method)  # type: ignore[no-any-return]
    return getattr(world.itself(entry), method)  # type: ignore[no-any-return]


def _class_of(function: Callable[..., Any], owner: str) -> Any:
    return getattr(inspect.getmodule(function), owner)


def right_call(world: World, entry: str) -> dict[str, Any]:
    needed = [
        p.name
        for p in parameters(SURFACE[entry])
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and (p.default is p.empty or p.name in ROWS.get(entry, Row()).given)
    ]
    return given(world, entry, needed)


def run(world: World, entry: str, changed: dict[str, Any]) -> Any:
    """The right call, with some arguments changed. A positional prompt goes first where any may come."""
    function, arguments = callable_of(world, entry), {**right_call(world, entry), **changed}
    several = any(p.name == "model_args" for p in parameters(SURFACE[entry]))
    prompt = [arguments.pop("prompt", "Mary and John")] if several else []
    if "names_filter" in changed and entry == "TransformerBridge.generate":
        arguments["return_cache"] = True
    return function(*prompt, **arguments)


def test_the_surface_is_found() -> None:
    assert len(AUDITED) > 150
    assert {"TransformerBridge.forward", "ActivationCache.logit_lens", "viz.of_runs.routing_map"} <= set(AUDITED)
    assert set(NOT_AUDITED) <= set(SURFACE) and set(ROWS) <= set(SURFACE)


@pytest.mark.parametrize("entry", AUDITED)
def test_a_right_call_works_and_wrong_values_are_told(world: World, entry: str) -> None:
    torch.manual_seed(0)
    wrong = [
        f"right call: {why or 'refused'}" for why in [complaint(lambda: run(world, entry, {}))] if why != "accepted"
    ]
    for parameter in parameters(SURFACE[entry]):
        if parameter.name in KEYWORDS and wrong_values_of(entry, parameter.name):
            why = complaint(lambda: run(world, entry, {"nonsense_keyword": 1}))
            wrong += [f"an unknown keyword: {why}"] if why else []
            continue
        for value in wrong_values(entry, parameter.name):
            if value is parameter.default:
                continue
            why = complaint(lambda name=parameter.name, value=value: run(world, entry, {name: value}))  # type: ignore[misc]
            wrong += [f"{parameter.name}={_short(value)}: {why}"] if why else []
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")  # torch says of some kinds that they are new, of others that they are old
@pytest.mark.parametrize("entry", AUDITED)
def test_odd_values_are_answered_or_told(world: World, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)  # a number may be taken for a file's name
    wrong = []
    for parameter in parameters(SURFACE[entry]):
        if parameter.name in KEYWORDS | OF_OTHERS | SWITCHES | WORDS:
            continue
        for what, make in ODD.items():
            why = complaint(lambda name=parameter.name, make=make: run(world, entry, {name: make()}))  # type: ignore[misc]
            wrong += [f"{parameter.name} is {what}: {why}"] if why not in (None, "accepted") else []
    assert not wrong, "\n" + "\n".join(wrong)


def wrong_values_of(entry: str, name: str) -> bool:
    """Whether further keywords are checked here, and not by transformers or torch."""
    return ROWS.get(entry, Row()).wrong.get(name) != []


def _short(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]
