"""`python -m transformer_lens verify`: the table, JSON, exit codes, errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support import family
from transformer_lens.cli.app import app
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, adapter_for


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    family("40b").save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def broken(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same checkpoint, read by an adapter that exchanges its norms."""
    right = type(adapter_for(family("40b").config))

    class Broken(right):
        def variant(self):
            return {**super().variant(), "normalization_type": "RMS"}

    monkeypatch.setitem(ADAPTERS, "falcon", Broken)
    return checkpoint


def run(*arguments: str):
    return CliRunner().invoke(app, ["verify", *arguments])


def test_the_table() -> None:
    result = run("tiny-falcon", "--dtype", "bfloat16", "--attn-implementation", "eager")
    assert result.exit_code == 0, result.output
    assert "FalconForCausalLM, bfloat16, eager, cpu" in result.stdout
    assert "all passed" in " ".join(result.stdout.split())


def test_json(checkpoint: str) -> None:
    result = run(checkpoint, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["passed"] is True
    assert data["device"] == "cpu"
    assert {r["check"] for r in data["results"]} == set(data["checks"]) - {"experts"}


def test_a_failure_is_exit_status_one(broken: str) -> None:
    result = run(broken, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["passed"] is False
    assert {r["check"] for r in data["results"] if not r["passed"]} == {"norm"}
    table = run(broken)
    assert table.exit_code == 1
    assert "FAILED" in table.stdout


def test_an_error_is_a_sentence(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    debug = run(str(tmp_path), "--debug")
    assert debug.exit_code == 1
    assert isinstance(debug.exception, (ValueError, OSError))


def test_a_wrong_dtype_is_a_sentence(checkpoint: str) -> None:
    result = run(checkpoint, "--dtype", "float31")
    assert result.exit_code == 2
    assert "got 'float31', expected the name of a torch dtype" in " ".join(result.stderr.replace("│", " ").split())


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "transformer_lens", "verify", "tiny-mixtral", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["passed"] is True
    assert data["seconds"] < 60  # a second or two by itself; a busy machine may take much longer
    assert torch.get_num_threads() == 1  # this process is as it was
