"""The laws, for hooks inside modules: untouched, looking does not disturb, one firing, nothing left behind."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.inside.cases import ATTENTIONS, FAMILIES, inside, make, wrap
from tests.support import mixtral, tokens, torch_hooks
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.core

PATTERN = "blocks.1.attn.hook_pattern"
NORMALIZED = "blocks.1.ln1.hook_normalized"


def stood_in(model: nn.Module) -> set[str]:
    """The modules whose `forward` is not their class's."""
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def halve(value: Tensor, hook: Any) -> Tensor:
    """At module level, so that it can be pickled."""
    return value * 0.5


def flat(pattern: Tensor, hook: Any) -> Tensor:
    return torch.full_like(pattern, 0.1)


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_looking_disturbs_nothing(family: str, attn: str) -> None:
    """Every inside hook at once, those on request too; and what was captured does not change later."""
    model, ids = make(family, attn), tokens()
    bare = model(ids).logits
    bridge = wrap(model)
    logits, cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
    copies = {name: value.clone() for name, value in cache.items()}
    assert torch.equal(logits, bare)
    assert torch.equal(bridge(ids), bare)
    logits.sum().backward()
    for name in inside(bridge):
        assert torch.equal(cache[name], copies[name]), name
    assert not stood_in(model) and not torch_hooks(model)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_into_experts_disturbs_nothing(how: str, dtype: torch.dtype) -> None:
    model, ids = mixtral(experts=how, dtype=dtype), tokens()
    with torch.no_grad():
        bare = model(ids).logits
        bridge = wrap(model)
        for name in inside(bridge):
            assert torch.equal(bridge.run_with_cache(ids, names_filter=name)[0], bare), name


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_module_asked_for_has_a_stand_in(family: str) -> None:
    """And it is gone with the hook."""
    model = make(family)
    bridge = wrap(model)
    for name in inside(bridge):
        with bridge.hooks(fwd_hooks=[(name, lambda value, hook: None)]):
            (where,) = stood_in(model) - {""}  # the model itself is watched while hooks are attached
            expected = [".0." in where] if name.startswith("blocks.0") else [".1." in where or "blocks" not in name]
            assert expected == [True], (name, where)
        assert not stood_in(model) and not torch_hooks(model)


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_fires_once_in_order(family: str, attn: str) -> None:
    model, ids = make(family, attn), tokens()
    bridge = wrap(model)
    order: list[str] = []
    wanted = {"looked": inside(bridge), "written": inside(bridge)}
    bridge.run_with_hooks(ids, fwd_hooks=[(wanted["written"], lambda value, hook: order.append(hook.name))])
    assert Counter(order) == Counter(wanted["written"])
    _, cache = bridge.run_with_cache(ids, names_filter=wanted["looked"])
    assert Counter(cache.keys()) == Counter(wanted["looked"])
    layers = [name.split(".")[1] for name in order if name.startswith("blocks.")]
    assert layers == sorted(layers)
    attention = [n.rpartition("_")[2] for n in order if "blocks.0.attn" in n]
    assert attention == [s for s in ("k", "q", "scores", "pattern", "result") if s in attention]


def test_two_bridges_on_one_model() -> None:
    """Each one's hook fires in the other's runs no more than torch hooks would: in order, on one stand-in."""
    model, ids = make("40b"), tokens()
    first, second = TransformerBridge(model), TransformerBridge(model)
    seen: list[Tensor] = []
    with torch.no_grad():
        alone = first.run_with_hooks(ids, fwd_hooks=[(PATTERN, halve)])
        twice = first.run_with_hooks(ids, fwd_hooks=[(PATTERN, lambda value, hook: value * 0.25)])
        with first.hooks(fwd_hooks=[(PATTERN, halve)]):
            assert torch.equal(second(ids), alone)
            with second.hooks(fwd_hooks=[(PATTERN, halve), (PATTERN, lambda value, hook: seen.append(value))]):
                assert torch.equal(model(ids).logits, twice)
                assert len(stood_in(model) - {""}) == 1
            looked, cache = second.run_with_cache(ids, names_filter=PATTERN)
            assert torch.equal(looked, alone)
        bare = model(ids).logits
    assert torch.equal(cache[PATTERN], seen[0] * 2)
    assert not torch.equal(bare, alone) and not stood_in(model) and not torch_hooks(model)
    first.detach()
    with torch.no_grad():
        assert torch.equal(second.run_with_hooks(ids, fwd_hooks=[(PATTERN, halve)]), alone)


