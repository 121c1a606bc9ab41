"""`python -m transformer_lens info`: tables, JSON, exit codes, errors without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import falcon_config, family
from transformer_lens.cli.app import app
from transformer_lens.model_bridge import model_info


def run(*arguments: str):
    return CliRunner().invoke(app, ["info", *arguments], env={"COLUMNS": "200"})


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_published_sizes() -> None:
    small, large = run("falcon-7b"), run("falcon-40b", "--context", "2048", "--dtype", "bf16")
    assert small.exit_code == large.exit_code == 0
    assert "2,048 about 20 MB (16.0 MB) about 20 MB (16.0 MB) the same" in words(small.stdout)
    assert "2,048 about 240 MB (240.0 MB) 3.8 GB 16 times" in words(large.stdout)
    assert "new decoder architecture" in large.stdout
    assert "41.30 billion" in large.stdout


def test_contexts_and_dtype() -> None:
    result = run("mixtral-8x7b", "--context", "2_048, 8192", "--dtype", "fp32")
    assert "KV cache of one sequence in float32" in result.stdout
    assert "8,192 2.0 GB 2.0 GB the same" in words(result.stdout)


def test_json_is_all_of_it(tmp_path: Path) -> None:
    family("40b").config.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        result = run(str(place), "--json", "--context", "8,64")
        assert result.exit_code == 0
        assert json.loads(result.stdout) == json.loads(json.dumps(model_info(place, context=[8, 64]).to_dict()))


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("falcon-7b", "--context", "2048,many"), 2, "got '2048,many', expected numbers of tokens"),
        (("falcon-7b", "--context", ""), 2, "got '', expected numbers of tokens"),
        (("falcon-7b", "--dtype", "float31"), 2, "got 'float31', expected the name of a torch dtype"),
        (("falcon-7b", "--context", "0"), 1, "error: context: got [0], expected numbers of tokens"),
        (("falcon-7b", "--dtype", "int8"), 1, "error: dtype: got 'int8', expected a floating-point one"),
        (("/nowhere/at/all",), 1, "error: /nowhere/at/all: there is no such directory or file"),
        (("gpt2-xl",), 1, "error: gpt2-xl is on this machine neither as a directory nor in Hugging Face's cache, and"),
    ],
)
def test_an_error_is_a_sentence(arguments: tuple[str, ...], code: int, sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert sentence in words(result.stderr.replace("│", " "))
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert isinstance(run(*arguments, "--debug").exception, (ValueError, OSError))


def test_a_config_that_cannot_run_is_the_adapters_sentence(tmp_path: Path) -> None:
    falcon_config(new_decoder_architecture=True, parallel_attn=False).save_pretrained(tmp_path)
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert (
        "FalconConfig cannot be run by its own model class: new_decoder_architecture runs attention and MLP"
        in words(result.stderr)
    )


def test_the_largest_model_without_its_weights() -> None:
    result = run("falcon-180b", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["parameters"] > 178e9
