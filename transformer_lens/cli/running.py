"""How every command runs: errors as sentences on stderr, exit codes, broken pipes, Ctrl-C.

Exit codes: 0 done, 1 failed or a check failed, 2 command line not understood, 130 Ctrl-C, 141 the reader of the output
went away. With `--debug` an error keeps its traceback.
"""

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
"""Errors that the user can fix; anything else is a bug in the package."""
_DEBUG = "transformer_lens.debug"
Function = TypeVar("Function", bound=Callable[..., Any])


def _remember(context: typer.Context, value: bool) -> bool:
    if value:
        context.meta[_DEBUG] = True
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember)]
"""The `--debug` option, of every command and of the program itself."""


class Command(TyperCommand):
    """A command that reports errors as sentences."""

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
            # What is left goes nowhere, or Python complains about the broken pipe at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        except ERRORS as error:
            if ctx.meta.get(_DEBUG):
                raise
            say(sentence(error), "error: ", "bold red")
            raise typer.Exit(FAILED) from None


class Commands(typer.Typer):
    """An application of `Command`s, with `--debug` and grouped options."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        register = super().command(name, **{"cls": Command, **options})

        def add(function: Function) -> Function:
            register(with_single_options(function))
            return function

        return add


def with_single_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command with an option per field of its dataclass parameters, under the class's docstring, and `--debug`."""
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
    """Standard output; a reader that stops early raises `BrokenPipeError`, as elsewhere in Python."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def run(app: typer.Typer) -> None:
    """Run the program and exit with its exit code."""
    if "--debug" not in sys.argv:
        sys.excepthook = explain
    typer.main.get_command(app).main(prog_name=PROGRAM, complete_var=COMPLETE)


def load_package() -> None:
    """Run the package's `__init__`, which imports torch, if the program started without it."""
    package = sys.modules["transformer_lens"]
    if "TransformerBridge" not in vars(package):
        assert package.__spec__ is not None and package.__spec__.loader is not None
        logging.disable(logging.WARNING)  # torchao and its like tell what they could not load, asked for or not
        try:
            package.__spec__.loader.exec_module(package)
        finally:
            logging.disable(logging.NOTSET)


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an unexpected error; Python exits with 1 after it."""
    if not issubclass(kind, KeyboardInterrupt):
        told = f"{kind.__name__}: {error}\nThis is a fault of transformer_lens; --debug shows where."
        say(told, "error: ", "bold red")


def sentence(error: BaseException) -> str:
    """The text of an error, without the quotes that a `KeyError` puts around it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


def say(text: str, label: str = "", style: str = "") -> None:
    """Write to stderr; in a file, each message stays on one line."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((label, style), text), soft_wrap=not console.is_terminal)


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Show warnings as sentences, without the line of code that raised them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(str(message), "warning: ", "bold yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
