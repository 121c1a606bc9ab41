"""Laws 1 and 2: the model is the model, and looking does not disturb it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.equivalence.grid import REFUSED, RUNNABLE, Case, every_case, family_cases, wrap
from tests.support import cache_of, tokens, torch_hooks, with_cache


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What every module is and holds, by identity."""
    held = {}
    for name, module in model.named_modules():
        inside = {
            key: list(value.items()) if isinstance(value, dict) else id(value) for key, value in vars(module).items()
        }
        held[name] = (type(module), inside)
    return held


def test_the_sweep_is_the_one_of_the_design() -> None:
    assert (len(RUNNABLE), len(REFUSED)) == (98, 94)


@pytest.mark.parametrize("case", every_case())
def test_logits_are_bitwise_the_bare_models(case: Case) -> None:
    """Nothing hooked; everything cached; every hook held by a function that returns None; detached."""
    model, ids = case.model(), tokens()
    with torch.no_grad():
        bare = model(ids).logits
        before = snapshot(model)
        bridge = wrap(model)
        assert torch.equal(bridge(ids), bare)
        cached, cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
        assert torch.equal(cached, bare)
        assert set(cache) == set(bridge.hook_dict)
        fired: Counter[str] = Counter()
        looked = bridge.run_with_hooks(ids, fwd_hooks=[(ports(bridge), lambda tensor, hook: fired.update([hook.name]))])
        assert torch.equal(looked, bare)
        assert fired == Counter(ports(bridge))
        assert torch_hooks(model) == 0
        assert bridge.detach() is model
        assert snapshot(model) == before
        assert torch.equal(model(ids).logits, bare)


def ports(bridge: Any) -> list[str]:
    """The names of the hooks that are ports, in every block."""
    rows = [row for row in bridge.hook_table().present() if row.kind == "port"]
    layers = range(bridge.cfg.n_layers)
    return list(dict.fromkeys(row.name.replace("{i}", str(i)) for row in rows for i in layers))


@pytest.mark.parametrize("case", family_cases())
def test_parameters_are_the_models_own(case: Case) -> None:
    model = case.model()
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    bridge = wrap(model)
    bridge.run_with_cache(tokens())
    after = dict(bridge.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p and p.data_ptr() == at for name, (p, at) in before.items())
    own = [p for name, child in bridge.named_children() if name != "original_model" for p in child.parameters()]
    assert own == []
    assert list(bridge.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("case", family_cases())
def test_hooks_that_come_and_go_leave_nothing(case: Case) -> None:
    """Also when the forward raises halfway."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    before = snapshot(model)

    def fail(tensor: Tensor, hook: Any) -> None:
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_attn_out", fail)])
    assert torch_hooks(model) == 0
    bridge.add_hook(list(bridge.hook_dict), lambda tensor, hook: None)
    assert torch_hooks(model) > 0
    bridge.reset_hooks()
    assert torch_hooks(model) == 0
    assert snapshot(model) == before


@pytest.mark.parametrize("case", family_cases())
def test_decoding_with_a_kv_cache_is_the_models_own(case: Case) -> None:
    """The same tokens in two calls: logits, and what the hooks see at the new positions."""
    model, ids = case.model(), tokens(2, 8)
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        bare = model(ids[:, 5:], **with_cache(copy.deepcopy(cache_of(first)))).logits
        bridge = wrap(model)
        assert torch.equal(bridge(ids[:, 5:], past_key_values=copy.deepcopy(cache_of(first))), bare)
        logits, cache = bridge.run_with_cache(ids[:, 5:], past_key_values=copy.deepcopy(cache_of(first)))
    assert torch.equal(logits, bare)
    assert all(cache[name].shape[1] == 3 for name in ports(bridge))


@pytest.mark.parametrize("case", family_cases())
def test_left_padding_makes_the_call_generate_makes(case: Case) -> None:
    """Masks and, per row, positions counted from the first real token."""
    model, ids = case.model(), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        bare = model(ids, attention_mask=mask, position_ids=positions).logits
        bridge = wrap(model)
        assert torch.equal(bridge(ids, attention_mask=mask), bare)
        assert torch.equal(bridge.run_with_cache(ids, attention_mask=mask)[0], bare)


@pytest.mark.parametrize("case", family_cases())
def test_the_call_is_the_one_a_user_would_make(case: Case) -> None:
    """`bridge(tokens)` is `model(tokens)`: no mask, no positions, and the KV cache as the model has it by default."""
    model, ids = case.model(), tokens()
    calls: list[set[str]] = []
    bridge = wrap(model)
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(set(kwargs)), with_kwargs=True)
    bridge(ids)
    bridge.run_with_cache(ids)
    handle.remove()
    assert calls == [{"input_ids"}, {"input_ids"}]
