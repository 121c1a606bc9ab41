"""How every command runs: errors as sentences on stderr, exit codes, broken pipes, Ctrl-C.

0: done. 1: it could not be done, or a check failed. 2: the command line was not understood. 130: Ctrl-C. 141: whoever
read the output stopped reading. With `--debug` an error keeps its traceback.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import TracebackType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand
from typer.models import OptionInfo

FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
PROGRAM, COMPLETE = "transformer-lens", "_TRANSFORMER_LENS_COMPLETE"
ERRORS = (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError)
"""What the package raises for what its user can put right; anything else is a fault of its own."""
_DEBUG = "transformer_lens.debug"
Function = TypeVar("Function", bound=Callable[..., Any])


def _remember(context: typer.Context, value: bool) -> bool:
    if value:
        context.meta[_DEBUG] = True
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember)]
"""Every command has it, and so has the program before its command."""


class Command(TyperCommand):
    """A command whose errors are sentences."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings_in_a_line():
                load_package()
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            say("\ninterrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            discard_output()
            raise typer.Exit(PIPE_CLOSED) from None
        except ERRORS as error:
            if ctx.meta.get(_DEBUG):
                raise
            say(sentence(error), "error: ", "bold red")
            raise typer.Exit(FAILED) from None


class Commands(typer.Typer):
    """An application whose commands are all `Command`s, with `--debug`, and with options in groups."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        register = super().command(name, **{"cls": Command, **options})

        def add(function: Function) -> Function:
            register(with_single_options(function))
            return function

        return add


def with_single_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command as typer wants it: a parameter that is a dataclass becomes one option for each of its fields.

    They stand under a heading in the help, which is the docstring of the dataclass. `--debug` comes last.
    """
    given = inspect.signature(function, eval_str=True).parameters
    groups: dict[str, Any] = {name: p.annotation for name, p in given.items() if is_dataclass(p.annotation)}
    options: dict[str, inspect.Parameter] = {}

    def add(name: str, kind: Any, default: Any) -> None:
        options[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)

    for name, parameter in given.items():
        if name not in groups:
            add(name, parameter.annotation, parameter.default)
            continue
        for field_name, kind in get_type_hints(groups[name], include_extras=True).items():
            default = getattr(groups[name], field_name)
            option = default if isinstance(default, OptionInfo) else get_args(kind)[1]
            option.rich_help_panel = groups[name].__doc__
            add(field_name, kind, default)
    if "debug" not in given:
        add("debug", Debug, False)

    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values[field.name] for field in fields(group)})
        function(**{name: values[name] for name in given})

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {name: option.annotation for name, option in options.items()}
    command.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
    return command


class Output(Console):
    """Standard output. A reader that stops early is `BrokenPipeError`, like anywhere else in Python."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def run(app: typer.Typer) -> None:
    """Run the program, and leave the process with its exit code."""
    if "--debug" not in sys.argv:
        sys.excepthook = explain
    typer.main.get_command(app).main(prog_name=PROGRAM, complete_var=COMPLETE)


def load_package() -> None:
    """Run the package's `__init__`, which imports torch, where the program began without it."""
    package = sys.modules["transformer_lens"]
    if "TransformerBridge" not in vars(package):
        assert package.__spec__ is not None and package.__spec__.loader is not None
        logging.disable(logging.WARNING)  # torchao and its like tell what they could not load, asked for or not
        try:
            package.__spec__.loader.exec_module(package)
        finally:
            logging.disable(logging.NOTSET)


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What to say of an error that no user can have meant; Python leaves with 1 after it."""
    if not issubclass(kind, KeyboardInterrupt):
        say(
            f"{kind.__name__}: {error}\nThis is a fault of transformer_lens; --debug shows where.",
            "error: ",
            "bold red",
        )


def sentence(error: BaseException) -> str:
    """
    >>> sentence(KeyError("no hook 'a'")), sentence(RuntimeError())
    ("no hook 'a'", 'RuntimeError')

    The text of an error. A `KeyError` would show its text in quotes.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


def say(text: str, label: str = "", style: str = "") -> None:
    """Write to stderr; a file gets one line for one line."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((label, style), text), soft_wrap=not console.is_terminal)


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Show warnings as sentences, without the line of code they come from."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(str(message), "warning: ", "bold yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def discard_output() -> None:
    """Let what is still to be written go nowhere, or Python complains about the pipe when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
