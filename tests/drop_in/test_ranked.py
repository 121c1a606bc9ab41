"""Every name of the ranked table of `../shared/clients.md`, row by row, and the contracts below it, by consequence."""

import importlib
import inspect
from typing import Any

import pytest
import torch

from tests.families.models import build
from tests.support import falcon
from transformer_lens import (
    ActivationCache,
    FactoredMatrix,
    HookedRootModule,
    HookedTransformer,
    HookedTransformerConfig,
    HookPoint,
    TransformerBridge,
)
from transformer_lens.model_bridge.sources import build_bridge_from_module

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"

MODULES = {
    "": ("HookedTransformer", "HookedTransformerConfig", "HookedTransformerKeyValueCache"),
    "HookedTransformer": ("HookedTransformer", "Loss", "Output", "HookedRootModule", "USE_DEFAULT_VALUE"),
    "config": ("TransformerBridgeConfig",),
    "model_bridge.sources": ("build_bridge_from_module",),
    "ActivationCache": ("ActivationCache",),
    "FactoredMatrix": ("FactoredMatrix",),
    "HookedRootModule": ("HookedRootModule",),
    "utilities": ("get_attention_mask", "get_tokens_with_bos_removed", "tokenize_and_concatenate", "USE_DEFAULT_VALUE"),
    "utilities.addmm": ("batch_addmm", "vanilla_addmm"),
    "loading_from_pretrained": ("OFFICIAL_MODEL_NAMES", "get_official_model_name"),
    "components": ("MLP", "Attention", "TransformerBlock", "LayerNorm", "RMSNorm", "Embed", "Unembed"),
    "components.abstract_attention": ("AbstractAttention",),
    "components.mlps.can_be_used_as_mlp": ("CanBeUsedAsMLP",),
    "past_key_value_caching": ("HookedTransformerKeyValueCache", "HookedTransformerKeyValueCacheEntry"),
}
CFG = (
    *("tokenizer_name", "original_architecture", "output_logits_soft_cap", "use_normalization_before_and_after"),
    *("ungroup_grouped_query_attention", "attn_scale", "n_layers", "d_model", "device", "n_heads", "model_name"),
    *("dtype", "d_vocab", "d_head", "d_mlp", "n_ctx", "n_key_value_heads", "parallel_attn_mlp", "normalization_type"),
    *("d_vocab_out", "seed", "use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in", "act_fn"),
    *("positional_embedding_type", "attn_only"),
)
HOOKS = {
    **{f"blocks.1.attn.hook_{part}_input": f"blocks.1.hook_{part}_input" for part in "qkv"},
    "blocks.1.attn.hook_attn_in": "blocks.1.hook_attn_in",
    "ln_final.hook_in": "blocks.2.hook_resid_post",
    "blocks.1.ln1.hook_in": "blocks.1.hook_resid_pre",
    "blocks.0.hook_out": "blocks.0.hook_resid_post",
}
METHODS = (
    *("get_params", "input_to_embed", "tl_parameters", "tl_named_parameters", "loss_fn", "add_caching_hooks"),
    *("to_single_str_token", "list_hooks", "hook_aliases", "_hook_registry", "_collect_hook_aliases_from_registry"),
    *("cfg", "run_with_cache", "to_tokens", "run_with_hooks", "tokenizer", "blocks", "enable_compatibility_mode"),
    *("hook_dict", "parameters", "eval", "to_str_tokens", "unembed", "ln_final", "to_string", "to", "hooks"),
    *("reset_hooks", "add_hook", "generate", "embed", "to_single_token", "W_O", "named_parameters", "named_modules"),
    *("W_E", "original_model", "W_U", "set_use_attn_result", "b_U", "W_V", "mod_dict", "hook_embed", "W_Q", "W_K"),
    *("W_out", "get_caching_hooks", "load_state_dict", "tokens_to_residual_directions", "get_token_position", "QK"),
    *("OV", "hf_generate", "generate_stream", "all_head_labels", "set_ungroup_grouped_query_attention"),
)
KEYWORDS = {
    "enable_compatibility_mode": ("refactor_factored_attn_matrices",),
    "generate": (
        *("return_input_tokens", "freq_penalty", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"),
        *("verbose", "use_past_kv_cache", "stop_at_eos", "return_type", "output_logits"),
    ),
    "generate_stream": ("verbose", "max_tokens_per_yield"),
    "boot_transformers": (
        *("model_name", "device", "dtype", "n_ctx", "load_weights", "hf_config_overrides", "hf_model"),
        "from_pretrained_kwargs",
    ),
    "run_with_cache": (
        *("names_filter", "return_type", "stop_at_layer", "remove_batch_dim", "attention_mask", "return_cache_object"),
        *("prepend_bos", "incl_bwd", "pos_slice"),
    ),
    "run_with_hooks": (
        *("fwd_hooks", "bwd_hooks", "return_type", "clear_contexts", "loss_per_token", "stop_at_layer"),
        "reset_hooks_end",
    ),
    "hooks": ("fwd_hooks", "bwd_hooks"),
    "to_tokens": ("prepend_bos", "padding_side", "truncate", "move_to_device"),
    "add_hook": ("is_permanent", "dir"),
}
OF_CACHE = {
    **dict.fromkeys(
        ("get_full_resid_decomposition", "stack_neuron_results", "get_neuron_results"), ("project_output_onto",)
    ),
    "stack_head_results": ("layer", "pos_slice", "return_labels"),
    "accumulated_resid": ("incl_mid", "return_labels"),
}


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-mixtral")


@pytest.mark.parametrize("path", MODULES)
def test_modules(path):
    module: Any = importlib.import_module(f"transformer_lens.{path}".rstrip("."))
    assert [name for name in MODULES[path] if not hasattr(module, name)] == []


def test_attributes(bridge):
    assert [name for name in CFG if not hasattr(bridge.cfg, name)] == []
    assert [name for name in METHODS if not hasattr(bridge, name)] == []


def test_hooks(bridge):
    assert {alias: bridge.canonical_name(alias) for alias in HOOKS} == HOOKS
    assert bridge.blocks[0].hook_out is bridge.hook_dict["blocks.0.hook_resid_post"]


def test_keywords(bridge):
    for method, names in KEYWORDS.items():
        has = inspect.signature(getattr(bridge, method)).parameters
        missing = [name for name in names if name not in has and "from_pretrained_kwargs" not in has]
        assert missing == [] or any(p.kind is p.VAR_KEYWORD for p in has.values()), (method, missing)
    for method, names in OF_CACHE.items():
        assert set(names) <= set(inspect.signature(getattr(ActivationCache, method)).parameters), method


# -- models that are there already -------------------------------------------------------------------------


def test_a_bridge_around_a_module(bridge):
    module = bridge.original_model
    made = build_bridge_from_module(
        module, "MixtralForCausalLM", hf_config=module.config, tokenizer=bridge.tokenizer, dtype=torch.float32
    )
    assert made.original_model is module and made.cfg.model_name == "external"
    assert torch.equal(made(TEXT), bridge(TEXT))
    asked = HookedTransformerConfig.from_dict({**bridge.cfg.to_dict(), "use_attn_result": True})
    named = build_bridge_from_module(module, "MixtralForCausalLM", tl_config=asked, device="cpu", model_name="mine")
    assert named.cfg.use_attn_result and named.cfg.model_name == "mine"
    assert ("blocks.0.attn.hook_result" in named.run_with_cache(torch.tensor([[1, 2]]))[1]) is True


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one of hf_config and tl_config"),
        ({"dtype": torch.bfloat16, "hf": True}, "got dtype=torch.bfloat16, and the module has torch.float32"),
        ({"device": "meta", "hf": True}, "got device=device"),
        ({"layers": 7}, "got n_layers=7, and the module has 3"),
        ({"architecture": "LlamaForCausalLM", "hf": True}, "and the module has 'MixtralForCausalLM'"),
    ],
)
def test_what_is_not_so_of_a_module_is_refused(bridge, options, said):
    module, given = bridge.original_model, dict(options)
    if given.pop("hf", False):
        given["hf_config"] = module.config
    if "layers" in given:
        given["tl_config"] = {**bridge.cfg.to_dict(), "n_layers": given.pop("layers")}
    with pytest.raises(ValueError, match=said):
        build_bridge_from_module(module, given.pop("architecture", "MixtralForCausalLM"), **given)


