"""`ActivationCache`: a mapping from name to tensor under every spelling."""

import pytest
import torch

from tests.support import FAMILIES, family, tokens
from transformer_lens import ActivationCache, TransformerBridge

pytestmark = pytest.mark.core


@pytest.fixture(params=FAMILIES)
def bridge(request) -> TransformerBridge:
    return TransformerBridge(family(request.param, num_hidden_layers=3))


@pytest.fixture
def cache(bridge) -> ActivationCache:
    return bridge.run_with_cache(tokens())[1]


def test_it_is_a_mapping(bridge, cache):
    assert len(cache) == len(list(cache)) == len(cache.keys()) == len(cache.items()) == len(cache.values())
    assert dict(cache) == cache.cache_dict
    assert all(cache[name] is tensor for name, tensor in cache.items())
    assert cache.get("blocks.0.hook_resid_pre") is cache["resid_pre", 0]
    assert cache.get("nonsense") is None
    assert repr(cache).startswith(f"ActivationCache with {len(cache)} tensors: ['hook_embed', ")


def test_each_tensor_is_listed_once_under_its_canonical_name_in_order(bridge, cache):
    names = list(cache)
    assert len(set(names)) == len(names)
    assert all(bridge.canonical_name(name) == name for name in names)
    assert not set(names) & set(bridge.aliases)
    assert names[0] == "hook_embed"
    assert names[-1] == "unembed.hook_out"
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    assert blocks == sorted(blocks)
    first = [name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")]
    for before, after in [
        ("hook_resid_pre", "attn.hook_in"),
        ("attn.hook_in", "attn.hook_q"),
        ("attn.hook_q", "attn.hook_z"),
        ("attn.hook_z", "hook_attn_out"),
        ("hook_mlp_out", "hook_resid_post"),
    ]:
        assert first.index(before) < first.index(after)


def test_every_spelling_of_a_name_is_the_same_tensor(bridge, cache):
    for alias, name in bridge.aliases.items():
        if name in cache.cache_dict:
            assert cache[alias] is cache[name]
            assert alias in cache


def test_asking_by_alias_captures_one_tensor(bridge):
    x = tokens()
    _, cache = bridge.run_with_cache(x, names_filter="blocks.1.hook_out")
    assert list(cache) == ["blocks.1.hook_resid_post"]
    assert cache["blocks.1.hook_out"] is cache["blocks.1.hook_resid_post"]
    both = ["blocks.1.hook_out", "blocks.1.hook_resid_post", "blocks.1.hook_resid_post"]
    assert len(bridge.run_with_cache(x, names_filter=both)[1]) == 1
    _, cache = bridge.run_with_cache(x, names_filter=lambda name: name.endswith("attn.q.hook_out"))
    assert list(cache) == [f"blocks.{i}.attn.hook_q" for i in range(3)]
    fired = []
    bridge.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_in", lambda tensor, hook: fired.append(hook.name))])
    assert fired == ["blocks.0.hook_resid_pre"]


SHORT = [
    (("q", 0), "blocks.0.attn.hook_q"),
    (("z", 2, "attn"), "blocks.2.attn.hook_z"),
    (("z", 2, "a"), "blocks.2.attn.hook_z"),
    (("resid_post", -1), "blocks.2.hook_resid_post"),
    (("resid_pre", -3), "blocks.0.hook_resid_pre"),
    (("mlp_out", 1), "blocks.1.hook_mlp_out"),
    (("in", 1, "mlp"), "blocks.1.mlp.hook_in"),
    (("out", None, "ln_final"), "ln_final.hook_out"),
    ("embed", "hook_embed"),
    ("hook_embed", "hook_embed"),
    ("embed.hook_out", "hook_embed"),
    ("resid_post1", "blocks.1.hook_resid_post"),
    ("k2", "blocks.2.attn.hook_k"),
]


def test_short_names(cache):
    for key, name in SHORT:
        assert cache.full_name(key) == name
        assert key in cache
        assert cache[key] is cache.cache_dict[name]


def test_keys_that_are_not_there(bridge, cache):
    for key in ["nonsense", ("nonsense", 0), ("scale", 0, "nonsense")]:
        assert key not in cache
        with pytest.raises(KeyError, match="no hook is named"):
            cache[key]
    for layer in (3, 7, -4):
        assert ("q", layer) not in cache
        with pytest.raises(KeyError, match=f"got layer {layer}, expected -3 to 2 in a model of 3 layers"):
            cache["q", layer]
    for key in [5, ("q",), ("q", 0, "attn", 1), (0, "q"), None]:
        assert key not in cache
        with pytest.raises(TypeError, match="expected a name, \\(name, layer\\) or \\(name, layer, component\\)"):
            cache[key]
    _, few = bridge.run_with_cache(tokens(), names_filter="hook_embed")
    assert ("q", 0) not in few
    with pytest.raises(KeyError, match="'blocks.0.attn.hook_q' was not captured; this cache holds 1 tensors: 'hook_em"):
        few["q", 0]


def test_gradients(bridge):
    x = tokens()
    names = ["hook_embed", "blocks.0.attn.hook_q", "blocks.2.hook_resid_post"]
    loss, cache = bridge.run_with_cache(x, names_filter=names, return_type="loss", incl_bwd=True)
    assert loss.ndim == 0
    assert list(cache)[:3] == names
    assert set(cache) == {*names, *(f"{name}_grad" for name in names)}
    assert cache["q_grad", 0] is cache["blocks.0.attn.hook_q_grad"]
    assert cache["resid_post_grad", -1].shape == cache["resid_post", -1].shape
    assert cache["blocks.2.hook_out_grad"] is cache["resid_post_grad", 2]
    assert cache["embed_grad"].abs().sum() > 0
    assert ("z_grad", 0) not in cache
    embedding = bridge.original_model.get_input_embeddings().weight.grad
    assert embedding is not None


def test_incl_bwd_needs_one_number(bridge):
    x = tokens()
    with pytest.raises(ValueError, match=r"incl_bwd: got an output of \[2, 7, 61\], expected one number"):
        bridge.run_with_cache(x, incl_bwd=True)
    with pytest.raises(ValueError, match="incl_bwd: got an output of NoneType"):
        bridge.run_with_cache(x, incl_bwd=True, return_type=None)
    with torch.no_grad(), pytest.raises(ValueError, match="the output does not require a gradient"):
        bridge.run_with_cache(x, incl_bwd=True, return_type="loss")


def test_remove_batch_dim(bridge):
    x = tokens(1, 5)
    _, cache = bridge.run_with_cache(x)
    before = {name: tensor[0] for name, tensor in cache.items()}
    assert cache.has_batch_dim
    assert cache.remove_batch_dim() is cache
    assert not cache.has_batch_dim
    assert all(torch.equal(cache[name], tensor) for name, tensor in before.items())
    assert cache.remove_batch_dim() is cache
    assert all(torch.equal(cache[name], tensor) for name, tensor in before.items())
    _, direct = bridge.run_with_cache(x, remove_batch_dim=True)
    assert not direct.has_batch_dim
    assert all(torch.equal(direct[name], tensor) for name, tensor in before.items())


def test_remove_batch_dim_of_a_larger_batch(bridge, cache):
    with pytest.raises(ValueError, match="remove_batch_dim: 'hook_embed' has a batch of 2, expected 1"):
        cache.remove_batch_dim()
    assert cache["embed"].shape[0] == 2
    assert cache.has_batch_dim


def test_to_moves_every_tensor(cache):
    assert cache.to("meta") is cache
    assert all(tensor.device.type == "meta" for tensor in cache.values())


def test_stack_activation(cache):
    stacked = cache.stack_activation("resid_post")
    assert stacked.shape == (3, 2, 7, 32)
    assert all(torch.equal(stacked[i], cache["resid_post", i]) for i in range(3))
    assert torch.equal(cache.stack_activation("resid_post", 2), stacked[:2])
    assert torch.equal(cache.stack_activation("in", 1, "attn")[0], cache["in", 0, "attn"])
    assert torch.equal(cache.stack_activation("q", -1)[2], cache["q", 2])


def test_a_plain_dictionary_on_request(bridge):
    x = tokens()
    output, store = bridge.run_with_cache(x, return_cache_object=False)
    assert type(store) is dict
    assert list(store) == list(bridge.run_with_cache(x)[1])
    assert torch.equal(output, bridge(x))


def test_options_reach_the_hooks(bridge):
    x = tokens()
    _, whole = bridge.run_with_cache(x)
    _, last = bridge.run_with_cache(x, names_filter=["blocks.0.attn.hook_z", "hook_embed"], pos_slice=-1)
    assert torch.equal(last["z", 0], whole["z", 0][:, -1:])
    assert torch.equal(last["z", 0][:, -1], whole["z", 0][:, -1])
    _, moved = bridge.run_with_cache(x, names_filter="hook_embed", device="meta")
    assert moved["embed"].device.type == "meta"
    _, own = bridge.run_with_cache(x, names_filter="blocks.0.attn.hook_q", clone=True)
    # A q captured without it may keep the whole fused QKV alive.
    assert own["q", 0].untyped_storage().nbytes() == own["q", 0].nbytes
    assert torch.equal(own["q", 0], whole["q", 0])
    store, forward, _ = bridge.get_caching_hooks("blocks.0.hook_in")
    bridge.run_with_hooks(x, fwd_hooks=forward)
    assert torch.equal(store["blocks.0.hook_resid_pre"], whole["resid_pre", 0])


def test_captured_tensors_outlive_later_runs_and_edits(bridge):
    x = tokens()
    _, cache = bridge.run_with_cache(x)
    copies = {name: tensor.clone() for name, tensor in cache.items()}

    def zero(tensor, hook):
        tensor.zero_()

    bridge.run_with_hooks(x, fwd_hooks=[(lambda name: name.endswith(("out", "resid_post")), zero)])
    assert all(torch.equal(cache[name], copy) for name, copy in copies.items())


def test_no_cache_needs_a_gradient(cache):
    assert not any(tensor.requires_grad for tensor in cache.values())
