"""Integrated gradients over activations (Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.gradient_runs import differentiable_names, gradient_run, one_number, wide
from transformer_lens.analysis.patching.engine import Metric, SweepInput
from transformer_lens.checks import a_number, a_tensor


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


@checked
def line_steps(steps: int) -> tuple[list[float], list[float]]:
    """Points between 0 and 1, and weights that sum to one: Gauss-Legendre quadrature, exact for polynomials of degree
    `2 * steps - 1`.

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
    """`(activation - baseline) * mean gradient` on the straight line from the baseline to the activation, for every
    number of one hook. The baseline is a number, or a tensor of the activation's shape (that of another run, or a mean
    over many). The scores sum to what the metric loses by the baseline, and `completeness_error` says how nearly.

    >>> metric = lambda logits: logits[0, -1, 5]
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
    with torch.no_grad():
        without = bridge.run_with_hooks(x, fwd_hooks=[(name, _replacing(start))], attention_mask=mask)
    total = one_number(metric(logits)).detach() - one_number(metric(without)).detach()
    mean = torch.zeros_like(wide(there))
    for first in range(0, steps, steps_per_batch):
        some = slice(first, first + steps_per_batch)
        line = torch.stack([torch.lerp(start, there, point) for point in points[some]])
        mean += summed_gradients(bridge, below, mask, metric, weights[some], [name], name, line, layer)[name]
    scores = (wide(there) - wide(start)) * mean
    return IntegratedGradients(scores, tuple(bridge.hook_dict[name].axes.split()), total)


def summed_gradients(
    bridge: TransformerBridge,
    below: Tensor,
    mask: Tensor | None,
    metric: Metric,
    weights: list[float],
    names: Sequence[str],
    moved: str,
    line: Float[Tensor, "step batch pos ..."],
    layer: int | None = None,
) -> dict[str, Float[Tensor, "batch pos ..."]]:
    """The gradient at some hooks, by the weights of points on a line: values of the hook `moved`, which run as copies
    of the batch."""
    copies, batch = line.shape[:2]

    def total(logits: Tensor) -> Tensor:
        values = [weight * one_number(metric(rows)) for weight, rows in zip(weights, logits.split(batch), strict=True)]
        return torch.stack(values).sum()

    run = gradient_run(
        bridge,
        below.repeat(copies, *[1] * (below.ndim - 1)),
        None if mask is None else mask.repeat(copies, 1),
        total,
        names,
        fwd_hooks=[(moved, _replacing(line.flatten(0, 1)))],
        start_at_layer=layer,
    )
    return {name: wide(found).unflatten(0, (copies, batch)).sum(0) for name, found in run.gradients().items()}


def _replacing(value: Tensor) -> Any:
    return lambda activation, hook: value.clone()


def _baseline(baseline: Tensor | float, there: Tensor, name: str) -> Tensor:
    if not isinstance(baseline, Tensor):
        return torch.full_like(there, a_number("baseline", baseline))
    a_tensor("baseline", baseline)
    if baseline.shape != there.shape and baseline.shape != there.shape[1:]:
        raise ValueError(
            f"baseline: got shape {list(baseline.shape)}, expected {list(there.shape)} as at {name!r}, or a row of it"
        )
    return baseline.detach().to(there.device, there.dtype).expand_as(there).clone()
