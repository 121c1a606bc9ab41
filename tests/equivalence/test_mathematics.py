"""Law 4 against mathematics: each edit has a model, a weight or a sum on paper that must give the same logits.

Scaling by two is exact in binary floating point, and so is a product with zero: where only those are
involved, the comparison is bitwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.equivalence.grid import Case, family_cases, wrap
from tests.equivalence.oracles import fused_columns
from tests.support import falcon, mixtral, tokens

F64 = 1e-10
"""Float64: two orders of summing a few hundred terms of size up to ten differ by about 1e-14."""
MIXTRAL = 1e-4
"""Mixtral's norms and router compute in float32 whatever the dtype: rounding of 1e-7 grows over two layers."""

all_families = pytest.mark.parametrize("case", family_cases())
exact_families = pytest.mark.parametrize("case", family_cases(torch.float64, experts="eager"))
falcons = pytest.mark.parametrize("case", family_cases()[:-1])


def tolerance(bridge: Any) -> float:
    return MIXTRAL if bridge.cfg.num_experts else F64


def block(model: Any, layer: int) -> Any:
    base = model.base_model
    return base.layers[layer] if model.config.model_type == "mixtral" else base.h[layer]


def output_projection(model: Any, layer: int) -> Any:
    found = block(model, layer)
    return found.self_attn.o_proj if model.config.model_type == "mixtral" else found.self_attention.dense


def twin(model: Any, alter: Callable[[Any], None]) -> Any:
    """A copy of the model with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        alter(other)
    return other


@all_families
@pytest.mark.parametrize("head", [0, 5, 7])
def test_ablating_a_head_is_zeroing_its_columns_of_the_output_projection(case: Case, head: int) -> None:
    model, ids = case.model(), tokens()
    size = output_projection(model, 1).weight.shape[1] // 8

    def zero_columns(other: Any) -> None:
        output_projection(other, 1).weight[:, head * size : (head + 1) * size] = 0

    def ablate(z: Tensor, hook: Any) -> None:
        z[:, :, head] = 0

    expected = twin(model, zero_columns)(ids).logits
    bridge = wrap(model)
    written = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", ablate)])
    assert torch.equal(written, expected)
    assert not torch.equal(written, bridge(ids))


@exact_families
@pytest.mark.parametrize("head", [0, 6])
def test_mean_ablating_a_head_adds_a_constant_for_what_it_says(case: Case, head: int) -> None:
    """Attention's output becomes that of the other heads, plus the mean of z through the head's columns."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    _, clean = bridge.run_with_cache(ids)
    mean = clean["z", 0][:, :, head].mean((0, 1))

    def ablate(z: Tensor, hook: Any) -> Tensor:
        z[:, :, head] = z[:, :, head].mean((0, 1))
        return z

    weight = output_projection(model, 0).weight.unflatten(1, (8, -1))[:, head].detach()
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", ablate)]):
        _, cache = bridge.run_with_cache(ids)
    expected = clean["attn_out", 0] + (mean - clean["z", 0][:, :, head]) @ weight.T
    torch.testing.assert_close(cache["attn_out", 0], expected, rtol=0, atol=tolerance(bridge))


@all_families
def test_patching_positions_from_another_run(case: Case) -> None:
    """One position changes nothing before it; all of them make it the other run."""
    model, ids, others = case.model(), tokens(), tokens()
    bridge = wrap(model)
    clean = bridge(ids)
    target, other = bridge.run_with_cache(others)
    name = "blocks.1.hook_resid_pre"

    def patch(stream: Tensor, hook: Any) -> None:
        stream[:, 4] = other[name][:, 4]

    patched = bridge.run_with_hooks(ids, fwd_hooks=[(name, patch)])
    # Rows of a matmul may round differently with their neighbours' values: not bitwise, but float32 close.
    torch.testing.assert_close(patched[:, :4], clean[:, :4], rtol=0, atol=1e-4)
    assert (patched[:, 4:] - clean[:, 4:]).abs().amax((0, 2)).min() > 1e-2
    assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda stream, hook: other[name])]), target)


def grouped_columns(model: Any, layer: int, group: int, bridge: Any) -> slice:
    """The columns of the output projection that a key-value group's query heads own."""
    width = output_projection(model, layer).weight.shape[1] // bridge.cfg.n_key_value_heads
    return slice(group * width, (group + 1) * width)


