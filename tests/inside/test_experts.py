"""Inside Mixtral's experts: every value is that of one token and one expert at a time, and writes follow.

Looking leaves the logits bitwise what they are under every implementation of the experts in transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inside.cases import DTYPES, assert_close, ramp, run_edited, wrap
from tests.inside.oracles import Edit, experts, layer_of
from tests.support import mixtral, tokens
from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.core

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
SHAPES = [(number, top) for number in (1, 2, 3, 4, 6, 8) for top in (1, 2, 3) if top <= number]
NAMES = ("router_logits", "expert_weights", "expert_indices", "pre", "pre_linear", "post", "expert_out")
IN, OUT = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"


def at(short: str) -> str:
    return f"blocks.0.mlp.hook_{short}"


def model_of(number: int, top: int, how: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    # A router of size one decides clearly: no two probabilities are as close as rounding.
    return mixtral(experts=how, dtype=dtype, num_local_experts=number, num_experts_per_tok=top)


def moe(model: Any) -> Any:
    return layer_of(model, 0).mlp


def watched(bridge: TransformerBridge, ids: Tensor, edits: dict[str, Edit], **kwargs: Any) -> dict[str, Tensor]:
    """Everything of the first mixture, by short name, in a run with edits there."""
    keep = [IN, OUT, *map(at, NAMES)]
    _, found = run_edited(bridge, ids, {at(n): edit for n, edit in edits.items()}, keep, **kwargs)
    return {"in": found[IN], "mlp_out": found[OUT]} | {short: found[at(short)] for short in NAMES}


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("number, top", SHAPES)
def test_captured_values_are_the_loops(number: int, top: int, how: str) -> None:
    model, ids = model_of(number, top, how), tokens()
    with torch.no_grad():
        bare = model(ids).logits
        bridge = wrap(model)
        logits, _ = bridge.run_with_cache(ids)
        found = watched(bridge, ids, {})
    assert torch.equal(logits, bare)
    expected = experts(moe(model), found["in"])
    assert torch.equal(found["expert_indices"], expected["expert_indices"])
    for short in (*NAMES, "mlp_out"):
        assert found[short].shape == expected[short].shape
        assert_close(found[short], expected[short].double(), model.dtype, short)
    weighted = (found["expert_out"] * found["expert_weights"][..., None]).sum(2)
    assert_close(weighted, found["mlp_out"].double(), model.dtype, "weighted sum")


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_looking_in_bf16(how: str) -> None:
    model, ids = model_of(4, 2, how, torch.bfloat16), tokens()
    with torch.no_grad():
        bare = model(ids).logits
        bridge = wrap(model)
        assert torch.equal(bridge.run_with_cache(ids)[0], bare)
        found = watched(bridge, ids, {})
    # The naive loop chooses as the model did: bf16 logits are close together.
    expected = experts(
        moe(model),
        found["in"],
        {
            "expert_weights": lambda _: found["expert_weights"].double(),
            "expert_indices": lambda _: found["expert_indices"],
        },
    )
    for short in ("pre", "pre_linear", "post", "expert_out", "mlp_out"):
        assert_close(found[short], expected[short], model.dtype, short)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number, top", SHAPES)
def test_a_hook_inside_eager_experts_leaves_them_bitwise(number: int, top: int, dtype: str) -> None:
    model, ids = model_of(number, top, "eager", DTYPES[dtype]), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        bare = bridge(ids)
        for short in NAMES:
            through = bridge.run_with_hooks(ids, fwd_hooks=[(at(short), lambda value, hook: None)])
            assert torch.equal(through, bare), short
            copied = bridge.run_with_hooks(ids, fwd_hooks=[(at(short), lambda value, hook: value.clone())])
            assert torch.equal(copied, bare), short


@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
def test_a_hook_inside_the_kernels_leaves_them_as_they_are(how: str) -> None:
    model, ids = model_of(4, 2, how), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        bare = bridge(ids)
        for short in ("pre", "pre_linear", "post", "expert_out"):
            through = bridge.run_with_hooks(ids, fwd_hooks=[(at(short), lambda value, hook: None)])
            assert torch.equal(through, bare), short


WRITES: dict[str, Edit] = {
    "router_logits": lambda logits: logits.flip(-1) * 0.5 + ramp(logits),
    "pre": lambda pre: pre.flip(-1) * 0.7 + ramp(pre),
    "pre_linear": lambda linear: linear.flip(-1) * 0.7 + ramp(linear),
    "post": lambda post: post.flip(-1) * 0.7 + ramp(post),
    "expert_out": lambda out: out.flip(-1) * 0.7 + ramp(out),
    "expert_weights": lambda weights: weights * 0.5 + 0.2,
}


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("number, top", SHAPES)
def test_a_write_has_the_predicted_effect(number: int, top: int, how: str) -> None:
    """One at a time and all at once; a write to the router's logits chooses again."""
    model, ids = model_of(number, top, how), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        for edits in [{short: edit} for short, edit in WRITES.items()] + [WRITES]:
            found = watched(bridge, ids, edits)
            expected = experts(moe(model), found["in"], edits)
            assert torch.equal(found["expert_indices"], expected["expert_indices"])
            for short in (*NAMES, "mlp_out"):
                assert_close(found[short], expected[short].double(), model.dtype, f"{short} after {list(edits)}")


