"""Attribution patching: activation patching to first order, for all places at once.

Sources: Nanda 2023, "Attribution Patching"; Syed et al. 2023, "Attribution Patching Outperforms Automated
Circuit Discovery". Everywhere here a positive score means that the clean value raises the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.gradient_runs import (
    At,
    differentiable_names,
    gradient_run,
    prompt_pair,
    wide,
)
from transformer_lens.analysis.patching.engine import Metric, SweepInput
from transformer_lens.analysis.patching.experts import PARTS, expert_contributions
from transformer_lens.asking import need_experts
from transformer_lens.checks import a_text


@dataclass(frozen=True, eq=False, repr=False)
class AttributionScores:
    """Scores of single numbers of activations; `by` and `stacked` sum them over the axes that do not matter."""

    scores: dict[str, Tensor]
    """By hook: (clean - corrupted) * gradient, of the activation's shape, in float32 at least."""
    axes: dict[str, tuple[str, ...]]
    """By hook: what the axes are."""
    value: Float[Tensor, ""]
    """The metric in the run whose gradient was taken."""

    def by(self, axes: str) -> dict[str, Tensor]:
        """The score of each hook by some of its axes, in their order in `axes`; the others are summed, the batch too.
        Raises `ValueError` for an axis that a hook does not have.

        >>> metric = lambda logits: logits[0, -1, 5]
        >>> found = attribution_patching(bridge, "Mary and John", "Mary and Mary", metric, "blocks.0.attn.hook_z")
        >>> found.by("pos head")["blocks.0.attn.hook_z"].shape, found.by("")["blocks.0.attn.hook_z"].shape
        (torch.Size([5, 4]), torch.Size([]))
        """
        a_text("axes", axes)
        return {name: self._by(name, axes.split()) for name in self.scores}

    def stacked(self, axes: str) -> Float[Tensor, "hook ..."]:
        """`by`, with the hooks as the first axis.

        >>> metric = lambda logits: logits[0, -1, 5]
        >>> names = [f"blocks.{i}.attn.hook_z" for i in range(4)]
        >>> attribution_patching(bridge, "Mary and John", "Mary and Mary", metric, names).stacked("head").shape
        torch.Size([4, 4])
        """
        return torch.stack(list(self.by(axes).values()))

    def _by(self, name: str, wanted: list[str]) -> Tensor:
        here = self.axes[name]
        missing = [axis for axis in wanted if axis not in here]
        if missing or len(set(wanted)) < len(wanted):
            raise ValueError(f"by: got axes {wanted}, expected some of {', '.join(here)}, which {name!r} has")
        rest = [i for i, axis in enumerate(here) if axis not in wanted]
        scores = self.scores[name]
        kept = [axis for axis in here if axis in wanted]
        return (scores.sum(rest) if rest else scores).permute([kept.index(axis) for axis in wanted])

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
    """What the metric would change, to first order, if an activation of the clean run were put into the corrupted one:
    `(clean - corrupted) * d metric / d activation`, for every number of every named hook.

    >>> clean = "When Noah and Adam went to the church, Adam bought a ball for"
    >>> corrupted = "When Noah and Adam went to the church, Noah bought a ball for"
    >>> noah, adam = bridge.to_single_token(" Noah"), bridge.to_single_token(" Adam")
    >>> metric = lambda logits: (logits[:, -1, noah] - logits[:, -1, adam]).mean()
    >>> names = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
    >>> heads = attribution_patching(bridge, clean, corrupted, metric, names).stacked("head")
    >>> divmod(int(heads.argmax()), 4)  # the layer and head whose clean output helps most
    (3, 3)

    It costs two forwards and one backward, however many hooks. `at` says where the gradient is taken. In the corrupted
    run (default) a score estimates `metric(corrupted with the clean value) - metric(corrupted)`, which the sweeps of
    `transformer_lens.patching` measure; in the clean run, `metric(clean) - metric(clean with the corrupted value)`. It
    is exact where the metric is linear in the activation.

    Inputs are a text, tokens or embeddings, of one shape and padded alike. The metric gets logits [batch pos d_vocab]
    and makes one number of them, with torch. Raises `ValueError` for inputs that do not fit, for a metric that autograd
    cannot follow or that is not finite, and for hooks of integers or of chosen experts.
    """
    pair = prompt_pair(bridge, clean, corrupted, attention_mask, at)
    found = differentiable_names(bridge, names)
    with torch.no_grad():
        _, kept = bridge.run_with_cache(
            pair.other(at), names_filter=found, attention_mask=pair.mask, return_cache_object=False, return_type=None
        )
    run = gradient_run(bridge, pair.base(at), pair.mask, metric, found)
    here, gradients = run.activations(), run.gradients()
    sign = -1 if at == "clean" else 1
    scores = {name: sign * (wide(kept[name]) - wide(here[name])) * wide(gradients[name]) for name in found}
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
    """Attribution patching of what each expert adds to the stream: its output times its weight, nothing where it was
    not chosen. An estimate of `get_act_patch_expert_out`; arguments and errors as in `attribution_patching`. Raises
    `ValueError` for a dense model.

    >>> metric = lambda logits: logits[0, -1, 5]
    >>> expert_attribution_patching(moe, "Mary and John", "Mary and Mary", metric).shape
    torch.Size([3, 1, 5, 4])
    """
    n_experts = need_experts(bridge.cfg, "attribution to experts")
    pair = prompt_pair(bridge, clean, corrupted, attention_mask, at)
    layers = range(bridge.cfg.n_layers)
    names = [f"blocks.{layer}.mlp.hook_{part}" for layer in layers for part in PARTS]
    with torch.no_grad():
        caches = [
            bridge.run_with_cache(one, names_filter=names, attention_mask=pair.mask, return_type=None)[1]
            for one in (pair.clean, pair.corrupted)
        ]
    outputs = [f"blocks.{layer}.hook_mlp_out" for layer in layers]
    gradients = gradient_run(bridge, pair.base(at), pair.mask, metric, outputs).gradients()
    scores = []
    for layer in layers:
        clean_parts, corrupted_parts = (wide(expert_contributions(cache, layer, n_experts)) for cache in caches)
        gradient = wide(gradients[f"blocks.{layer}.hook_mlp_out"])
        scores.append(torch.einsum("bped,bpd->bpe", clean_parts - corrupted_parts, gradient))
    return torch.stack(scores)