@all_families
def test_doubling_the_values_of_a_group_is_doubling_its_heads_columns(case: Case) -> None:
    """Which v feeds which z, through the attention kernel: exact, and knows nothing of the fused layout."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    for group in range(bridge.cfg.n_key_value_heads):
        columns = grouped_columns(model, 0, group, bridge)
        expected = twin(model, lambda other: output_projection(other, 0).weight[:, columns].mul_(2))(ids).logits

        def double(v: Tensor, hook: Any) -> None:
            v[:, :, group] *= 2

        written = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_v", double)])
        assert torch.equal(written, expected), group
        assert not torch.equal(written, bridge(ids))


@all_families
def test_doubling_a_groups_key_is_doubling_its_queries(case: Case) -> None:
    """Scores are their product, so either doubles them, exactly; and the other groups' do not move."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    per_group = bridge.cfg.n_heads // bridge.cfg.n_key_value_heads
    for group in range(bridge.cfg.n_key_value_heads):

        def double_key(k: Tensor, hook: Any) -> None:
            k[:, :, group] *= 2

        def double_queries(q: Tensor, hook: Any) -> None:
            q[:, :, group * per_group : (group + 1) * per_group] *= 2

        by_key = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_k", double_key)])
        by_queries = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_q", double_queries)])
        assert torch.equal(by_key, by_queries), group
        assert not torch.equal(by_key, bridge(ids))


@pytest.mark.parametrize("case", [c for c in family_cases(torch.float64, experts="eager") if c.id not in ("7b", "rw")])
def test_swapping_keys_between_groups_is_swapping_their_query_and_value_heads(case: Case) -> None:
    """Swapping k is moving all the rest the other way: q, v and the columns that read z.

    Multi-query attention has one key, and ALiBi's slopes belong to the places of the heads.
    """
    model, ids = case.model(), tokens()
    bridge = wrap(model)

    def swap(x: Tensor, hook: Any) -> Tensor:
        size = x.shape[2] // bridge.cfg.n_key_value_heads
        return torch.cat([x[:, :, size : 2 * size], x[:, :, :size], x[:, :, 2 * size :]], 2)

    def swapped_columns(other: Any) -> None:
        weight = output_projection(other, 1).weight
        first, second = (grouped_columns(other, 1, group, bridge) for group in (0, 1))
        weight[:, first], weight[:, second] = weight[:, second].clone(), weight[:, first].clone()

    names = [f"blocks.1.attn.hook_{part}" for part in "kqv"]
    written = bridge.run_with_hooks(ids, fwd_hooks=[(names[0], swap)])
    assert (written - bridge(ids)).abs().max() > 1e-3
    # Swapping q, v and the columns that read z moves every other part along: k alone stays behind.
    bridge.detach()
    moved = wrap(twin(model, swapped_columns))
    expected = moved.run_with_hooks(ids, fwd_hooks=[(names[1:], swap)])
    torch.testing.assert_close(written, expected, rtol=0, atol=tolerance(moved))


@falcons
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_doubling_a_part_is_doubling_its_rows_of_the_fused_weight(case: Case, part: str) -> None:
    model, ids = case.model(), tokens()
    rows = fused_columns(model.config, part)

    def double_rows(other: Any) -> None:
        linear = other.transformer.h[1].self_attention.query_key_value
        linear.weight[rows] *= 2
        if linear.bias is not None:
            linear.bias[rows] *= 2

    expected = twin(model, double_rows)(ids).logits
    bridge = wrap(model)
    written = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.1.attn.hook_{part}", lambda x, hook: x * 2)])
    assert torch.equal(written, expected)


@pytest.mark.core
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_doubling_a_part_is_doubling_its_projection(part: str) -> None:
    model, ids = mixtral(), tokens()
    expected = twin(model, lambda other: getattr(block(other, 1).self_attn, f"{part}_proj").weight.mul_(2))(ids).logits
    written = wrap(model).run_with_hooks(ids, fwd_hooks=[(f"blocks.1.attn.hook_{part}", lambda x, hook: x * 2)])
    assert torch.equal(written, expected)


