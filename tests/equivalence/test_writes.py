"""Law 4, for every hook of every configuration: it fires once, and a write does what a hand-written hook does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.equivalence.grid import Case, every_case, family_cases, one_by_one, wrap
from tests.equivalence.oracles import edited, places_of
from tests.equivalence.test_untouched import ports
from tests.support import tokens


def change(value: Tensor, experts: int | None) -> Tensor:
    """Another value: each text gets a scaled and shifted version of the other's; each expert becomes the next."""
    if value.is_floating_point():
        return value.roll(1, 0) * 0.5 + 0.3
    assert experts is not None
    return (value + 1) % experts


def moves(name: str, bridge: Any) -> bool:
    """Whether the change above can be seen: with one expert, the next one is the same one."""
    return not (name.endswith("hook_expert_indices") and bridge.cfg.num_experts == 1)


@pytest.mark.parametrize("case", every_case())
def test_a_write_at_each_hook_is_bitwise_the_hand_written_one(case: Case) -> None:
    model, ids = case.model(), tokens()
    experts = getattr(model.config, "num_local_experts", None)
    places = places_of(model, batch=2)
    with torch.no_grad():
        bare = model(ids).logits
        expected = {}
        for name in one_by_one(case, list(places)):
            with edited(model, places[name], lambda value: change(value, experts)):
                expected[name] = model(ids).logits
        bridge = wrap(model)
        assert set(ports(bridge)) == set(places)
        for name in expected:
            written = bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda value, hook: change(value, experts))])
            assert torch.equal(written, expected[name]), name
            assert torch.equal(written, bare) != moves(name, bridge), name
        assert torch.equal(bridge(ids), bare)


@pytest.mark.parametrize("case", every_case())
def test_every_hook_fires_exactly_once(case: Case) -> None:
    """Also while every other hook, named here, is held too; in the order in which the model computes them."""
    model = case.model()
    bridge = wrap(model)
    order: list[str] = []
    with torch.no_grad():
        bridge.run_with_hooks(tokens(), fwd_hooks=[(lambda name: True, lambda value, hook: order.append(hook.name))])
    assert Counter(order) == Counter(bridge.hook_dict.keys())
    layers = [name.split(".")[1] for name in order if name.startswith("blocks.")]
    assert layers == sorted(layers)
    assert order[0] == "hook_embed" and order[-2:] == ["ln_final.hook_out", "unembed.hook_out"]


@pytest.mark.parametrize("case", family_cases())
def test_an_edit_in_place_is_a_write(case: Case) -> None:
    """Returning the edited tensor, editing it and returning nothing, and returning a new one are one thing."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    experts = bridge.cfg.num_experts

    def in_place(value: Tensor, hook: Any) -> None:
        value.copy_(change(value, experts))

    def in_place_returned(value: Tensor, hook: Any) -> Tensor:
        return value.copy_(change(value, experts))

    for name in ports(bridge):
        expected = bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda value, hook: change(value, experts))])
        assert not torch.equal(expected, bridge(ids)), name
        for hook in (in_place, in_place_returned):
            assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(name, hook)]), expected), (name, hook)


@pytest.mark.parametrize("case", family_cases())
def test_what_is_captured_after_a_write_is_what_was_written(case: Case) -> None:
    """And nothing before the write, in the order of the model, has moved."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    experts = bridge.cfg.num_experts
    with torch.no_grad():
        _, before = bridge.run_with_cache(ids)
        for name in ports(bridge):
            order: list[str] = []
            found: dict[str, Tensor] = {}

            def look(value: Tensor, hook: Any) -> None:
                order.append(hook.name)
                found[hook.name] = value

            write = (name, lambda value, hook: change(value, experts))
            bridge.run_with_hooks(ids, fwd_hooks=[write, (ports(bridge), look)])
            assert torch.equal(found[name], change(before[name], experts)), name
            for earlier in order[: order.index(name)]:
                assert torch.equal(found[earlier], before[earlier]), (name, earlier)


@pytest.mark.parametrize("case", family_cases())
def test_writes_at_every_hook_at_once(case: Case) -> None:
    """All edits together equal all hand-written hooks together: no write undoes another's."""
    model, ids = case.model(), tokens()
    experts = getattr(model.config, "num_local_experts", None)

    def edit(value: Tensor) -> Tensor:
        return value * 0.5 + 0.1 if value.is_floating_point() else change(value, experts)

    with torch.no_grad():
        bridge = wrap(model)
        # A hand-written middle stream puts its own sum at the end of the block; it is held by the test above.
        names = [name for name in ports(bridge) if not name.endswith("hook_resid_mid")]
        written = bridge.run_with_hooks(ids, fwd_hooks=[(names, lambda value, hook: edit(value))])
        bridge.detach()
        # Hand-written q, k and v hooks sit on one activation, one after the other, as the bridge's do.
        handles = [h for name in names for h in places_of(model, batch=2)[name].install(model, edit)]
        expected = model(ids).logits
        for handle in handles:
            handle.remove()
    assert torch.equal(written, expected)


@pytest.mark.parametrize("case", family_cases())
def test_a_write_that_does_not_fit_is_refused_at_every_hook(case: Case) -> None:
    """Nothing is broadcast or cast in silence: another shape or dtype raises, and names the hook."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    for name in ports(bridge):
        with pytest.raises(ValueError, match=f"^hook at '{name}': got a replacement of shape"):
            bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda value, hook: value[:1])])
        with pytest.raises(ValueError, match=f"^hook at '{name}': got a replacement of dtype"):
            bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda value, hook: value.to(torch.float16))])
    assert torch.equal(bridge(ids), model(ids).logits)
