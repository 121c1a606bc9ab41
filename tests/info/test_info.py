"""`model_info`: counts against real models, cache sizes against caches that were filled, published figures by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    FalconConfig,
    FalconForSequenceClassification,
    FalconModel,
    MixtralConfig,
    OPTConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.adapters.test_published import CARDS
from tests.support import FAMILIES, LAYOUTS, cache_of, falcon_config, falcon_sweep, family, mixtral, tokens, with_cache
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge import ModelInfo, model_info
from transformer_lens.model_bridge.loading.info import cache_memory
from transformer_lens.model_bridge.supported_architectures import adapter_for

MB, GB = 2**20, 2**30


def memory(info: ModelInfo, precision: str, which: str = "bytes") -> int:
    return next(getattr(row, which) for row in info.weights if row.precision == precision)


def bytes_held(cache: DynamicCache) -> int:
    """What the tensors of a cache keep alive."""
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def filled(model: Any, prompt: int, new: int) -> DynamicCache:
    """transformers' own cache after a real generation: it holds all tokens but the last."""
    cache = DynamicCache(config=model.config)
    model.generate(
        tokens(1, prompt),
        **with_cache(cache),
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return cache


# -- parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    model = family(name)
    info = model_info(model.config)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert memory(info, "fp32") == sum(p.nbytes for p in model.parameters())
    assert memory(info, "bf16") == sum(p.nbytes for p in family(name, dtype=torch.bfloat16).parameters())
    assert info.architecture == type(model).__name__


def test_a_model_of_another_kind() -> None:
    for kind in (FalconModel, FalconForSequenceClassification):
        config = falcon_config(architectures=[kind.__name__], **LAYOUTS["7b"])
        info = model_info(config)
        assert info.parameters == sum(p.numel() for p in kind(config).parameters())
        assert info.architecture == kind.__name__


def test_active_parameters_are_those_that_a_token_meets() -> None:
    model = mixtral(num_local_experts=5, num_experts_per_tok=2)
    info = model_info(model.config)
    experts = model.model.layers[0].mlp.experts
    one = experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()
    assert info.active_parameters == info.parameters - 2 * 3 * one  # two layers, three idle experts in each
    dense = model_info(family("40b").config)
    assert dense.active_parameters == dense.parameters


def test_published_models_by_hand() -> None:
    """Counted with pencil and paper from the shapes: vocabulary, blocks, final norm."""
    d, vocab = 4544, 65024
    block = (d + 2 * 64) * d + d * d + 2 * 4 * d * d + 2 * d
    assert model_info("falcon-7b").parameters == vocab * d + 32 * block + 2 * d
    d = 8192
    block = (128 + 2 * 8) * 64 * d + d * d + 2 * 4 * d * d + 4 * d
    assert model_info("falcon-40b").parameters == vocab * d + 60 * block + 2 * d
    d, d_mlp, vocab = 4096, 14336, 32000
    expert = 3 * d * d_mlp
    rest = 2 * vocab * d + 32 * (2 * d * d + 2 * 8 * 128 * d + 8 * d + 2 * d) + d
    info = model_info("mixtral-8x7b")
    assert info.parameters == rest + 32 * 8 * expert
    assert info.active_parameters == rest + 32 * 2 * expert


@pytest.mark.parametrize("name", CARDS)
def test_published_shapes(name: str) -> None:
    card, info = CARDS[name], model_info(name)
    assert round(info.parameters / 1e9, 2) == card.billions
    shown = info.to_dict()
    assert {key: shown[key] for key in card.cfg if key in shown} == {k: v for k, v in card.cfg.items() if k in shown}
    assert info.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[card.config.model_type]


def test_active_parameters_of_published_mixtures() -> None:
    assert round(model_info("mixtral-8x7b").active_parameters / 1e9, 1) == 12.9
    assert round(model_info("mixtral-8x22b").active_parameters / 1e9, 1) == 39.2


# -- quantised weights -----------------------------------------------------------------------------------


def test_quantised_memory_by_hand() -> None:
    config = FalconConfig(
        vocab_size=10, hidden_size=16, num_attention_heads=2, num_hidden_layers=3, ffn_hidden_size=24, bias=True
    )
    info = model_info(config)
    # A block of the 7B layout: qkv [16 + 2 * 8, 16], dense [16, 16], up [24, 16], down [16, 24].
    matrix = [32 * 16, 16 * 16, 24 * 16, 16 * 24]
    rows = 32 + 16 + 24 + 16
    rest = 10 * 16 + 3 * (rows + 2 * 16) + 2 * 16  # embeddings; biases and norm of each block; final norm
    assert info.parameters == 3 * sum(matrix) + rest
    assert memory(info, "8-bit") == 3 * (sum(matrix) + 4 * rows) + 2 * rest
    assert memory(info, "4-bit") == 3 * (sum(matrix) // 2 + 4 * (8 + 4 + 6 + 6)) + 2 * rest
    assert memory(info, "8-bit", "bitsandbytes") == memory(info, "8-bit")


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_quantised_memory_is_what_bitsandbytes_takes(options: dict[str, Any], tmp_path: Path) -> None:
    """Mixtral's attention is made of torch.nn.Linear, its experts are not, and stay as they are."""
    model = mixtral(hidden_size=64, intermediate_size=40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )
    held = sum(p.nbytes for p in loaded.parameters())
    for parameter in loaded.parameters():
        if "load_in_8bit" in options and hasattr(parameter, "SCB"):
            held += parameter.SCB.nbytes
        if "load_in_4bit" in options and hasattr(parameter, "quant_state"):
            held += parameter.quant_state.absmax.nbytes
    info = model_info(model.config)
    precision = "8-bit" if "load_in_8bit" in options else "4-bit"
    assert memory(info, precision, "bitsandbytes") == held
    assert memory(info, precision) < held < memory(info, "bf16")


def test_quantised_experts_count_each_matrix() -> None:
    config = MixtralConfig(
        vocab_size=10, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=1,
    )  # fmt: skip
    info = model_info(config)
    attention, experts = [16 * 16, 8 * 16, 8 * 16, 16 * 16], [48 * 16, 16 * 24] * 3
    rest = 2 * 10 * 16 + 3 * 16 + 3 * 16  # embeddings and head, router, norms
    rows = (16 + 8 + 8 + 16) + 3 * (48 + 16)
    assert info.parameters == sum(attention) + sum(experts) + rest
    assert memory(info, "8-bit") == sum(attention) + sum(experts) + 4 * rows + 2 * rest
    assert memory(info, "4-bit") == (sum(attention) + sum(experts)) // 2 + 4 * (4 + 2 + 2 + 4 + 3 * (12 + 6)) + 2 * rest


# -- the KV cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_cache_is_as_large_as_transformers_fills_it(name: str, dtype: str) -> None:
    model = family(name, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    cache = filled(model, prompt=5, new=4)
    (row,) = model_info(model.config, context=[8], dtype=dtype).kv_cache
    assert bytes_held(cache) == row.allocated
    # What attention needs: the heads in it that differ from one another.
    keys = cache.layers[0].keys
    distinct = len({tuple(head.flatten().tolist()) for head in keys[0]})
    assert row.needed * keys.shape[1] == row.allocated * distinct


def test_the_cache_of_every_falcon_layout() -> None:
    count = 0
    for changes in falcon_sweep():
        config = falcon_config(**changes, num_hidden_layers=1)
        try:
            adapter = adapter_for(config)
        except ValueError:
            continue
        count += 1
        model = family("7b", **{"multi_query": True, **changes, "num_hidden_layers": 1})
        with torch.no_grad():
            cache = cache_of(model(tokens(1, 6)))
        row = cache_memory(adapter, 6, torch.float32)
        assert bytes_held(cache) == row.allocated, changes
        _, captured = TransformerBridge(model).run_with_cache(tokens(1, 6), names_filter="blocks.0.attn.hook_k")
        assert 2 * captured["k", 0].nbytes == row.needed, changes
    assert count == 98


@pytest.mark.parametrize(("prompt", "new"), [(3, 3), (7, 2), (8, 2), (12, 4), (5, 9)])
def test_a_sliding_window_bounds_the_cache(prompt: int, new: int) -> None:
    model = mixtral(sliding_window=8)
    cache = filled(model, prompt, new)
    held = prompt + new - 1
    (row,) = model_info(model.config, context=[held], dtype="fp32").kv_cache
    assert bytes_held(cache) == row.allocated
    assert sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) == row.needed
    position = 2 * 2 * 2 * 4 * 4  # keys and values, layers, key heads, d_head, bytes
    assert row.needed == position * min(held, 7)


def test_published_caches() -> None:
    """At 2,048 tokens in bf16: about 20 MB for 7B and 240 MB for 40B; transformers takes 16 and 29 times as much."""
    cases = {"falcon-7b": (16 * MB, 1), "falcon-40b": (240 * MB, 16), "falcon-180b": (320 * MB, 29)}
    for name, (needed, ratio) in cases.items():
        row = model_info(name).kv_cache[0]
        assert (row.context, row.needed, row.allocated) == (2048, needed, ratio * needed)
    text = str(model_info("falcon-7b"))
    assert "2,048   about 20 MB (16.0 MB)  about 20 MB (16.0 MB)   the same" in text
    assert "2,048   about 240 MB (240.0 MB)  3.8 GB                  16 times" in str(model_info("falcon-40b"))
    assert "29 times" in str(model_info("falcon-180b"))


# -- words -----------------------------------------------------------------------------------------------

WORDS = {
    "falcon-rw-1b": "Falcon RW layout: 32 heads, each with a key and value of its own; "
    "sequential: attention, then MLP each with a norm; ALiBi",
    "falcon-7b": "Falcon 7B layout: multi-query, 71 query heads share one key and value; "
    "parallel attention and MLP with one norm; RoPE",
    "falcon-11b": "Falcon 11B layout (new decoder architecture): 32 query heads in 8 groups that share a key and "
    "value; parallel attention and MLP with one norm; RoPE",
    "falcon-40b": "Falcon 40B and 180B layout (new decoder architecture): 128 query heads in 8 groups that share a key "
    "and value; parallel attention and MLP with two norms; RoPE",
    "mixtral-8x7b": "Mixtral: 32 query heads in 8 groups that share a key and value; "
    "sequential: attention, then 8 experts, 2 per token, each with a norm; RoPE",
}


@pytest.mark.parametrize("name", WORDS)
def test_layouts_in_words(name: str) -> None:
    assert model_info(name).layout == WORDS[name]


def test_layouts_that_nobody_published() -> None:
    own = model_info(falcon_config(alibi=True, **LAYOUTS["40b"])).layout
    assert own.startswith("Falcon, as none of the published layouts (new decoder architecture): 8 query heads in 2")
    assert own.endswith("with two norms; ALiBi")
    assert model_info(falcon_config(**LAYOUTS["rw-rope"])).layout.startswith(
        "Falcon, as none of the published layouts: "
    )
    window = model_info(MixtralConfig(sliding_window=4096)).layout
    assert window.endswith("RoPE; each token attends to the last 4,096")


def test_the_text() -> None:
    text = str(model_info("mixtral-8x7b", context=[10, 100_000], dtype="fp32"))
    assert "46.70 billion, of which 12.88 billion work on each token" in text
    assert "KV cache of one sequence in float32" in text
    assert "bitsandbytes leaves the experts in bf16 too" in text
    assert "\n100,000  " in text
    assert "bitsandbytes" not in str(model_info("falcon-7b"))


# -- where the config comes from -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_needs_no_weights(name: str, tmp_path: Path) -> None:
    config = family(name).config
    config.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json"]
    expected = {**model_info(config).to_dict(), "name": ""}
    for place in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        info = model_info(place)
        assert {**info.to_dict(), "name": ""} == expected
        assert info.name == str(place)


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_shipped_models(name: str) -> None:
    model = TransformerBridge.boot_transformers(name).original_model
    info = model_info(name)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert [row.context for row in info.kv_cache] == [model.config.max_position_embeddings]


def test_a_directory_comes_before_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family("rw").config.save_pretrained("falcon-40b")
    assert model_info("falcon-40b").d_model == 32


def test_a_hub_name_without_network_points_at_the_built_in_shape() -> None:
    with pytest.raises(OSError, match="The shape of falcon-40b is built in: ask for 'falcon-40b'"):
        model_info("nobody/falcon-40b")
    with pytest.raises(OSError) as caught:
        model_info("nobody/something-else")
    assert "built in" not in str(caught.value)


def test_the_contexts_shown_by_default() -> None:
    assert [row.context for row in model_info("falcon-7b").kv_cache] == [2048]
    assert [row.context for row in model_info("falcon-11b").kv_cache] == [2048, 8192]
    assert [row.context for row in model_info("falcon-11b", context=[7, 3]).kv_cache] == [7, 3]


def test_plain_data_goes_through_json() -> None:
    info = model_info("mixtral-8x22b", dtype=torch.float16)
    data = json.loads(json.dumps(info.to_dict()))
    assert data["cache_dtype"] == "float16"
    assert data["kv_cache"][0] == {"context": 2048, "needed": 448 * MB, "allocated": 448 * MB}
    assert [row["precision"] for row in data["weights"]] == ["fp32", "bf16", "8-bit", "4-bit"]
    assert (data["num_experts"], data["experts_per_token"]) == (8, 2)


def test_nothing_is_allocated() -> None:
    """665 GB of weights are counted in a process that could not hold them."""
    assert memory(model_info("falcon-180b"), "fp32") > 600 * GB


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [[], [0], [-1], [2.5], ["8"], [True]])
def test_contexts_that_are_none(context: list[Any]) -> None:
    with pytest.raises(ValueError, match="context: got .* expected numbers of tokens, such as"):
        model_info("falcon-7b", context=context)


@pytest.mark.parametrize("dtype", ["int8", "auto", "bf17", torch.int32])
def test_dtypes_that_are_none(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype: got "):
        model_info("falcon-7b", dtype=dtype)


def test_configs_that_cannot_run() -> None:
    with pytest.raises(ValueError, match="cannot be run by its own model class: new_decoder_architecture"):
        model_info(falcon_config(new_decoder_architecture=True, parallel_attn=False))
    with pytest.raises(ValueError, match="model_type 'opt' is not supported"):
        model_info(OPTConfig())