@falcons
def test_silencing_a_neuron_is_zeroing_its_column(case: Case) -> None:
    """After the activation function exactly; before it, far to the left, GELU gives zero too."""
    model, ids = case.model(), tokens()
    expected = twin(model, lambda other: block(other, 0).mlp.dense_4h_to_h.weight[:, 11].zero_())(ids).logits
    bridge = wrap(model)

    def silence(neurons: Tensor, hook: Any) -> None:
        neurons[..., 11] = 0 if "post" in hook.name else -1e4

    for name in ("blocks.0.mlp.hook_post", "blocks.0.mlp.hook_pre"):
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(name, silence)]), expected), name
    assert not torch.equal(expected, bridge(ids))


@all_families
def test_the_ends_of_the_model(case: Case) -> None:
    """Embeddings written at hook_embed are `inputs_embeds`; what ln_final hands on is what the head multiplies."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    new = torch.randn(2, 7, 32)
    written = bridge.run_with_hooks(ids, fwd_hooks=[("hook_embed", lambda x, hook: new)])
    assert torch.equal(written, model(inputs_embeds=new).logits)
    written = bridge.run_with_hooks(ids, fwd_hooks=[("ln_final.hook_out", lambda x, hook: new)])
    assert torch.equal(written, model.lm_head(new))
    logits = torch.randn(2, 7, model.config.vocab_size)
    written = bridge.run_with_hooks(ids, fwd_hooks=[("unembed.hook_out", lambda x, hook: logits)])
    assert torch.equal(written, logits)


@all_families
def test_a_block_that_says_nothing_hands_its_stream_on(case: Case) -> None:
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    silent = [(["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"], lambda x, hook: torch.zeros_like(x))]
    with bridge.hooks(fwd_hooks=silent):
        _, cache = bridge.run_with_cache(ids)
    assert torch.equal(cache["resid_post", 0], cache["resid_pre", 0])


@pytest.mark.parametrize("case", [case for case in family_cases() if case.id in ("rw", "rw-rope", "mixtral")])
def test_the_middle_stream_feeds_the_mlp_and_the_sum(case: Case) -> None:
    """Where hook_mlp_in reaches the MLP alone, a write at hook_resid_mid reaches both."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    new = torch.randn(2, 7, 32)
    found = block(model, 0)
    mlp = found.mlp(found.post_attention_layernorm(new))
    _, clean = bridge.run_with_cache(ids)
    for name, kept in (("hook_resid_mid", new), ("hook_mlp_in", clean["resid_mid", 0])):
        with bridge.hooks(fwd_hooks=[(f"blocks.0.{name}", lambda x, hook: new)]):
            _, cache = bridge.run_with_cache(ids)
        assert torch.equal(cache["mlp_out", 0], mlp), name
        assert torch.equal(cache["resid_post", 0], kept + mlp), name


@pytest.mark.parametrize("case", [case for case in family_cases() if case.id in ("7b", "11b", "40b")])
def test_the_mlp_of_a_parallel_block_reads_a_stream_of_its_own(case: Case) -> None:
    """A write at hook_mlp_in is the MLP on the norm of what was written; attention does not see it."""
    model, ids = case.model(), tokens()
    bridge = wrap(model)
    new = torch.randn(2, 7, 32)
    found = block(model, 1)
    norm = (
        found.ln_mlp
        if case.changes.get("num_ln_in_parallel_attn") != 1 and "new_decoder_architecture" in (case.changes)
        else found.input_layernorm
    )
    mlp = found.mlp(F.layer_norm(new, (32,), norm.weight, norm.bias, norm.eps))
    _, clean = bridge.run_with_cache(ids)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_in", lambda x, hook: new)]):
        _, cache = bridge.run_with_cache(ids)
    assert torch.equal(cache["mlp_out", 1], mlp)
    assert torch.equal(cache["attn_out", 1], clean["attn_out", 1])
    assert torch.equal(cache["resid_post", 1], clean["resid_pre", 1] + (mlp + clean["attn_out", 1]))


# -- routing -----------------------------------------------------------------------------------------


