"""A round trip through a directory loses nothing, and what it writes is Hugging Face's own format."""

from __future__ import annotations

import copy
import json
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconForSequenceClassification,
    MixtralForCausalLM,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from tests.bridge.texts import tokenizer
from tests.equivalence.grid import each_layout
from tests.support import FAMILIES, falcon, falcon_config, family, mixtral, tokens
from transformer_lens import TransformerBridge
from transformer_lens.data import tiny_model_path


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("changes", each_layout(turn=0, turns=2, num_hidden_layers=1))
def test_every_falcon_layout(changes: dict[str, Any], tmp_path: Path) -> None:
    model = falcon(**changes)
    TransformerBridge(model).save_pretrained(tmp_path)
    x = tokens()
    bare = AutoModelForCausalLM.from_pretrained(tmp_path)
    same_state(model, bare)
    with torch.no_grad():
        expected = model(x).logits
        assert torch.equal(bare(x).logits, expected)
        again = TransformerBridge.from_pretrained(tmp_path)
        assert torch.equal(again(x), expected)
    same_state(model, again.original_model)
    assert again.cfg.to_dict() == {**TransformerBridge(model).cfg.to_dict(), "model_name": str(tmp_path)}


@pytest.mark.parametrize(
    "changes", [{}, {"num_local_experts": 3}, {"tie_word_embeddings": True}, {"sliding_window": 4}]
)
def test_mixtral_with_every_expert(changes: dict[str, Any], tmp_path: Path) -> None:
    model = mixtral(**changes)
    TransformerBridge(model).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        # Hugging Face's files hold each expert's matrices apart; the model holds them stacked.
        for layer in range(2):
            stacked = model.model.layers[layer].mlp.experts
            assert len([n for n in names if f"layers.{layer}." in n and ".experts." in n]) == 3 * stacked.num_experts
            for expert in range(stacked.num_experts):
                at = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                gate_up = torch.cat([file.get_tensor(f"{at}.w1.weight"), file.get_tensor(f"{at}.w3.weight")])
                assert torch.equal(gate_up, stacked.gate_up_proj[expert])
                assert torch.equal(file.get_tensor(f"{at}.w2.weight"), stacked.down_proj[expert])
    again = TransformerBridge.from_pretrained(tmp_path)
    assert type(again.original_model) is MixtralForCausalLM
    same_state(model, again.original_model)
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    x = tokens()
    with torch.no_grad():
        assert torch.equal(again(x), model(x).logits)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = family(name, dtype=dtype)
    TransformerBridge(model).save_pretrained(tmp_path)
    again = TransformerBridge.from_pretrained(tmp_path)
    assert again.cfg.dtype == dtype
    same_state(model, again.original_model)


