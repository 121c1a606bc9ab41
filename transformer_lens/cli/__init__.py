"""The command line: `transformer-lens COMMAND`, or `python -m transformer_lens COMMAND`, on the public API alone."""

import sys

MISSING = "the command line needs typer and rich: pip install 'transformer-lens-bridge[cli]'\n"


def main() -> None:
    """Run the command line, or say what to install if its libraries are missing."""
    try:
        import rich
        import typer
    except ImportError:
        sys.stderr.write(MISSING)
        raise SystemExit(2) from None
    del rich, typer
    from transformer_lens.cli.app import app
    from transformer_lens.cli.running import run

    run(app)
