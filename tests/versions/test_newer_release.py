"""A transformers newer than any that was tested is said at the first boot in a process; importing says nothing."""

import subprocess
import sys
import warnings

import pytest

from transformer_lens import TransformerBridge
from transformer_lens.model_bridge import supported_versions
from transformer_lens.model_bridge.supported_versions import NEWEST, OLDEST, minor

FIRST, SECOND = minor(NEWEST)


def said_at_boot(monkeypatch, release):
    """What two boots in one process say under a release (each test takes a release of its own)."""
    monkeypatch.setattr(supported_versions.transformers, "__version__", release)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for name in ("tiny-falcon", "tiny-mixtral"):
            TransformerBridge.boot_transformers(name)
    return [str(warning.message) for warning in found if warning.category is UserWarning]


@pytest.mark.parametrize("release", [f"{FIRST}.{SECOND + 1}.0", f"{FIRST}.{SECOND + 2}.0.dev0", f"{FIRST + 1}.0.0"])
def test_a_newer_minor_is_said_once(monkeypatch, release):
    assert said_at_boot(monkeypatch, release) == [
        f"transformers {release} is installed and this package was tested up to {NEWEST}: "
        "`bridge.verify()` tells whether all it shows of your model is right there"
    ]


@pytest.mark.parametrize("release", [NEWEST, f"{FIRST}.{SECOND}.99", OLDEST])
def test_a_tested_minor_says_nothing(monkeypatch, release):
    assert said_at_boot(monkeypatch, release) == []


def test_where_warnings_are_errors_a_second_boot_does_not_go_through(monkeypatch):
    monkeypatch.setattr(supported_versions.transformers, "__version__", "98.7.6")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match=r"transformers 98\.7\.6 is installed"):
                TransformerBridge.boot_transformers("tiny-falcon")


def test_importing_under_a_newer_release_says_nothing():
    program = "import transformers\ntransformers.__version__ = '99.0.0'\nimport transformer_lens"
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == ""
    assert "tested" not in found.stderr  # where other packages speak of themselves
