"""Law 5: the gradient at every hook is autograd's on the bare model, and what finite differences measure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.equivalence.grid import Case, falcon_cases, family_cases, mixtral_cases, one_by_one, wrap
from tests.equivalence.oracles import Place, hand_gradient, places_of
from tests.equivalence.test_untouched import ports
from tests.support import tokens, torch_hooks

MIXTRALS = mixtral_cases()
SEVERAL = [
    *family_cases(),
    *falcon_cases(dtypes=("fp32",)),
    *[case for case in MIXTRALS if not case.marks][::4],
    *[case for case in MIXTRALS if case.marks][::9],
]


def float_ports(bridge: Any) -> list[str]:
    """The ports whose tensor has a gradient."""
    return [name for name in ports(bridge) if not bridge.hook_dict[name].integer]


def gradient_at(bridge: Any, name: str, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient that one backward hook is shown."""
    found: list[Tensor] = []
    logits = bridge.run_with_hooks(ids, bwd_hooks=[(name, lambda gradient, hook: found.append(gradient))])
    (logits * weights).sum().backward()
    (gradient,) = found
    return logits.detach(), gradient


@pytest.mark.parametrize("case", SEVERAL)
def test_gradients_are_bitwise_autograds_on_the_bare_model(case: Case) -> None:
    """One hook at a time, as on the bare model; the forward's numbers do not move."""
    model, ids = case.model(), tokens()
    bare = model(ids).logits.detach()
    weights = torch.randn_like(bare)
    places = places_of(model, batch=2)
    names = [name for name in places if "hook_expert_indices" not in name]
    expected = {name: hand_gradient(model, places[name], ids, weights) for name in one_by_one(case, names)}
    bridge = wrap(model)
    assert set(float_ports(bridge)) == set(names)
    for name in expected:
        logits, gradient = gradient_at(bridge, name, ids, weights)
        assert torch.equal(logits, bare), name
        assert torch.equal(gradient, expected[name]), name
        assert gradient.abs().max() > 0, name
    assert torch_hooks(model) == 0


@pytest.mark.parametrize("case", family_cases())
def test_gradients_are_those_of_torch_autograd_grad(case: Case) -> None:
    """By the other door: `torch.autograd.grad` of the bare model's logits by the very tensors.

    Where the bare block adds in place into what its MLP returned, that tensor no longer exists to be asked.
    """
    model, ids = case.model(), tokens()
    weights = torch.randn(2, 7, model.config.vocab_size)
    places = {name: place for name, place in places_of(model, batch=2).items() if isinstance(place, Place)}
    raw: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            raw[name] = tensor.view_as(tensor)
            return raw[name]

        return keep

    asked = [n for n in places if "mlp_out" not in n and "indices" not in n]
    for name in asked:
        handles = places[name].raw_hooks(model, keeper(name))
        logits = model(ids).logits
        for handle in handles:
            handle.remove()
        (gradient,) = torch.autograd.grad((logits * weights).sum(), raw[name])
        raw[name] = places[name].get(gradient)
    bridge = wrap(model)
    for name in asked:
        assert torch.equal(gradient_at(bridge, name, ids, weights)[1], raw[name]), name


@pytest.mark.parametrize("case", family_cases())
def test_all_gradients_at_once(case: Case) -> None:
    """`incl_bwd` keeps what single hooks see; forward numerics, parameters' gradients and captures stay."""
    model, ids = case.model(), tokens()
    loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    bridge = wrap(model)
    names = float_ports(bridge)
    _, looked = bridge.run_with_cache(ids, names_filter=names)
    value, cache = bridge.run_with_cache(ids, names_filter=names, return_type="loss", incl_bwd=True)
    # The same mean of the same float32 terms, summed in another order.
    torch.testing.assert_close(value, loss, rtol=1e-6, atol=0)
    for name in float_ports(bridge):
        assert torch.equal(cache[name], looked[name]), name
        assert cache[name + "_grad"].shape == cache[name].shape
    for name, parameter in model.named_parameters():
        # Float32 sums over tokens in another order, relative to the largest entry.
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * scale, msg=name)
    for i in range(2):
        # Both are added to the stream, so each has the stream's own gradient.
        post = cache[f"blocks.{i}.hook_resid_post_grad"]
        assert torch.equal(cache[f"blocks.{i}.hook_mlp_out_grad"], post)
        if bridge.cfg.parallel_attn_mlp:
            assert torch.equal(cache[f"blocks.{i}.hook_attn_out_grad"], post)
        else:
            mid = cache[f"blocks.{i}.hook_resid_mid_grad"]
            assert torch.equal(cache[f"blocks.{i}.hook_attn_out_grad"], mid)
            assert not torch.equal(mid, post)


