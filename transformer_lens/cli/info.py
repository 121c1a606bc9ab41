"""`info`: a model's layout, parameters and memory, from its config alone."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console

from transformer_lens.cli.options import dtype_of
from transformer_lens.model_bridge import model_info

SHORT_DTYPES = ("bf16", "fp16", "fp32")


def run_info(
    model: str, console: Console, *, context: str | None = None, dtype: str = "bf16", as_json: bool = False
) -> None:
    """Show what a model is and what memory it takes.

    >>> run_info("falcon-7b", Console(), context="2048,8192")  # doctest: +SKIP

    Raises typer's `BadParameter` for a context that is no list of numbers, or a dtype that is none; `ValueError` for
    a configuration that cannot run.
    """
    info = model_info(model, context=None if context is None else lengths(context), dtype=cache_dtype(dtype))
    if as_json:
        typer.echo(json.dumps(info.to_dict(), indent=2))
    else:
        console.print(*info.tables())


def lengths(text: str) -> list[int]:
    """
    >>> from transformer_lens.cli.info import lengths
    >>> lengths("2048, 8192")
    [2048, 8192]
    """
    parts: list[Any] = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(
            f"got {text!r}, expected numbers of tokens with commas between, such as 2048,8192", param_hint="--context"
        )
    return [int(part) for part in parts]


def cache_dtype(text: str) -> str:
    """
    >>> cache_dtype("fp16")
    'fp16'

    The dtype as it was given. Raises typer's `BadParameter`, exit code 2, for what names none.
    """
    if text in SHORT_DTYPES:
        return text
    try:
        return str(dtype_of(text))
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{error.message}, or {', '.join(SHORT_DTYPES)}", param_hint="--dtype") from error
