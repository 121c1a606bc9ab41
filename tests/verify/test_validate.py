"""`bridge.validate()` and `transformer-lens validate`: other engines at the same points, against the bare model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.families.models import build
from tests.support import family
from transformer_lens import TransformerBridge
from transformer_lens.cli.app import app
from transformer_lens.model_bridge.verification import engine_worker, validation
from transformer_lens.model_bridge.verification.validation import ENGINES, compared, run_engine, write_task
from transformer_lens.model_bridge.verification.verify import random_tokens

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge(family("40b", attn="eager"))


@pytest.fixture(scope="module")
def recorded(falcon: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What plain torch hooks showed, by the worker that engines run."""
    folder = tmp_path_factory.mktemp("recorded")
    write_task(falcon, folder, ["transformers"], TOKENS)
    engine_worker.main("transformers", str(folder))
    return folder


def found(bridge: TransformerBridge, folder: Path, engine: str = "transformers") -> dict[str, validation.Comparison]:
    with torch.no_grad():
        return {one.hook: one for one in compared(bridge, folder, engine, TOKENS)}


def copy_of(recorded: Path, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "transformers.json").write_text((recorded / "transformers.json").read_text())
    return load_file(recorded / "transformers.safetensors")


def test_the_bare_model_shows_the_same(falcon: TransformerBridge, recorded: Path) -> None:
    results = found(falcon, recorded)
    assert set(results) == set(falcon.hook_dict)
    missing = {hook.split(".", 2)[-1] for hook, one in results.items() if one.result == "missing"}
    assert {"ln1.hook_scale", "ln2.hook_normalized", "attn.hook_attn_scores", "attn.hook_result"} <= missing
    assert {one.result for one in results.values()} == {"equal", "missing"}
    shown = ("hook_resid_post", "hook_mlp_out", "attn.hook_k", "attn.hook_rot_q", "attn.hook_pattern", "attn.hook_z")
    assert all(results[f"blocks.1.{hook}"].result == "equal" for hook in shown)


def test_one_changed_value_is_wrong_by_what_was_changed(
    falcon: TransformerBridge, recorded: Path, tmp_path: Path
) -> None:
    values = copy_of(recorded, tmp_path)
    mlp = values["blocks.1.mlp|output"]
    largest = float(mlp.abs().max())
    mlp[0, 2, 3] += 0.5 * largest
    save_file(values, tmp_path / "transformers.safetensors")
    results = found(falcon, tmp_path)
    assert [hook for hook, one in results.items() if one.result == "wrong"] == ["blocks.1.hook_mlp_out"]
    changed = results["blocks.1.hook_mlp_out"]
    assert changed.difference == pytest.approx(0.5 * largest / float(mlp.abs().max()))
    assert changed.text == f"wrong by {changed.difference:.0e}"
    report = validation.Validation("falcon", tuple(results.values()))
    assert not report.passed
    line = next(line for line in str(report).splitlines() if line.startswith("blocks.{i}.hook_mlp_out"))
    assert line.endswith(changed.text)


def test_a_change_of_a_rounding_is_within(falcon: TransformerBridge, recorded: Path, tmp_path: Path) -> None:
    values = copy_of(recorded, tmp_path)
    values["blocks.0.mlp|output"] *= 1 + 2.0**-20
    save_file(values, tmp_path / "transformers.safetensors")
    one = found(falcon, tmp_path)["blocks.0.hook_mlp_out"]
    assert (one.result, one.difference) == ("within", pytest.approx(2.0**-20, rel=0.3))


def test_values_under_names_of_their_own(falcon: TransformerBridge, tmp_path: Path) -> None:
    """In another shape of as many numbers, with another number for masked scores; and one of another shape."""
    _, cache = falcon.run_with_cache(TOKENS)
    scores = cache["blocks.0.attn.hook_attn_scores"]
    shown = {
        "blocks.0.attn.hook_q": cache["blocks.0.attn.hook_q"].flatten(-2).clone(),
        "blocks.0.attn.hook_attn_scores": scores.masked_fill(scores < -1e30, -torch.inf),
        "blocks.0.attn.hook_k": cache["blocks.0.attn.hook_k"][:, :3].clone(),
    }
    save_file(shown, tmp_path / "transformer-lens.safetensors")
    said = {"order": list(shown), "refused": {"blocks.0.attn.hook_v": "ValueError: fused"}}
    (tmp_path / "transformer-lens.json").write_text(json.dumps(said))
    results = found(falcon, tmp_path, "transformer-lens")
    assert results["blocks.0.attn.hook_q"].result == "equal"
    assert results["blocks.0.attn.hook_attn_scores"].result == "equal"
    assert results["blocks.0.attn.hook_k"].text == "wrong by another shape"
    assert results["blocks.0.attn.hook_k"].note == "got shape [2, 3, 2, 4], expected [2, 5, 2, 4]"
    assert results["blocks.0.attn.hook_v"].text == "refused"
    assert results["blocks.0.attn.hook_v"].note == "ValueError: fused"
    assert results["blocks.0.attn.hook_z"].text == "missing"
    row = validation.Validation("falcon", (results["blocks.0.attn.hook_k"],)).to_dicts()[0]
    assert row["difference"] is None


