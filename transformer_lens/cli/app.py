"""The commands. Each reads its options, calls the public API and shows what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from transformer_lens.cli.demo import run_demo
from transformer_lens.cli.info import run_info
from transformer_lens.cli.verify import run_verify

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


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help="A hub name, a directory, a config.json, or a built-in shape such as falcon-40b.")
    ],
    context: Annotated[
        str | None, typer.Option(help="Tokens in the KV cache, such as 2048,8192. Default: 2048 and the model's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the KV cache: bf16, fp16 or fp32.")] = "bf16",
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON, in bytes.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Layout, parameters, memory of weights and KV cache of a model, from its config alone."""
    try:
        run_info(model, Console(), context=context, dtype=dtype, as_json=json)
    except (ValueError, TypeError, KeyError, OSError) as error:
        if debug:
            raise
        Console(stderr=True).print("[bold red]error:[/]", Text(str(error)))
        raise typer.Exit(1) from None


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A hub name or directory, such as tiny-falcon.")],
    device: Annotated[str | None, typer.Option(help="For example cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="For example bfloat16. Default: the checkpoint's own.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager or flash_attention_2.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every comparison as JSON.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Compare every component, layer and hook of a model with Hugging Face's own; exit status 1 if one differs."""
    try:
        passed = run_verify(
            model, Console(), as_json=json, device=device, dtype=dtype, attn_implementation=attn_implementation
        )
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        if debug:
            raise
        Console(stderr=True).print("[bold red]error:[/]", Text(str(error)))
        raise typer.Exit(1) from None
    if not passed:
        raise typer.Exit(1)
