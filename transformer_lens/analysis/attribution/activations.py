"""Attribution to activations: attribution patching (first-order activation patching) and integrated gradients.

Sources: Nanda 2023, "Attribution Patching"; Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit
Discovery"; Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks". A positive score means that the clean
value raises the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

import transformer_lens.analysis.attribution.gradient_runs as runs
from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.gradient_runs import At, one_number
from transformer_lens.analysis.patching.engine import Metric, SweepInput
from transformer_lens.analysis.patching.experts import PARTS, expert_contributions
from transformer_lens.asking import need_whole_mlps
from transformer_lens.checks import a_number, a_tensor, a_text
from transformer_lens.factored_matrix import wide


@dataclass(frozen=True, eq=False, repr=False)
class AttributionScores:
    """Scores for every element of some activations; `by` and `stacked` sum them over the axes you do not need."""

    scores: dict[str, Tensor]
    """By hook: (clean - corrupted) * gradient, shaped like the activation, in at least float32."""
    axes: dict[str, tuple[str, ...]]
    """By hook: the names of the axes."""
    value: Float[Tensor, ""]
    """The metric in the run whose gradient was taken."""

    def by(self, axes: str) -> dict[str, Tensor]:
        """Sum each hook's scores over all axes (the batch too) except those named, in the order named. Raises
        `ValueError` for an axis that a hook does not have.

        >>> metric = lambda logits: logits[0, -1, 5]
        >>> found = attribution_patching(bridge, "Mary and John", "Mary and Mary", metric, "blocks.0.attn.hook_z")
        >>> found.by("pos head")["blocks.0.attn.hook_z"].shape, found.by("")["blocks.0.attn.hook_z"].shape
        (torch.Size([5, 4]), torch.Size([]))
        """
        wanted, found = a_text("axes", axes).split(), dict[str, Tensor]()
        for name, here in self.axes.items():
            if not set(wanted) <= set(here) or len(set(wanted)) < len(wanted):
                raise ValueError(f"by: got axes {wanted}, expected some of {', '.join(here)}, which {name!r} has")
            found[name] = reduce(self.scores[name], f"{' '.join(here)} -> {' '.join(wanted)}", "sum")
        return found

    def stacked(self, axes: str) -> Float[Tensor, "hook ..."]:
        """`by`, stacked along a first axis of hooks: `found.stacked("head")` is [hook, head]."""
        return torch.stack(list(self.by(axes).values()))

    def __repr__(self) -> str:
        return f"AttributionScores of {len(self.scores)} hooks: {', '.join(list(self.scores)[:4])}"


@checked
def attribution_patching(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    names: str | Sequence[str],
    *,
    at: At = "corrupted",
    attention_mask: Tensor | None = None,
) -> AttributionScores:
    """Estimate, to first order, how the metric changes when a clean activation is patched into the corrupted run:
    `(clean - corrupted) * d metric / d activation`, for every element of every named hook.

    >>> clean = "When Noah and Adam went to the church, Adam bought a ball for"
    >>> corrupted = "When Noah and Adam went to the church, Noah bought a ball for"
    >>> noah, adam = bridge.to_single_token(" Noah"), bridge.to_single_token(" Adam")
    >>> metric = lambda logits: (logits[:, -1, noah] - logits[:, -1, adam]).mean()
    >>> names = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
    >>> heads = attribution_patching(bridge, clean, corrupted, metric, names).stacked("head")
    >>> divmod(int(heads.argmax()), 4)  # the layer and head whose clean output helps most
    (3, 3)

    It costs two forwards and one backward, however many hooks. `at` says in which run the gradient is taken. In the
    corrupted run (default) a score estimates `metric(corrupted with the clean value) - metric(corrupted)`, as the
    sweeps of `transformer_lens.patching` measure it; in the clean run,
    `metric(clean) - metric(clean with the corrupted value)`. It is exact where the metric is linear in the activation.

    Inputs are text, tokens or embeddings, of one shape and with the same padding. The metric maps logits [batch pos
    d_vocab] to one number, with torch. Raises `ValueError` for inputs that do not fit, a metric that is not finite or
    has no gradient, and hooks of integers or of chosen experts.
    """
    pair = runs.prompt_pair(bridge, clean, corrupted, attention_mask, at)
    found = runs.differentiable_names(bridge, names)
    there = runs.read(bridge, pair.other, pair.mask, found)
    run = runs.gradient_run(bridge, pair.base, pair.mask, metric, found)
    here, gradients = run.activations(), run.gradients()
    scores = {name: pair.sign * (wide(there[name]) - wide(here[name])) * wide(gradients[name]) for name in found}
    axes = {name: tuple(bridge.hook_dict[name].axes.split()) for name in found}
    return AttributionScores(scores, axes, run.value.detach())


@checked
def expert_attribution_patching(
    bridge: TransformerBridge,
    clean: SweepInput,
    corrupted: SweepInput,
    metric: Metric,
    *,
    at: At = "corrupted",
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "layer batch pos expert"]:
    """Attribution patching of each expert's contribution to the residual stream: its weighted output, zero where it was
    not chosen. It estimates `get_act_patch_expert_out`; arguments and errors as in `attribution_patching`, and
    `ValueError` for a dense model.

    >>> metric = lambda logits: logits[0, -1, 5]
    >>> expert_attribution_patching(moe, "Mary and John", "Mary and Mary", metric).shape
    torch.Size([3, 1, 5, 4])
    """
    n_experts = need_whole_mlps(bridge, "attribution to experts")
    pair = runs.prompt_pair(bridge, clean, corrupted, attention_mask, at)
    layers = range(bridge.cfg.n_layers)
    names = [f"blocks.{layer}.mlp.hook_{part}" for layer in layers for part in PARTS]
    both = [runs.read(bridge, one, pair.mask, names) for one in (pair.other, pair.base)]
    outputs = [f"blocks.{layer}.hook_mlp_out" for layer in layers]
    gradients = runs.gradient_run(bridge, pair.base, pair.mask, metric, outputs).gradients()
    scores = []
    for layer, output in enumerate(outputs):
        there, here = (wide(expert_contributions(kept, layer, n_experts)) for kept in both)
        scores.append(torch.einsum("bped,bpd->bpe", pair.sign * (there - here), wide(gradients[output])))
    return torch.stack(scores)


@dataclass(frozen=True, eq=False, repr=False)
class IntegratedGradients:
    """Attributions to one activation, with the error of their sum."""

    scores: Float[Tensor, "batch pos ..."]
    """One score for each element of the activation, in at least float32."""
    axes: tuple[str, ...]
    total: Float[Tensor, ""]
    """The metric with the actual activation minus the metric with the baseline."""

    @property
    def completeness_error(self) -> float:
        """The sum of the scores minus `total`: zero up to rounding and too few steps."""
        return float(self.scores.sum() - self.total)

    def __repr__(self) -> str:
        return f"IntegratedGradients by {' '.join(self.axes)}, completeness error {self.completeness_error:.2g}"


@checked
def line_steps(steps: int) -> tuple[list[float], list[float]]:
    """Gauss-Legendre points between 0 and 1, with weights that sum to one; exact up to degree `2 * steps - 1`.

    >>> line_steps(1)
    ([0.5], [1.0])
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    return [float(x) for x in (points + 1) / 2], [float(x) for x in weights / 2]