def test_an_engine_that_ends_is_said_to_refuse(falcon: TransformerBridge, tmp_path: Path) -> None:
    ends = tmp_path / "python"
    ends.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no engine here' >&2\nexit 1\n")
    ends.chmod(0o755)
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        write_task(falcon, folder, ["interp-engine"], TOKENS)
    run_engine("interp-engine", folders, str(ends))
    for folder in folders:
        results = found(falcon, folder, "interp-engine")
        z, q = results["blocks.0.attn.hook_z"], results["blocks.0.attn.hook_q"]
        assert (z.result, z.note) == ("refused", "ModuleNotFoundError: no engine here")
        assert q.result == "missing"


def test_a_model_that_an_engine_cannot_load_is_refused(falcon: TransformerBridge, tmp_path: Path) -> None:
    write_task(falcon, tmp_path, ["transformers"], TOKENS)
    (tmp_path / "model.safetensors").unlink()
    engine_worker.main("transformers", str(tmp_path))
    one = found(falcon, tmp_path)["blocks.0.attn.hook_z"]
    assert one.result == "refused"
    assert one.note.startswith("OSError: ")


def test_names_of_experts_are_not_those_of_a_dense_mlp() -> None:
    bridge = TransformerBridge(family("mixtral"))
    assert validation.their_names(bridge, "transformer-lens", "blocks.0.mlp.hook_post") == []
    assert validation.their_names(bridge, "interp-engine", "blocks.1.mlp.hook_post") == ["mlp_act.1"]
    indices = "blocks.1.mlp.hook_expert_indices"
    assert validation.their_names(bridge, "transformer-lens", indices) == [indices]


def test_the_tables_name_hooks_that_exist() -> None:
    models = ("gpt2", "gemma2", "qwen3", "granite", "qwen3_moe")
    rows = [row.name for name in models for row in TransformerBridge(build(name)).hook_table().present()]
    for engine, asked in ENGINES.items():
        assert {*asked.get("names", ()), *asked.get("dense", ())} <= {*rows}, engine
        assert set(asked.get("dense", ())) <= set(asked.get("names", ()))
        assert ("names" in asked) != ("modules" in asked)
    assert set(ENGINES) == set(engine_worker.ENGINES)


def test_errors(falcon: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError) as unknown:
        falcon.validate(["nnterp"])
    assert unknown.value.args == (
        "validate: got the engine 'nnterp', expected one of transformers, nnsight, transformer-lens, interp-engine",
    )
    monkeypatch.setenv("TRANSFORMER_LENS_ENGINES", str(tmp_path))
    with pytest.raises(FileNotFoundError) as missing:
        falcon.validate(["nnsight"])
    version = torch.__version__.partition("+")[0]
    place = tmp_path / "nnsight"
    assert str(missing.value) == (
        f"validate: nnsight has no environment at {place}; make it with: python -m venv {place} && "
        f"{place}/bin/pip install torch=={version} nnsight==0.8.1"
    )
    monkeypatch.delenv("TRANSFORMER_LENS_ENGINES")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(
        FileNotFoundError, match="no environment at .*/.cache/transformer-lens-bridge/engines/nnsight; "
    ):
        falcon.validate(["nnsight"])
    with pytest.raises(ValueError, match="got torch.float32 of shape \\[1, 3\\], expected token ids"):
        falcon.validate(tokens=torch.zeros(3))


class TestCommand:
    def run(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["validate", *arguments])
        return result.exit_code, result.output

    @pytest.mark.parametrize("name", ["40b", "mixtral"])
    def test_the_bare_model_agrees(self, name: str, tmp_path: Path) -> None:
        family(name).save_pretrained(tmp_path)
        code, output = self.run(str(tmp_path), "--against", "transformers", "--json")
        assert code == 0, output
        rows = json.loads(output)
        # The grouped kernel of experts adds in an order that depends on where its tensors lie in memory.
        assert {row["result"] for row in rows} <= {"equal", "missing", *(["within"] if name == "mixtral" else [])}
        equal = {row["hook"] for row in rows if row["result"] in ("equal", "within")}
        inside = {"40b": "blocks.1.attn.hook_rot_k", "mixtral": "blocks.0.mlp.hook_expert_weights"}[name]
        assert {"blocks.1.attn.hook_pattern", "hook_embed", "unembed.hook_out", inside} <= equal

    def test_another_value_is_exit_status_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An environment of nnsight that answers with what was recorded, one value of it changed."""
        model, recorded, home = tmp_path / "model", tmp_path / "recorded", tmp_path / "engines" / "nnsight" / "bin"
        family("7b").save_pretrained(model)
        bridge = TransformerBridge.boot_transformers(str(model), attn_implementation="eager")
        write_task(bridge, recorded, ["transformers"], random_tokens(bridge))
        engine_worker.main("transformers", str(recorded))
        values = load_file(recorded / "transformers.safetensors")
        values["embed|output"][1, 4, 5] += values["embed|output"].abs().max()
        save_file(values, recorded / "nnsight.safetensors")
        home.mkdir(parents=True)
        (home / "python").write_text(
            f"#!/bin/sh\ncp {recorded}/nnsight.safetensors $4/\ncp {recorded}/transformers.json $4/nnsight.json\n"
        )
        (home / "python").chmod(0o755)
        monkeypatch.setenv("TRANSFORMER_LENS_ENGINES", str(tmp_path / "engines"))
        code, output = self.run(str(model), "--against", "nnsight", "--against", "transformers")
        assert code == 1
        lines = [line.split() for line in output.splitlines()]
        (line,) = [line for line in lines if "wrong" in line]
        assert (line[:3], line[4:]) == (["hook_embed", "wrong", "by"], ["equal"])

    def test_no_such_model(self) -> None:
        code, output = self.run("no/such-model")
        assert code == 1
        assert "'no/such-model' is no directory here" in output