@pytest.mark.parametrize("name", ["7b", "40b"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_untied_ones_apart(name: str, tied: bool, tmp_path: Path) -> None:
    model = family(name, tie_word_embeddings=tied)
    TransformerBridge(model).save_pretrained(tmp_path)
    again = TransformerBridge.from_pretrained(tmp_path).original_model
    shared = again.lm_head.weight is again.transformer.word_embeddings.weight
    assert shared is tied
    same_state(model, again)


def test_a_head_of_another_kind(tmp_path: Path) -> None:
    model = FalconForSequenceClassification(falcon_config(num_kv_heads=2, new_decoder_architecture=True, num_labels=3))
    model.config.pad_token_id = 0
    TransformerBridge(model).save_pretrained(tmp_path)
    again = TransformerBridge.from_pretrained(tmp_path)
    assert type(again.original_model) is FalconForSequenceClassification
    same_state(model, again.original_model)


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    bridge = TransformerBridge(family("40b"), tokenizer())
    bridge.original_model.generation_config.max_new_tokens = 7
    bridge.original_model.generation_config.do_sample = True
    bridge.original_model.generation_config.top_k = 5
    bridge.save_pretrained(tmp_path)
    again = TransformerBridge.from_pretrained(tmp_path)
    assert (
        again.original_model.generation_config.to_diff_dict() == bridge.original_model.generation_config.to_diff_dict()
    )
    assert again.original_model.generation_config.top_k == 5
    assert torch.equal(again.to_tokens("the cat"), bridge.to_tokens("the cat"))
    assert again.tokenizer.special_tokens_map == bridge.tokenizer.special_tokens_map
    assert len(again.tokenizer) == len(bridge.tokenizer)


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_shipped_models_with_their_tokenizers(name: str, tmp_path: Path) -> None:
    bridge = TransformerBridge.boot_transformers(name)
    bridge.save_pretrained(tmp_path)
    again = TransformerBridge.from_pretrained(str(tmp_path))
    text = "When Mary and John went to the store"
    assert torch.equal(again.to_tokens(text), bridge.to_tokens(text))
    with torch.no_grad():
        assert torch.equal(again(text), bridge(text))
    ours = json.loads((tmp_path / "tokenizer.json").read_text())
    assert ours == json.loads((tiny_model_path(name) / "tokenizer.json").read_text())


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_saving_over_the_directory_it_came_from(name: str, tmp_path: Path) -> None:
    family(name).save_pretrained(tmp_path)
    bridge = TransformerBridge.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.mul_(0.5)
    kept = {key: tensor.clone() for key, tensor in bridge.state_dict().items()}
    bridge.save_pretrained(tmp_path)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in bridge.state_dict().items())
    same_state(bridge.original_model, TransformerBridge.from_pretrained(tmp_path).original_model)


def test_shards(tmp_path: Path) -> None:
    model = family("mixtral")
    TransformerBridge(model).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    same_state(model, TransformerBridge.from_pretrained(tmp_path).original_model)


def test_offloaded_weights_are_saved_too(tmp_path: Path) -> None:
    model = family("40b")
    model.save_pretrained(tmp_path / "whole")
    places = {
        "transformer.word_embeddings": "cpu",
        "lm_head": "cpu",
        "transformer.h.0": "cpu",
        "transformer.h.1": "disk",
    }
    places |= {"transformer.ln_f": "cpu", "transformer.rotary_emb": "cpu"}
    bridge = TransformerBridge.from_pretrained(tmp_path / "whole", device_map=places, offload_folder=tmp_path / "off")
    assert bridge.original_model.hf_device_map["transformer.h.1"] == "disk"
    assert any(parameter.is_meta for parameter in bridge.parameters())
    with pytest.warns(UserWarning, match="offloaded"):
        bridge.save_pretrained(tmp_path / "again")
    same_state(model, TransformerBridge.from_pretrained(tmp_path / "again").original_model)


# -- what else is on while saving ---------------------------------------------------------------------


def busy(bridge: TransformerBridge) -> None:
    """Ports, stand-ins and a module in a hook's place, all on."""
    bridge.add_hook("blocks.0.attn.hook_pattern", lambda tensor, hook: 0.5 * tensor)
    bridge.add_hook("blocks.1.hook_mlp_out", lambda tensor, hook: 2 * tensor)
    bridge.add_perma_hook("hook_embed", lambda tensor, hook: 1 + tensor)
    bridge.blocks[0].hook_resid_post = torch.nn.Linear(32, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_change_neither_state_nor_files(name: str, tmp_path: Path) -> None:
    model = family(name)
    x = tokens()
    with torch.no_grad():
        expected = model(x).logits
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "bare")
    bridge = TransformerBridge(model)
    busy(bridge)
    with torch.no_grad():
        assert not torch.equal(bridge(x), expected)
    state = bridge.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())
    bridge.save_pretrained(tmp_path / "bridge")
    bare, ours = (tmp_path / "bare", tmp_path / "bridge")
    assert sorted(file.name for file in bare.iterdir()) == sorted(file.name for file in ours.iterdir())
    for file in bare.iterdir():
        assert file.read_bytes() == (ours / file.name).read_bytes(), file.name
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(ours)(x).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda bridge: pickle.loads(pickle.dumps(bridge))], ids=["deepcopy", "pickle"]
)
def test_copies_have_a_state_of_their_own(name: str, copied: Any) -> None:
    bridge = TransformerBridge(family(name))
    x = tokens()
    other = copied(bridge)
    with torch.no_grad():
        assert torch.equal(other(x), bridge(x))
        clean = bridge(x)
        other.load_state_dict({key: 0 * tensor for key, tensor in other.state_dict().items()})
        assert torch.equal(bridge(x), clean)
        assert not torch.equal(other(x), clean)
        other.load_state_dict(bridge.state_dict())
        assert torch.equal(other(x), clean)


