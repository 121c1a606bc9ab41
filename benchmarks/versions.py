"""`python -m benchmarks.versions oldest|newest|matrix`: the core of the suite on releases other than the pinned ones.

Each environment holds what constraints.txt pins, but for what it is about. `matrix` stores what became of every case in
results/versions.json, and writes docs/versions.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from benchmarks import page
from benchmarks.pinned import CONSTRAINTS, PROJECT, REPOSITORY, declared, pins
from benchmarks.pytest_run import pytest_run
from benchmarks.report import RESULTS, read, store

STORED = "versions.json"
CORE = ("-m", "core and not gpu and not swarm", "-n", "2", "--dist", "loadfile")
HERE = "{}.{}".format(*sys.version_info[:2])
MOVING: Mapping[str, Sequence[str]] = {
    "torch": ("torch", "triton", "nvidia-.*", "cuda-.*"),
    "transformers": ("transformers", "tokenizers", "huggingface-hub"),
}
"""What is not held to constraints.txt where one of these is another release: each names a range of them."""


@dataclass(frozen=True)
class Case:
    """Releases to run the core on, and the environment they are installed in; `None` is the pinned release.

    `libraries_of` is the torch whose CUDA libraries are there in the place of its own, which would be gigabytes
    for what a CPU never calls.
    """

    home: str = ".venv"
    python: str = HERE
    torch: str | None = None
    transformers: str | None = None
    libraries_of: str | None = None

    @property
    def asked(self) -> dict[str, str]:
        """The three releases in numbers."""
        pinned = pins(CONSTRAINTS.read_text())
        return {"python": self.python} | {name: getattr(self, name) or pinned[name] for name in MOVING}

    @property
    def moved(self) -> list[str]:
        """The packages that are another release than the pinned one."""
        return [name for name in MOVING if getattr(self, name) is not None]

    @property
    def executable(self) -> Path:
        """The python of the environment."""
        return REPOSITORY / self.home / "bin" / "python"


NEWEST_TORCH = "2.14.1"
MATRIX = (
    Case(".venv-torch", torch=NEWEST_TORCH),
    Case(".venv-torch", torch="2.11.0", libraries_of=NEWEST_TORCH),
    Case(".venv-torch-2.15", torch="2.15.0"),
    Case(".venv-python-3.12", python="3.12", torch=NEWEST_TORCH),
    Case(".venv-python-3.13", python="3.13", torch=NEWEST_TORCH),
)
"""What `make matrix` runs beside the pinned releases, and the oldest and the newest transformers."""


class NotInstalled(Exception):
    """A case that this machine cannot be given, in the words of what refused it."""


# -- which releases ------------------------------------------------------------------------------------


def transformers_range() -> Requirement:
    """The range that pyproject.toml asks for."""
    return next(each for each in declared(tomllib.loads(PROJECT.read_text())) if each.name == "transformers")


def oldest() -> Case:
    """The lower end of that range."""
    minor = next(each.version for each in transformers_range().specifier if each.operator == ">=")
    return Case(".venv-oldest", transformers=f"{minor}.0")


def newest() -> Case:
    """The newest release in that range that pip finds; where that is the pinned one, its environment."""
    command = ["install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
    found = json.loads(pip(Path(sys.executable), *command, str(transformers_range())))
    version = found["install"][0]["metadata"]["version"]
    case = Case(".venv-newest", transformers=version)
    return Case() if case.asked == Case().asked else case


# -- installing ----------------------------------------------------------------------------------------


def loosened(text: str, packages: Iterable[str]) -> str:
    """A constraints file without these packages and what moves with them."""
    free = [re.compile(pattern) for package in packages for pattern in MOVING[package]]
    names = [(line, line.partition("==")[0]) for line in text.splitlines()]
    return "".join(f"{line}\n" for line, name in names if not any(each.fullmatch(name) for each in free))


def install(case: Case) -> None:
    """Make the environment of a case, unless it is there as it would be made."""
    if case == Case():
        return
    home = REPOSITORY / case.home
    constraints, done = home / "constraints.txt", home / "installed.txt"
    wanted = f"{case}\n{CONSTRAINTS.read_text()}\n{PROJECT.read_text()}"
    if done.exists() and done.read_text() == wanted:
        return
    print(f"installing {case.asked} in {case.home}", flush=True)
    if not case.executable.exists():
        command([*interpreter(case.python), "-m", "venv", str(home)])
    done.unlink(missing_ok=True)
    constraints.write_text(loosened(CONSTRAINTS.read_text(), case.moved))
    exact = [f"{name}=={release}" for name, release in case.asked.items() if name in case.moved]
    if case.libraries_of:
        exact = [line.replace(f"torch=={case.torch}", f"torch=={case.libraries_of}") for line in exact]
    constrained = ("install", "-c", str(constraints))
    # Built in the environment itself, with the pinned build backend: how to constrain another one differs among pips.
    pip(case.executable, *constrained, "hatchling", "editables")
    pip(case.executable, *constrained, *exact, "--no-build-isolation", "-e", ".[dev]")
    if case.libraries_of:
        pip(case.executable, "install", "--no-deps", f"torch=={case.torch}")
    done.write_text(wanted)


def interpreter(version: str) -> list[str]:
    """The command of a Python: this one, one on the path, or one of pyenv's."""
    if version == HERE:
        return [sys.executable]
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    installed = [str(found) for found in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for found in filter(None, [shutil.which(f"python{version}"), *installed]):
        # What pyenv puts on the path refuses where that version is not the chosen one.
        if subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return [found]
    raise NotInstalled(f"no python{version} was found on this machine")


def pip(python: Path, *arguments: str) -> str:
    """What pip printed."""
    return command([str(python), "-m", "pip", "--disable-pip-version-check", *arguments])


def command(words: Sequence[str]) -> str:
    """What a command printed; its errors as `NotInstalled`."""
    found = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if found.returncode:
        raise NotInstalled(refusal(found.stdout + found.stderr))
    return found.stdout


def refusal(printed: str) -> str:
    """The lines of pip that say what refused: its errors, and which requests do not go together."""
    telling = re.compile(r"ERROR: (?!ResolutionImpossible).*|(The user requested|\S+ \S+ depends on) .*")
    return "\n".join(line.strip() for line in printed.splitlines() if telling.fullmatch(line.strip()))


# -- running -------------------------------------------------------------------------------------------


def run(case: Case) -> dict[str, Any]:
    """Install a case and run the core on it: what was there, and what became of the tests."""
    install(case)
    began = time.monotonic()
    found = pytest_run(case.executable, CORE, {})
    if "tests" not in found:
        raise NotInstalled(f"pytest ended with status {found['exit_status']} and no report")
    bad = found["failures"] + found["errors"]
    return {
        **there(case.executable),
        "passed": found["tests"] - bad - found["skipped"],
        "failed": bad,
        "skipped": found["skipped"],
        "names_of_failed": found["failed"],
        "seconds": round(time.monotonic() - began),
        "exit_status": found["exit_status"],
    }


def there(python: Path) -> dict[str, str]:
    """The releases that an environment really has."""
    program = (
        "import json, platform, sys; from importlib.metadata import version\n"
        "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in sys.argv[1:]}))"
    )
    found: dict[str, str] = json.loads(command([str(python), "-c", program, *MOVING]))
    return found


def sentence(row: Mapping[str, Any]) -> str:
    """A run in one line."""
    return (
        f"core on Python {row['python']}, torch {row['torch']}, transformers {row['transformers']}: "
        f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped in {row['seconds']} s"
    )


def matrix(cases: Iterable[Case]) -> int:
    """Run the core on each case; store what became of it, or why it was not run, before the next one."""
    status = 0
    for case in cases:
        try:
            row = run(case)
            print(sentence(row), flush=True)
        except NotInstalled as error:
            row = {"not_run": str(error)}
            print(f"not run: {case.asked}: {error}", flush=True)
        status |= row.get("exit_status", 0)
        note = {"libraries_of": case.libraries_of} if case.libraries_of else {}
        keep({"asked": case.asked, **note, "date": datetime.now(UTC).date().isoformat(), **row})
    return status


def keep(row: Mapping[str, Any]) -> None:
    """Store a row in the place of the one for the same releases."""
    rows = read(STORED)["rows"] if (RESULTS / STORED).exists() else []
    rows = [each for each in rows if each["asked"] != row["asked"]] + [row]
    store(RESULTS / STORED, {"machine": f"{platform.machine()}, {platform.system()}", "rows": rows})
    page.write()


def main(arguments: Sequence[str] | None = None) -> int:
    """One case, or all of them."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__.splitlines()[0])
    made.add_argument("what", choices=["oldest", "newest", "matrix"])
    made.add_argument(
        "--only", nargs="+", metavar="RELEASE", help="of the matrix, the cases that have one of these (3.12)"
    )
    made.add_argument(
        "--if-newer",
        action="store_true",
        help="of newest, nothing where it is the pinned release, as after `make test`",
    )
    options = made.parse_args(arguments)
    if options.what == "matrix":
        cases = dict.fromkeys([Case(), oldest(), newest(), *MATRIX])
        return matrix(each for each in cases if not options.only or set(options.only) & set(each.asked.values()))
    case = {"oldest": oldest, "newest": newest}[options.what]()
    if case == Case():
        runs = "nothing to run" if options.if_newer else f"the core runs in {case.home}"
        print(f"transformers {case.asked['transformers']}, the newest that pip finds, is the pinned one: {runs}")
        if options.if_newer:
            return 0
    row = run(case)
    print(sentence(row))
    return int(row["exit_status"])


if __name__ == "__main__":
    sys.exit(main())
