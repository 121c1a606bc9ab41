"""`python -m benchmarks.pinned`: all that this package needs is in constraints.txt, and installed as pinned there.

Every target of the Makefile that installs something ends with it. `make constraints` writes the file.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
CONSTRAINTS = REPOSITORY / "constraints.txt"
PROJECT = REPOSITORY / "pyproject.toml"


def pins(text: str) -> dict[str, str]:
    """The version that a constraints file pins on this machine, by the normalised name of the package.

    >>> pins("Jinja2==3.1.6\\ncolorama==0.4.6 ; python_version < '3'")
    {'jinja2': '3.1.6'}
    """
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = [each for each in map(Requirement, filter(None, lines)) if applies(each.marker)]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in found}


def declared(project: Mapping[str, Any]) -> list[Requirement]:
    """What pyproject.toml asks for on this machine: at run time, in every extra, and to build the package."""
    extras = project["project"]["optional-dependencies"].values()
    lines = [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]
    found = [Requirement(line) for line in [*lines, *project["build-system"]["requires"]]]
    return [each for each in found if applies(each.marker)]


def needed(roots: Sequence[Requirement]) -> Iterator[tuple[Requirement, str]]:
    """Each requirement and who has it, of these and of what they need in turn, as far as it is installed here."""
    left = [(root, "pyproject.toml") for root in roots]
    seen = set()
    while left:
        requirement, owner = left.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        yield requirement, owner
        if key not in seen:
            seen.add(key)
            left += [(each, requirement.name) for each in requirements_of(requirement)]


def requirements_of(requirement: Requirement) -> list[Requirement]:
    """What an installed package needs here with the extras asked for; nothing where it is not installed."""
    try:
        lines = distribution(requirement.name).requires or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [each for each in found if applies(each.marker, requirement.extras)]


def applies(marker: Marker | None, extras: Iterable[str] = ()) -> bool:
    """Whether a requirement counts on this machine with any of these extras, or without one."""
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def problems(pinned: Mapping[str, str], project: Mapping[str, Any]) -> list[str]:
    """A sentence for each package that is not pinned, not pinned as asked, or not installed as pinned."""
    found = {}
    ours = canonicalize_name(project["project"]["name"])
    for requirement, owner in needed(declared(project)):
        name = canonicalize_name(requirement.name)
        version = pinned.get(name)
        if name == ours:
            continue
        if version is None:
            found[name] = f"{name}, which {owner} needs, is not pinned: run `make constraints`"
        elif not requirement.specifier.contains(version, prereleases=True):
            asked = f"{owner} asks for {requirement.specifier}"
            found[name] = f"{name} is pinned to {version} and {asked}: run `make constraints`"
        elif installed(name) not in (None, version):
            there = f"{installed(name)} is installed"
            found[name] = f"{name} is pinned to {version} and {there}: run `make setup`, or `make clean` first"
    return [found[name] for name in sorted(found)]


def installed(name: str) -> str | None:
    """The installed release without its local part ("2.13.0" for "2.13.0+cpu"), or `None`."""
    try:
        return distribution(name).version.partition("+")[0]
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    wrong = problems(pins(CONSTRAINTS.read_text()), tomllib.loads(PROJECT.read_text()))
    sys.exit("\n".join(f"constraints.txt: {line}" for line in wrong) if wrong else 0)
