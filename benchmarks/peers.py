"""`make bench-peers`: the same work in TransformerLens 4.3.0 and nnsight 0.8.1, each in its own environment.

python -m benchmarks.peers [--size 100m] [--family falcon mixtral] [--quick] [--out FILE] [--add]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MORE_FAMILIES, SIZES
from benchmarks.peer_packages import PACKAGES
from benchmarks.peer_tasks import QUESTIONS, TIMINGS
from benchmarks.peer_worker import ANSWER
from benchmarks.pinned import CONSTRAINTS, REPOSITORY, pins
from benchmarks.report import RESULTS, amount, environment, show, store
from transformer_lens.model_bridge.verification.validation import ENGINES

PEERS = REPOSITORY / "build" / "peers"
VERSIONS: Mapping[str, str] = {
    name: engine["install"].partition("==")[2] for name, engine in ENGINES.items() if "install" in engine
}
TASK_LIMIT = 1800
"""Seconds one worker process may take."""


@dataclass(frozen=True)
class Answer:
    """What a package did with one task on one model."""

    package: str
    model: str
    task: str
    result: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The answer in a table's cell."""
        found = self.result
        if "crashed" in found:
            return "crashed"
        if "not_offered" in found:
            return "not offered"
        if "wrong_shape" in found:
            return "wrong shape"
        if found["unit"] == "error":
            return "exact" if found["largest_error"] == 0 else f"off by {found['largest_error']:.1e}"
        wrong = found.get("same_tokens_as_torch_hooks") is False or found.get("largest_error", 0.0) > 1e-3
        return amount(found["median"], found["unit"]) + (" (wrong)" if wrong else "")


def install(package: str) -> Path:
    """The python of the package's own environment, made when it is not there."""
    home = PEERS / package
    python = home / "bin" / "python"
    wanted = f"{package}=={VERSIONS[package]}"
    done = home / ".installed"
    if not done.exists() or done.read_text() != wanted:
        venv.create(home, with_pip=True, clear=True)
        # With this repository's torch: unpinned it pulls gigabytes, and the figures would not compare.
        torch = f"torch=={pins(CONSTRAINTS.read_text())['torch']}"
        subprocess.run([str(python), "-m", "pip", "install", "-q", torch, wanted], check=True)
        done.write_text(wanted)
    return python


def shared_code() -> Path:
    """A folder that holds this package and not the repository, whose `transformer_lens` would hide the peer's."""
    folder = PEERS / "path"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "benchmarks").mkdir(parents=True)
    for file in Path(__file__).parent.glob("*.py"):
        shutil.copy(file, folder / "benchmarks")
    return folder


@dataclass(frozen=True)
class Worker:
    """How to run tasks for one package."""

    package: str
    python: Path
    path: Path
    options: Sequence[str]

    def run(self, model: str, options: Sequence[str], tasks: Sequence[str]) -> Iterator[Answer]:
        """Every task's answer; a task that ends the process is answered by its last words."""
        left = list(tasks)
        search = [str(self.path), *([str(REPOSITORY)] if self.package == "ours" else [])]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONWARNINGS": "ignore"}
        while left:
            command = [str(self.python), "-m", "benchmarks.peer_worker", self.package, *self.options, *options]
            found = subprocess.run(
                [*command, "--task", *left],
                capture_output=True,
                text=True,
                cwd=self.path,
                env=variables,
                timeout=TASK_LIMIT,
                check=False,
            )
            for line in found.stdout.splitlines():
                if line.startswith(ANSWER):
                    said = json.loads(line.removeprefix(ANSWER))
                    left.remove(said["task"])
                    yield Answer(self.package, model, said["task"], said["answer"])
            if left:
                yield Answer(self.package, model, left.pop(0), {"crashed": last_words(found.stderr)})


def last_words(stderr: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line for line in stderr.splitlines() if line and not line.startswith((" ", "\t"))]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Warning"))]
    return (errors or lines or ["no message"])[-1][:400]


def tables(answers: Sequence[Answer], packages: Sequence[str]) -> None:
    """Print what each package took, and what it got right."""
    cells = {(a.package, a.model, a.task): a.text for a in answers if a.task != "environment"}
    for title, tasks in (
        ("The same work, relative to bare transformers in the same process", tuple(TIMINGS)),
        ("What is shown, against plain torch hooks on the bare model", QUESTIONS),
    ):
        places = dict.fromkeys((a.model, a.task) for a in answers if a.task in tasks)
        rows = [[task, model, *(cells.get((p, model, task), "") for p in packages)] for model, task in places]
        show(title, ("what", "model", *packages), rows, {"crashed": "bold red", "exact": "green"})
        print()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    made.add_argument("--package", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    made.add_argument("--size", nargs="+", choices=SIZES, default=["tiny", "100m"])
    made.add_argument("--family", nargs="+", choices=MORE_FAMILIES, default=list(MORE_FAMILIES))
    made.add_argument("--task", nargs="+", choices=[*TIMINGS, *QUESTIONS], default=[*TIMINGS, *QUESTIONS])
    made.add_argument("--long", type=int, default=2048, help="tokens of the long text")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--quick", action="store_true")
    made.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    made.add_argument("--add", action="store_true", help="keep what the file has of other tasks and models")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, run, print, store."""
    options = parser().parse_args(arguments)
    path = shared_code()
    common = ["--long", str(options.long), "--threads", str(options.threads), *(["--quick"] if options.quick else [])]
    pythons = {name: Path(sys.executable) if name == "ours" else install(name) for name in options.package}
    workers = [Worker(name, python, path, common) for name, python in pythons.items()]
    timings = [task for task in options.task if task in TIMINGS]
    questions = [task for task in options.task if task in QUESTIONS]
    jobs: list[tuple[str, list[str], list[str]]] = [("", [], ["environment"])]
    # Package after package on one model, so that a change in the machine's load meets them all.
    for size in options.size if timings else ():
        jobs += [(f"{f} {size}", ["--family", f, "--size", size], timings) for f in options.family]
    if questions:
        jobs.append(("falcon, 2 layers", [], questions))
    answers: list[Answer] = []
    for model, chosen, tasks in jobs:
        for worker in workers:
            for answer in worker.run(model, chosen, tasks):
                answers.append(answer)
                said = "" if answer.task == "environment" else answer.text
                print(answer.package, model, answer.task, said, sep=" | ", file=sys.stderr, flush=True)
    tables(answers, options.package)
    places = {answer.package: answer.result for answer in answers if answer.task == "environment"}
    asked = [answer for answer in answers if answer.task != "environment"]
    figures = [{**vars(answer), "text": answer.text, "quick": options.quick} for answer in asked]
    here = environment(torch.device("cpu"))
    if options.add:
        before = json.loads(options.out.read_text())
        anew = {(row["package"], row["model"], row["task"]) for row in figures}
        kept = [row for row in before["answers"] if (row["package"], row["model"], row["task"]) not in anew]
        figures = [*kept, *figures]
        here, places = before["environment"], before["packages"] | places
    store(options.out, {"environment": here, "packages": places, "answers": figures})
    print(f"stored in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
