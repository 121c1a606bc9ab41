"""Integrated gradients over activations (Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.gradient_runs import differentiable_names, gradient_run, one_number, wide
from transformer_lens.analysis.patching.base_run import SweepInput
from transformer_lens.analysis.patching.engine import Metric
from transformer_lens.checks import a_number


@dataclass(frozen=True, eq=False, repr=False)
class IntegratedGradients:
    """Attributions to one activation, and how far their sum is from what it should be."""

    scores: Float[Tensor, "batch pos ..."]
    """One for each number of the activation, in float32 at least."""
    axes: tuple[str, ...]
    total: Float[Tensor, ""]
    """The metric with the activation as it is, less that with the baseline in its place."""

    @property
    def completeness_error(self) -> float:
        """The sum of the scores less `total`: zero but for rounding and too few steps."""
        return float(self.scores.sum() - self.total)

    def __repr__(self) -> str:
        return f"IntegratedGradients by {' '.join(self.axes)}, completeness error {self.completeness_error:.2g}"


def line_steps(steps: int) -> tuple[list[float], list[float]]:
    """Points between 0 and 1, and weights that sum to one: Gauss-Legendre quadrature, exact for polynomials of degree
    `2 * steps - 1`.

    >>> line_steps(1)
    ([0.5], [1.0])
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, expected a whole number of at least 1")
    points, weights = np.polynomial.legendre.leggauss(steps)
    return [float(x) for x in (points + 1) / 2], [float(x) for x in weights / 2]


def weighted_metric(metric: Metric, weights: list[float], batch: int) -> Metric:
    """The metric of each copy of the batch, weighted and summed."""

    def total(logits: Tensor) -> Tensor:
        values = [weight * one_number(metric(rows)) for weight, rows in zip(weights, logits.split(batch), strict=True)]
        return torch.stack(values).sum()

    return total


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
    """`(activation - baseline) * mean gradient` on the straight line from the baseline to the activation, for every
    number of one hook. The baseline is a number, or a tensor of the activation's shape (that of another run, or a mean
    over many). The scores sum to what the metric loses by the baseline, and `completeness_error` says how nearly.

    >>> def metric(logits):
    ...     return logits[0, -1, 5]
    >>> found = integrated_gradients(bridge, "Mary and John", metric, "blocks.2.hook_mlp_out")
    >>> found.scores.sum(-1).shape, abs(found.completeness_error) < 1e-3
    (torch.Size([1, 5]), True)

    It costs two forwards, and `steps` forwards and backwards of the layers from the hook on, `steps_per_batch` at a
    time; the points are those of `line_steps`. Sharp bends on the line want more steps: a norm bends near a stream of
    zeros, so a residual stream wants another baseline. Where a router changes its choice the metric jumps, which no
    gradient sees, and the error stays. Other arguments and errors as in `attribution_patching`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected the name of one hook")
    (name,) = differentiable_names(bridge, name)
    points, weights = line_steps(steps)
    if steps_per_batch < 1:
        raise ValueError(f"steps_per_batch: got {steps_per_batch}, expected at least 1")
    x, _, mask = bridge.input_and_mask(input, attention_mask=attention_mask)
    layer = bridge.hook_dict[name].layer() if name.startswith("blocks.") else None
    stream_name = [] if layer is None else [f"blocks.{layer}.hook_resid_pre"]
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(
            x, names_filter=[name, *stream_name], attention_mask=mask, return_cache_object=False
        )
    there = cache[name]
    start = _baseline(baseline, there, name)
    below = x if layer is None else cache[stream_name[0]]
    total = one_number(metric(logits)).detach() - _at_baseline(bridge, x, mask, metric, name, start)
    mean = torch.zeros_like(wide(there))
    for first in range(0, steps, steps_per_batch):
        some = slice(first, first + steps_per_batch)
        line = torch.stack([torch.lerp(start, there, point) for point in points[some]])
        total_metric = weighted_metric(metric, weights[some], len(x))
        mean += _summed_gradient(bridge, below, mask, total_metric, name, line, layer)
    scores = (wide(there) - wide(start)) * mean
    return IntegratedGradients(scores, tuple(bridge.hook_dict[name].axes.split()), total)


def _summed_gradient(
    bridge: TransformerBridge,
    below: Tensor,
    mask: Tensor | None,
    metric: Metric,
    name: str,
    line: Float[Tensor, "step batch pos ..."],
    layer: int | None,
) -> Float[Tensor, "batch pos ..."]:
    """The gradient at one hook, summed over points on a line, which run as copies of the batch."""
    copies = len(line)
    run = gradient_run(
        bridge,
        below.repeat(copies, *[1] * (below.ndim - 1)),
        None if mask is None else mask.repeat(copies, 1),
        metric,
        [name],
        fwd_hooks=[(name, _replacing(line.flatten(0, 1)))],
        start_at_layer=layer,
    )
    gradients: Tensor = wide(run.gradients()[name]).unflatten(0, line.shape[:2])
    return gradients.sum(0)


def _replacing(value: Tensor) -> Any:
    return lambda activation, hook: value.clone()


@torch.no_grad()
def _at_baseline(
    bridge: TransformerBridge, x: Tensor, mask: Tensor | None, metric: Metric, name: str, start: Tensor
) -> Tensor:
    logits = bridge.run_with_hooks(x, fwd_hooks=[(name, _replacing(start))], attention_mask=mask)
    return one_number(metric(logits)).detach()


def _baseline(baseline: Tensor | float, there: Tensor, name: str) -> Tensor:
    if not isinstance(baseline, Tensor):
        return torch.full_like(there, a_number("baseline", baseline))
    if baseline.shape != there.shape and baseline.shape != there.shape[1:]:
        raise ValueError(
            f"baseline: got shape {list(baseline.shape)}, expected {list(there.shape)} as at {name!r}, or a row of it"
        )
    return baseline.detach().to(there.device, there.dtype).expand_as(there).clone()