def experts_on_paper(mlp: Any, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Each token's chosen experts, one at a time, each a gated MLP, times its weight."""
    out = torch.zeros_like(x)
    for b, p, c in torch.cartesian_prod(*map(torch.arange, indices.shape)).tolist():
        e = int(indices[b, p, c])
        gate, up = (mlp.experts.gate_up_proj[e] @ x[b, p]).chunk(2)
        out[b, p] += weights[b, p, c] * (mlp.experts.down_proj[e] @ (F.silu(gate) * up))
    return out


@pytest.mark.core
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_forced_routing_is_the_sum_over_the_forced_experts(how: str) -> None:
    """Indices and weights written by hand; and what is captured is what the experts used."""
    model, ids = mixtral(experts=how), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        _, clean = bridge.run_with_cache(ids)
        x, weights, indices = (
            clean[f"blocks.1.mlp.hook_{name}"] for name in ("in", "expert_weights", "expert_indices")
        )
        forced = (indices + torch.tensor([1, 3])) % 4
        other = torch.rand(2, 7, 2)
        cases = {
            "nothing": ([], weights, indices),
            "indices": ([("blocks.1.mlp.hook_expert_indices", lambda i, hook: forced)], weights, forced),
            "weights": ([("blocks.1.mlp.hook_expert_weights", lambda w, hook: other)], other, indices),
        }
        for what, (hooks, used_weights, used_indices) in cases.items():
            with bridge.hooks(fwd_hooks=hooks):
                _, cache = bridge.run_with_cache(ids)
            expected = experts_on_paper(model.model.layers[1].mlp, x, used_weights, used_indices)
            # Float32, one dot product at a time instead of one matmul: 24 and 32 terms of size ten.
            torch.testing.assert_close(cache["mlp_out", 1], expected, rtol=1e-4, atol=1e-4, msg=what)


@pytest.mark.core
def test_weights_sum_to_one_and_follow_the_router_on_paper() -> None:
    model, ids = mixtral(), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        chances = (cache["blocks.0.mlp.hook_in"] @ model.model.layers[0].mlp.gate.weight.T).softmax(-1)
    best, indices = chances.sort(-1, descending=True)
    assert torch.equal(cache["expert_indices", 0], indices[..., :2])
    # A softmax of float32 logits computed by another matmul.
    expected = best[..., :2] / best[..., :2].sum(-1, keepdim=True)
    torch.testing.assert_close(cache["expert_weights", 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.core
def test_all_weight_on_one_expert_is_a_dense_mlp() -> None:
    model, ids = mixtral(), tokens()
    bridge = wrap(model)
    experts = model.model.layers[0].mlp.experts
    hooks = [
        ("blocks.0.mlp.hook_expert_indices", lambda i, hook: torch.tensor([3, 0]).expand_as(i)),
        ("blocks.0.mlp.hook_expert_weights", lambda w, hook: torch.tensor([1.0, 0.0]).expand_as(w)),
    ]
    with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
        _, cache = bridge.run_with_cache(ids)
        gate, up = F.linear(cache["blocks.0.mlp.hook_in"], experts.gate_up_proj[3]).chunk(2, -1)
        expected = F.linear(F.silu(gate) * up, experts.down_proj[3])
    # Float32 sums of 24 and 32 terms in another order.
    torch.testing.assert_close(cache["mlp_out", 0], expected, rtol=1e-4, atol=1e-4)


# -- ALiBi -------------------------------------------------------------------------------------------


def alibi_attention(q: Tensor, k: Tensor, v: Tensor, copies: int) -> Tensor:
    """Press et al. on paper, in float64: head h adds slope 2^-(h+1) times the key's position to its scores.

    Falcon divides the biased scores by sqrt(d_head), the bias with them (its `inv_norm_factor`).
    """
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    slopes = 2.0 ** -torch.arange(1, 9, dtype=torch.float64)
    bias = slopes[:, None, None] * torch.arange(k.shape[2])
    scores = (q @ k.transpose(-1, -2) + copies * bias) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.core
@pytest.mark.parametrize("attn, copies", [("sdpa", 1), ("eager", 2)])
def test_alibi_is_right_under_sdpa_and_doubled_under_eager(attn: str, copies: int) -> None:
    """Pins transformers' fault: when eager equals one bias, the warning at boot can go."""
    model, ids = falcon(attn, multi_query=False, parallel_attn=False, alibi=True), tokens()
    bridge = wrap(model)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    q, k, v, z = (cache[part, 0] for part in "qkvz")
    # Float32 against float64: rounding of about 1e-7 relative to values of size one.
    torch.testing.assert_close(z.double(), alibi_attention(q, k, v, copies), rtol=0, atol=1e-5)
    assert (z.double() - alibi_attention(q, k, v, 3 - copies)).abs().max() > 1e-3
