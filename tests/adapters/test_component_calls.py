"""Components of the bridge called by themselves: they compute what they compute in the model, and hooks fire."""

import copy
import re

import pytest
import torch

from tests.support import FAMILIES, family, tokens
from transformer_lens import TransformerBridge

every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def bridge(name) -> TransformerBridge:
    return TransformerBridge(family(name))


def run(bridge):
    """A run's tokens, logits and activations, on the bare model and by hooks of torch's own."""
    ids = tokens()
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    return ids, logits, cache


@every_family
def test_each_component_computes_what_it_computes_in_the_model(bridge):
    ids, logits, cache = run(bridge)
    with torch.no_grad():
        assert torch.equal(bridge.embed(ids), cache["hook_embed"])
        assert torch.equal(bridge.ln_final(cache["resid_post", -1]), cache["ln_final.hook_out"])
        assert torch.equal(bridge.unembed(cache["ln_final.hook_out"]), logits)
        for layer, block in enumerate(bridge.blocks):
            assert torch.equal(block.ln1(cache["resid_pre", layer]), cache[f"blocks.{layer}.attn.hook_in"])
            assert torch.equal(block(cache["resid_pre", layer]), cache["resid_post", layer])
            norm = block.ln2 if "ln2" in block._modules else block.ln1
            stream = cache["resid_mid" if f"blocks.{layer}.hook_resid_mid" in cache else "resid_pre", layer]
            assert torch.equal(norm(stream), cache[f"blocks.{layer}.mlp.hook_in"])
            # Falcon's prepared blocks and Mixtral's experts return a tensor that nobody adds into.
            assert torch.equal(block.mlp(norm(stream)), cache["mlp_out", layer])


@every_family
def test_a_model_put_together_from_its_components(bridge):
    ids, logits, _ = run(bridge)
    with torch.no_grad():
        stream = bridge.embed(ids)
        for block in bridge.blocks:
            stream = block(stream)
        assert torch.equal(bridge.unembed(bridge.ln_final(stream)), logits)


@every_family
def test_hooks_fire_and_edit_as_in_a_run(bridge):
    ids, _, cache = run(bridge)
    stream = cache["resid_pre", 1]
    seen = []

    def note(value, hook):
        seen.append((hook.name, value.clone()))

    inside, after = "blocks.1.ln1.hook_scale", "blocks.1.attn.hook_in"
    with torch.no_grad(), bridge.hooks([(inside, note), (after, note)]):
        bridge.blocks[1].ln1(stream)
        assert [name for name, _ in seen] == [inside]
        bridge(ids)
    assert [name for name, _ in seen] == [inside, inside, after]
    assert torch.equal(seen[0][1], seen[1][1])
    seen.clear()
    # An edit counts: half the scale, so twice the normalised stream, less what the bias adds.
    with torch.no_grad(), bridge.hooks([("blocks.1.ln1.hook_scale", lambda scale, hook: scale / 2)]):
        doubled = bridge.blocks[1].ln1(stream)
    bias = getattr(bridge.blocks[1].ln1, "b", None)
    plain = bridge.blocks[1].ln1(stream) - (0 if bias is None else bias)
    torch.testing.assert_close(doubled - (0 if bias is None else bias), 2 * plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), bridge.hooks([("blocks.1.hook_mlp_out", lambda out, hook: torch.zeros_like(out))]):
        assert not bridge.blocks[1].mlp(stream).any()
        assert torch.allclose(bridge.blocks[1](stream), stream + cache["attn_out", 1], atol=1e-5)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(2)]
    with torch.no_grad(), bridge.hooks([(names, note)]):
        bridge.blocks[1](stream)
    assert [name for name, _ in seen] == ["blocks.1.hook_resid_post"]
    plain = bridge.original_model.lm_head(stream)
    with torch.no_grad(), bridge.hooks([("unembed.hook_out", lambda logits, hook: logits + 1)]):
        assert torch.equal(bridge.unembed(stream), plain + 1)
    assert torch.equal(bridge.blocks[1].ln1(stream), cache["blocks.1.attn.hook_in"])


@every_family
def test_gradients_pass_and_a_hook_of_a_run_may_call_components(bridge):
    ids, logits, cache = run(bridge)
    stream = cache["resid_pre", 1].clone().requires_grad_()
    bridge.unembed(bridge.ln_final(bridge.blocks[1](stream)))[0, -1, 3].backward()
    leaf = cache["resid_pre", 1].clone().requires_grad_()
    bridge(leaf, start_at_layer=1)[0, -1, 3].backward()
    assert torch.equal(stream.grad, leaf.grad) and stream.grad.any()
    early = []

    def lens(value, hook):
        early.append(bridge.unembed(bridge.ln_final(bridge.blocks[1](value))))

    with torch.no_grad():
        out = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_resid_post", lens)])
    assert torch.equal(early[0], logits) and torch.equal(out, logits)


@every_family
def test_attention_alone_says_what_it_lacks_and_runs_on_all_of_it(bridge):
    ids, _, cache = run(bridge)
    x = cache["blocks.1.attn.hook_in"]
    attn = bridge.blocks[1].attn
    said = re.escape("blocks.1.attn: got the normalised stream alone, and attention reads a mask and positions too")
    advice = re.escape("call the block on a stream, bridge.blocks[1](stream), with a hook at blocks.1.attn.hook_in")
    for call in (lambda: attn(x), lambda: attn(hidden_states=x), attn):
        with pytest.raises(
            ValueError, match=f"{said}.*{advice}.*{type(attn.original_component).__name__}.forward takes"
        ):
            call()
    given = {}

    def keep(module, args, kwargs):
        given.update(args=args, kwargs=kwargs)

    handle = bridge.blocks[1].attn.original_component.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        bridge(ids)
        handle.remove()
        for cache_name in {"layer_past", "past_key_values", "cache"} & set(given["kwargs"]):
            given["kwargs"][cache_name] = None  # the run's, which holds these positions already
        out = bridge.blocks[1].attn(*given["args"], **given["kwargs"])[0]
    assert torch.equal(out, cache["attn_out", 1])
    # What the message advises: the block, with what attention reads exchanged.
    with torch.no_grad(), bridge.hooks([("blocks.1.attn.hook_in", lambda value, hook: 0 * value)]):
        found = []
        with bridge.hooks([("blocks.1.hook_attn_out", lambda value, hook: found.append(value.clone()))]):
            bridge.blocks[1](cache["resid_pre", 1])
    assert not torch.equal(found[0], cache["attn_out", 1])


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_blocks_take_masks_refuse_what_they_do_not_know_and_stay_of_their_bridge(bridge):
    ids, _, cache = run(bridge)
    stream = cache["resid_pre", 1]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        masked = bridge.blocks[1](stream, attention_mask=mask)
        expected = bridge(stream, start_at_layer=1, stop_at_layer=2, attention_mask=mask)
    assert torch.equal(masked, expected) and not torch.equal(masked, cache["resid_post", 1])
    with pytest.raises(TypeError, match="nonsense"):
        bridge.blocks[1](stream, nonsense=1)
    other = copy.deepcopy(bridge)
    with torch.no_grad():
        for parameter in other.original_model.parameters():
            parameter.zero_()
    assert torch.equal(other.blocks[1](stream), stream)
    assert torch.equal(bridge.blocks[1](stream), cache["resid_post", 1])
    bridge.detach()
    with pytest.raises(ValueError, match="detached"):
        bridge.blocks[1](stream)