# -- refusals ---------------------------------------------------------------------------------------------


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        TransformerBridge(family("40b")).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_hub_is_not_pushed_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="push_to_hub would leave the tokenizer out"):
        TransformerBridge(family("40b")).save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_processed_weights_are_saved_only_when_asked_for_by_name(tmp_path: Path) -> None:
    model = family("40b", tie_word_embeddings=False)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bridge = TransformerBridge(model)
    x = tokens()
    with bridge.center_unembed(), torch.no_grad():
        with pytest.raises(ValueError) as caught:
            bridge.save_pretrained(tmp_path / "refused")
        assert str(caught.value) == (
            "save_pretrained: the weights were processed (center_unembed) and are not those of the checkpoint any "
            "more; save inside `with bridge.unprocessed():`, or pass allow_processed=True"
        )
        assert not (tmp_path / "refused").exists()
        bridge.save_pretrained(tmp_path / "processed", allow_processed=True)
        assert torch.equal(TransformerBridge.from_pretrained(tmp_path / "processed")(x), bridge(x))
        with bridge.unprocessed():
            bridge.save_pretrained(tmp_path / "own")
    own = TransformerBridge.from_pretrained(tmp_path / "own").state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.items())
    bridge.save_pretrained(tmp_path / "again")


QUANTISED = [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}]


def quantised(name: str, options: dict[str, Any], directory: Path) -> TransformerBridge:
    sizes = {"intermediate_size": 64} if name == "mixtral" else {"ffn_hidden_size": 128}
    family(name, hidden_size=64, **sizes).save_pretrained(directory)
    config = BitsAndBytesConfig(**options)
    return TransformerBridge.from_pretrained(directory, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize("options", QUANTISED, ids=["8-bit", "4-bit"])
def test_a_quantised_mixtral_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    bridge = quantised("mixtral", options, tmp_path / "whole")
    attention = bridge.original_model.model.layers[0].self_attn.q_proj
    assert attention.weight.dtype in (torch.int8, torch.uint8)
    x = tokens()
    with torch.no_grad():
        expected = bridge(x)
        bridge.save_pretrained(tmp_path / "packed")
        again = TransformerBridge.from_pretrained(tmp_path / "packed")
        assert type(again.original_model.model.layers[0].self_attn.q_proj) is type(attention)
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("options", QUANTISED, ids=["8-bit", "4-bit"])
def test_a_quantised_falcon_could_not_be_read_back(options: dict[str, Any], tmp_path: Path) -> None:
    bridge = quantised("40b", options, tmp_path / "whole")
    with pytest.raises(ValueError, match="could not read 8 quantised layers back \\(transformer.h.0.self_attention"):
        bridge.save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    # This is why: written all the same, transformers does not find its own numbers again.
    bridge.original_model.save_pretrained(tmp_path / "bare")
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "bare", ignore_mismatched_sizes=True)
    layer = bare.transformer.h[0].mlp.dense_h_to_4h
    assert type(layer).__name__ == "FalconLinear"


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"add_adapter of transformers {transformers.__version__} asks for peft {MIN_PEFT_VERSION}; runs with it",
)
@pytest.mark.parametrize("options", QUANTISED, ids=["8-bit", "4-bit"])
def test_an_adapter_on_a_quantised_falcon_is_saved_alone(options: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig

    bridge = quantised("40b", options, tmp_path / "whole")
    bridge.original_model.add_adapter(LoraConfig(target_modules=["query_key_value"], r=2, init_lora_weights=False))
    bridge.save_pretrained(tmp_path / "adapter")
    assert all("lora" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_peft_model_saves_its_adapter_alone(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    family(name).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    target = "q_proj" if name == "mixtral" else "query_key_value"
    bridge = TransformerBridge(get_peft_model(model, LoraConfig(target_modules=[target], r=2, init_lora_weights=False)))
    bridge.save_pretrained(tmp_path / "adapter")
    assert all("lora" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    x = tokens()
    with torch.no_grad():
        bridge.original_model.eval()
        again = TransformerBridge.from_pretrained(tmp_path / "adapter")
        assert torch.equal(again(x), bridge(x))
        assert not torch.equal(again(x), TransformerBridge.from_pretrained(tmp_path / "base")(x))