def test_threads_do_not_see_each_others_hooks() -> None:
    model = make("7b")
    bridge = wrap(model)
    texts = [tokens() for _ in range(4)]
    factors = [0.25, 0.5, 2.0, 4.0]

    def run(i: int) -> Tensor:
        with torch.no_grad():
            hooks = [(PATTERN, lambda value, hook: value * factors[i])]
            return bridge.run_with_hooks(texts[i], fwd_hooks=hooks)

    def look(i: int) -> Tensor:
        with torch.no_grad():
            return bridge.run_with_cache(texts[i], names_filter=[PATTERN, NORMALIZED])[1][PATTERN]

    expected = [(run(i), look(i)) for i in range(4)]
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def repeat(i: int) -> None:
        found[i] = [(run(i), look(i)) for _ in range(10)]

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, pairs in found.items():
        assert len(pairs) == 10
        assert all(torch.equal(a, b) for pair in pairs for a, b in zip(pair, expected[i], strict=True))
    assert not stood_in(model) and not torch_hooks(model)


@pytest.mark.parametrize("family", ["40b", "mixtral"])
def test_an_exception_inside_leaves_nothing(family: str) -> None:
    model, ids = make(family), tokens()
    bare = model(ids).logits
    bridge = wrap(model)

    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    for name in inside(bridge):
        with pytest.raises(RuntimeError, match="on purpose"):
            bridge.run_with_hooks(ids, fwd_hooks=[(name, fail)])
        assert not stood_in(model) and not torch_hooks(model)
    assert torch.equal(bridge(ids), bare)


def test_copies_carry_their_hooks() -> None:
    """A copy has its own stand-in; taking the hook off one leaves the other's."""
    model, ids = make("40b"), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        bare = bridge(ids)
        bridge.add_hook(PATTERN, halve)
        hooked = bridge(ids)
        for other in (copy.deepcopy(bridge), pickle.loads(pickle.dumps(bridge))):
            assert torch.equal(other(ids), hooked) and other.original_model is not model
            bridge.reset_hooks()
            assert torch.equal(other(ids), hooked) and torch.equal(bridge(ids), bare)
            assert not stood_in(model)
            assert torch.equal(other.detach()(ids).logits, bare) and not stood_in(other.original_model)
            bridge.add_hook(PATTERN, halve)
    bridge.detach()
    assert not stood_in(model) and not torch_hooks(model)


