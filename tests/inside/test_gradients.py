"""The gradient at every hook inside is what finite differences measure, and what explicit attention has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inside.cases import ATTENTIONS, FAMILIES, assert_close, inside, make, window_of, wrap
from tests.inside.oracles import allowed_keys, attention, attention_weights, positions_of
from tests.support import tokens
from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.core

OUT = "blocks.1.hook_attn_out"
WITHIN = ("rot_q", "rot_k", "attn_scores", "pattern", "result")


def gradient_at(bridge: TransformerBridge, name: str, ids: Tensor, weights: Tensor) -> Tensor:
    found: list[Tensor] = []
    watch = [(name, lambda gradient, hook: found.append(gradient))]
    (bridge.run_with_hooks(ids, bwd_hooks=watch) * weights).sum().backward()
    (gradient,) = found
    return gradient


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_explicit_attention(family: str, attn: str) -> None:
    model, ids = make(family, attn, torch.float64), tokens()
    bridge = wrap(model)
    weights = torch.randn(2, 7, 32, dtype=torch.float64)
    x = bridge.run_with_cache(ids)[1]["blocks.1.attn.hook_in"].detach().requires_grad_()
    mask = torch.ones_like(ids)
    steps = attention(attention_weights(model, 1), x, positions_of(mask), allowed_keys(mask, 7, window_of(model)))
    (steps["attn_out"] * weights).sum().backward()
    for short in WITHIN:
        name = f"blocks.1.attn.hook_{short}"
        if name not in bridge.hook_dict:
            continue
        live: list[Tensor] = []
        found: list[Tensor] = []
        bridge.run_with_hooks(
            ids,
            fwd_hooks=[(OUT, lambda value, hook: live.append(value))],
            bwd_hooks=[(name, lambda gradient, hook: found.append(gradient))],
        )
        (live[0] * weights).sum().backward()
        expected = steps[short].grad
        assert expected is not None and expected.abs().max() > 0
        assert_close(found[0], expected, model.dtype, short)


def slope(bridge: Any, ids: Tensor, weights: Tensor, name: str, direction: Tensor, step: float) -> float:
    """The central difference of the weighted logits along a direction at one hook."""

    def level(size: float) -> float:
        push = [(name, lambda value, hook: value + (size * direction).to(value.dtype))]
        with torch.no_grad():
            return float((bridge.run_with_hooks(ids, fwd_hooks=push) * weights).sum())

    return (level(step) - level(-step)) / (2 * step)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_what_finite_differences_measure(family: str) -> None:
    """A central difference errs by step² times a third derivative, and by rounding over step.

    Falcon is float64 throughout. Mixtral's norms, softmax and router compute in float32: a coarser step and
    tolerance, and all experts chosen, since a choice jumps.
    """
    coarse = family.startswith("mixtral")
    step, tolerance = (1e-3, 2e-2) if coarse else (1e-5, 1e-6)
    changes = {"num_experts_per_tok": 4} if coarse else {}
    model, ids = make(family, dtype=torch.float64, **changes), tokens()
    bridge = wrap(model)
    weights = torch.randn(2, 7, model.config.vocab_size, dtype=torch.float64)
    names = inside(bridge)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=names)
    for name in names:
        gradient = gradient_at(bridge, name, ids, weights).double()
        masked = cache[name] < -1e30  # nothing moves a masked score, and its gradient is zero
        direction = torch.randn(gradient.shape, dtype=torch.float64).masked_fill(masked, 0)
        direction /= direction.norm()
        measured = slope(bridge, ids, weights, name, direction, step)
        predicted = float((gradient * direction).sum())
        assert gradient.abs().max() > 0
        assert abs(measured - predicted) < tolerance * float(gradient.norm()), (name, measured, predicted)


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_gradients_at_once_and_the_parameters(family: str, attn: str) -> None:
    """`incl_bwd` with every inside hook: parameters get the gradients they get without."""
    model, ids = make(family, attn, torch.float64), tokens()
    bridge = wrap(model)
    bridge(ids, return_type="loss").backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    names = inside(bridge)
    _, cache = bridge.run_with_cache(ids, names_filter=names, return_type="loss", incl_bwd=True)
    for name in names:
        assert cache[name + "_grad"].shape == cache[name].shape
        assert torch.isfinite(cache[name + "_grad"]).all()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], torch.float32, name)  # float32 inside a Mixtral


def test_a_gradient_inside_can_be_written() -> None:
    """A pattern whose gradient is zeroed passes none to the queries."""
    model, ids = make("40b"), tokens()
    bridge = wrap(model)
    found: list[Tensor] = []
    watch = [
        ("blocks.1.attn.hook_pattern", lambda gradient, hook: torch.zeros_like(gradient)),
        ("blocks.1.attn.hook_q", lambda gradient, hook: found.append(gradient)),
    ]
    bridge.run_with_hooks(ids, bwd_hooks=watch).sum().backward()
    assert found[0].abs().max() == 0
    bridge.run_with_hooks(ids, bwd_hooks=watch[1:]).sum().backward()
    assert found[1].abs().max() > 0
