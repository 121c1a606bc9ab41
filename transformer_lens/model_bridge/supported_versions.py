"""The transformers releases that this package is tested with, and the warning about a newer one.

`constraints.txt` pins the release of `NEWEST`, pyproject.toml begins its range at `OLDEST`; a test compares them.
"""

from __future__ import annotations

import warnings
from functools import cache

import transformers

OLDEST = "5.13.0"
"""The oldest release, on which the core of the suite passes (`make test-oldest`)."""
NEWEST = "5.24.0"
"""The newest release on which the whole suite passes (`make test`). Later ones of the same minor do not warn."""


def warn_of_a_newer_release() -> None:
    """Warn once per process if the installed transformers is newer than any that was tested."""
    _warn(transformers.__version__)


@cache
def _warn(installed: str) -> None:
    if minor(installed) > minor(NEWEST):
        warnings.warn(
            f"transformers {installed} is installed and this package was tested up to {NEWEST}: "
            "`bridge.verify()` tells whether all it shows of your model is right there",
            stacklevel=4,
        )


def minor(release: str) -> tuple[int, int]:
    """The first two numbers of a release: "5.24.0.dev0" -> (5, 24)."""
    first, second, *_ = release.split(".")
    return int(first), int(second)
