"""`torch.compile` around, under and inside a bridge: nothing hooked compiles whole, and hooks are never ignored."""

from __future__ import annotations

import pytest
import torch
from torch import _dynamo as dynamo

from tests.on_top.adapters import adapted
from tests.support import family, tokens, torch_hooks
from transformer_lens import TransformerBridge

HOOKS = (
    "hook_embed",
    "blocks.0.hook_resid_post",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_pattern",
    "blocks.0.mlp.hook_post",
    "ln_final.hook_scale",
    "unembed.hook_out",
)


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()
    with torch.no_grad():
        yield
    dynamo.reset()


@pytest.mark.parametrize("name", ["7b", "40b", "rw", "mixtral"])
def test_no_graph_break_from_us(name):
    """One graph, as for the bare model, also after `prepare_model` and after hooks have come and gone."""
    model, x = family(name, num_hidden_layers=1), tokens()
    assert dynamo.explain(model)(x).graph_break_count == 0
    bridge = TransformerBridge(model)
    bridge.run_with_cache(x)
    for whole in (bridge.original_model, bridge):
        dynamo.reset()
        found = torch.compile(whole, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(getattr(found, "logits", found), bridge(x), rtol=0, atol=2e-5)


def ways(bridge, how):
    """Something compiled, called with tokens, that gives logits."""
    if how == "the model":
        compiled = torch.compile(bridge.original_model, backend="eager")
        return lambda x: compiled(x).logits
    if how == "model.compile()":
        bridge.original_model.compile(backend="eager")
        return bridge
    if how == "each layer":
        for block in bridge.blocks:
            block.original_component.compile(backend="eager")
        return bridge
    if how == "the base model":
        bridge.root.in_place.compile(backend="eager")
        return bridge
    return torch.compile(bridge, backend="eager")


HOW = ("the model", "model.compile()", "each layer", "the base model", "the bridge")


def slow_unless_7b(name: str, how: str) -> object:
    return pytest.param(name, how, marks=[] if name == "7b" or how == "the model" else [pytest.mark.slow])


@pytest.mark.parametrize("name, how", [slow_unless_7b(name, how) for name in ("7b", "mixtral") for how in HOW])
def test_hooks_added_after_compilation_take_effect(name, how):
    bridge, x = TransformerBridge(family(name)), tokens()
    plain = bridge(x)

    def double(value, hook):
        seen.append(hook.name)
        return 1.5 * value

    expected, seen = {}, []
    for hook in HOOKS:
        expected[hook] = bridge.run_with_hooks(x, fwd_hooks=[(hook, double)])
        assert not torch.equal(expected[hook], plain)
    run = ways(bridge, how)
    for hook in HOOKS:
        torch.testing.assert_close(run(x), plain, rtol=0, atol=1e-6)  # compiled, with nothing hooked
        seen.clear()
        with bridge.hooks(fwd_hooks=[(hook, double)]):
            got = run(x)
        assert seen == [hook]
        assert torch.equal(got, expected[hook]), hook  # a hooked run is the eager model's
    torch.testing.assert_close(run(x), plain, rtol=0, atol=1e-6)
    assert torch_hooks(bridge.original_model) == 0


@pytest.mark.parametrize("how", HOW)
def test_compiling_under_hooks(how):
    """First the hook, then the compiler: the hook fires, and once it is gone it is gone."""
    bridge, x, seen = TransformerBridge(family("40b", num_hidden_layers=1)), tokens(), []
    plain = bridge(x)
    bridge.add_hook("blocks.0.attn.hook_z", lambda value, hook: seen.append(value) or 2 * value)
    expected = bridge(x)
    run = ways(bridge, how)
    for times in range(2, 5):
        torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-6)
        assert len(seen) == times
    bridge.reset_hooks()
    torch.testing.assert_close(run(x), plain, rtol=0, atol=1e-6)
    assert len(seen) == 4


def test_compiled_parts_stay_compiled_and_survive_detach():
    """What `compile()` left on modules is taken away while hooks are attached, and comes back with the last."""
    bridge = TransformerBridge(family("7b"))
    model = bridge.original_model
    compiled: list[torch.nn.Module] = [model, model.transformer.h[0]]
    for module in compiled:
        module.compile(backend="eager")
    before = [module._compiled_call_impl for module in compiled]
    assert all(before)
    with bridge.hooks(fwd_hooks=[("hook_embed", lambda value, hook: None)]):
        assert not any(module._compiled_call_impl for module in compiled)
    assert [module._compiled_call_impl for module in compiled] == before
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_run_with_cache_compiled(name):
    bridge, x = TransformerBridge(family(name, num_hidden_layers=1)), tokens()
    logits, cache = bridge.run_with_cache(x)
    compiled = torch.compile(bridge.run_with_cache, backend="aot_eager")
    for _ in range(2):
        got, values = compiled(x)
        assert torch.equal(got, logits)
        assert list(values) == list(cache) and all(torch.equal(values[hook], cache[hook]) for hook in cache)
    assert torch_hooks(bridge.original_model) == 0


def test_run_with_hooks_and_a_with_block_compiled():
    bridge, x = TransformerBridge(family("mixtral")), tokens()
    hooks = [("blocks.0.mlp.hook_post", lambda value, hook: 0.5 * value)]
    expected = bridge.run_with_hooks(x, fwd_hooks=hooks)
    assert torch.equal(torch.compile(bridge.run_with_hooks, backend="eager")(x, fwd_hooks=hooks), expected)

    def function(x):
        with bridge.hooks(fwd_hooks=hooks):
            return bridge(x) + 1

    assert torch.equal(torch.compile(function, backend="eager")(x), expected + 1)
    assert torch_hooks(bridge.original_model) == 0


def test_fullgraph_under_hooks_is_an_error():
    """Hooks run eagerly, and who insists on one graph is told so by torch, not given a run without hooks."""
    bridge, x = TransformerBridge(family("7b", num_hidden_layers=1)), tokens()
    whole = torch.compile(bridge.original_model, backend="eager", fullgraph=True)
    whole(x)
    bridge.add_hook("hook_embed", lambda value, hook: None)
    with pytest.raises((RuntimeError, dynamo.exc.Unsupported), match="no compiled frames|while hooks are on it"):
        whole(x)


def test_an_adapted_model_compiles_too():
    peft_model = adapted(family("7b"), "7b")
    bridge, x = TransformerBridge(peft_model), tokens()
    compiled, hook = torch.compile(peft_model, backend="eager"), ("blocks.0.attn.hook_q", lambda q, hook: 2 * q)
    torch.testing.assert_close(compiled(x).logits, bridge(x), rtol=0, atol=1e-6)
    with bridge.hooks(fwd_hooks=[hook]):
        assert torch.equal(compiled(x).logits, bridge(x))
    assert not torch.equal(bridge.run_with_hooks(x, fwd_hooks=[hook]), bridge(x))


@pytest.mark.slow
def test_inductor():
    """Real kernels: rounding of their own with nothing hooked, the eager model's values with a hook."""
    bridge, x = TransformerBridge(family("7b", num_hidden_layers=1)), tokens()
    plain, compiled = bridge(x), torch.compile(bridge.original_model)
    torch.testing.assert_close(compiled(x).logits, plain, rtol=0, atol=1e-4)
    hooks = [("blocks.0.attn.hook_pattern", lambda value, hook: value.flip(1))]
    expected = bridge.run_with_hooks(x, fwd_hooks=hooks)
    with bridge.hooks(fwd_hooks=hooks):
        assert torch.equal(compiled(x).logits, expected)
    torch.testing.assert_close(compiled(x).logits, plain, rtol=0, atol=1e-4)
