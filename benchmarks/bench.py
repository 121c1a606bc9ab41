"""`make bench`: the budget table of design section 5, printed and stored.

python -m benchmarks.bench [--size tiny 100m 250m] [--family falcon mixtral] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.budgets import ROWS as BUDGET_ROWS
from benchmarks.budgets import Place, Row, Subject
from benchmarks.collect_rows import COLLECT_ROWS
from benchmarks.compiled_rows import COMPILED_ROWS
from benchmarks.generation_rows import GENERATION_ROWS
from benchmarks.import_cost import import_cost
from benchmarks.models import FAMILIES, SIZES
from benchmarks.patching_rows import PATCHING_ROWS
from benchmarks.report import BUDGET_COLUMNS, RESULTS, VERDICT_STYLES, budget_cells, environment, show, store
from benchmarks.timing import QUICK, Effort, prepare_device

ROWS = {**BUDGET_ROWS, **GENERATION_ROWS, **PATCHING_ROWS, **COLLECT_ROWS, **COMPILED_ROWS}
THREADS = 2
TITLE = "Budgets: the bridge beside bare transformers, in one process"
# The rows that only mean something on some models; the others are measured on each.
ONLY_TINY = ("port_hot_path", "names_by_predicate")
ONLY_100M = (*PATCHING_ROWS, *COMPILED_ROWS)
# Deep and narrow: what it is there for is the row whose cost grows with every hook of every layer.
ON_135M = ("verify",)


def measure(subject: Subject, rows: Sequence[str] = tuple(ROWS)) -> Iterator[Row]:
    """The chosen rows of one model."""
    with torch.no_grad():
        for key in rows:
            if subject.size == "135m" and key not in ON_135M:
                continue
            if (key not in ONLY_TINY or subject.size == "tiny") and (key not in ONLY_100M or subject.size == "100m"):
                yield ROWS[key](subject)


def import_rows(repeats: int) -> list[Row]:
    """What the import costs; it concerns no model."""
    cost = import_cost(repeats)
    what = "import transformer_lens, beyond torch and the model classes"
    added = {"modules_added": cost.modules}
    return [
        Row("import_seconds", what, "", cost.seconds, "s", 0.3, added),
        Row("import_megabytes", what, "", cost.megabytes, "MB", 15.0, added),
    ]


def run_table(
    place: Place, families: Sequence[str], sizes: Sequence[str], rows: Sequence[str] = tuple(ROWS)
) -> list[Row]:
    """Measure the table, saying on stderr what has been measured."""
    measured: list[Row] = []
    for size in sizes:
        for family in families:
            subject = Subject.of(family, size, place)
            for row in measure(subject, rows):
                measured.append(row)
                print(*budget_cells(row), sep=" | ", file=sys.stderr, flush=True)
    return measured


def write(rows: Sequence[Row], out: Path, device: torch.device, quick: bool) -> None:
    """Print the table and store its figures."""
    show(TITLE, BUDGET_COLUMNS, [budget_cells(row) for row in rows], VERDICT_STYLES)
    over = [row for row in rows if row.verdict == "over"]
    print(f"\n{len(rows)} figures, {len(over)} over budget" + (" (--quick: too few samples to judge)" if quick else ""))
    document = {"environment": environment(device), "quick": quick, "rows": [row.to_dict() for row in rows]}
    store(out, document)
    print(f"stored in {out}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.splitlines()[0])
    made.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    made.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    made.add_argument("--row", nargs="+", choices=[*ROWS, "import"], default=[*ROWS, "import"])
    made.add_argument("--quick", action="store_true", help="a few samples, to try the harness out")
    made.add_argument("--threads", type=int, default=THREADS)
    made.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    made.add_argument("--strict", action="store_true", help="exit with 1 if anything is over budget")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, store."""
    options = parser().parse_args(arguments)
    device = torch.device("cpu")
    prepare_device(device, options.threads)
    place = Place(device, torch.float32, QUICK if options.quick else Effort())
    rows = run_table(place, options.family, options.size, [row for row in options.row if row in ROWS])
    if "import" in options.row:
        rows += import_rows(3 if options.quick else 11)
    write(rows, options.out, device, options.quick)
    return int(options.strict and any(row.verdict == "over" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
