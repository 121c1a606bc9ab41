"""Inside LayerNorm and RMSNorm: scale and normalised stream are the formula's, and writes follow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.inside.cases import DTYPES, FAMILIES, assert_close, make, ramp, run_edited, wrap
from tests.inside.oracles import base, layer_of, norm
from tests.support import tokens
from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.core

KINDS = ("hook_scale", "hook_normalized")


def norms(model: Any) -> dict[str, tuple[nn.Module, str, str]]:
    """Name -> its module, the hook that reads what enters it, and one that reads what it returns."""
    block, root = layer_of(model, 1), base(model)
    two = hasattr(block, "ln_attn")
    first = block.ln_attn if two else block.input_layernorm
    found = {"blocks.1.ln1": (first, "blocks.1.hook_resid_pre", "blocks.1.attn.hook_in")}
    if two:
        found["blocks.1.ln2"] = (block.ln_mlp, "blocks.1.hook_mlp_in", "blocks.1.mlp.hook_in")
    elif hasattr(block, "post_attention_layernorm"):
        found["blocks.1.ln2"] = (block.post_attention_layernorm, "blocks.1.hook_mlp_in", "blocks.1.mlp.hook_in")
    final = root.ln_f if hasattr(root, "ln_f") else root.norm
    return found | {"ln_final": (final, "blocks.1.hook_resid_post", "ln_final.hook_out")}


def cases() -> list[Any]:
    return [pytest.param(f, d, id=f"{f}-{d}") for f in FAMILIES for d in DTYPES]


def exact(model: Any) -> torch.dtype:
    """Whose rounding counts: a Mixtral norms in float32 even where it is float64."""
    wide = model.dtype == torch.float64 and model.config.model_type == "mixtral"
    return torch.float32 if wide else model.dtype


@pytest.mark.parametrize("family, dtype", cases())
def test_captured_values_are_the_formulas(family: str, dtype: str) -> None:
    model, ids = make(family, dtype=DTYPES[dtype]), tokens()
    with torch.no_grad():
        bare = model(ids).logits
        bridge = wrap(model)
        logits, cache = bridge.run_with_cache(ids)
    assert torch.equal(logits, bare)
    found = norms(model)
    assert {n.rpartition(".")[0] for n in cache if n.endswith("hook_scale") and "blocks.0" not in n} == set(found)
    for name, (module, entering, leaving) in found.items():
        expected = norm(module, cache[entering])
        for kind in KINDS:
            got = cache[f"{name}.{kind}"]
            assert got.shape == expected[kind].shape
            assert_close(got, expected[kind], exact(model), f"{name}.{kind}")
        # As torch's own kernels, half precision is normed in float32; the normalised part is rounded.
        half = model.dtype == torch.bfloat16 or model.config.model_type == "mixtral"
        assert cache[f"{name}.hook_scale"].dtype == (torch.float32 if half else model.dtype)
        assert cache[f"{name}.hook_normalized"].dtype == model.dtype
        assert_close(cache[leaving], expected["out"], exact(model), leaving)


@pytest.mark.parametrize("family, dtype", cases())
def test_the_formula_computes_the_modules_output(family: str, dtype: str) -> None:
    """RMSNorm bitwise; LayerNorm, whose kernel sums in another order, within rounding, on that norm alone."""
    model, ids = make(family, dtype=DTYPES[dtype]), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        for name, (_, _, leaving) in norms(model).items():
            _, clean = bridge.run_with_cache(ids, names_filter=leaving)
            for kind in KINDS:
                with bridge.hooks(fwd_hooks=[(f"{name}.{kind}", lambda value, hook: None)]):
                    _, through = bridge.run_with_cache(ids, names_filter=leaving)
                if model.config.model_type == "mixtral":
                    assert torch.equal(through[leaving], clean[leaving])
                else:
                    # One last bit of the kernel's own dtype; bf16 rounds once more.
                    unit = torch.finfo(model.dtype).eps * float(clean[leaving].abs().max())
                    assert (through[leaving] - clean[leaving]).abs().max() <= 2 * unit


@pytest.mark.parametrize("family, dtype", cases())
def test_writes_have_the_predicted_effect(family: str, dtype: str) -> None:
    model, ids = make(family, dtype=DTYPES[dtype]), tokens()
    bridge = wrap(model)
    changes = {
        "hook_scale": lambda scale: scale * 2 + 0.3 * ramp(scale),
        "hook_normalized": lambda normalized: normalized.roll(1, -1) * 0.5 + ramp(normalized),
    }
    with torch.no_grad():
        for name, (module, entering, leaving) in norms(model).items():
            for edits in ({"hook_scale"}, {"hook_normalized"}, set(KINDS)):
                here = {kind: changes[kind] for kind in edits}
                hooks = {f"{name}.{kind}": change for kind, change in here.items()}
                _, found = run_edited(bridge, ids, hooks, [entering, leaving, f"{name}.hook_normalized"])
                expected = norm(module, found[entering], here)
                what = f"{name} after {edits}"
                assert_close(found[f"{name}.hook_normalized"], expected["hook_normalized"], exact(model), what)
                assert_close(found[leaving], expected["out"], exact(model), what)


@pytest.mark.parametrize("family", FAMILIES)
def test_twice_the_scale_is_half_of_the_normalised_part(family: str) -> None:
    """The bias is not divided, and nothing but the logits follows the last norm."""
    model, ids = make(family), tokens()
    bridge = wrap(model)
    final = norms(model)["ln_final"][0]
    weight, bias = final.weight, getattr(final, "bias", None)
    with torch.no_grad():
        _, clean = bridge.run_with_cache(ids)
        doubled = bridge.run_with_hooks(ids, fwd_hooks=[("ln_final.hook_scale", lambda scale, hook: scale * 2)])
        half = clean["ln_final.hook_normalized"] / 2 * weight + (0 if bias is None else bias)
        assert_close(doubled, model.lm_head(half).double(), torch.float32)
        assert (doubled - model(ids).logits).abs().max() > 0.1


def gradient(bridge: TransformerBridge, ids: Tensor, weights: Tensor, hooks: list[Any]) -> Tensor:
    found: list[Tensor] = []
    watch = [("blocks.1.hook_resid_post", lambda value, hook: found.append(value))]
    logits = bridge.run_with_hooks(ids, fwd_hooks=hooks, bwd_hooks=watch)
    (logits * weights).sum().backward()
    return found[0]


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_scale_gives_the_linearised_gradient(family: str, dtype: str) -> None:
    """With the scale held, the norm is linear: its gradient is that of the explicit linear map."""
    model, ids = make(family, dtype=DTYPES[dtype]), tokens()
    bridge = wrap(model)
    final = norms(model)["ln_final"][0]
    weights = torch.randn(2, 7, model.config.vocab_size, dtype=model.dtype)
    stream = bridge.run_with_cache(ids)[1]["resid_post", -1].detach().double().requires_grad_()
    steps = norm(final, stream, {"hook_scale": lambda scale: scale.detach()})
    logits = steps["out"] @ model.lm_head.weight.detach().double().T
    (linear,) = torch.autograd.grad((logits * weights).sum(), stream)
    whole_logits = norm(final, stream)["out"] @ model.lm_head.weight.detach().double().T
    (whole,) = torch.autograd.grad((whole_logits * weights).sum(), stream)
    frozen = gradient(bridge, ids, weights, [("ln_final.hook_scale", lambda scale, hook: scale.detach())])
    assert_close(frozen, linear, exact(model), "frozen")
    assert_close(gradient(bridge, ids, weights, []), whole, exact(model), "whole")
    assert (linear - whole).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_inside_a_norm(family: str) -> None:
    model, ids = make(family, dtype=torch.float64), tokens()
    bridge = wrap(model)
    weights = torch.randn(2, 7, model.config.vocab_size, dtype=torch.float64)
    final = norms(model)["ln_final"][0]
    stream = bridge.run_with_cache(ids)[1]["resid_post", -1].detach().double().requires_grad_()
    steps = norm(final, stream)
    (steps["out"] @ model.lm_head.weight.detach().T * weights).sum().backward()
    for kind in KINDS:
        found: list[Tensor] = []
        watch = [(f"ln_final.{kind}", lambda value, hook: found.append(value))]
        (bridge.run_with_hooks(ids, bwd_hooks=watch) * weights).sum().backward()
        expected = steps[kind].grad
        assert expected is not None
        assert_close(found[0], expected, exact(model), kind)