def slope(bridge: Any, ids: Tensor, weights: Tensor, name: str, direction: Tensor, step: float) -> float:
    """The central difference of the weighted logits along a direction at one hook."""

    def at(size: float) -> float:
        push = (name, lambda value, hook: value + size * direction)
        with torch.no_grad():
            logits = bridge.run_with_hooks(ids, fwd_hooks=[push])
        return float((logits * weights).sum())

    return (at(step) - at(-step)) / (2 * step)


@pytest.mark.parametrize("case", family_cases(torch.float64, experts="eager"))
def test_gradients_are_what_finite_differences_measure(case: Case) -> None:
    """In double precision along random directions; the value is written, so this also tests the write.

    A central difference errs by step² times a third derivative and by rounding over step. Falcon is float64
    throughout. Mixtral's norms and router compute in float32, and its top-k choice jumps: all four experts
    are chosen, the step is coarser and so is the tolerance (measured: 8e-5 at this step, more at any other).
    """
    mixtral = case.family == "mixtral"
    step, tolerance = (3e-3, 1e-3) if mixtral else (1e-5, 1e-6)
    case = case._replace(changes={**case.changes, **({"num_experts_per_tok": 4} if mixtral else {})})
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    weights = torch.randn(2, 7, model.config.vocab_size, dtype=torch.float64)
    _, cache = bridge.run_with_cache(ids)
    for name in float_ports(bridge):
        _, gradient = gradient_at(bridge, name, ids, weights)
        for _ in range(2):
            direction = torch.randn_like(cache[name])
            direction /= direction.norm()
            measured = slope(bridge, ids, weights, name, direction, step)
            predicted = float((gradient * direction).sum())
            assert abs(measured - predicted) < tolerance * float(gradient.norm()), (name, measured, predicted)


@pytest.mark.parametrize("case", family_cases())
def test_a_gradient_can_be_written(case: Case) -> None:
    """A head whose gradient is zeroed at z passes nothing on to its query, and the others pass theirs."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    weights = torch.randn(2, 7, model.config.vocab_size)
    _, clean = gradient_at(bridge, "blocks.1.attn.hook_q", ids, weights)
    found: list[Tensor] = []

    def silence(gradient: Tensor, hook: Any) -> Tensor:
        gradient[:, :, 3] = 0
        return gradient

    hooks = [("blocks.1.attn.hook_z", silence), ("blocks.1.attn.hook_q", lambda grad, hook: found.append(grad))]
    logits = bridge.run_with_hooks(ids, bwd_hooks=hooks)
    (logits * weights).sum().backward()
    (written,) = found
    others = [head for head in range(8) if head != 3]
    assert clean[:, :, 3].abs().max() > 0 and written[:, :, 3].abs().max() == 0
    assert torch.equal(written[:, :, others], clean[:, :, others])


@pytest.mark.parametrize("case", family_cases())
def test_a_gradient_flows_through_a_written_value(case: Case) -> None:
    """What a hook returns is part of the graph: scaling by two doubles the gradient of what was there."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    weights = torch.randn(2, 7, model.config.vocab_size)
    for name in float_ports(bridge):
        kept: dict[str, Tensor] = {}

        def scale(value: Tensor, hook: Any) -> Tensor:
            kept["before"], kept["after"] = value, value * 2
            return kept["after"]

        logits = bridge.run_with_hooks(ids, fwd_hooks=[(name, scale)])
        before, after = torch.autograd.grad((logits * weights).sum(), [kept["before"], kept["after"]])
        assert torch.equal(before, 2 * after) and after.abs().max() > 0, name
