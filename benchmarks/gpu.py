"""`make gpu`: the tests and the budgets on CUDA, full-size random models included.

python -m benchmarks.gpu [--quick] [--out FILE] [--skip tests table full compiled] [--dry-run --device cpu]

Needs no more than torch 2.11, transformers 5.17, einops, jaxtyping, safetensors, tqdm, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import compiled_rows
from benchmarks.bench import import_rows, measure, run_table
from benchmarks.budgets import Place, Row, Subject
from benchmarks.models import FAMILIES, FULL_SIZE, SIZES, make_config, make_model, parameter_count
from benchmarks.pytest_run import pytest_run
from benchmarks.report import BUDGET_COLUMNS, RESULTS, VERDICT_STYLES, budget_cells, environment, show, store
from benchmarks.timing import QUICK, Effort, prepare_device

NO_GPU = "no GPU was at hand: torch.cuda.is_available() is False, so nothing was measured on CUDA"
FULL_ROWS = (
    "noise",
    "untouched_forward",
    "untouched_decode",
    "parameter_bytes",
    "wrapping",
    "resid_cache",
    "full_cache",
    "kept_memory",
    "steering",
)
ROOM = 12e9
"""Bytes beside the weights: activations of 2,048 tokens, a cache of everything, cuBLAS's workspace."""
STAGES = ("tests", "table", "full", "compiled")
COMPILED_SECONDS = 480
"""The most that the compiled rows may take of a device; those left then are named."""
DRY_SHAPE: Mapping[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "ffn_hidden_size": 64,
}


# -- tests ---------------------------------------------------------------------------------------------


def run_tests(device: torch.device) -> list[dict[str, Any]]:
    """The tests written for CUDA, and the core suite with every tensor made on the device."""
    suites = {
        "tests for CUDA": ["-m", "gpu", "tests/gpu"],
        # Without the inside of modules and the remote text, which have tests for CUDA of their own.
        "core suite, made on the device": [
            *("-m", "core and not gpu", "-p", "benchmarks.on_device"),
            *("--ignore=tests/inside", "--ignore=tests/distributed"),
        ],
    }
    where = {"TRANSFORMER_LENS_TEST_DEVICE": str(device)}
    return [{"name": name, **pytest_run(sys.executable, suites[name], where)} for name in suites]


# -- full-size models ----------------------------------------------------------------------------------


def full_size(place: Place, dry_run: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """The budget rows of the published shapes, where the device has room; else a line saying why not."""
    rows: list[Row] = []
    notes: list[dict[str, Any]] = []
    for name, (family, shape) in FULL_SIZE.items():
        config = make_config(family, **{**shape, **(dry_shape(family) if dry_run else {})})
        needed = parameter_count(config) * place.dtype.itemsize + (0 if dry_run else ROOM)
        free = free_bytes(place.device)
        note: dict[str, Any] = {"model": name, "needed_bytes": needed, "free_bytes": free}
        if needed > free:
            notes.append({**note, "skipped": f"{name} needs {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free"})
        else:
            subject = Subject(name, make_model(config, place.device, place.dtype), place)
            for row in measure(subject, FULL_ROWS):
                rows.append(row)
                print(*budget_cells(row), sep=" | ", file=sys.stderr, flush=True)
            notes.append({**note, **peak(place.device)})
            del subject
            release(place.device)
        print(notes[-1], file=sys.stderr, flush=True)
    return rows, notes


# -- compiled runners ----------------------------------------------------------------------------------


def compiled(place: Place, size: str, dry_run: bool) -> tuple[list[Row], list[str]]:
    """The rows of compiled runners, with CUDA graphs on CUDA, until the time is used up; and those left out."""
    compiled_rows.BACKEND = "eager" if dry_run else compiled_rows.BACKEND
    compiled_rows.MODE = "reduce-overhead" if place.device.type == "cuda" else None
    rows, left, start = [], [], time.monotonic()
    for family in FAMILIES:
        subject = Subject.of(family, size, place)
        for key, row in compiled_rows.COMPILED_ROWS.items():
            if time.monotonic() - start > COMPILED_SECONDS:
                left.append(f"{key} of {family}")
                continue
            torch._dynamo.reset()
            with torch.no_grad():
                rows.append(row(subject))
            print(*budget_cells(rows[-1]), sep=" | ", file=sys.stderr, flush=True)
        del subject
        release(place.device)
    return rows, left


def dry_shape(family: str) -> dict[str, Any]:
    """A shape small enough to walk the same path anywhere."""
    unknown = "intermediate_size" if family == "falcon" else "ffn_hidden_size"
    return {key: value for key, value in DRY_SHAPE.items() if key != unknown}


def free_bytes(device: torch.device) -> float:
    """Memory that is free on the device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def peak(device: torch.device) -> dict[str, int]:
    """The most memory that was in use since the last model."""
    if device.type != "cuda":
        return {}
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)}


def release(device: torch.device) -> None:
    """Give a dropped model's memory back before the next one is made."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# -- all of it -----------------------------------------------------------------------------------------


def say_no_gpu(out: Path) -> None:
    """Say that there was none, and store that without losing figures of a time when there was one."""
    print(NO_GPU)
    stored = json.loads(out.read_text()) if out.exists() else {}
    stored["last_run_without_gpu"] = {"what": NO_GPU, "environment": environment(torch.device("cpu"))}
    store(out, stored)
    print(f"stored in {out}" + (", beside the figures of an earlier run on a GPU" if "rows" in stored else ""))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true")
    made.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    made.add_argument("--skip", nargs="+", choices=STAGES, default=[])
    made.add_argument("--device", default="cuda")
    made.add_argument("--dry-run", action="store_true", help="walk the code on --device with small models")
    made.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Test, measure, print, store."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        say_no_gpu(options.out)
        return 0
    if options.dry_run and options.out == RESULTS / "gpu.json":
        raise SystemExit("--dry-run measures nothing real: pass --out, so that real figures stay")
    prepare_device(device)
    long_tokens = 64 if options.dry_run else 2048
    effort = QUICK if options.quick or options.dry_run else Effort()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # bf16 crawls on a CPU
    place = Place(device, dtype, effort, long_tokens)
    document: dict[str, Any] = {"environment": environment(device), "quick": options.quick, "dry_run": options.dry_run}
    document["dtype"] = str(place.dtype)
    document["tests"] = [] if "tests" in options.skip else run_tests(device)
    rows: list[Row] = []
    if "table" not in options.skip:
        sizes = ["tiny"] if options.dry_run else options.size
        rows += run_table(place, FAMILIES, sizes)
        rows += import_rows(1 if options.dry_run else 5)
    left: list[str] = []
    if "compiled" not in options.skip:
        compiled_found, left = compiled(place, "tiny" if options.dry_run else "100m", options.dry_run)
        rows += compiled_found
    notes: list[dict[str, Any]] = []
    if "full" not in options.skip:
        full_rows, notes = full_size(place, options.dry_run)
        rows += full_rows
    show(f"Budgets on {device}", BUDGET_COLUMNS, [budget_cells(row) for row in rows], VERDICT_STYLES)
    store(options.out, {**document, "full_size": notes, "not_reached": left, "rows": [row.to_dict() for row in rows]})
    for run in document["tests"]:
        print(f"{run['name']}: exit status {run['exit_status']}, {run.get('tests', 0)} tests")
    print(f"stored in {options.out}")
    return int(any(run["exit_status"] for run in document["tests"]))


if __name__ == "__main__":
    sys.exit(main())
