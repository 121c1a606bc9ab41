"""Latent attention (DeepSeek and relatives): what is its own, against the bare model and against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.models import LATENTS, MODELS, build
from tests.support import cache_of, tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis.patching import run_interventions
from transformer_lens.collect.run import probe
from transformer_lens.model_bridge.loading.info import cache_memory
from transformer_lens.model_bridge.supported_architectures import adapter_for

pytestmark = pytest.mark.skipif("deepseek_v3" not in MODELS, reason="this release has other modules for it")
of_its_own = pytest.mark.parametrize("name", [name for name in MODELS if name.split(",")[0] in LATENTS])


def last(logits: Tensor) -> Tensor:
    return logits[0, -1].logsumexp(-1)


@of_its_own
def test_heads_are_as_wide_as_their_own_tensors(name: str) -> None:
    bridge = TransformerBridge(build(name))
    shapes = {row.name.rpartition(".")[2]: row.shape for row in bridge.hook_table().present() if ".attn." in row.name}
    assert shapes["hook_q"] == ("batch", "pos", 8, 10) and shapes["hook_z"] == ("batch", "pos", 8, 5)
    assert shapes["hook_v"] == ("batch", "key_pos", 8, 5) and shapes["hook_rot_k"] == ("batch", "key_pos", 8, 10)
    assert shapes["hook_kv_latent"] == ("batch", "pos", 14)
    assert bridge.blocks[0].attn.W_O.shape == (8, 5, 32)
    assert torch.equal(bridge.W_O[1].flatten(0, 1).T, bridge.blocks[1].attn.o.original_component.weight)


@of_its_own
def test_keys_and_values_are_made_from_the_latent_vector(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    attn: Any = bridge.blocks[1].attn
    _, cache = bridge.run_with_cache(ids)
    made = attn.kv_b.original_component(cache["blocks.1.attn.hook_kv_latent"]).unflatten(-1, (8, 11))
    torch.testing.assert_close(cache["v", 1], made[..., 6:])
    torch.testing.assert_close(cache["rot_k", 1][..., :6], made[..., :6])
    rotated = cache["rot_k", 1][..., 6:]
    assert torch.equal(rotated, rotated[:, :, :1].expand_as(rotated))  # all heads share it
    with bridge.hooks([("blocks.1.attn.hook_kv_latent", lambda x, hook: torch.zeros_like(x))]):
        _, silent = bridge.run_with_cache(ids)
    assert not silent["v", 1].any() and not silent["z", 1].any()
    with bridge.hooks([("blocks.1.attn.hook_rot_k", lambda x, hook: torch.zeros_like(x))]):
        _, alike = bridge.run_with_cache(ids)
    chosen = (cache["pattern", 1] > 0).float()  # by an indexer; elsewhere all that came before
    mean = torch.einsum("bhqk,bkhd->bqhd", chosen / chosen.sum(-1, keepdim=True), cache["v", 1])
    if not attn.chooses:
        torch.testing.assert_close(mean, cache["v", 1].cumsum(1) / torch.arange(1, 8)[:, None, None])
    torch.testing.assert_close(alike["z", 1], mean, rtol=1e-4, atol=1e-5)


@of_its_own
def test_what_a_cache_holds_is_what_the_info_says(name: str) -> None:
    model = build(name)
    held = cache_of(model(tokens(1, 12), use_cache=True))
    row = cache_memory(adapter_for(model.config), 12, torch.float32)
    kept = sum(x.numel() for layer in held.layers for x in (layer.keys, layer.values))
    assert row.allocated == row.needed == 4 * kept == 4 * 2 * 12 * (14 + 4)


def test_all_keys_and_values_are_seen_while_decoding() -> None:
    model, ids = build("deepseek_v3"), tokens()
    bridge = TransformerBridge(model)
    _, whole = bridge.run_with_cache(ids)
    past = cache_of(model(ids[:, :5], use_cache=True))
    _, step = bridge.run_with_cache(ids[:, 5:], past_key_values=past)
    for name in ("v", "rot_k"):
        torch.testing.assert_close(step[name, 1], whole[name, 1])
    torch.testing.assert_close(step["blocks.1.attn.hook_kv_latent"], whole["blocks.1.attn.hook_kv_latent"][:, 5:])


def test_a_generation_with_edited_values_is_that_of_a_torch_hook() -> None:
    model, ids = build("deepseek_v3"), tokens()
    bridge, silent = TransformerBridge(model), slice(-5, None)

    def silence(module: Any, args: Any, out: Tensor) -> Tensor:
        changed = out.clone()
        changed.unflatten(-1, (8, -1))[..., 3, silent] = 0
        return changed

    handle = model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(silence)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    handle.remove()
    edit = ("blocks.0.attn.hook_v", lambda v, hook: v.index_fill(2, torch.tensor(3), 0))
    with bridge.hooks([edit]):
        got = bridge.generate(ids, return_type="tokens", verbose=False, **options)
    assert torch.equal(got, expected)
    assert not torch.equal(got, model.generate(ids, attention_mask=torch.ones_like(ids), **options))


def test_a_sweep_over_values_is_a_loop() -> None:
    bridge, ids = TransformerBridge(build("deepseek_v3")), tokens(1, 6)

    def without(position: int) -> Any:
        return lambda v, hook: v.index_fill(1, torch.tensor(position), 0)

    every = [(f"blocks.{layer}.attn.hook_v", without(position)) for layer in (0, 1) for position in range(6)]
    every += [(f"blocks.1.attn.hook_{name}", without(2)) for name in ("z", "kv_latent", "q_latent")]
    found = run_interventions(bridge, ids, every, last)
    alone = torch.stack([last(bridge.run_with_hooks(ids, fwd_hooks=[one])) for one in every])
    torch.testing.assert_close(found, alone.detach(), rtol=1e-5, atol=1e-5)
    late = run_interventions(bridge, ids, every[12:], last)  # these go on from a cache of latent vectors
    torch.testing.assert_close(late, alone[12:].detach(), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_have_is_absent_with_a_sentence() -> None:
    bridge, ids = TransformerBridge(build("deepseek_v3")), tokens()
    for hook, why in (
        ("blocks.0.attn.hook_k", "keys are joined from two parts"),
        ("blocks.0.hook_q_input", "made from one latent vector"),
        ("blocks.1.hook_attn_in", "made from one latent vector"),
    ):
        with pytest.raises(KeyError, match=why):
            bridge.run_with_cache(ids, names_filter=hook)
    for name in ("W_Q", "W_K", "W_V", "b_V", "QK", "OV"):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn: a norm stands between the stream and what is made"):
            getattr(bridge.blocks[0].attn, name)
    with pytest.raises(ValueError, match="no matrix maps one to the other"):
        bridge.OV  # noqa: B018
    assert "blocks.0.attn.W_O" in bridge.get_params() and "blocks.0.attn.W_K" not in bridge.get_params()


def test_queries_without_a_latent_vector_have_a_matrix() -> None:
    bridge, ids = TransformerBridge(build("deepseek_v2, whole queries")), tokens()
    _, cache = bridge.run_with_cache(ids)
    attn = bridge.blocks[0].attn
    by_hand = torch.einsum("bpm,hmd->bphd", cache["blocks.0.attn.hook_in"], attn.W_Q)
    torch.testing.assert_close(by_hand, cache["q", 0], rtol=1e-5, atol=1e-5)
    assert "blocks.0.attn.hook_q_latent" not in bridge.hook_dict


def test_configs_that_cannot_run_are_refused() -> None:
    config = build("deepseek_v2").config
    config.num_experts_per_tok = None
    with pytest.raises(ValueError, match="it chooses None experts for each token and has 6"):
        adapter_for(config)


def test_a_generation_shows_what_the_whole_text_shows() -> None:
    bridge, options = TransformerBridge(build("deepseek_v3", "eager")), {"max_new_tokens": 4, "do_sample": False}
    shown = {"return_cache": True, "names_filter": lambda name: ".attn." in name}
    found, seen = bridge.generate(tokens(), return_type="tokens", verbose=False, **options, **shown)
    _, whole = bridge.run_with_cache(found, names_filter=lambda name: ".attn." in name)
    assert set(seen) == set(whole)
    for name in seen:
        assert seen[name].shape == whole[name].shape, name
        torch.testing.assert_close(seen[name], whole[name], rtol=1e-4, atol=1e-4)


def test_values_are_no_ones_for_collection() -> None:
    bridge = TransformerBridge(build("deepseek_v3"))
    with pytest.raises(ValueError, match="only hooks with a value for each token, 'batch pos ...'"):
        probe(bridge, ["blocks.0.attn.hook_v"], None)
    assert "blocks.0.attn.hook_kv_latent" in probe(bridge, ["blocks.0.attn.hook_kv_latent"], None)
