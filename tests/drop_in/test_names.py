"""What scripts and packages written for TransformerLens import and call: `../shared/clients.md`, ranked there."""

import importlib

import numpy as np
import pytest
import torch

import transformer_lens
from tests.support import falcon, mixtral
from transformer_lens import (
    ActivationCache,
    FactoredMatrix,
    HookedTransformer,
    HookedTransformerConfig,
    TransformerBridge,
)
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.utilities import (
    batch_addmm,
    get_attention_mask,
    get_device,
    get_tokens_with_bos_removed,
    tokenize_and_concatenate,
    vanilla_addmm,
)


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-mixtral")


TEXT = "When Mary and John went to the store, John gave a drink to"

# -- import paths --------------------------------------------------------------------------------------

PATHS = {
    "HookedTransformer": ("HookedTransformer", "HookedTransformerConfig", "Loss", "Output", "HookedRootModule"),
    "HookedTransformerConfig": ("HookedTransformerConfig",),
    "ActivationCache": ("ActivationCache",),
    "FactoredMatrix": ("FactoredMatrix",),
    "HookedRootModule": ("HookedRootModule",),
    "config": ("TransformerBridgeConfig", "HookedTransformerConfig", "TransformerLensConfig"),
    "components": ("MLP", "Attention", "TransformerBlock", "LayerNorm", "LayerNormPre", "RMSNorm", "Embed", "Unembed"),
    "components.abstract_attention": ("AbstractAttention",),
    "components.mlps.can_be_used_as_mlp": ("CanBeUsedAsMLP",),
    "loading_from_pretrained": ("OFFICIAL_MODEL_NAMES", "MODEL_ALIASES", "get_official_model_name"),
    "past_key_value_caching": ("HookedTransformerKeyValueCache", "HookedTransformerKeyValueCacheEntry"),
    "utils": ("USE_DEFAULT_VALUE", "get_device", "tokenize_and_concatenate", "test_prompt"),
    "model_bridge": ("TransformerBridge",),
}


@pytest.mark.parametrize("path", PATHS)
def test_import_paths(path):
    module = importlib.import_module(f"transformer_lens.{path}")
    assert [name for name in PATHS[path] if not hasattr(module, name)] == []


def test_a_module_of_a_classs_name_does_not_hide_the_class():
    for path in PATHS:
        importlib.import_module(f"transformer_lens.{path}")
    assert all(
        isinstance(getattr(transformer_lens, name), type) for name in transformer_lens.__all__ if name[0].isupper()
    )
    assert transformer_lens.ActivationCache is ActivationCache and transformer_lens.FactoredMatrix is FactoredMatrix


def test_components_are_what_their_names_say(bridge):
    from transformer_lens import components as c

    block = bridge.blocks[0]
    assert isinstance(block, c.TransformerBlock) and isinstance(block.attn, c.Attention)
    assert isinstance(block.mlp, c.MoE) and isinstance(block.ln1, c.RMSNorm) and isinstance(bridge.embed, c.Embed)


# -- HookedTransformer -----------------------------------------------------------------------------------


def test_every_bridge_is_one_and_subclasses_are_their_own(bridge):
    class WithSAEs(HookedTransformer):
        def saes(self):
            return []

    model = WithSAEs.from_pretrained("tiny-falcon")
    assert type(model) is WithSAEs and model.saes() == [] and isinstance(model, HookedTransformer)
    assert isinstance(bridge, HookedTransformer) and not isinstance(bridge, WithSAEs)
    assert not isinstance(bridge.original_model, HookedTransformer)


def test_loading_processes_by_default_and_keeps_log_probabilities(bridge):
    model = HookedTransformer.from_pretrained("tiny-mixtral")
    assert model.processed == ("fold_ln", "center_unembed", "fold_value_biases")
    plain = bridge(TEXT).log_softmax(-1)
    torch.testing.assert_close(model(TEXT).log_softmax(-1), plain, atol=2e-4, rtol=0)
    assert torch.equal(model.blocks[1].ln1.w, torch.ones(128))
    untouched = HookedTransformer.from_pretrained_no_processing("tiny-mixtral")
    assert untouched.processed == () and torch.equal(untouched(TEXT), bridge(TEXT))
    model.undo_processing()
    assert torch.equal(model(TEXT), bridge(TEXT))