def test_a_module_of_its_own_hooks_lists_them_itself():
    """SAELens's proxies of other models fill `hook_dict` and `mod_dict` in their own `setup`."""

    class Proxy(HookedRootModule):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.setup()

        def setup(self):
            self.mod_dict, self.hook_dict = {}, {}
            for name, module in self.inner.named_children():
                point = HookPoint()
                point.name = name
                module.register_forward_hook(lambda m, i, o, point=point: point(o))
                self.hook_dict[name] = self.mod_dict[name] = point

        def forward(self, x):
            return self.inner(x)

    inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    proxy, x = Proxy(inner), torch.randn(5, 3)
    output, cache = proxy.run_with_cache(x)
    assert torch.equal(cache["0"], inner[0](x)) and torch.equal(output, inner(x)) and set(proxy.mod_dict) == {"0", "1"}
    zeroed = proxy.run_with_hooks(x, fwd_hooks=[("0", lambda value, hook: value * 0)])
    assert torch.equal(zeroed, inner[1].bias.expand(5, 2))


# -- contracts that people rely on -------------------------------------------------------------------------


def test_compatibility_mode_takes_the_keyword_and_refuses_what_is_not_there():
    model = TransformerBridge.boot_transformers("tiny-falcon")
    model.enable_compatibility_mode(disable_warnings=True, refactor_factored_attn_matrices=False)
    assert model.processed
    model.undo_processing()
    with pytest.raises(ValueError, match=r"refactor_factored_attn_matrices is not supported; attn\.QK"):
        model.enable_compatibility_mode(refactor_factored_attn_matrices=True)
    assert not model.processed


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "olmo2", "falcon_h1"])
def test_what_the_final_norm_reads(family):
    model = TransformerBridge(build(family))
    seen = []
    handle = model.ln_final.original_component.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _, cache = model.run_with_cache(torch.tensor([[5, 6, 7, 8]]))
    handle.remove()
    assert torch.equal(cache["ln_final.hook_in"], seen[0])