class Splice(nn.Module):
    """What an autoencoder does in a hook's place: reads, writes, and has a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_read = HookPoint()

    def forward(self, value: Tensor) -> Tensor:
        return self.hook_read(value) * 0.5


@pytest.mark.parametrize("slot", ["hook_pattern", "hook_rot_q", "hook_result"])
def test_a_module_in_an_inside_slot(slot: str) -> None:
    # Eager, where what goes on from a seam is bitwise what the module does.
    model, ids = make("40b", "eager"), tokens()
    bridge: Any = wrap(model)
    name = f"blocks.1.attn.{slot}"
    with torch.no_grad():
        bare = bridge(ids)
        expected = bridge.run_with_hooks(ids, fwd_hooks=[(name, halve)])
        _, plain = bridge.run_with_cache(ids, names_filter=name)
        setattr(bridge.blocks[1].attn, slot, Splice())
        bridge.setup()
        assert torch.equal(bridge(ids), expected) and len(stood_in(model) - {""}) == 1
        _, cache = bridge.run_with_cache(ids, names_filter=f"{name}.hook_read")
        assert torch.equal(cache[f"{name}.hook_read"], plain[name])
        setattr(bridge.blocks[1].attn, slot, HookPoint())
        assert torch.equal(bridge(ids), bare) and not stood_in(model)
        setattr(bridge.blocks[1].attn, slot, Splice())
        bridge.detach()
        assert torch.equal(model(ids).logits, bare)
    assert not stood_in(model) and not torch_hooks(model)


@pytest.mark.parametrize("name", [PATTERN, NORMALIZED, "blocks.1.hook_k_input", "blocks.1.mlp.hook_post"])
def test_a_forward_within_a_hook_is_another_run(name: str) -> None:
    """The inner run sees neither the hook it is called from nor the outer run's others."""
    model, ids = make("mixtral"), tokens()
    bridge = wrap(model)
    other, inner = tokens(3, 5), []

    def again(value: Tensor, hook: Any) -> Tensor:
        inner.append(bridge.run_with_cache(other, names_filter=[PATTERN, name]))
        inner.append((bridge(other), None))
        return value * 0.5

    with torch.no_grad():
        bare = bridge.run_with_cache(other, names_filter=[PATTERN, name])
        expected = bridge.run_with_hooks(ids, fwd_hooks=[(name, halve)])
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(name, again)]), expected)
    (logits, cache), (again_logits, _) = inner
    assert torch.equal(logits, bare[0]) and torch.equal(again_logits, bare[0])
    assert torch.equal(cache[PATTERN], bare[1][PATTERN]) and torch.equal(cache[name], bare[1][name])
    assert not stood_in(model) and not torch_hooks(model)


@pytest.mark.parametrize("family", ["40b", "rw", "mixtral"])
def test_some_of_the_layers(family: str) -> None:
    """Hooks inside layers that a run leaves out stay silent; those within it see what they see in a whole run."""
    model, ids = make(family), tokens()
    bridge = wrap(model)
    names = [PATTERN, PATTERN.replace(".1.", ".0."), NORMALIZED, NORMALIZED.replace(".1.", ".0.")]
    with torch.no_grad():
        logits, full = bridge.run_with_cache(ids, names_filter=[*names, "blocks.1.hook_resid_pre"])
        stream = full["blocks.1.hook_resid_pre"]
        stopped, below = bridge.run_with_cache(ids, names_filter=lambda n: n in names, stop_at_layer=1)
        started, above = bridge.run_with_cache(stream, names_filter=lambda n: n in names, start_at_layer=1)
    assert torch.equal(stopped, stream) and torch.equal(started, logits)
    assert set(below) == set(names[1::2]) and set(above) == set(names[::2])
    for part in (below, above):
        assert all(torch.equal(part[name], full[name]) for name in part)
    with pytest.raises(ValueError, match="never fired"):
        bridge.run_with_hooks(stream, start_at_layer=1, fwd_hooks=[(names[1], halve)])
    with torch.no_grad():
        edited = bridge.run_with_hooks(stream, start_at_layer=1, fwd_hooks=[(PATTERN, flat)])
        assert torch.equal(edited, bridge.run_with_hooks(ids, fwd_hooks=[(PATTERN, flat)]))
    assert not stood_in(model) and not torch_hooks(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_mode(family: str) -> None:
    model, ids = make(family), tokens()
    bridge = wrap(model)
    names = inside(bridge)
    with torch.no_grad():
        bare, cache = bridge.run_with_cache(ids, names_filter=names)
        edited = bridge.run_with_hooks(ids, fwd_hooks=[(PATTERN, halve)])
    with torch.inference_mode():
        logits, again = bridge.run_with_cache(ids, names_filter=names)
        assert torch.equal(logits, bare)
        assert all(torch.equal(again[name], cache[name]) for name in names)
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(PATTERN, halve)]), edited)


def test_a_forward_that_was_exchanged_before_comes_back() -> None:
    """Other packages put a `forward` of their own on modules; a stand-in works over it, and gives it back."""
    model, ids = make("7b"), tokens()
    module = model.transformer.h[1].self_attention
    original, calls = module.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    module.forward = counted
    bridge = wrap(model)
    with torch.no_grad():
        bare = model(ids).logits
        assert torch.equal(bridge.run_with_cache(ids, names_filter=PATTERN)[0], bare)
    assert len(calls) == 2 and module.__dict__["forward"] is counted
