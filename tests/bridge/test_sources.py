"""Loading runs no code of a checkpoint and reads no pickle unless asked for by name; what does not fit is refused."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils as dynamic
from safetensors.torch import load_file, save_file

from tests.support import FAMILIES, family, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.loading import load
from transformer_lens.model_bridge.loading.load import load_config

OUT = "transformer.h.1.mlp.dense_4h_to_h.weight"


class Malicious:
    """A pickle that makes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def model() -> torch.nn.Module:
    return family("40b")


@pytest.fixture
def pickled(model: torch.nn.Module, tmp_path: Path) -> Path:
    """A directory whose only weights are an honest pytorch_model.bin."""
    model.config.architectures = ["FalconForCausalLM"]
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    return tmp_path / "pickled"


def plant(path: Path, trace: Path, model: torch.nn.Module) -> None:
    torch.save({**model.state_dict(), "payload": Malicious(trace)}, path)


def test_the_planted_pickle_is_dangerous(model: torch.nn.Module, tmp_path: Path) -> None:
    plant(tmp_path / "bad.bin", tmp_path / "trace", model)
    torch.load(tmp_path / "bad.bin", weights_only=False)
    assert (tmp_path / "trace").exists()


def test_a_pickle_is_refused_and_not_read(pickled: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    plant(pickled / "pytorch_model.bin", tmp_path / "trace", model)
    with pytest.raises(ValueError) as caught:
        TransformerBridge.from_pretrained(pickled)
    assert str(caught.value) == (
        f"{pickled}: its weights are pickled (pytorch_model.bin), and a pickle can run any code when it is read; "
        "use a safetensors copy, or if you trust its source pass allow_pickle=True"
    )
    for keyword in ("use_safetensors", "weights_only"):
        with pytest.raises(ValueError, match=f"{keyword}=False asks for pickled weights.* pass allow_pickle=True"):
            TransformerBridge.from_pretrained(pickled, **{keyword: False})
    # Not read at all, whatever is in it.
    (pickled / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="its weights are pickled"):
        TransformerBridge.from_pretrained(pickled)
    assert not (tmp_path / "trace").exists()


def test_an_allowed_pickle_is_loaded_and_still_may_not_run_code(
    pickled: Path, model: torch.nn.Module, tmp_path: Path
) -> None:
    x = tokens()
    with torch.no_grad():
        expected = model(x).logits
        assert torch.equal(TransformerBridge.from_pretrained(pickled, allow_pickle=True)(x), expected)
        either = TransformerBridge.from_pretrained(pickled, allow_pickle=True, use_safetensors=False)
        assert torch.equal(either(x), expected)
    plant(pickled / "pytorch_model.bin", tmp_path / "trace", model)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TransformerBridge.from_pretrained(pickled, allow_pickle=True)
    assert not (tmp_path / "trace").exists()


def test_safetensors_beside_a_pickle_are_taken(pickled: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(pickled)
    plant(pickled / "pytorch_model.bin", tmp_path / "trace", model)
    x = tokens()
    with torch.no_grad():
        for options in ({}, {"allow_pickle": True}):
            assert torch.equal(TransformerBridge.from_pretrained(pickled, **options)(x), model(x).logits)
    with pytest.raises(ValueError, match="use_safetensors=False asks for pickled weights"):
        TransformerBridge.from_pretrained(pickled, use_safetensors=False)
    assert not (tmp_path / "trace").exists()


def test_sharded_pickles(pickled: Path, model: torch.nn.Module) -> None:
    (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "pytorch_model-00001-of-00001.bin")}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pickled \\(pytorch_model-00001-of-00001.bin\\)"):
        TransformerBridge.from_pretrained(pickled)
    with torch.no_grad():
        x = tokens()
        assert torch.equal(TransformerBridge.from_pretrained(pickled, allow_pickle=True)(x), model(x).logits)


def test_a_safetensors_index_that_leads_to_a_pickle(pickled: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    """transformers 5.23 follows such an index even under use_safetensors=True."""
    plant(pickled / "pytorch_model.bin", tmp_path / "trace", model)
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "pytorch_model.bin")}
    (pickled / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its weights are pickled \\(pytorch_model.bin\\)"):
        TransformerBridge.from_pretrained(pickled)
    assert not (tmp_path / "trace").exists()


def test_a_pickle_that_was_not_seen_is_not_read_either(
    pickled: Path, model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`has_file` says no when the connection fails; transformers is told to take safetensors alone as well."""
    plant(pickled / "pytorch_model.bin", tmp_path / "trace", model)
    monkeypatch.setattr(load, "has_file", lambda *args, **kwargs: False)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        TransformerBridge.from_pretrained(pickled)
    assert not (tmp_path / "trace").exists()


def test_a_config_that_names_a_pickle(model: torch.nn.Module, tmp_path: Path) -> None:
    """The one pickle that transformers takes from `transformers_weights`; it comes before model.safetensors."""
    model.save_pretrained(tmp_path / "named")
    write_config(tmp_path / "named", transformers_weights="adapter_model.bin")
    plant(tmp_path / "named" / "adapter_model.bin", tmp_path / "trace", model)
    with pytest.raises(ValueError, match=r"its weights are pickled \(adapter_model.bin\)"):
        TransformerBridge.from_pretrained(tmp_path / "named")
    assert not (tmp_path / "trace").exists()


def test_a_variant_has_files_of_its_own(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.half.bin")
    TransformerBridge.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.half.bin\)"):
        TransformerBridge.from_pretrained(tmp_path, variant="half")


def test_a_subfolder(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "inner")
    assert TransformerBridge.from_pretrained(tmp_path, subfolder="inner").cfg.n_layers == 2
    (tmp_path / "inner" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "inner" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="its weights are pickled"):
        TransformerBridge.from_pretrained(tmp_path, subfolder="inner")


def adapter(model: torch.nn.Module, directory: Path, base: Path) -> Path:
    """A directory with a LoRA of this model and nothing else."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(base)
    model.name_or_path = str(base)
    adapted = get_peft_model(model, LoraConfig(target_modules=["query_key_value"], r=2, init_lora_weights=False))
    adapted.save_pretrained(directory)
    return directory


def test_an_adapter_alone(model: torch.nn.Module, tmp_path: Path) -> None:
    directory = adapter(model, tmp_path / "adapter", tmp_path / "base")
    names = {file.name for file in directory.iterdir()}
    assert "adapter_model.safetensors" in names and "config.json" not in names
    x = tokens()
    with torch.no_grad():
        assert torch.equal(TransformerBridge.from_pretrained(directory)(x), model(x).logits)
        plain = TransformerBridge.from_pretrained(tmp_path / "base")(x)
        assert not torch.equal(model(x).logits, plain)
    weights = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(weights, directory / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"pickled \(adapter_model.bin\)"):
        TransformerBridge.from_pretrained(directory)


def test_an_adapter_that_names_no_model(model: torch.nn.Module, tmp_path: Path) -> None:
    directory = adapter(model, tmp_path / "adapter", tmp_path / "base")
    described = directory / "adapter_config.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "base_model_name_or_path": ""}))
    with pytest.raises(ValueError, match="its adapter_config.json names no base_model_name_or_path"):
        TransformerBridge.from_pretrained(directory)


def test_an_adapter_of_a_pickled_model(model: torch.nn.Module, tmp_path: Path) -> None:
    directory = adapter(model, tmp_path / "adapter", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(family("40b").state_dict(), tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{tmp_path / 'base'}: its weights are pickled"):
        TransformerBridge.from_pretrained(directory)


# -- code in the repository -----------------------------------------------------------------------------

CODE = """
import os
from transformers import FalconConfig, FalconForCausalLM

os.mkdir({trace!r})


class OtherConfig(FalconConfig):
    pass


class OtherModel(FalconForCausalLM):
    config_class = OtherConfig
"""


@pytest.fixture
def with_code(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Falcon whose repository holds code, as the published ones do; the code leaves a trace when it runs."""
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model.save_pretrained(tmp_path / "code")
    write_config(
        tmp_path / "code", auto_map={"AutoConfig": "other.OtherConfig", "AutoModelForCausalLM": "other.OtherModel"}
    )
    (tmp_path / "code" / "other.py").write_text(CODE.format(trace=str(tmp_path / "trace")))
    return tmp_path / "code"


def write_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}])
def test_a_known_family_runs_with_transformers_own_code(with_code: Path, options: dict, tmp_path: Path) -> None:
    bridge = TransformerBridge.from_pretrained(with_code, **options)
    assert type(bridge.original_model).__module__ == "transformers.models.falcon.modeling_falcon"
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}])
def test_a_family_that_only_its_code_knows_is_refused(with_code: Path, options: dict, tmp_path: Path) -> None:
    write_config(with_code, model_type="other")
    with pytest.raises(ValueError) as caught:
        TransformerBridge.from_pretrained(with_code, **options)
    assert str(caught.value) == (
        f"{with_code}: its config is read by code in its repository (other.OtherConfig), which is not run unless asked "
        "for; read that code, and if you trust it pass trust_remote_code=True"
    )
    assert not (tmp_path / "trace").exists()


def test_code_runs_when_asked_for_by_name_and_is_warned_of(with_code: Path, model, tmp_path: Path) -> None:
    write_config(with_code, architectures=["OtherModel"])
    with pytest.warns(UserWarning, match="OtherModel is code of its repository.* run bridge.verify()"):
        bridge = TransformerBridge.from_pretrained(with_code, trust_remote_code=True)
    assert (tmp_path / "trace").exists()
    assert type(bridge.original_model).__name__ == "OtherModel"
    x = tokens()
    with torch.no_grad():
        assert torch.equal(bridge(x), model(x).logits)


def test_the_code_of_a_tokenizer_is_not_run(with_code: Path, tmp_path: Path) -> None:
    code = {"AutoTokenizer": ["other.OtherConfig", None]}
    (with_code / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": code, "tokenizer_class": "OtherTokenizer"})
    )
    assert TransformerBridge.from_pretrained(with_code).tokenizer is None
    assert not (tmp_path / "trace").exists()


# -- what does not fit ----------------------------------------------------------------------------------


def rewrite(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_not_made_up(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop(OUT))
    with pytest.raises(ValueError) as caught:
        TransformerBridge.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} does not fit FalconForCausalLM\n  missing: {OUT!r}\n"
        "strict=False loads it all the same: what is missing is then random"
    )
    loaded = TransformerBridge.from_pretrained(tmp_path, strict=False).state_dict()
    same = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, loaded[key])}
    assert set(loaded) - same == {OUT}


def test_a_weight_too_many_is_not_dropped(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({OUT.replace("weight", "lora"): torch.ones(2)}))
    with pytest.raises(ValueError, match=f"unexpected: '{OUT[:-6]}lora' \\(nearest in the model: '{OUT}'\\)"):
        TransformerBridge.from_pretrained(tmp_path)
    TransformerBridge.from_pretrained(tmp_path, strict=False)
    # Fewer layers than the checkpoint has were asked for by name, so what is left over is no surprise.
    assert TransformerBridge.from_pretrained(tmp_path, num_hidden_layers=1).cfg.n_layers == 1


def test_a_weight_of_another_shape(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({OUT: torch.ones(3, 4)}))
    with pytest.raises(ValueError, match=rf"shape: '{OUT}' is \[3, 4\], expected \[32, 48\]"):
        TransformerBridge.from_pretrained(tmp_path)
    TransformerBridge.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_the_report_is_not_handed_out(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="output_loading_info: "):
        TransformerBridge.from_pretrained(tmp_path, output_loading_info=True)


def test_options_of_loading_do_not_go_with_a_loaded_model(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="allow_pickle cannot be applied to an hf_model that is already loaded"):
        TransformerBridge.boot_transformers(hf_model=model, allow_pickle=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_comes_from_a_directory_or_a_file(name: str, tmp_path: Path) -> None:
    model = family(name)
    model.config.save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert load_config(place).hidden_size == model.config.hidden_size


def test_a_subclass_comes_back_as_itself() -> None:
    class Mine(TransformerBridge):
        """A researcher's own."""

    assert type(Mine.from_pretrained("tiny-falcon")) is Mine
