"""Attribution patching and AtP*: against finite differences, linear cases, softmaxes by hand and brute-force sweeps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import FAMILIES, falcon, family, tokens
from transformer_lens import TransformerBridge, patching
from transformer_lens.analysis.attribution import (
    atp_star,
    attribution_patching,
    expert_attribution_patching,
    integrated_gradients,
)
from transformer_lens.analysis.attribution.activations import line_steps
from transformer_lens.analysis.attribution.atp import key_effects, query_effects

STREAMS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_in", "hook_mlp_out", "hook_q_input", "hook_k_input")
INSIDE = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "attn.hook_result")


def metric(logits: Tensor) -> Tensor:
    """Linear in the logits, unequal in the rows."""
    weights = torch.arange(1.0, len(logits) + 1, dtype=logits.dtype)
    return ((logits[:, -1, 7] - logits[:, -1, 9]) * weights).sum() + logits[:, -2, 5].sum()


def pair(name: str, batch: int = 2, pos: int = 5, **changes: Any) -> tuple[TransformerBridge, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "mixtral":
        changes["experts"] = "eager"
    bridge = TransformerBridge(family(name, **changes).double())
    return bridge, tokens(batch, pos), tokens(batch, pos)


def number(bridge: TransformerBridge, x: Tensor) -> float:
    with torch.no_grad():
        return metric(bridge(x)).item()


def activations(bridge: TransformerBridge, x: Tensor, names: list[str]) -> Any:
    with torch.no_grad():
        return bridge.run_with_cache(x, names_filter=names)[1]


def measured(bridge: TransformerBridge, x: Tensor, name: str, value: Tensor) -> float:
    with torch.no_grad():
        return float(metric(bridge.run_with_hooks(x, fwd_hooks=[(name, lambda old, hook: value.clone())])))


@pytest.mark.parametrize("at", ["corrupted", "clean"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_a_score_is_the_derivative_towards_the_clean_activation(layout, at):
    bridge, clean, corrupted = pair(layout)
    names = [f"blocks.1.{name}" for name in (*STREAMS, *INSIDE)]
    names += ["hook_embed", "blocks.0.mlp.hook_router_logits" if layout == "mixtral" else "blocks.0.mlp.hook_post"]
    found = attribution_patching(bridge, clean, corrupted, metric, names, at=at)
    ours, theirs = activations(bridge, clean, names), activations(bridge, corrupted, names)
    base, x = (ours, clean) if at == "clean" else (theirs, corrupted)
    # Mixtral's norms and softmax are in float32.
    step, tolerance = (1e-3, 2e-2) if layout == "mixtral" else (1e-5, 1e-6)
    for name in names:
        direction = ours[name] - theirs[name]
        up, down = (measured(bridge, x, name, base[name] + sign * step * direction) for sign in (1, -1))
        expected = (up - down) / (2 * step)
        assert abs(float(found.scores[name].sum()) - expected) < tolerance * (1 + abs(expected)), name
    assert float(found.value) == pytest.approx(number(bridge, x), abs=1e-4)


@pytest.mark.parametrize("layout", FAMILIES)
def test_it_is_exact_where_the_metric_is_linear(layout):
    bridge, clean, corrupted = pair(layout)
    name = "blocks.1.hook_resid_post"
    scale = activations(bridge, corrupted, ["ln_final.hook_scale"])["ln_final.hook_scale"]
    ours, theirs = activations(bridge, clean, [name])[name], activations(bridge, corrupted, [name])[name]
    with bridge.hooks(fwd_hooks=[("ln_final.hook_scale", lambda old, hook: scale.clone())]):
        found = attribution_patching(bridge, clean, corrupted, metric, name).by("pos")[name]
        base = number(bridge, corrupted)
        for pos in range(5):
            patched = theirs.clone()
            patched[:, pos] = ours[:, pos]
            assert float(found[pos]) == pytest.approx(measured(bridge, corrupted, name, patched) - base, abs=1e-4)
    assert found[:3].abs().max() == 0 and found[3:].abs().min() > 1e-3


def test_scores_sum_over_the_axes_left_out():
    bridge, clean, corrupted = pair("40b")
    names = [f"blocks.{i}.attn.hook_{part}" for i in (0, 1) for part in ("z", "k")]
    found = attribution_patching(bridge, clean, corrupted, metric, names)
    zs = attribution_patching(bridge, clean, corrupted, metric, [names[0], names[2]])
    z = found.scores["blocks.1.attn.hook_z"]
    assert z.shape == (2, 5, 8, 4)
    torch.testing.assert_close(zs.by("head pos")["blocks.1.attn.hook_z"], z.sum((0, 3)).T)
    torch.testing.assert_close(
        found.stacked("batch"), torch.stack([one.sum((1, 2, 3)) for one in found.scores.values()])
    )
    with pytest.raises(ValueError, match=r"got axes \['head'\], expected some of batch, pos, kv_head, d_head"):
        found.by("head")
    with pytest.raises(ValueError, match=r"got axes \['pos', 'pos'\]"):
        found.by("pos pos")


def test_experts_add_up_to_their_layer():
    bridge, clean, corrupted = pair("mixtral")
    names = [f"blocks.{i}.hook_mlp_out" for i in (0, 1)]
    for at in ("corrupted", "clean"):
        experts = expert_attribution_patching(bridge, clean, corrupted, metric, at=at)
        layers = attribution_patching(bridge, clean, corrupted, metric, names, at=at).stacked("batch pos")
        torch.testing.assert_close(experts.sum(-1), layers, rtol=0, atol=1e-5)
    # An expert that neither run chose has no score; each of the others has its own part.
    _, ours = bridge.run_with_cache(clean)
    _, theirs = bridge.run_with_cache(corrupted)
    chosen = torch.zeros(2, 2, 5, 4).bool()
    for cache in (ours, theirs):
        for layer in (0, 1):
            chosen[layer].scatter_(-1, cache[f"blocks.{layer}.mlp.hook_expert_indices"], True)
    assert not experts[~chosen].any() and (experts[:, :, -1][chosen[:, :, -1]] != 0).all()


def test_left_padding_changes_nothing():
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    bridge.tokenizer.padding_side = "left"
    clean = ["When Noah and Adam went to the church, Adam bought a ball for", "Then Mary and John met. John told"]
    corrupted = ["When Noah and Adam went to the church, Noah bought a ball for", "Then Mary and John met. Mary told"]
    names = ["blocks.0.hook_resid_pre", "blocks.2.attn.hook_z"]

    def measure(logits):
        return (logits[:, -1, 100] - logits[:, -1, 200]).sum()

    together = [bridge.to_tokens(texts) for texts in (clean, corrupted)]
    found = attribution_patching(bridge, *together, measure, names)
    stars = atp_star(bridge, *together, measure)
    width = together[0].shape[1]
    for row in (0, 1):
        alone = attribution_patching(bridge, clean[row], corrupted[row], measure, names)
        star = atp_star(bridge, clean[row], corrupted[row], measure)
        for name in names:
            single = alone.scores[name][0]
            assert single.abs().max() > 0.01
            torch.testing.assert_close(found.scores[name][row, width - len(single) :], single, rtol=1e-3, atol=1e-4)
            assert not found.scores[name][row, : width - len(single)].any()
        for part, scores in star.items():
            assert not stars[part][:, row, : width - scores.shape[2]].any(), part
            torch.testing.assert_close(
                stars[part][:, row, width - scores.shape[2] :], scores[:, 0], rtol=1e-3, atol=1e-4
            )
    assert len(bridge.to_tokens(clean[1])[0]) < width


@pytest.mark.parametrize("outside", [torch.no_grad, nullcontext])
def test_the_model_is_left_as_it_was(outside):
    bridge, clean, corrupted = pair("40b")
    name = "blocks.0.attn.hook_z"
    expected = attribution_patching(bridge, clean, corrupted, metric, name).scores[name]
    assert all(parameter.grad is None for parameter in bridge.original_model.parameters())
    for parameter in bridge.original_model.parameters():
        parameter.requires_grad_(False)
    with outside():
        found = attribution_patching(bridge, clean, corrupted, metric, name).scores[name]
        assert torch.equal(found, expected) and not found.requires_grad
        star = atp_star(bridge, clean, corrupted, metric, ["z"], grad_drop=False)["z"]
    torch.testing.assert_close(star[0], expected.sum(-1))
    assert not any(point.has_hooks() for point in bridge.hook_points())


def test_half_precision_scores_are_in_float32():
    bridge = TransformerBridge(falcon(dtype=torch.bfloat16))
    found = attribution_patching(bridge, tokens(), tokens(), metric, "blocks.0.attn.hook_z")
    assert found.scores["blocks.0.attn.hook_z"].dtype == torch.float32
    assert atp_star(bridge, tokens(), tokens(), metric)["q"].isfinite().all()


# -- AtP* ----------------------------------------------------------------------------------------------


def random_scores(spread: float) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    scores, change, gradient = (torch.randn(2, 3, 4, 4, dtype=torch.float64) * spread for _ in range(3))
    hidden = torch.ones(4, 4).triu(1).bool()
    return scores.masked_fill(hidden, torch.finfo(torch.float64).min), change, gradient / spread


@pytest.mark.parametrize("spread", [1.0, 30.0, 800.0])
def test_softmaxes_are_recomputed(spread):
    scores, change, gradient = random_scores(spread)
    before = scores.softmax(-1)
    expected = (((scores + change).softmax(-1) - before) * gradient).sum(-1)
    torch.testing.assert_close(query_effects(scores, change, gradient), expected)
    columns = []
    for key in range(4):
        patched = scores.clone()
        patched[..., key] += torch.where(patched[..., key] < -1e300, 0, change[..., key])
        columns.append(((patched.softmax(-1) - before) * gradient).sum((-1, -2)))
    torch.testing.assert_close(key_effects(scores, change, gradient), torch.stack(columns, -1), rtol=1e-6, atol=1e-9)


def test_queries_that_may_see_nothing_score_nothing():
    scores = torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min)
    ones = torch.ones_like(scores)
    assert query_effects(scores, ones, 0 * ones).tolist() == [[[0, 0]]]
    assert key_effects(scores, ones, 0 * ones).tolist() == [[[0, 0]]]


@pytest.mark.parametrize("layout", FAMILIES)
def test_the_qk_fix_is_exact_below_a_linear_metric(layout):
    """With the MLP and the final norm's scale held, the last layer's pattern acts linearly."""
    bridge, clean, corrupted = pair(layout)
    held = activations(bridge, corrupted, ["blocks.1.hook_mlp_out", "ln_final.hook_scale"])
    _, clean_cache = bridge.run_with_cache(clean)
    with bridge.hooks(fwd_hooks=[(name, lambda old, hook: held[hook.name].clone()) for name in held]):
        with torch.no_grad():
            base = number(bridge, corrupted)
        found = atp_star(bridge, clean, corrupted, metric, ("q", "k"), grad_drop=False)
        plain = atp_star(bridge, clean, corrupted, metric, ("q", "k"), grad_drop=False, qk_fix=False)
        for part in "qk":
            sweep = getattr(patching, f"get_act_patch_attn_head_{part}_by_pos")
            expected = sweep(bridge, corrupted, clean_cache, metric, verbose=False)[1] - base
            assert expected.abs().max() > 0.1
            tolerance = 1e-4 if layout == "mixtral" else 1e-9
            torch.testing.assert_close(found[part][1].sum(0), expected.double(), rtol=0, atol=tolerance)
            assert (plain[part][1].sum(0) - expected).abs().max() > 100 * tolerance


@pytest.mark.parametrize("layout", ["40b", "rw", "mixtral"])
def test_grad_drop_leaves_out_one_layer_at_a_time(layout):
    bridge, clean, corrupted = pair(layout, num_hidden_layers=3)
    parts = {"q": "attn.hook_q", "v": "attn.hook_v", "z": "attn.hook_z", "mlp_out": "hook_mlp_out"}
    found = atp_star(bridge, clean, corrupted, metric, tuple(parts), qk_fix=False)
    fixed = atp_star(bridge, clean, corrupted, metric, ("q", "k"))
    expected = {part: torch.zeros_like(scores) for part, scores in (found | {"fixed": fixed["k"]}).items()}
    for layer in range(3):
        writes = [f"blocks.{layer}.hook_{branch}_out" for branch in ("attn", "mlp")]
        with bridge.hooks(fwd_hooks=[(writes, lambda old, hook: old.detach())]):
            for part, name in parts.items():
                names = [f"blocks.{i}.{name}" for i in range(3)]
                scores = attribution_patching(bridge, clean, corrupted, metric, names)
                summed = torch.stack(list(scores.scores.values())).sum(-1)
                if part == "mlp_out":
                    summed[layer] = 0  # behind its own cut
                expected[part] += summed.abs() / 2
            expected["fixed"] += atp_star(bridge, clean, corrupted, metric, ["k"], grad_drop=False)["k"].abs() / 2
    for part in parts:
        torch.testing.assert_close(found[part], expected[part])
        assert (found[part] >= 0).all() and found[part].max() > 0.01
    torch.testing.assert_close(fixed["k"], expected["fixed"])


def test_at_clean_turns_the_sign_of_a_swap():
    bridge, clean, corrupted = pair("40b")
    here = atp_star(bridge, clean, corrupted, metric, at="clean", grad_drop=False)
    there = atp_star(bridge, corrupted, clean, metric, grad_drop=False)
    for part in here:
        torch.testing.assert_close(here[part], -there[part])


def test_parts_without_a_softmax_are_attribution_patching():
    bridge, clean, corrupted = pair("rw")
    found = atp_star(bridge, clean, corrupted, metric, ("mlp_post", "attn_out", "v"), at="clean", grad_drop=False)
    hooks = {"mlp_post": ("mlp.hook_post", "d_mlp"), "attn_out": ("hook_attn_out", ""), "v": ("attn.hook_v", "kv_head")}
    for part, (hook, axis) in hooks.items():
        names = [f"blocks.{i}.{hook}" for i in (0, 1)]
        scores = attribution_patching(bridge, clean, corrupted, metric, names, at="clean")
        torch.testing.assert_close(found[part], scores.stacked(f"batch pos {axis}"))
        assert found[part].abs().max() > 0.01


# -- integrated gradients --------------------------------------------------------------------------------


def test_steps_integrate_polynomials():
    points, weights = line_steps(4)
    for power in range(8):
        assert sum(w * x**power for x, w in zip(points, weights, strict=True)) == pytest.approx(1 / (power + 1))


def places():
    """Every hook on one layout and every layout at one hook, in turn; the rest of the product is slow."""
    names = ["hook_embed", "blocks.1.attn.hook_q", "blocks.1.hook_resid_pre", "blocks.0.mlp.hook_post"]
    found = []
    for number, layout in enumerate(["40b", "7b", "11b", "rw", "rw-rope"]):
        for place, name in enumerate(names):
            chosen = layout == "40b" or place == number - 1
            found.append(pytest.param(layout, name, marks=[] if chosen else [pytest.mark.slow]))
    return found


@pytest.mark.parametrize("layout, name", places())
def test_integrated_gradients_are_complete(layout, name):
    bridge, x, other = pair(layout)
    there, baseline = (activations(bridge, one, [name])[name] for one in (x, other))
    found = integrated_gradients(bridge, x, metric, name, baseline=baseline, steps=160, steps_per_batch=50)
    expected = number(bridge, x) - measured(bridge, x, name, baseline)
    assert float(found.total) == pytest.approx(expected, abs=1e-9) and abs(expected) > 0.1
    assert abs(found.completeness_error) < 1e-3 * abs(expected), found
    # The same integral by hand, one step at a time, with another rule.
    mean = torch.zeros_like(there)
    for step in range(200):
        point = (baseline + (step + 0.5) / 200 * (there - baseline)).requires_grad_()
        logits = bridge.run_with_hooks(x, fwd_hooks=[(name, lambda old, hook, point=point: point)])
        mean += torch.autograd.grad(metric(logits), point)[0] / 200
    torch.testing.assert_close(found.scores, (there - baseline) * mean, rtol=2e-3, atol=2e-3)


def test_integrated_gradients_of_experts_say_what_they_miss():
    bridge, x, other = pair("mixtral")
    held = activations(bridge, x, ["blocks.1.mlp.hook_expert_indices"])["blocks.1.mlp.hook_expert_indices"]
    baseline = activations(bridge, other, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    free = integrated_gradients(bridge, x, metric, "blocks.1.hook_resid_pre", baseline=baseline, steps=32)
    with bridge.hooks(
        fwd_hooks=[("blocks.1.mlp.hook_expert_indices", lambda old, hook: held.repeat(len(old) // 2, 1, 1))]
    ):
        fixed = integrated_gradients(bridge, x, metric, "blocks.1.hook_resid_pre", baseline=baseline, steps=32)
    assert abs(fixed.completeness_error) < 1e-2 * abs(float(fixed.total))
    assert abs(free.completeness_error) > 10 * abs(fixed.completeness_error)


def test_integrated_gradients_with_left_padding_and_numbers_as_baseline():
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    bridge.tokenizer.padding_side = "left"
    texts = ["When Noah and Adam went to the church, Adam bought a ball for", "Then Mary and John met"]

    def measure(logits):
        return logits[:, -1, 100].sum()

    tokens_ = bridge.to_tokens(texts)
    both = integrated_gradients(bridge, tokens_, measure, "blocks.1.hook_mlp_out", baseline=0.0)
    alone = integrated_gradients(bridge, texts[1], measure, "blocks.1.hook_mlp_out")
    length = alone.scores.shape[1]
    torch.testing.assert_close(both.scores[1, -length:], alone.scores[0], rtol=1e-3, atol=1e-4)
    assert not both.scores[1, :-length].any() and length < tokens_.shape[1]
    assert abs(both.completeness_error) < 1e-3 * abs(float(both.total))
    row = torch.zeros(*both.scores.shape[1:])
    again = integrated_gradients(bridge, tokens_, measure, "blocks.1.hook_mlp_out", baseline=row, steps_per_batch=3)
    torch.testing.assert_close(again.scores, both.scores, rtol=1e-3, atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------

NAME = "blocks.0.attn.hook_z"
REFUSED: list[tuple[type[Exception], str, Any]] = [
    (ValueError, "names: got none", lambda b, x: attribution_patching(b, x, x, metric, [])),
    (KeyError, "the nearest names are", lambda b, x: attribution_patching(b, x, x, metric, "blocks.0.hook_zz")),
    (
        ValueError,
        "got 'noised', expected 'corrupted' or",
        lambda b, x: attribution_patching(b, x, x, metric, NAME, at="noised"),
    ),
    (ValueError, r"got \[2, 7\] and \[2, 6\]", lambda b, x: attribution_patching(b, x, x[:, :6], metric, NAME)),
    (ValueError, "at least one", lambda b, x: attribution_patching(b, x[:0], x[:0], metric, NAME)),
    (
        TypeError,
        r"a tensor of shape \[2\], expected one number",
        lambda b, x: attribution_patching(b, x, x, lambda y: y[:, -1, 0], NAME),
    ),
    (TypeError, "returned str", lambda b, x: attribution_patching(b, x, x, lambda y: "much", NAME)),
    (ValueError, "returned nan", lambda b, x: attribution_patching(b, x, x, lambda y: y.sum() * torch.nan, NAME)),
    (
        ValueError,
        "autograd can follow",
        lambda b, x: attribution_patching(b, x, x, lambda y: float(y.detach().sum()), NAME),
    ),
    (
        ValueError,
        "hook 'blocks.0.mlp.hook_expert_indices' holds integers",
        lambda b, x: attribution_patching(b, x, x, metric, "blocks.0.mlp.hook_expert_indices"),
    ),
    (
        ValueError,
        "experts by their number",
        lambda b, x: attribution_patching(b, x, x, metric, "blocks.0.mlp.hook_expert_out"),
    ),
    (ValueError, r"parts: got \['w'\], expected some of q, k", lambda b, x: atp_star(b, x, x, metric, ["w"])),
    (ValueError, "parts: got 'q'", lambda b, x: atp_star(b, x, x, metric, "q")),
    (KeyError, "use 'mlp_out'", lambda b, x: atp_star(b, x, x, metric, ["mlp_post"])),
    (ValueError, "steps: got 0", lambda b, x: integrated_gradients(b, x, metric, NAME, steps=0)),
    (ValueError, "steps_per_batch: got 0", lambda b, x: integrated_gradients(b, x, metric, NAME, steps_per_batch=0)),
    (
        ValueError,
        r"baseline: got shape \[3\], expected \[2, 7, 8, 4\]",
        lambda b, x: integrated_gradients(b, x, metric, NAME, baseline=torch.zeros(3)),
    ),
    (
        TypeError,
        "name: got list, expected the name of one hook",
        lambda b, x: integrated_gradients(b, x, metric, [NAME]),
    ),
]


@pytest.mark.parametrize(("kind", "text", "call"), REFUSED, ids=[text for _, text, _ in REFUSED])
def test_what_does_not_fit_is_refused(kind, text, call):
    bridge = TransformerBridge(family("mixtral"))
    with pytest.raises(kind, match=text):
        call(bridge, tokens())
    assert not any(point.has_hooks() for point in bridge.hook_points())


def test_more_refusals():
    bridge = TransformerBridge(falcon(num_hidden_layers=1))
    x = tokens()
    with pytest.raises(ValueError, match="grad_drop: it leaves out one layer"):
        atp_star(bridge, x, x, metric)
    with pytest.raises(ValueError, match="dense"):
        expert_attribution_patching(bridge, x, x, metric)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        attribution_patching(bridge, x, x, metric, "blocks.0.attn.hook_z")
    tiny = TransformerBridge.boot_transformers("tiny-falcon")
    tiny.tokenizer.padding_side = "left"
    texts = ["Mary and John", "Mary"]
    uneven = [tiny.to_tokens(texts), tiny.to_tokens(texts[::-1])]
    with pytest.raises(ValueError, match="padding differs"):
        attribution_patching(tiny, *uneven, metric, "blocks.0.attn.hook_z")

    def broken(z, hook):
        raise RuntimeError("inside")

    with tiny.hooks(fwd_hooks=[("blocks.1.attn.hook_z", broken)]), pytest.raises(RuntimeError, match="inside"):
        attribution_patching(tiny, "Mary and John", "Mary and Mary", metric, "blocks.0.attn.hook_z")
    assert not any(point.has_hooks() for point in tiny.hook_points())