def test_keywords_that_ask_for_nothing_are_accepted_and_others_refused():
    kept = {"checkpoint_index": None, "n_devices": 1, "refactor_factored_attn_matrices": False, "move_to_device": True}
    model = HookedTransformer.from_pretrained("tiny-falcon", **kept, default_prepend_bos=False, first_n_layers=2)
    assert model.cfg.default_prepend_bos is False and model.cfg.n_layers == 2 and model.cfg.model_name == "tiny-falcon"
    for asked in ({"checkpoint_value": 1000}, {"n_devices": 2}, {"refactor_factored_attn_matrices": True}):
        with pytest.raises(ValueError, match=next(iter(asked))):
            HookedTransformer.from_pretrained("tiny-falcon", **asked)
    with pytest.raises(TypeError, match="the nearest are"):
        HookedTransformer.from_pretrained("tiny-falcon", fold_layernorm=True)


def test_a_model_that_is_there_is_wrapped():
    hf_model = mixtral()
    model = HookedTransformer.from_pretrained("mistralai/Mixtral-8x7B-v0.1", hf_model=hf_model, fold_ln=False)
    assert model.original_model is hf_model and model.cfg.model_name == "mistralai/Mixtral-8x7B-v0.1"
    assert HookedTransformer(hf_model).original_model is hf_model


def test_the_padding_side_is_the_tokenizers():
    model = HookedTransformer.from_pretrained("tiny-falcon", default_padding_side="left")
    assert (
        model.tokenizer.padding_side == "left"
        and model.to_tokens(["Mary", "Mary and"])[0, 0] == model.tokenizer.pad_token_id
    )


# -- models of numbers alone -----------------------------------------------------------------------------

SIZES = {"n_layers": 2, "d_model": 24, "n_heads": 4, "n_ctx": 40, "d_vocab": 50, "seed": 3}
RMS = {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"}
KINDS = {
    "GPT2LMHeadModel": {"act_fn": "gelu_new", "d_mlp": 56},
    "GPTNeoXForCausalLM": {
        "positional_embedding_type": "rotary",
        "parallel_attn_mlp": True,
        "rotary_dim": 2,
        "act_fn": "gelu",
    },
    "LlamaForCausalLM": {**RMS, "n_key_value_heads": 2, "d_head": 10, "rotary_base": 500.0},
    "MixtralForCausalLM": {**RMS, "num_experts": 5, "experts_per_token": 3, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("architecture", KINDS)
def test_a_config_becomes_the_model_it_describes(architecture):
    asked = HookedTransformerConfig(**SIZES, **KINDS[architecture])
    model = TransformerBridge.boot_native(asked)
    assert model.cfg.architecture == architecture and not model.original_model.training
    for name in (*SIZES, *KINDS[architecture], "d_head", "d_mlp", "n_key_value_heads", "eps"):
        if name != "seed":
            assert getattr(model.cfg, name) == getattr(asked, name), name
    tokens = torch.arange(6)[None]
    assert torch.equal(model(tokens), TransformerBridge.boot_native(asked.to_dict())(tokens))
    assert not torch.equal(model(tokens), TransformerBridge.boot_native({**asked.to_dict(), "seed": 4})(tokens))
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, model(tokens)) and cache["pattern", 1].shape == (1, 4, 6, 6)


def test_a_seed_leaves_the_callers_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    TransformerBridge.boot_native(HookedTransformerConfig(**SIZES))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attn_only": True}, {"normalization_type": "LNPre"}, {"n_key_value_heads": 2}, {"d_head": 7},
        {"num_experts": 4},
        {"act_fn": "solu"}, {"attn_scale": 3.0}, {"output_logits_soft_cap": 30.0}, {"d_vocab_out": 7},
        {"rotary_dim": 4}, {"d_vocab": -1}, {"gated_mlp": True}, {"sliding_window": 4},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_what_no_family_has_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransformerBridge.boot_native(HookedTransformerConfig(**{**SIZES, **wrong}))


def test_what_is_no_config_is_refused(bridge):
    with pytest.raises(TypeError, match="boot_native: got"):
        TransformerBridge.boot_native(3)
    with pytest.raises(TypeError, match="n_head"):
        TransformerBridge.boot_native({**SIZES, "n_head": 2})
    with pytest.raises(ValueError, match="neither n_heads nor d_head"):
        HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=4)


def test_the_vocabulary_may_be_the_tokenizers(bridge):
    sizes = {key: value for key, value in SIZES.items() if key != "d_vocab"}
    model = HookedTransformer(HookedTransformerConfig(**sizes), bridge.tokenizer)
    assert model.cfg.d_vocab == len(bridge.tokenizer) and model("Mary and John").shape == (1, 5, len(bridge.tokenizer))


def test_what_a_config_says_about_the_bridge_is_kept():
    kept = HookedTransformer({**SIZES, "use_attn_result": True, "model_name": "mine"}).cfg
    assert kept.use_attn_result and kept.model_name == "mine"
    assert TransformerBridge.boot_native(SIZES).cfg.model_name == "native"
    assert TransformerBridge.boot_native(SIZES, model_name="toy").cfg.model_name == "toy"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"first_n_layers": 0}, "first_n_layers"),
        ({"first_n_layers": 0, "hf_model": falcon()}, "first_n_layers"),
        ({"default_prepend_bos": "yes"}, "default_prepend_bos"),
    ],
)
def test_what_loading_cannot_heed_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        HookedTransformer.from_pretrained("tiny-falcon", **options)


