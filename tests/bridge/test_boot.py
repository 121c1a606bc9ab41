"""`boot_transformers`: from a directory, or around a model that is there."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconForSequenceClassification,
    MixtralForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

from tests.bridge.texts import tokenizer
from tests.families.models import build
from tests.support import MIXTRAL_SMALL, falcon_config, family, perturbed, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge import model_info, skeleton_bridge


@pytest.fixture(params=["40b", "rw", "mixtral"])
def saved(request, tmp_path):
    """A model and the directory it was saved to."""
    model = family(request.param)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_directory_without_a_tokenizer(saved, caplog):
    model, path = saved
    with caplog.at_level(logging.WARNING, "transformer_lens.model_bridge.loading.load"):
        bridge = TransformerBridge.boot_transformers(path)
    assert "the bridge takes token ids only" in caplog.text
    assert bridge.tokenizer is None
    assert type(bridge.original_model) is type(model)
    assert not bridge.original_model.training
    x = tokens()
    assert torch.equal(bridge(x), model(x).logits)
    assert bridge.cfg.model_name == str(path)
    assert bridge.cfg.architecture == type(model).__name__


@pytest.mark.core
def test_a_directory_with_a_tokenizer(saved):
    model, path = saved
    tokenizer().save_pretrained(path)
    bridge = TransformerBridge.boot_transformers(str(path))
    ids = bridge.to_tokens("the cat")
    assert bridge.to_string(ids) == ["<s> the cat"]
    assert torch.equal(bridge("the cat"), model(ids).logits)
    other = tokenizer(padding_side="left")
    assert TransformerBridge.boot_transformers(path, tokenizer=other).tokenizer is other


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (FalconForSequenceClassification, falcon_config(num_labels=3, pad_token_id=0)),
        (
            MixtralForSequenceClassification,
            MixtralForSequenceClassification.config_class(**MIXTRAL_SMALL, num_labels=3, pad_token_id=0),
        ),
    ],
)
def test_a_classifier_comes_back_as_one(kind, config, tmp_path):
    model = perturbed(kind(config))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(tmp_path)
    assert type(bridge.original_model) is kind
    x = tokens()
    assert torch.equal(bridge(x), model(x).logits)
    assert bridge.cfg.d_vocab_out == 3


def test_dtype(saved):
    model, path = saved
    assert TransformerBridge.boot_transformers(path).cfg.dtype == torch.float32
    for dtype in (torch.bfloat16, "bfloat16"):
        bridge = TransformerBridge.boot_transformers(path, dtype=dtype)
        assert bridge.cfg.dtype == torch.bfloat16
        assert all(p.dtype == torch.bfloat16 for p in bridge.parameters())
    # The checkpoint's own dtype is the default.
    model.to(torch.bfloat16).save_pretrained(path)
    assert TransformerBridge.boot_transformers(path).cfg.dtype == torch.bfloat16


def test_loading_options_reach_transformers(tmp_path):
    family("40b").save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(tmp_path, attn_implementation="eager")
    assert bridge.original_model.config._attn_implementation == "eager"
    bridge = TransformerBridge.boot_transformers(tmp_path, num_hidden_layers=1)
    assert bridge.cfg.n_layers == 1


def test_around_a_model():
    model = family("7b")
    bridge = TransformerBridge.boot_transformers(hf_model=model, tokenizer=tokenizer())
    assert bridge.original_model is model
    assert bridge.to_tokens("cat").shape == (1, 2)
    named = TransformerBridge.boot_transformers("my-falcon", hf_model=model, dtype="float64")
    assert named.cfg.model_name == "my-falcon"
    assert named.tokenizer is None
    assert named.cfg.dtype == next(model.parameters()).dtype == torch.float64
    moved = TransformerBridge.boot_transformers(hf_model=family("7b"), device="meta", dtype=torch.float16)
    assert (moved.cfg.device.type, moved.cfg.dtype) == ("meta", torch.float16)


def test_a_subclass_boots_as_itself():
    class Mine(TransformerBridge):
        pass

    assert type(Mine.boot_transformers(hf_model=family("7b"))) is Mine


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"revision": "main"}, "revision"),
        ({"device_map": "auto"}, "device_map"),
        ({"attn_implementation": "eager", "revision": "x"}, "attn_implementation, revision"),
        ({"quantization_config": object()}, "quantization_config"),
        ({"token": "x"}, "token"),
    ],
)
def test_options_that_a_loaded_model_cannot_take(options, named):
    with pytest.raises(ValueError, match=f"boot_transformers: {named} cannot be applied to an hf_model that is alre"):
        TransformerBridge.boot_transformers(hf_model=family("7b"), **options)


def test_neither_a_name_nor_a_model():
    with pytest.raises(ValueError, match="got neither a name nor hf_model, expected one of them"):
        TransformerBridge.boot_transformers()


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        TransformerBridge.boot_transformers(tmp_path / "nowhere")


def test_a_file_is_no_directory_and_a_config_is_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json is a file, expected a hub name, or a directory"):
        TransformerBridge.boot_transformers(tmp_path / "config.json")
    with pytest.raises(ValueError, match="its config is a list, expected a JSON object"):
        skeleton_bridge(tmp_path / "config.json")
    with pytest.raises(OSError, match="there is no such directory or file"):
        TransformerBridge.boot_transformers("/dev/null")


def test_an_empty_directory(tmp_path):
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        TransformerBridge.boot_transformers(tmp_path)


def test_another_family_is_refused_by_name(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16, "ffn_dim": 8}
    model = OPTForCausalLM(OPTConfig(**sizes))
    sentence = "model_type 'opt' is not supported; of the 85 families that are"
    with pytest.raises(ValueError, match=sentence):
        TransformerBridge(model)
    model.config.save_pretrained(tmp_path)
    # Refused from the config alone: there are no weights in this directory.
    with pytest.raises(ValueError, match=sentence):
        TransformerBridge.boot_transformers(tmp_path)


def test_a_configuration_that_cannot_run_is_refused_before_weights_are_read(tmp_path):
    falcon_config(new_decoder_architecture=True, parallel_attn=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FalconConfig cannot be run by its own model class: new_decoder_architecture"):
        TransformerBridge.boot_transformers(tmp_path)


def test_alibi_under_eager_is_warned_of(tmp_path):
    family("rw").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="ALiBi"):
        TransformerBridge.boot_transformers(tmp_path, attn_implementation="eager")


# -- no keyword is swallowed ----------------------------------------------------------------------------


def test_the_old_name_of_dtype(saved):
    _, path = saved
    for given in ({"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        bridge = TransformerBridge.from_pretrained(path, **given)
        assert {p.dtype for p in bridge.parameters()} == {torch.bfloat16}
    assert TransformerBridge.boot_transformers(path, torch_dtype="auto").cfg.dtype == torch.float32
    around = TransformerBridge.boot_transformers(hf_model=family("7b"), torch_dtype=torch.float16)
    assert around.cfg.dtype == torch.float16
    with pytest.raises(
        TypeError, match="got 'dtype' and 'torch_dtype', which are both the dtype of the weights; pass on"
    ):
        TransformerBridge.boot_transformers(path, dtype=torch.float32, torch_dtype=torch.float32)


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [
        ("atn_implementation", "attn_implementation"),
        ("device_mapp", "device_map"),
        ("num_hidden_layer", "num_hidden_layers"),
        ("revison", "revision"),
        ("subfoldr", "subfolder"),
        ("trust_remote_cod", "trust_remote_code"),
        ("allow_pickles", "allow_pickle"),
        ("low_cpu_mem_usage", "output_hidden_states"),  # dropped by transformers itself
        ("_fast_init", "strict"),
    ],
)
def test_a_keyword_that_nothing_takes_is_refused_with_the_nearest(saved, keyword, nearest):
    model, path = saved
    for where in ({"name_or_path": path}, {"hf_model": model}):
        with pytest.raises(TypeError, match=rf"boot_transformers: got an unknown keyword '{keyword}'; .*{nearest}"):
            TransformerBridge.boot_transformers(**where, **{keyword: "eager"})


def test_none_as_the_value_of_a_configs_field_takes_effect(tmp_path):
    family("mixtral", sliding_window=3).save_pretrained(tmp_path)
    assert TransformerBridge.boot_transformers(tmp_path).cfg.sliding_window == 3
    bridge, x = TransformerBridge.boot_transformers(tmp_path, sliding_window=None), tokens()
    assert bridge.cfg.sliding_window is None
    bare = MixtralForSequenceClassification.config_class.from_pretrained(tmp_path)
    bare.sliding_window = None
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, config=bare).eval()(x).logits
        assert torch.equal(bridge(x), expected)


def test_defaults_may_be_said_of_a_model_that_is_there():
    bridge = TransformerBridge.boot_transformers(hf_model=family("7b"), trust_remote_code=False, device_map=None)
    assert bridge.cfg.n_layers == 2


def test_a_skeleton_takes_what_says_where_files_are_and_nothing_else(tmp_path):
    config = falcon_config()
    config.save_pretrained(tmp_path)
    for model in (tmp_path, config, "falcon-40b"):
        for function in (skeleton_bridge, model_info):
            with pytest.raises(TypeError, match="loading: got an unknown keyword 'num_hidden_layers'; the nearest are"):
                function(model, num_hidden_layers=1)
            function(model, revision=None)


def test_overrides_of_the_config_count_even_as_none_and_come_once(tmp_path):
    build("gemma2").save_pretrained(tmp_path)
    options = {"hf_config_overrides": {"final_logit_softcapping": None}}
    assert TransformerBridge.boot_transformers(tmp_path, **options).config.final_logit_softcapping is None
    with pytest.raises(TypeError, match="got num_hidden_layers also in hf_config_overrides"):
        TransformerBridge.boot_transformers(tmp_path, {"num_hidden_layers": 1}, num_hidden_layers=2)
    with pytest.raises(TypeError, match="unknown keyword 'nonsense'"):
        TransformerBridge.boot_transformers(tmp_path, {"nonsense": None})