def test_a_plain_dictionary_has_the_spelling_that_was_asked_for(bridge):
    asked = ["blocks.1.hook_out", "blocks.0.attn.q.hook_out", "blocks.1.hook_resid_post"]
    _, found = bridge.run_with_cache(TEXT, names_filter=asked, return_cache_object=False)
    assert list(found) == asked and found[asked[0]] is found[asked[2]]
    _, one = bridge.run_with_cache(
        TEXT, names_filter="embed.hook_out", return_cache_object=False, incl_bwd=True, return_type="loss"
    )
    bridge.original_model.zero_grad()
    assert list(one) == ["embed.hook_out", "embed.hook_out_grad"]
    _, every = bridge.run_with_cache(TEXT, return_cache_object=False)
    assert set(every) == set(bridge.default_names())


def test_of_two_rotary_bases_the_global_one_is_told():
    model = TransformerBridge(build("gemma3_text"))
    assert model.cfg.rotary_base == model.config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert model.config.rope_parameters["sliding_attention"]["rope_theta"] != model.cfg.rotary_base
    assert model.cfg.rotary_dim == model.cfg.d_head


class Replacement(torch.nn.Module):
    """What circuit-tracer puts in the place of an MLP: the old one between two hooks."""

    def __init__(self, old):
        super().__init__()
        self.old, self.hook_in, self.hook_out = old, HookPoint(), HookPoint()

    def forward(self, x):
        return self.hook_out(self.old(self.hook_in(x)))


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_what_is_put_in_a_components_place_is_called(name):
    model = HookedTransformer.from_pretrained_no_processing(name)
    tokens = model.to_tokens(TEXT)
    bare, cache = model.run_with_cache(tokens)
    for block in model.blocks:
        block.mlp = Replacement(block.mlp)
    model.unembed = Replacement(model.unembed)
    model.setup()
    asked = ["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out", "unembed.hook_in"]
    logits, seen = model.run_with_cache(tokens, names_filter=asked)
    assert torch.equal(logits, bare) and list(seen) == asked
    assert torch.equal(seen["blocks.1.mlp.hook_out"].reshape(cache["mlp_out", 1].shape), cache["mlp_out", 1])
    zeroed = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.hook_out", lambda value, hook: value * 0)])
    plain = HookedTransformer.from_pretrained_no_processing(name)
    expected = plain.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: value * 0)])
    assert torch.equal(zeroed, expected) and not torch.equal(zeroed, bare)


def test_v_is_no_transpose():
    matrix = FactoredMatrix(torch.randn(5, 2), torch.randn(2, 7))
    U, S, V = matrix.svd()
    assert V.shape == (7, 2)
    torch.testing.assert_close(U @ S.diag() @ V.T, matrix.AB)


def test_one_position_keeps_its_axis(bridge):
    cache = bridge.run_with_cache(TEXT, pos_slice=-1)[1]
    assert torch.equal(cache["resid_post", 0], bridge.run_with_cache(TEXT)[1]["resid_post", 0][:, -1:])


def test_a_stream_without_components_is_scaled(bridge):
    cache = bridge.run_with_cache([TEXT, OTHER])[1]
    last = cache["resid_post", -1][:, -1]
    alone = cache.apply_ln_to_stack(last, pos_slice=-1)
    assert alone.shape == (2, 128)
    torch.testing.assert_close(alone, bridge.ln_final(cache["resid_post", -1])[:, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, cache.apply_ln_to_stack(last[None], pos_slice=-1)[0])


def test_targets_per_position(bridge):
    cache = bridge.run_with_cache([TEXT, OTHER])[1]
    targets = torch.randint(5, 700, (2, 15), generator=torch.Generator().manual_seed(0))
    parts = cache.logit_attrs(cache.decompose_resid(), targets)
    logits = cache["unembed.hook_out"].gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(parts.sum(0), logits, atol=1e-3, rtol=1e-4)


def test_the_switch_for_grouped_queries_is_kept():
    model = HookedTransformer(falcon())
    model.set_ungroup_grouped_query_attention(True)
    assert model.cfg.ungroup_grouped_query_attention is True