@checked
def integrated_gradients(
    bridge: TransformerBridge,
    input: SweepInput,
    metric: Metric,
    name: str,
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 16,
    steps_per_batch: int = 8,
    attention_mask: Tensor | None = None,
) -> IntegratedGradients:
    """Integrated gradients for one hook: `(activation - baseline) * mean gradient` along the straight line between
    them, for every element. The baseline is a number or a tensor shaped like the activation (from another run, or a
    mean over many). The scores sum to the change in the metric, up to `completeness_error`.

    >>> metric = lambda logits: logits[0, -1, 5]
    >>> found = integrated_gradients(bridge, "Mary and John", metric, "blocks.2.hook_mlp_out")
    >>> found.scores.sum(-1).shape, abs(found.completeness_error) < 1e-3
    (torch.Size([1, 5]), True)

    It costs two forwards, and `steps` forwards and backwards of the layers above the hook, `steps_per_batch` at a time;
    the points are those of `line_steps`. Sharp bends need more steps: a norm bends near a zero stream, so choose
    another baseline for a residual stream. Where a router switches experts the metric jumps, which no gradient sees,
    and the error stays. Other arguments and errors as in `attribution_patching`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected the name of one hook")
    (name,) = runs.differentiable_names(bridge, name)
    x, _, mask = bridge.input_and_mask(input, attention_mask=attention_mask)
    layer = bridge.hook_dict[name].layer() if name.startswith("blocks.") else None
    entering = f"blocks.{layer or 0}.hook_resid_pre"
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(
            x, names_filter=[name, entering], attention_mask=mask, return_cache_object=False
        )
        there = cache[name]
        start = _baseline(baseline, there, name)
        without = bridge.run_with_hooks(x, fwd_hooks=[(name, _replacing(start))], attention_mask=mask)
    total = one_number(metric(logits)).detach() - one_number(metric(without)).detach()
    below = x if layer is None else cache[entering]
    mean = mean_gradients(bridge, below, mask, metric, [name], name, (start, there), (steps, steps_per_batch), layer)
    scores = (wide(there) - wide(start)) * mean[name]
    return IntegratedGradients(scores, tuple(bridge.hook_dict[name].axes.split()), total)


def mean_gradients(
    bridge: TransformerBridge,
    below: Tensor,
    mask: Tensor | None,
    metric: Metric,
    names: Sequence[str],
    moved: str,
    ends: tuple[Tensor, Tensor],
    steps: tuple[int, int],
    layer: int | None = None,
) -> dict[str, Float[Tensor, "batch pos ..."]]:
    """The mean gradient at some hooks on the line between two values of `moved`; `steps` are all, and at a time."""
    points, weights = line_steps(steps[0])
    batch, mean = len(below), dict[str, Tensor]()

    def total(weights: list[float], logits: Tensor) -> Tensor:
        values = [weight * one_number(metric(rows)) for weight, rows in zip(weights, logits.split(batch), strict=True)]
        return torch.stack(values).sum()

    for first in range(0, *steps):
        some = slice(first, first + steps[1])
        line = torch.cat([torch.lerp(*ends, point) for point in points[some]])
        copies = len(weights[some])
        run = runs.gradient_run(
            bridge,
            below.repeat(copies, *[1] * (below.ndim - 1)),
            None if mask is None else mask.repeat(copies, 1),
            partial(total, weights[some]),
            names,
            fwd_hooks=[(moved, _replacing(line))],
            start_at_layer=layer,
        )
        for name, found in run.gradients().items():
            mean[name] = mean.get(name, 0) + wide(found).unflatten(0, (copies, batch)).sum(0)
    return mean


def _replacing(value: Tensor) -> Any:
    return lambda activation, hook: value.clone()


def _baseline(baseline: Tensor | float, there: Tensor, name: str) -> Tensor:
    if not isinstance(baseline, Tensor):
        return torch.full_like(there, a_number("baseline", baseline))
    if a_tensor("baseline", baseline).shape not in (there.shape, there.shape[1:]):
        expected = f"{list(there.shape)} as at {name!r}, or a row of it"
        raise ValueError(f"baseline: got shape {list(baseline.shape)}, expected {expected}")
    return baseline.detach().to(there).expand_as(there).clone()
