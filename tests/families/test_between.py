"""What stands between heads and W_O (Bitnet's norm, the gates of Afmoe and Qwen 3 Next), against the mathematics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.models import build
from tests.support import tokens
from transformer_lens.model_bridge import TransformerBridge

GATED = ("afmoe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
NORMED = ("bitnet", "bitnet, biased")
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}
LAYER = "blocks.1.attn"


def cached(name: str) -> tuple[Any, Any, Tensor]:
    bridge, ids = TransformerBridge(build(name)), tokens()
    _, cache = bridge.run_with_cache(ids, names_filter=list(bridge.hook_dict))
    return bridge, cache, ids


@pytest.mark.parametrize("name", [*GATED, *NORMED])
def test_attended_is_the_values_by_the_pattern_and_results_sum_to_the_output(name: str) -> None:
    bridge, cache, _ = cached(name)
    groups = bridge.cfg.n_heads // bridge.cfg.n_key_value_heads
    values = cache["v", 1].repeat_interleave(groups, 2)
    attended = torch.einsum("bhqk,bkhd->bqhd", cache["pattern", 1], values)
    torch.testing.assert_close(cache[f"{LAYER}.hook_attended"], attended, **ROUNDING)
    returned = cache["result", 1].sum(2) + bridge.blocks[1].attn.b_O
    out = bridge.blocks[1].attn.module_of("o")(cache["z", 1].flatten(-2))
    torch.testing.assert_close(returned, out, **ROUNDING)
    assert not torch.allclose(cache["z", 1], attended, atol=0.01)


@pytest.mark.parametrize("name", GATED)
def test_z_is_attended_times_the_sigmoid_of_the_gate(name: str) -> None:
    bridge, cache, ids = cached(name)
    attended, gate = cache[f"{LAYER}.hook_attended"], cache[f"{LAYER}.hook_gate"]
    torch.testing.assert_close(cache["z", 1], attended * gate.sigmoid(), **ROUNDING)
    for hook, z in (
        ("hook_gate", lambda x: attended * x.sigmoid()),
        ("hook_attended", lambda x: x * gate.sigmoid()),
    ):
        new = torch.randn_like(gate)
        with bridge.hooks([(f"{LAYER}.{hook}", lambda x, hook, new=new: new)]):
            _, written = bridge.run_with_cache(ids)
        torch.testing.assert_close(written["z", 1], z(new), **ROUNDING)
        assert torch.equal(
            written["rot_q" if bridge.adapter.model_type != "afmoe" else "q", 1],
            cache["rot_q" if bridge.adapter.model_type != "afmoe" else "q", 1],
        )


@pytest.mark.parametrize("name", NORMED)
def test_z_and_the_neurons_are_what_the_norms_return(name: str) -> None:
    bridge, cache, ids = cached(name)
    block = bridge.original_model.model.layers[1]
    for norm, before, after in (
        (block.self_attn.attn_sub_norm, f"{LAYER}.hook_attended", f"{LAYER}.hook_z"),
        (block.mlp.ffn_sub_norm, "blocks.1.mlp.hook_activated", "blocks.1.mlp.hook_post"),
    ):
        assert torch.equal(cache[after], norm(cache[before].flatten(2)).view_as(cache[after]))
        new = torch.randn_like(cache[before])
        with bridge.hooks([(before, lambda x, hook, new=new: new)]):
            _, written = bridge.run_with_cache(ids)
        assert torch.equal(written[after], norm(new.flatten(2)).view_as(new))
    gate, into = cache["blocks.1.mlp.hook_pre"], cache["blocks.1.mlp.hook_pre_linear"]
    torch.testing.assert_close(cache["blocks.1.mlp.hook_activated"], gate.relu().square() * into, **ROUNDING)
    neurons = cache["blocks.1.mlp.hook_post"] @ bridge.blocks[1].mlp.W_out
    torch.testing.assert_close(neurons, cache["mlp_out", 1], **ROUNDING)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("hook", ["hook_q_input", "hook_attn_in"])
def test_the_gate_of_a_head_reads_the_stream_of_its_query(name: str, hook: str) -> None:
    bridge, cache, ids = cached(name)
    block = bridge.blocks[1]
    stream = torch.randn_like(cache["resid_pre", 1])
    with bridge.hooks(
        [(f"blocks.1.{hook}", lambda x, hook: torch.cat([x[:, :, :1], stream[:, :, None], x[:, :, 2:]], 2))]
    ):
        _, written = bridge.run_with_cache(ids)
    role, view = block.attn.places["gate"]
    gates = view(bridge.cfg).get(block.attn.module_of(role)(block.ln1(stream)))
    expected = cache[f"{LAYER}.hook_gate"].clone()
    expected[:, :, 1] = gates[:, :, 1]
    torch.testing.assert_close(written[f"{LAYER}.hook_gate"], expected, **ROUNDING)
    assert torch.equal(written["k", 1], cache["k", 1])


def test_gradients_at_what_attention_returns_are_autograds() -> None:
    model, ids = build("bitnet"), tokens()
    norm, seen = model.model.layers[1].self_attn.attn_sub_norm, {}

    def watch(module: Any, args: Any) -> None:
        args[0].register_hook(lambda gradient: seen.update(g=gradient))

    handle = norm.register_forward_pre_hook(watch)
    model(ids, labels=ids).loss.backward()
    handle.remove()
    model.zero_grad()
    with torch.enable_grad():
        _, cache = TransformerBridge(model).run_with_cache(ids, return_type="loss", incl_bwd=True)
    torch.testing.assert_close(cache[f"{LAYER}.hook_attended_grad"].flatten(2), seen["g"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["bitnet, biased", "qwen3_5_text"])
def test_what_has_no_matrix_is_refused(name: str) -> None:
    bridge = TransformerBridge(build(name))
    with pytest.raises(ValueError, match=r"blocks\.1\.attn: a norm or a gate stands between a head's values and W_O"):
        assert bridge.blocks[1].attn.OV
    with pytest.raises(ValueError, match="a norm or a gate stands between the values and W_O"):
        bridge.fold_value_biases()
