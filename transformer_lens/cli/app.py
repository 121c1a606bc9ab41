"""The commands. Each reads its options, calls the public API and shows what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transformer_lens.cli.demo import run_demo

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look inside Falcon and Mixtral models by name.")


@app.callback()
def _commands() -> None:
    """Look inside Falcon and Mixtral models by name."""


@app.command()
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="A hub name or directory; repeatable. Default: both shipped models."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("out/demo"),
    device: Annotated[str | None, typer.Option(help="For example cuda.")] = None,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Find induction heads, patch an indirect-object circuit, and watch experts being chosen."""
    console = Console()
    try:
        run_demo(model or ["tiny-falcon", "tiny-mixtral"], out, console, device=device)
    except (ValueError, KeyError, OSError) as error:
        if debug:
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {error}")
        raise typer.Exit(1) from None