def test_forced_and_forbidden_routing() -> None:
    """The lowest logit is never chosen while there is another; the highest always is, and first."""
    model, ids = model_of(4, 2), tokens()
    bridge = wrap(model)

    def force(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., 3], logits[..., 1] = torch.finfo(logits.dtype).max, torch.finfo(logits.dtype).min
        return logits

    with torch.no_grad():
        clean = watched(bridge, ids, {})
        found = watched(bridge, ids, {"router_logits": force})
    assert (clean["expert_indices"] == 1).any()
    assert (found["expert_indices"][..., 0] == 3).all() and not (found["expert_indices"] == 1).any()
    assert torch.equal(found["expert_weights"], torch.tensor([1.0, 0.0]).expand(2, 7, 2))
    alone = experts(moe(model), clean["in"], {"expert_indices": lambda i: torch.full_like(i, 3)})
    assert_close(found["mlp_out"], alone["expert_out"][:, :, 0], model.dtype)


@pytest.mark.parametrize("short", ["pre", "pre_linear", "post", "expert_out"])
def test_one_chosen_experts_edit_counts_by_its_weight(short: str) -> None:
    """Of one token, in one place: every other token and place stays bitwise."""
    model, ids, where = model_of(6, 3), tokens(), (1, 4, 1)
    bridge = wrap(model)

    def push(value: Tensor) -> Tensor:
        value = value.clone()
        value[where] += 5 * ramp(value[where])
        return value

    with torch.no_grad():
        clean = watched(bridge, ids, {short: lambda value: value.clone()})
        found = watched(bridge, ids, {short: push})
    change = found["expert_out"][where] - clean["expert_out"][where]
    moved = found["mlp_out"] - clean["mlp_out"]
    assert_close(moved[1, 4], (clean["expert_weights"][where] * change).double(), model.dtype)
    assert moved[1, 4].abs().max() > 0.01
    moved[1, 4] = 0
    assert (moved == 0).all()
    others = found["expert_out"] - clean["expert_out"]
    others[where] = 0
    assert (others == 0).all()


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_every_token_at_one_expert(how: str) -> None:
    """All choices forced to the same two experts, whose order the indices keep."""
    model, ids = model_of(8, 2, how), tokens()
    bridge = wrap(model)
    forced: dict[str, Edit] = {"expert_indices": lambda indices: torch.tensor([5, 2]).expand_as(indices).clone()}
    with torch.no_grad():
        found = watched(bridge, ids, forced)
    expected = experts(moe(model), found["in"], forced)
    for short in ("pre", "pre_linear", "post", "expert_out", "mlp_out"):
        assert_close(found[short], expected[short], model.dtype, short)