def test_a_device_is_left_alone_where_nothing_is_moved():
    model = HookedTransformer.from_pretrained_no_processing("tiny-falcon", device="meta", move_to_device=False)
    assert model.cfg.device == torch.device("cpu")


def test_a_model_that_is_not_moved_stays_where_it_was_made():
    model = HookedTransformer({**SIZES, "device": "meta"}, move_to_device=False)
    assert model.cfg.device == torch.device("cpu") and model.W_U.any()


# -- cfg -------------------------------------------------------------------------------------------------


def test_fields_of_cfg(bridge):
    cfg = bridge.cfg
    assert isinstance(cfg, HookedTransformerConfig) and cfg.original_architecture == "MixtralForCausalLM"
    assert cfg.tokenizer_name and cfg.attn_scale == 32**0.5 and cfg.output_logits_soft_cap == -1.0
    assert cfg.rotary_base == bridge.config.rope_parameters["rope_theta"] and cfg.rotary_dim == 32
    assert cfg.use_normalization_before_and_after is False and cfg.ungroup_grouped_query_attention is False
    assert TransformerBridge(falcon(alibi=True)).cfg.rotary_dim is None
    assert BridgeConfig.from_dict(cfg.to_dict()) == cfg


def test_the_tokenizers_name_follows_it():
    model = TransformerBridge.boot_transformers("tiny-falcon")
    tokenizer, model.tokenizer = model.tokenizer, None
    assert model.cfg.tokenizer_name is None
    model.tokenizer = tokenizer
    assert model.cfg.tokenizer_name == tokenizer.name_or_path


# -- booting ---------------------------------------------------------------------------------------------


def test_keywords_of_boot():
    model = TransformerBridge.boot_transformers(
        "tiny-mixtral", {"num_hidden_layers": 2}, "cpu", torch.bfloat16, n_ctx=20
    )
    assert (model.cfg.n_layers, model.cfg.dtype, model.cfg.n_ctx) == (2, torch.bfloat16, 20)
    named = TransformerBridge.boot_transformers(model_name="tiny-mixtral", trust_remote_code=False, load_weights=True)
    assert named.cfg.model_name == "tiny-mixtral"
    with pytest.raises(TypeError, match="twice"):
        TransformerBridge.boot_transformers("tiny-mixtral", model_name="tiny-mixtral")
    with pytest.raises(ValueError, match="n_ctx"):
        TransformerBridge.boot_transformers("tiny-mixtral", n_ctx=10**6)


