"""`hooks`: the rows of the hook table, from the config alone, filtered; as JSON what the API gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import family
from transformer_lens import TransformerBridge
from transformer_lens.cli.app import app
from transformer_lens.cli.hooks import matches
from transformer_lens.data import tiny_model_path
from transformer_lens.model_bridge import skeleton_bridge


def run(*arguments: str):
    return CliRunner().invoke(app, ["hooks", *arguments], env={"COLUMNS": "120"})


def rows(*arguments: str) -> list[dict]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["hooks"]


@pytest.mark.parametrize("model", ["tiny-falcon", "tiny-mixtral"])
def test_json_is_the_table_of_the_loaded_model(model: str) -> None:
    bridge = TransformerBridge.boot_transformers(model)
    result = run(model, "--json")
    data = json.loads(result.stdout)
    assert data["hooks"] == json.loads(json.dumps(bridge.hook_table().to_dicts()))
    assert (data["model"], data["n_layers"]) == (model, bridge.cfg.n_layers)
    assert data["architecture"] == bridge.cfg.architecture


@pytest.mark.parametrize("layout", ["7b", "11b", "40b", "rw", "rw-rope"])
def test_a_config_is_enough(layout: str, tmp_path: Path) -> None:
    model = family(layout)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    expected = TransformerBridge(model)
    found = skeleton_bridge(tmp_path)
    assert [vars(row) for row in found.hook_table()] == [vars(row) for row in expected.hook_table()]
    assert list(found.hook_dict) == list(expected.hook_dict)
    assert {p.device.type for p in found.parameters()} == {"meta"}
    assert rows(str(tmp_path / "config.json")) == rows(str(tmp_path))


def test_no_weight_is_read(tmp_path: Path) -> None:
    shutil.copy(tiny_model_path("tiny-falcon") / "config.json", tmp_path)
    assert rows(str(tmp_path)) == rows("tiny-falcon")


def test_the_table_has_shapes_and_reasons() -> None:
    text = " ".join(run("falcon-40b").stdout.split())
    assert "falcon-40b: FalconForCausalLM, 60 layers" in text
    assert "batch pos kv_head=8 d_head=64" in text
    assert "absent: attention and MLP read the same stream side by side" in text


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["attn.hook_rot"], {"blocks.{i}.attn.hook_rot_q", "blocks.{i}.attn.hook_rot_k"}),
        (["blocks.3.hook_resid_p*"], {"blocks.{i}.hook_resid_pre", "blocks.{i}.hook_resid_post"}),
        (["attn.?.hook_out"], {f"blocks.{{i}}.attn.hook_{x}" for x in "qkv"}),
        (["ln_final.hook_scale", "hook_embed"], {"ln_final.hook_scale", "hook_embed"}),
        (["hook_resid_mid"], {"blocks.{i}.hook_resid_mid"}),
    ],
)
def test_patterns(patterns: list[str], names: set[str]) -> None:
    assert {row["name"] for row in rows("tiny-falcon", *patterns)} == names


def test_an_absent_name_has_its_reason() -> None:
    (row,) = rows("tiny-falcon", "hook_resid_mid")
    assert row["kind"] == "absent"
    assert row["absent"].startswith("attention and MLP read the same stream")


@pytest.mark.parametrize("pattern", ["blocks.4.attn.hook_q", "attn.hook_qq", "HOOK_Q"])
def test_a_pattern_that_nothing_matches_fails_even_beside_others(pattern: str) -> None:
    result = run("tiny-falcon", "hook_z", pattern)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"no hook of this model matches {pattern!r}; it has 4 layers, and the nearest names are " in result.stderr


def test_a_layer_stands_for_all_of_them_only_at_its_place() -> None:
    assert matches("blocks.3", "blocks.{i}.hook_resid_pre", 4)
    assert not matches("blocks.4", "blocks.{i}.hook_resid_pre", 4)
    assert not matches("blocks.1", "hook_embed", 4)
    assert not matches("blocks.1x", "blocks.{i}.hook_resid_pre", 4)


def test_code_of_a_repository_is_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}), encoding="utf-8"
    )
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert "trust_remote_code" in result.stderr
