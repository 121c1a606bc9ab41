"""`python -m transformer_lens collect`: the same bytes as `bridge.collect`, JSON, errors without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from transformer_lens import TransformerBridge
from transformer_lens.cli.app import app
from transformer_lens.collect import ActivationStore

TEXTS = [f"Mary and John went to the store and gave {'Adam ' * i}a drink" for i in range(9)]


def run(*arguments: str):
    return CliRunner().invoke(app, ["collect", "tiny-falcon", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def test_the_command_is_the_method(texts: Path, tmp_path: Path) -> None:
    result = run(
        *("--data", str(texts), "--hooks", "blocks.[01].hook_resid_post", "--hooks", "blocks.2.attn.hook_z"),
        *("--out", str(tmp_path / "command"), "--store-dtype", "bfloat16", "--context-size", "16", "--batch-size", "2"),
        *("--padding", "--drop-bos", "--drop-first", "1", "--append-eos", "--shard-tokens", "64", "--max-tokens", "90"),
    )
    assert result.exit_code == 0, result.output
    assert "ActivationStore(" in result.stdout and "complete" in result.stdout
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.attn.hook_z"]
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    method = {"dtype": torch.bfloat16, "context_size": 16, "batch_size": 2, "packing": False, "drop_bos": True}
    more = {"drop_first": 1, "append_eos": True, "shard_tokens": 64, "max_tokens": 90, "progress": False}
    bridge.collect(texts, names, tmp_path / "method", **method, **more)
    for path in (tmp_path / "method").iterdir():
        assert path.read_bytes() == (tmp_path / "command" / path.name).read_bytes()


def test_other_data_and_json(texts: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    datasets.Dataset.from_list([{"body": text} for text in TEXTS]).save_to_disk(tmp_path / "saved")
    np.save(tmp_path / "ids.npy", torch.cat([bridge.to_tokens(text)[:, :9] for text in TEXTS]).numpy())
    kinds = {"saved": ("--text-key", "body"), "ids.npy": ()}
    for data, more in kinds.items():
        out = tmp_path / "out" / data
        result = run("--data", str(tmp_path / data), "--hooks", "hook_embed", "--out", str(out), "--json", *more)
        assert result.exit_code == 0, result.output
        size = sum(len(bridge.to_tokens(text)[0]) for text in TEXTS) if data == "saved" else 81
        said = json.loads(result.stdout)
        assert said == {"out": str(out), "complete": True, "tokens": size, "hooks": ["hook_embed"]}
        assert len(ActivationStore(out)) == size


def test_shared_by_processes(texts: Path, tmp_path: Path) -> None:
    common = (
        "--data",
        str(texts),
        "--hooks",
        "hook_embed",
        "--out",
        str(tmp_path / "out"),
        "--shard-tokens",
        "1",
        "--json",
    )
    first, second = (json.loads(run(*common, "--shard", part, "--batch-size", "1", "--context-size", "8").stdout)
                     for part in ("0/2", "1/2"))  # fmt: skip
    assert (first["complete"], second["complete"]) == (False, True)
    assert first["tokens"] < second["tokens"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "expected either --data PATH or --dataset NAME"),
        (("--data", "a.txt", "--dataset", "b"), 2, "expected either --data PATH or --dataset NAME"),
        (("--data", "nothing.txt"), 1, "there is no file 'nothing.txt'"),
        (("--data", "TEXTS", "--hooks", "blocks.0.attn.hook_zz"), 1, "the nearest names are"),
        (("--data", "TEXTS", "--shard", "2"), 2, "got '2', expected RANK/WORLD"),
        (("--data", "TEXTS", "--shard", "2/2"), 1, "shard: got (2, 2)"),
        (("--data", "TEXTS", "--store-dtype", "float31"), 2, "got 'float31', expected the name of a torch dtype"),
        (("--data", "TEXTS", "--store-dtype", "int32"), 1, "dtype: got torch.int32"),
        (("--data", "TEXTS", "--drop-first", "-1"), 2, "Invalid value for '--drop-first'"),
        (("--data", "TEXTS", "--batch-size", "0"), 2, "Invalid value for '--batch-size'"),
        (("--data", "TEXTS", "--shard-tokens", "0"), 2, "Invalid value for '--shard-tokens'"),
        (("--data", "TEXTS", "--max-tokens", "0"), 2, "Invalid value for '--max-tokens'"),
        (("--data", "TEXTS", "--context-size", "0"), 2, "Invalid value for '--context-size'"),
    ],
)
def test_an_error_is_a_sentence(
    arguments: tuple[str, ...], code: int, sentence: str, texts: Path, tmp_path: Path
) -> None:
    given = [str(texts) if argument == "TEXTS" else argument for argument in arguments]
    result = run("--hooks", "hook_embed", "--out", str(tmp_path / "out"), *given)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ") == (code == 1)
    assert sentence in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
