"""PEFT's LoRA under a bridge: every hook sees the adapted values. The oracle is a model with `W + s B A` by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model

from tests.bridge.test_detach import picture
from tests.on_top.adapters import adapted, config, model, multiplied_out, randomise
from tests.support import FAMILIES, family, tokens, torch_hooks
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.access.weights import read_weight

every_family = pytest.mark.parametrize("name", FAMILIES)
WHEN = ("before", "after")


def tolerance(name: str) -> float:
    """Mixtral's norms and router round to float32 whatever the model's dtype, so 1e-16 may become 1e-7 there."""
    return 1e-5 if name == "mixtral" else 1e-11


def bridged(name: str, when: str) -> tuple:
    """A bridge on an adapted model, put around it or under it; and one on the model multiplied out by hand."""
    base = model(name)
    plain = copy.deepcopy(base)
    if when == "before":
        peft_model = adapted(base, name)
        bridge = TransformerBridge(peft_model)
    else:
        bridge = TransformerBridge(base)
        peft_model = adapted(bridge.original_model, name)
    return bridge, peft_model, TransformerBridge(multiplied_out(plain, peft_model)), plain


def every(name: str) -> bool:
    return True


@pytest.mark.parametrize("when", WHEN)
@every_family
def test_every_hook_sees_adapted_values(name, when):
    bridge, peft_model, merged, plain = bridged(name, when)
    x = tokens()
    logits, cache = bridge.run_with_cache(x, names_filter=every)
    _, values = merged.run_with_cache(x, names_filter=every)
    assert torch.equal(logits, peft_model(x).logits)
    assert (logits - plain(x).logits).abs().max() > 1e-3
    assert set(cache) == set(values)
    for hook, value in values.items():
        torch.testing.assert_close(cache[hook], value, rtol=0, atol=tolerance(name), msg=lambda m, hook=hook: hook + m)
    # The adapter is seen on both sides of every projection, not only in what follows.
    before = TransformerBridge(plain).run_with_cache(x, names_filter=every)[1]
    for part in ("q", "v", "result"):
        assert (cache[part, 0] - before[part, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("when", WHEN)
@every_family
def test_writes_and_gradients_go_through_the_adapter(name, when):
    bridge, _, merged, _ = bridged(name, when)
    x = tokens()
    names = [n for n in bridge.hook_dict if ".1." not in n and not bridge.hook_dict[n].integer]
    for hook in names:

        def change(value, hook):
            scores = value.abs() > 1e30
            return torch.where(scores, value, 0.7 * value + 0.01)

        got, expected = (b.run_with_hooks(x, fwd_hooks=[(hook, change)]) for b in (bridge, merged))
        torch.testing.assert_close(got, expected, rtol=0, atol=20 * tolerance(name), msg=lambda m, hook=hook: hook + m)
        assert (got - bridge(x)).abs().max() > 1e-7, hook
    short = ("hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "attn.hook_result", "mlp.hook_pre")
    chosen = [f"blocks.1.{n}" for n in short]  # nothing below the first adapter requires a gradient
    grads = []
    for b in (bridge, merged):
        grads.append(b.run_with_cache(x, names_filter=chosen, incl_bwd=True, return_type="loss")[1])
        b.zero_grad()
    for hook in chosen:
        got, expected = (g[f"{hook}_grad"] for g in grads)
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance(name), msg=lambda m, hook=hook: hook + m)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ["7b", "rw", "mixtral"])
def test_verify_passes_with_an_adapter(name, when):
    bridge, *_ = bridged(name, when)
    report = bridge.verify()
    assert report.passed, str(report)


@every_family
def test_detach_gives_the_adapted_model_back(name):
    peft_model = adapted(model(name), name)
    x = tokens()
    before, logits = picture(peft_model), peft_model(x).logits
    bridge = TransformerBridge(peft_model)
    assert torch.equal(bridge(x), logits)
    assert bridge.cfg.architecture in ("FalconForCausalLM", "MixtralForCausalLM")
    bridge.add_hook(every, lambda value, hook: None)
    assert torch_hooks(peft_model) > 0
    bridge(x)
    bridge.run_with_cache(x)
    assert bridge.detach() is peft_model
    assert picture(peft_model) == before
    assert torch.equal(peft_model(x).logits, logits)


@every_family
def test_hooks_attached_first_follow_what_peft_exchanges(name):
    """They sat on the modules that PEFT then wrapped. There they would go on firing, with values of before."""
    base = model(name)
    plain = copy.deepcopy(base)
    bridge = TransformerBridge(base)
    x = tokens()
    names = ["q", "z", "pattern", "mlp.hook_post"]
    hooks = [f"blocks.0.{n}" if "." in n else f"blocks.0.attn.hook_{n}" for n in names]
    seen: dict[str, list] = {}

    def keep(value, hook):
        seen.setdefault(hook.name, []).append(value.detach().clone())

    bridge.add_hook(hooks, keep)
    bridge(x)
    peft_model = adapted(bridge.original_model, name)
    merged = TransformerBridge(multiplied_out(plain, peft_model))
    expected = [TransformerBridge(plain).run_with_cache(x)[1], *[merged.run_with_cache(x)[1]] * 4]
    bridge(x)
    peft_model(x)
    peft_model(input_ids=x)
    bridge.original_model.generate(x, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    for hook in hooks:
        assert len(seen[hook]) == 5
        for got, want in zip(seen[hook], expected, strict=True):
            torch.testing.assert_close(got, want[hook], rtol=0, atol=tolerance(name))
    seen.clear()
    peft_model.unload()
    bridge(x)
    for hook in hooks:
        (got,) = seen[hook]
        torch.testing.assert_close(got, expected[0][hook], rtol=0, atol=tolerance(name))
    bridge.detach()
    assert torch_hooks(base) == 0 and torch_hooks(peft_model) == 0
    assert all("forward" not in m.__dict__ for m in [*base.modules(), *peft_model.modules()])


@every_family
def test_adapters_are_switched_and_disabled_under_hooks(name):
    base = model(name)
    plain = copy.deepcopy(base)
    peft_model = adapted(base, name)
    peft_model.add_adapter("other", config(name))
    randomise(peft_model, "other")
    peft_model.eval()
    bridge, x, seen = TransformerBridge(peft_model), tokens(), []
    hooks = ["blocks.1.attn.hook_result", "blocks.1.mlp.hook_post"]
    bridge.add_hook(hooks, lambda value, hook: seen.append(value.detach().clone()))

    def check(reference) -> None:
        seen.clear()
        bridge(x)
        expected = TransformerBridge(reference).run_with_cache(x, names_filter=hooks)[1]
        assert len(seen) == 2
        for got, hook in zip(seen, hooks, strict=True):
            torch.testing.assert_close(got, expected[hook], rtol=0, atol=tolerance(name))

    check(multiplied_out(plain, peft_model))
    peft_model.set_adapter("other")
    check(multiplied_out(plain, peft_model, "other"))
    with peft_model.disable_adapter():
        check(plain)
    check(multiplied_out(plain, peft_model, "other"))
    peft_model.base_model.set_adapter(["default", "other"])
    check(multiplied_out(plain, peft_model, "default", "other"))
    both = multiplied_out(plain, peft_model, "default", "other")
    peft_model.merge_adapter()
    check(both)
    peft_model.unmerge_adapter()
    check(both)


@every_family
def test_the_adapter_learns_the_same_under_hooks(name):
    """Gradients of A and B, with hooks inside its modules, are those of the model alone."""
    base = model(name)
    peft_model = adapted(base, name)
    bridge, x = TransformerBridge(peft_model), tokens()
    own = [p for p in peft_model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(bridge(x, return_type="loss"), own)
    neutral = [(n, lambda value, hook: None) for n in bridge.hook_dict]
    got = torch.autograd.grad(bridge.run_with_hooks(x, fwd_hooks=neutral, return_type="loss"), own)
    assert all(e.abs().max() > 0 for e in expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance(name))


def test_gradients_at_a_write_of_results_reach_the_adapter():
    """hook_result is read from the adapted weight, so a changed result has a gradient to A and B."""
    bridge, *_ = bridged("7b", "before")
    x = tokens()
    b = bridge.blocks[0].attn.o.original_component.lora_B["default"].weight

    def objective() -> torch.Tensor:
        hooks = [("blocks.0.attn.hook_result", lambda value, hook: 0.5 * value)]
        return bridge.run_with_hooks(x, fwd_hooks=hooks).sin().sum()

    (gradient,) = torch.autograd.grad(objective(), b)
    direction, values = torch.randn_like(b), []
    with torch.no_grad():
        for step in (1e-5, -2e-5, 1e-5):
            b.add_(step * direction)
            values.append(objective())
    slope = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-5, atol=0)


def test_weights_are_read_with_their_adapter():
    base = model("rw")
    plain = copy.deepcopy(base)
    peft_model = adapted(base, "rw")
    merged = multiplied_out(plain, peft_model)
    layer, alone = (m.get_submodule("transformer.h.1.self_attention.dense") for m in (base, merged))
    torch.testing.assert_close(read_weight(layer), alone.weight, rtol=0, atol=1e-14)
    assert torch.equal(read_weight(layer, "bias"), alone.bias)
    with peft_model.disable_adapter():
        assert read_weight(layer) is layer.base_layer.weight
    mixed = model("mixtral")
    plain = copy.deepcopy(mixed)
    peft_model = adapted(mixed, "mixtral")
    merged = multiplied_out(plain, peft_model)
    for weight in ("gate_up_proj", "down_proj"):
        got = read_weight(mixed.model.layers[0].mlp.experts, weight)
        torch.testing.assert_close(got, getattr(merged.model.layers[0].mlp.experts, weight), rtol=0, atol=1e-14)


def test_other_adapters_are_refused_with_a_reason():
    prefix = get_peft_model(family("7b"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(
        ValueError, match=r"adapter 'default' \(PREFIX_TUNING\) adds positions of its own to every call"
    ):
        TransformerBridge(prefix)
    scaled = get_peft_model(
        family("7b"), IA3Config(target_modules=["query_key_value", "dense"], feedforward_modules=[])
    ).eval()
    bridge, x = TransformerBridge(scaled), tokens()
    assert torch.equal(bridge.run_with_cache(x)[0], scaled(x).logits)  # ports and what needs no weight are right
    with pytest.raises(ValueError, match="only plain LoRA is a matrix added to a weight"):
        bridge.run_with_cache(x, names_filter="blocks.0.attn.hook_result")
    dora = get_peft_model(family("7b"), LoraConfig(use_dora=True, target_modules=["dense"])).eval()
    with pytest.raises(ValueError, match="only plain LoRA is a matrix added to a weight"):
        TransformerBridge(dora).run_with_cache(x, names_filter="blocks.0.attn.hook_result")


def test_surgery_that_leaves_no_module_is_an_error():
    bridge = TransformerBridge(family("7b"))
    bridge.add_hook("blocks.0.attn.hook_q", lambda value, hook: None)
    layers = bridge.original_model.transformer.h
    layers[0] = torch.compile(layers[0], backend="eager")
    with pytest.raises(RuntimeError, match=r"call part.compile\(\) instead"):
        bridge(tokens())


def test_hooks_inside_follow_an_exchanged_module():
    """A norm exchanged under a hook: the hook shows the new one, and the old one is left as it was."""
    bridge, x, seen = TransformerBridge(family("7b")), tokens(), []
    block = bridge.original_model.transformer.h[1]
    old, new = block.input_layernorm, copy.deepcopy(block.input_layernorm)
    with torch.no_grad():
        new.weight.mul_(-1)
    bridge.add_hook("blocks.1.ln1.hook_normalized", lambda value, hook: seen.append(value) or 2 * value)
    bridge.add_hook("blocks.1.attn.hook_in", lambda value, hook: seen.append(value))
    bridge(x)
    block.input_layernorm = new
    bridge(x)
    assert len(seen) == 4 and torch.equal(seen[0], seen[2])
    expected = 2 * seen[2] * new.weight + new.bias
    torch.testing.assert_close(seen[3], expected, rtol=0, atol=1e-5)
    assert "forward" not in old.__dict__ and "forward" in new.__dict__
    bridge.reset_hooks()
    assert "forward" not in new.__dict__


@pytest.mark.parametrize("name", ["7b", "mixtral"])
def test_named_weights_have_their_adapter_and_processing_refuses(name):
    bridge, peft_model, merged, _ = bridged(name, "before")
    for weight in ("W_Q", "W_O", "W_in"):
        torch.testing.assert_close(getattr(bridge, weight), getattr(merged, weight), rtol=0, atol=1e-14)
    x = tokens()
    before = peft_model(x).logits
    with pytest.raises(ValueError, match=r"weights cannot be processed: .* an adapter \(Linear\) sits on it"):
        bridge.enable_compatibility_mode()
    assert torch.equal(peft_model(x).logits, before)