def test_random_weights_instead_of_the_checkpoints(bridge):
    torch.manual_seed(0)
    model = TransformerBridge.boot_transformers("tiny-mixtral", load_weights=False, attn_implementation="eager")
    assert model.W_E.shape == bridge.W_E.shape and not torch.equal(model.W_E, bridge.W_E)
    assert model.original_model.config._attn_implementation == "eager" and not model.original_model.training
    assert model.to_tokens("Mary").tolist() == bridge.to_tokens("Mary").tolist()
    with pytest.raises(TypeError, match="load_weights=False"):
        TransformerBridge.boot_transformers("tiny-mixtral", load_weights=False, output_loading_info=True)
    with pytest.raises(ValueError, match="load_weights=False"):
        TransformerBridge.boot_transformers(hf_model=bridge.original_model, load_weights=False)


# -- weights, streams, losses, hooks ---------------------------------------------------------------------


def test_params_are_the_models_weights_under_their_names(bridge):
    found = bridge.get_params()
    assert found["blocks.2.attn.W_Q"].data_ptr() == bridge.blocks[2].attn.W_Q.data_ptr()
    assert found["blocks.1.mlp.W_in"].shape == (4, 128, 64) and found["unembed.W_U"].shape == (128, bridge.cfg.d_vocab)
    assert found["blocks.2.ln2.w"].shape == (128,) and found["ln_final.w"].shape == (128,)
    assert bridge.tl_parameters().keys() == found.keys() == dict(bridge.tl_named_parameters()).keys()
    assert "pos_embed.W_pos" in TransformerBridge.boot_native(HookedTransformerConfig(**SIZES)).get_params()


def test_input_to_embed_and_back(bridge):
    stream, tokens, positions, mask = bridge.input_to_embed(["Mary", TEXT], padding_side="left")
    assert positions is None and mask[0].sum() == bridge.to_tokens("Mary").shape[1]
    whole = bridge(["Mary", TEXT], padding_side="left")
    torch.testing.assert_close(bridge(stream, start_at_layer=0, attention_mask=mask), whole)
    assert torch.equal(tokens, bridge.to_tokens(["Mary", TEXT], padding_side="left"))


def test_loss_fn(bridge):
    tokens = bridge.to_tokens(TEXT)
    logits = bridge(tokens)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(bridge.loss_fn(logits, tokens), expected)
    assert bridge.loss_fn(logits, tokens, per_token=True).shape == (1, tokens.shape[1] - 1)


def test_caching_hooks_stay_until_reset(bridge):
    kept = bridge.add_caching_hooks(["blocks.1.hook_resid_post", "blocks.0.mlp.hook_expert_indices"], incl_bwd=True)
    bridge(TEXT)
    _, cache = bridge.run_with_cache(TEXT)
    bridge(TEXT, return_type="loss").backward()
    bridge.reset_hooks()
    bridge.original_model.zero_grad()
    assert torch.equal(kept["blocks.1.hook_resid_post"], cache["resid_post", 1])
    assert "blocks.1.hook_resid_post_grad" in kept and "blocks.0.mlp.hook_expert_indices_grad" not in kept
    kept.clear()
    bridge(TEXT)
    assert not kept and bridge.list_hooks() == list(bridge.hook_dict)


def test_what_saelens_reads(bridge):
    assert bridge.hook_aliases["blocks.0.attn.q.hook_out"] == "blocks.0.attn.hook_q"
    assert (
        bridge._collect_hook_aliases_from_registry() == bridge.hook_aliases
        and bridge._hook_registry == bridge.hook_dict
    )


def test_newer_spellings_of_places(bridge):
    same = {
        "blocks.1.attn.hook_q_input": "blocks.1.hook_q_input",
        "blocks.1.attn.hook_attn_in": "blocks.1.hook_attn_in",
        "blocks.1.ln1.hook_in": "blocks.1.hook_resid_pre",
        "blocks.1.ln2.hook_in": "blocks.1.hook_mlp_in",
    }
    assert {alias: bridge.canonical_name(alias) for alias in same} == same
    block = bridge.blocks[1]
    assert block.hook_out is block.hook_resid_post and block.hook_in is block.hook_resid_pre
    _, cache = bridge.run_with_cache(TEXT, names_filter=["blocks.0.attn.hook_q_input", "blocks.0.ln1.hook_in"])
    assert list(cache) == ["blocks.0.hook_resid_pre", "blocks.0.hook_q_input"]


