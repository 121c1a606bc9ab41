"""The command line: `python -m transformer_lens COMMAND`. Built on the public API alone."""

from __future__ import annotations

import sys

MISSING = "the command line needs typer and rich: pip install 'transformer-lens-bridge[cli]'\n"


def main() -> None:
    """Run the command line; says what to install where its libraries are missing."""
    try:
        import rich
        import typer
    except ImportError:
        sys.stderr.write(MISSING)
        raise SystemExit(2) from None
    del rich, typer
    from transformer_lens.cli.app import app

    app()
