"""`verify`: every component of a checkpoint compared with Hugging Face's own."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from transformer_lens import TransformerBridge


def run_verify(model: str, console: Console, *, as_json: bool = False, **loading: Any) -> bool:
    """Load a model, verify it and show the report; returns whether everything passed.

    >>> run_verify("tiny-falcon", Console(), dtype="bfloat16")  # doctest: +SKIP
    True

    `loading` goes to `boot_transformers`; what is `None` is left out.
    """
    given = {name: value for name, value in loading.items() if value is not None}
    report = TransformerBridge.boot_transformers(model, **given).verify()
    if as_json:
        typer.echo(report.to_json())
    else:
        console.print(report)
    return report.passed