# -- generation ------------------------------------------------------------------------------------------


def test_input_tokens_and_logits_come_along(bridge):
    text, cache, tokens = bridge.generate(
        TEXT, 2, do_sample=False, return_input_tokens=True, return_cache=True, names_filter="blocks.0.hook_resid_post"
    )
    assert torch.equal(tokens, bridge.to_tokens(TEXT)) and text.startswith(TEXT) and len(cache) == 1
    output = bridge.generate(TEXT, 2, do_sample=False, output_logits=True)
    assert len(output.logits) == 2 and output.sequences.shape[1] == tokens.shape[1] + 2
    assert bridge.hf_generate(TEXT, 2, do_sample=False, output_scores=True).scores[0].shape == (1, bridge.cfg.d_vocab)


def test_arguments_by_position_are_transformerlenss(bridge):
    greedy = bridge.generate(TEXT, 3, True, None, False)
    assert greedy == bridge.generate(TEXT, max_new_tokens=3, eos_token_id=None, do_sample=False)


def test_a_frequency_penalty_takes_off_what_it_says():
    model = TransformerBridge(falcon())
    tokens = torch.tensor([[5, 5, 5, 6]])
    plain = model(tokens)[0, -1]
    out = model.generate(tokens, 1, freq_penalty=2.5, output_logits=True, output_scores=True, top_k=0, temperature=1.0)
    expected = plain.clone()
    expected[5] -= 7.5
    expected[6] -= 2.5
    torch.testing.assert_close(out.scores[0][0], expected)
    with pytest.raises(ValueError, match="freq_penalty"):
        model.generate(tokens, 1, freq_penalty=1.0, do_sample=False)
    with pytest.raises(ValueError, match="freq_penalty"):
        model.generate(tokens, 1, freq_penalty=-1.0)


