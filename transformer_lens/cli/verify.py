"""`verify`: every component of a checkpoint compared with Hugging Face's own."""

from __future__ import annotations

import typer
from rich.console import Console

from transformer_lens import TransformerBridge


def run_verify(bridge: TransformerBridge, console: Console, *, thorough: bool = False, as_json: bool = False) -> bool:
    """Verify a model and show the report; returns whether everything passed.

    >>> from transformer_lens import TransformerBridge
    >>> bridge = TransformerBridge.boot_transformers("tiny-falcon", dtype="bfloat16")
    >>> run_verify(bridge, Console())  # doctest: +SKIP
    True
    """
    report = bridge.verify(thorough=thorough, progress=not as_json)
    if as_json:
        typer.echo(report.to_json())
    else:
        console.print(report)
    return report.passed