def test_the_same_expert_twice_counts_twice() -> None:
    model, ids = model_of(4, 2), tokens()
    bridge = wrap(model)
    forced: dict[str, Edit] = {"expert_indices": lambda indices: torch.ones_like(indices)}
    with torch.no_grad():
        looked = watched(bridge, ids, forced)
        through = watched(bridge, ids, forced | {"post": lambda post: post.clone()})
    expected = experts(moe(model), looked["in"], forced)
    for found in (looked, through):
        assert_close(found["mlp_out"], expected["mlp_out"], model.dtype)
        assert torch.equal(found["expert_out"][:, :, 0], found["expert_out"][:, :, 1])


def test_a_second_layers_experts_and_one_token() -> None:
    """Decoding hands the experts a single token; each layer has experts of its own."""
    model, ids = model_of(4, 2), tokens(1, 1)
    bridge = wrap(model)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    expected = experts(layer_of(model, 1).mlp, cache["blocks.1.mlp.hook_in"])
    for short in NAMES:
        assert_close(cache[f"blocks.1.mlp.hook_{short}"], expected[short].double(), model.dtype, short)


@pytest.mark.parametrize("short", [n for n in NAMES if n != "expert_indices"])
def test_gradients_are_those_of_the_explicit_loop(short: str) -> None:
    """All four experts chosen, so that nothing jumps; the router computes in float32."""
    model, ids = model_of(4, 4, dtype=torch.float64), tokens()
    bridge = wrap(model)
    weights = torch.randn(2, 7, 32, dtype=torch.float64)
    entering = bridge.run_with_cache(ids)[1][IN].detach().requires_grad_()
    steps = experts(moe(model), entering)
    (steps["mlp_out"] * weights).sum().backward()
    live: list[Tensor] = []
    found: list[Tensor] = []
    bridge.run_with_hooks(
        ids,
        fwd_hooks=[(OUT, lambda value, hook: live.append(value))],
        bwd_hooks=[(at(short), lambda gradient, hook: found.append(gradient))],
    )
    (live[0] * weights).sum().backward()
    expected = steps[short].grad
    assert expected is not None and expected.abs().max() > 0
    assert_close(found[0], expected, torch.float32, short)


def test_a_router_called_by_itself_takes_any_axes_before_the_last() -> None:
    """As transformers' own does: `[batch, pos, d_model]` gives a row for each token."""
    model = model_of(4, 2)
    x = torch.randn(2, 3, model.config.hidden_size)
    bridge, gate = wrap(model), moe(model).gate
    with torch.no_grad():
        bare = gate(x)
        with bridge.hooks(fwd_hooks=[(at("router_logits"), lambda logits, hook: logits.clone())]):
            through = gate(x)
    assert [part.shape for part in through] == [(6, 4), (6, 2), (6, 2)]
    assert all(torch.equal(one, other) for one, other in zip(through, bare, strict=True))


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("short", ["pre", "post", "expert_out"])
def test_no_token_at_all(short: str, number: int) -> None:
    """A mixture takes an empty batch, and its hooks see its shape; a single expert has no neighbour."""
    model = model_of(number, 1)
    bridge, mixture = wrap(model), moe(model)
    x = torch.zeros(0, 3, model.config.hidden_size)
    width = {"pre": 24, "post": 24, "expert_out": 32}[short]
    seen: list[Tensor] = []

    def same(value: Tensor, hook: Any) -> Tensor:
        seen.append(value)
        return value.clone()

    with torch.no_grad(), bridge.hooks(fwd_hooks=[(at(short), same)]):
        out = mixture(x)
    assert [value.shape for value in seen] == [(0, 3, 1, width)]
    assert out.shape == x.shape