def test_a_frequency_penalty_counts_no_padding():
    model = TransformerBridge(falcon())
    tokens, mask = torch.tensor([[5, 5, 5, 6], [7, 8, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"output_scores": True, "return_dict_in_generate": True, "temperature": 1.0, "top_k": 0}
    plain = model.generate(tokens, 1, attention_mask=mask, output_logits=True, do_sample=True, **options)
    out = model.generate(tokens, 1, attention_mask=mask, freq_penalty=2.0, **options)
    expected = plain.logits[0].clone()
    for row, seen in enumerate(([5, 6], [5, 6, 7, 8])):
        expected[row, seen] -= 2.0
    torch.testing.assert_close(out.scores[0], expected)


def test_a_stream_in_portions(bridge):
    whole = bridge.generate(TEXT, 5, do_sample=False, eos_token_id=None)
    portions = list(bridge.generate_stream(TEXT, 5, 2, do_sample=False, eos_token_id=None))
    assert len(portions) == 3 and TEXT + "".join(portions) == whole
    ids = bridge.to_tokens([TEXT, TEXT])
    assert [p.shape for p in bridge.generate_stream(ids, 5, 3, do_sample=False, eos_token_id=None)] == [(2, 3), (2, 2)]
    pairs = list(bridge.generate_stream([TEXT, TEXT], 4, 3, do_sample=False, eos_token_id=None))
    assert [len(texts) for texts in pairs] == [2, 2]


# -- utilities -------------------------------------------------------------------------------------------


def test_products_and_device():
    a, b, c = torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)
    torch.testing.assert_close(vanilla_addmm(a, b, c), a + b @ c)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(batch_addmm(a, c, x), x @ c + a)
    assert isinstance(get_device(), str) and torch.device(get_device())


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_and_rows_without_their_beginning(bridge, side):
    tokenizer = bridge.tokenizer
    ids = bridge.to_tokens(["Mary", TEXT], padding_side=side)
    mask = get_attention_mask(tokenizer, ids, prepend_bos=True, padding_side=side)
    assert torch.equal(mask.bool(), bridge.input_and_mask(["Mary", TEXT], padding_side=side).mask.bool())
    without = get_tokens_with_bos_removed(tokenizer, ids, padding_side=side)
    assert torch.equal(without, bridge.to_tokens(["Mary", TEXT], padding_side=side, prepend_bos=False))


def test_padding_that_is_the_beginning_token():
    class Tokenizer:
        padding_side, pad_token_id, bos_token_id = "left", 1, 1

    ids = torch.tensor([[1, 1, 7], [1, 8, 9]])
    right = torch.tensor([[8, 1, 7, 1, 1], [8, 7, 7, 9, 9]])
    assert get_attention_mask(Tokenizer, right, False, "right").tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert get_attention_mask(Tokenizer, ids, prepend_bos=True).tolist() == [[0, 1, 1], [1, 1, 1]]
    assert get_attention_mask(Tokenizer, ids, prepend_bos=False).tolist() == [[0, 0, 1], [0, 1, 1]]
    assert get_attention_mask(None, ids, prepend_bos=True).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_texts_in_rows_of_one_length(bridge):
    datasets = pytest.importorskip("datasets")
    texts = ["Mary and John", "John gave a drink to Mary", TEXT] * 4
    made = tokenize_and_concatenate(datasets.Dataset.from_dict({"text": texts}), bridge.tokenizer, max_length=10)
    rows = torch.stack(list(made["tokens"]))
    assert rows.shape[1] == 10 and (rows[:, 0] == bridge.tokenizer.bos_token_id).all()
    eos = bridge.tokenizer.eos_token_id
    joined = [t for text in texts for t in [*bridge.to_tokens(text, prepend_bos=False)[0].tolist(), eos]]
    assert rows[:, 1:].flatten().tolist() == joined[: rows[:, 1:].numel()]
    assert np.array(made.with_format("numpy")["tokens"]).shape == rows.shape


def test_the_registry_does_not_ask_a_subclass():
    """SAELens's bridge builds its `hook_dict` from the registry, and writes into it."""

    class WithFeatures(TransformerBridge):
        @property
        def hook_dict(self):
            return {name: point for name, point in self._hook_registry.items() if "result" not in name}

    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    names = set(bridge.hook_dict)
    bridge.__class__ = WithFeatures
    bridge._hook_registry["blocks.0.hook_resid_post"] = torch.nn.Identity()
    assert set(bridge.hook_dict) == {name for name in names if "result" not in name}
    assert isinstance(bridge._hook_registry["blocks.0.hook_resid_post"], transformer_lens.HookPoint)
    assert bridge.run_with_cache(TEXT)[1]["q", 0].shape[-1] == bridge.cfg.d_head


def test_kv_cache_names(bridge):
    assert transformer_lens.HookedTransformerKeyValueCache.__module__ == "transformer_lens.past_key_value_caching"
    from transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache

    cache = HookedTransformerKeyValueCache.init_cache(bridge.cfg, "cpu", 1)
    first, rest = bridge.to_tokens(TEXT).split([4, 11], dim=1)
    bridge(first, past_key_values=cache)
    torch.testing.assert_close(bridge(rest, past_key_values=cache), bridge(TEXT)[:, 4:], atol=1e-4, rtol=1e-4)


def test_names_of_models():
    from transformer_lens.loading_from_pretrained import (
        OFFICIAL_MODEL_NAMES,
        get_num_params_of_pretrained,
        get_official_model_name,
        get_pretrained_model_config,
    )

    assert {"tiny-falcon", "falcon-40b", "mixtral-8x7b"} <= set(OFFICIAL_MODEL_NAMES)
    assert get_official_model_name("any/name") == "any/name"
    assert get_pretrained_model_config("falcon-40b").n_key_value_heads == 8
    assert get_pretrained_model_config("tiny-mixtral").num_experts == 4
    loaded = TransformerBridge.boot_transformers("tiny-mixtral")
    assert get_num_params_of_pretrained("tiny-mixtral") == sum(p.numel() for p in loaded.parameters())
    with pytest.raises(TypeError, match="unknown keyword 'n_layers'"):
        get_pretrained_model_config("falcon-40b", n_layers=3)
