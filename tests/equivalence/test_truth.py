"""Law 3: a captured tensor is the value the model computed there, bit for bit, and stays so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.equivalence.grid import Case, every_case, falcon_cases, family_cases, wrap
from tests.equivalence.oracles import hand_captures, places_of
from tests.equivalence.test_untouched import ports
from tests.support import mixtral, tokens


@pytest.mark.parametrize("case", every_case())
def test_captures_are_bitwise_those_of_hand_written_hooks(case: Case) -> None:
    """All ports of all layers, against plain torch hooks on the bare model that clone at once."""
    model, ids = case.model(), tokens()
    with torch.no_grad():
        expected = hand_captures(model, places_of(model, batch=2), ids)
        bridge = wrap(model)
        _, cache = bridge.run_with_cache(ids, names_filter=ports(bridge))
        assert set(cache) == set(expected)
        check_same(cache, expected)
        bridge(tokens())  # later forwards do not reach what was kept
        check_same(cache, expected)
        check_shapes(bridge, cache, ids)
        check_sums(bridge, cache)


def check_same(cache: Any, expected: dict[str, Tensor]) -> None:
    wrong = [name for name, value in expected.items() if not torch.equal(cache[name], value)]
    assert wrong == []


def check_shapes(bridge: Any, cache: Any, ids: Tensor) -> None:
    """Every capture has the axes that the table says."""
    known = dict(zip(("batch", "pos"), ids.shape, strict=True))
    for row in bridge.hook_table().present():
        if row.kind == "port":
            shape = [known.get(size, size) for size in row.shape]
            assert list(cache[row.name.replace("{i}", "1")].shape) == shape, row.name


def check_sums(bridge: Any, cache: Any) -> None:
    """The branches add up to the stream, in the order the block adds them, so in every dtype to the bit."""
    for i in range(bridge.cfg.n_layers):
        pre, attn, mlp = cache["resid_pre", i], cache["attn_out", i], cache["mlp_out", i]
        if bridge.cfg.parallel_attn_mlp:
            assert torch.equal(pre + (mlp + attn), cache["resid_post", i])
        else:
            assert torch.equal(pre + attn, cache["resid_mid", i])
            assert torch.equal(cache["resid_mid", i] + mlp, cache["resid_post", i])
        if i:
            assert torch.equal(cache["resid_post", i - 1], pre)


@pytest.mark.parametrize("case", falcon_cases(dtypes=("fp32",)))
def test_falcon_qkv_is_what_split_heads_makes(case: Case) -> None:
    """q, k and v against transformers' own `_split_heads`, which repeats k and v for the new architecture."""
    model, ids = case.model(), tokens()
    attention = model.transformer.h[1].self_attention
    fused: list[Tensor] = []
    handle = attention.query_key_value.register_forward_hook(lambda module, args, out: fused.append(out.clone()))
    with torch.no_grad():
        model(ids)
        handle.remove()
        q, k, v = attention._split_heads(fused[0])
        bridge = wrap(model)
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith(("hook_q", "hook_k", "hook_v")))
    repeats = k.shape[2] // bridge.cfg.n_key_value_heads
    assert torch.equal(cache["q", 1], q)
    assert torch.equal(cache["k", 1].repeat_interleave(repeats, dim=2), k)
    assert torch.equal(cache["v", 1].repeat_interleave(repeats, dim=2), v)


@pytest.mark.parametrize("case", family_cases())
def test_captures_survive_a_backward_pass_and_an_optimiser_step(case: Case) -> None:
    model, ids = case.model(), tokens()
    expected = {k: v.clone() for k, v in hand_captures(model, places_of(model, batch=2), ids).items()}
    bridge = wrap(model)
    loss, cache = bridge.run_with_cache(ids, return_type="loss")
    check_same(cache, expected)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    check_same(cache, expected)


@pytest.mark.parametrize("case", family_cases())
def test_each_hook_alone_sees_what_all_together_see(case: Case) -> None:
    """A capture does not depend on which other hooks are there."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        _, together = bridge.run_with_cache(ids)
        for name in ports(bridge):
            _, alone = bridge.run_with_cache(ids, names_filter=name)
            assert list(alone) == [name]
            assert torch.equal(alone[name], together[name]), name


@pytest.mark.parametrize("case", family_cases())
def test_a_hooks_own_tensor_can_be_kept_and_spoiled_after_the_run(case: Case) -> None:
    """What a user hook is handed is its own: another hook's edit of a later tensor does not reach it."""
    model, ids = case.model(), tokens()
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        expected = hand_captures(model, places_of(model, batch=2), ids)
        bridge = wrap(model)

        def keep(tensor: Tensor, hook: Any) -> None:
            kept[hook.name] = tensor

        logits = bridge.run_with_hooks(ids, fwd_hooks=[(ports(bridge), keep)])
        check_same(kept, expected)
        for tensor in kept.values():
            tensor.zero_()
        assert torch.equal(logits, model(ids).logits)


@pytest.mark.core
def test_router_jitter_does_not_reach_what_was_captured() -> None:
    """A training forward of Mixtral multiplies the MLP's input by noise, in place, after it was handed over."""
    model, ids = mixtral(router_jitter_noise=0.5), tokens()
    bridge = wrap(model.train())
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        normed = model.model.layers[0].post_attention_layernorm(cache["resid_mid", 0])
    assert torch.equal(cache["blocks.0.mlp.hook_in"], normed)
