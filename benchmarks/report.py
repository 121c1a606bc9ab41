"""The tables on the screen and the figures on disk."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from transformer_lens.text_table import TextTable

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "transformer-lens", "transformer-lens-bridge", "nnsight")


def environment(device: torch.device, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    shown = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.orig_argv if command is None else command),
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": torch.multiprocessing.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        shown |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return shown


def installed(package: str) -> str | None:
    """The version of a package, or `None`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def store(path: Path, document: Mapping[str, Any]) -> None:
    """Write figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def read(name: str) -> Any:
    """A stored document."""
    return json.loads((RESULTS / name).read_text())


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines) + "\n"


def place(environment: Mapping[str, Any]) -> str:
    """The machine and the versions, in a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if "lens" not in name)
    device = environment.get("gpu", f"{environment['processor']}, {environment['threads']} threads")
    return f"{device}; {versions}; {environment['date'][:10]}; `{' '.join(environment['command'][1:])}`"


def amount(value: float, unit: str) -> str:
    """A figure for reading.

    >>> amount(1.01234, "x"), amount(0.0123, "s"), amount(0, "bytes")
    ('1.012', '0.0123 s', '0 bytes')
    """
    if unit == "x":
        return f"{value:.3f}"
    return f"{value:.0f} bytes" if unit == "bytes" else f"{value:.3g} {unit}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Mapping[str, str]) -> None:
    """Print a table: with rich where it is installed, plain where not; `styles` colours cells by their text."""
    if find_spec("rich") is None or not sys.stdout.isatty():
        print(TextTable(title, columns, rows, ruled=True))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    Console().print(table)


VERDICT_STYLES = {"ok": "green", "over": "bold red"}
BUDGET_COLUMNS = ("what", "model", "measured", "spread", "budget", "")


def budget_cells(row: Any) -> tuple[str, ...]:
    """A budget row as text."""
    budget = "" if row.budget is None else f"<= {amount(row.budget, row.unit)}"
    spread = f"{amount(row.measured.low, row.unit)} to {amount(row.measured.high, row.unit)}"
    measured = amount(row.measured.median, row.unit)
    return (row.what, row.model, measured, spread, budget, row.verdict)
