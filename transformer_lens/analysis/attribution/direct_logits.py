"""Direct logit attribution with labels: what each part of the stream adds to a logit, without a detour.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". The cache does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Answer, answer_ids, part_label, position_number
from transformer_lens.checks import a_text, in_words, is_one_of


@dataclass(frozen=True, eq=False, repr=False)
class DirectLogitAttribution:
    """What each part adds to a logit, or to a logit difference: the parts sum to `logit`, but for rounding."""

    labels: list[str]
    """`embed`, `L0H1`, `0_attn_out`, `0_mlp_out`, `L0E2`, `L0N3`; `bias` of layers, and `final_bias`."""
    values: Float[Tensor, "component batch"]
    logit: Float[Tensor, " batch"]
    """What the model computed."""

    def __getitem__(self, label: str | tuple[int, int]) -> Float[Tensor, " batch"]:
        """What one part adds in each text. Raises `KeyError` for a label that is not there."""
        label = part_label(label)
        a_text("label", label)
        if label not in self.labels:
            raise KeyError(
                f"direct logit attribution: got {label!r}, expected one of {', '.join(self.labels[:6])}, ..."
            )
        return self.values[self.labels.index(label)]

    @checked
    def top(self, n: int) -> list[tuple[str, float]]:
        """The `n` parts that add most by size, on average over the texts."""
        means = self.values.mean(1)
        order = means.abs().argsort(descending=True, stable=True)[: max(n, 0)]
        return [(self.labels[int(at)], float(means[at])) for at in order]

    def __repr__(self) -> str:
        return f"DirectLogitAttribution to {len(self.labels)} parts in {self.values.shape[1]} texts"


def _experts(cache: ActivationCache, **options: Any) -> Any:
    stack, labels = PARTS["head"](cache, **options)
    kept = [number for number, label in enumerate(labels) if not label.endswith("_mlp_out")]
    experts: Any = cache.stack_expert_results(**options)
    return torch.cat([stack[kept], experts[0]]), [labels[number] for number in kept] + experts[1]


PARTS: dict[str, Callable[..., Any]] = {
    "component": ActivationCache.decompose_resid,
    "head": partial(ActivationCache.get_full_resid_decomposition, expand_neurons=False),
    "neuron": partial(ActivationCache.get_full_resid_decomposition, expand_neurons=True),
    "expert": _experts,
}


@checked
def direct_logit_attribution(
    bridge: TransformerBridge,
    cache: ActivationCache,
    answer: Answer,
    wrong_answer: Answer | None = None,
    position: int = -1,
    *,
    parts: str = "head",
) -> DirectLogitAttribution:
    """Split the logit of `answer`, less that of `wrong_answer`, at one position of every text. `parts` says into what:
    "component" (attention and MLP of each layer), "head" (heads and whole MLPs), "neuron" (heads and neurons), "expert"
    (heads and experts). With the final norm's scale as it was, the parts sum to the logit; `final_bias` is what that
    norm's bias and the unembedding's add.

    >>> prompt = "When Noah and Adam went to the church, Adam bought a ball for"
    >>> _, cache = bridge.run_with_cache(prompt)
    >>> adds = direct_logit_attribution(bridge, cache, " Noah", " Adam")
    >>> adds.top(1)[0][0], torch.allclose(adds.values.sum(0), adds.logit, atol=1e-4)
    ('L3H3', True)

    The cache is that of a whole run (the default filter). Pad on the left, so that -1 is each text's last token. For
    experts `transformer_lens.analysis.experts.logit_attribution` also reads several positions. Raises `ValueError` for
    parts that the model does not have, and for a cache without its batch axis.
    """
    if not is_one_of(parts, PARTS):
        raise ValueError(f"parts: got {parts!r}, expected one of {', '.join(PARTS)}")
    if not isinstance(cache, ActivationCache):
        raise TypeError(f"cache: got {in_words(cache)}, expected an ActivationCache")
    if not cache.has_batch_dim:
        raise ValueError("cache: it has no batch axis; cache without remove_batch_dim")
    whole_run = cache["unembed.hook_out"]
    position = position_number(position, whole_run.shape[1])
    logits = whole_run[:, position]
    right = answer_ids(bridge, "answer", answer, len(logits))
    wrong = None if wrong_answer is None else answer_ids(bridge, "wrong_answer", wrong_answer, len(logits))
    stack, labels = PARTS[parts](cache, pos_slice=position, return_labels=True)
    values = cache.logit_attrs(stack, right, wrong, pos_slice=position)
    norm: Any = bridge.get_submodule("ln_final")
    weight, offset = (one.detach().to(values.device, values.dtype) for one in (bridge.W_U, bridge.b_U))
    bias = norm.b.detach().to(values.device, values.dtype) @ weight + offset
    logit, final = (_difference(one, right, wrong) for one in (logits.to(values), bias.expand_as(logits)))
    return DirectLogitAttribution([*labels, "final_bias"], torch.cat([values, final[None]]), logit)


def _difference(logits: Tensor, right: Tensor, wrong: Tensor | None) -> Float[Tensor, " batch"]:
    rows = torch.arange(len(logits), device=logits.device)
    found = logits[rows, right.to(logits.device)]
    return found if wrong is None else found - logits[rows, wrong.to(logits.device)]
