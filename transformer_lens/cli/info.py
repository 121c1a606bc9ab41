"""`info`: a model's layout, parameters and memory, from its config alone."""

from __future__ import annotations

from typing import Any

import typer
from typer import Argument, Option

from transformer_lens.cli.options import complete_shape, dtype_of, write_json
from transformer_lens.cli.running import Output

SHORT_DTYPES = ("bf16", "fp16", "fp32")


def info(
    model: str = Argument(
        ...,
        metavar="MODEL",
        help="A hub name, a directory, a config.json, or a built-in shape such as falcon-40b.",
        autocompletion=complete_shape,
    ),
    context: str | None = Option(
        None, help="Tokens in the KV cache, such as 2048,8192. Default: 2048 and the model's own."
    ),
    dtype: str = Option("bf16", help="Of the KV cache: bf16, fp16 or fp32."),
    json: bool = Option(False, "--json", help="Print it as JSON, in bytes."),
) -> None:
    """Show a model's layout, parameters and memory (weights and KV cache), from its config alone.

    [bold]Examples[/]

    transformer-lens info falcon-40b --context 2048,8192

    transformer-lens info tiny-mixtral --json
    """
    from transformer_lens.model_bridge import model_info

    found = model_info(model, context=None if context is None else lengths(context), dtype=cache_dtype(dtype))
    if json:
        write_json(found.to_dict())
    else:
        Output().print(*found.tables())


def lengths(text: str) -> list[int]:
    """The numbers in a text such as "2048,8192"."""
    parts: list[Any] = [part.strip().replace("_", "") for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(
            f"got {text!r}, expected numbers of tokens with commas between, such as 2048,8192", param_hint="--context"
        )
    return [int(part) for part in parts]


def cache_dtype(text: str) -> str:
    """The dtype as given. Raises typer's `BadParameter`, exit code 2, for an unknown one."""
    if text in SHORT_DTYPES:
        return text
    try:
        return str(dtype_of(text))
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{error.message}, or {', '.join(SHORT_DTYPES)}", param_hint="--dtype") from error
