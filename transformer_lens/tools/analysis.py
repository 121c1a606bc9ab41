"""Direct logit attribution in TransformerLens's words; `transformer_lens.analysis.attribution` also has the biases."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.checks import in_words, one_of
from transformer_lens.utilities import SliceInput

__all__ = ["DirectLogitAttribution", "direct_logit_attribution"]


class DirectLogitAttribution(NamedTuple):
    """What each component adds."""

    attribution: Float[Tensor, "component ..."]
    labels: list[str]
    unit: str

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` components that add most, with their means."""
        means = self.attribution.reshape(len(self.labels), -1).mean(-1)
        return [(self.labels[i], float(means[i])) for i in means.argsort(descending=True)[:k].tolist()]


def direct_logit_attribution(
    model: TransformerBridge,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    unit: str = "component",
    pos: SliceInput = -1,
    cache: ActivationCache | None = None,
) -> DirectLogitAttribution:
    """What each component adds to the logit of `answer_tokens`, minus that of `incorrect_tokens`, without biases.

    >>> direct_logit_attribution(bridge, "Mary and John", " Mary", " John", unit="head").labels[-1]
    'remainder'

    `unit` is "component" (`decompose_resid`), "layer" (`accumulated_resid`) or "head" (`stack_head_results`, with the
    rest of the stream). `cache` stands for a run of `input`.
    """
    for what, given, kind in (("model", model, TransformerBridge), ("cache", cache, ActivationCache)):
        if not isinstance(given, kind) and (given is not None or what == "model"):
            raise TypeError(f"{what}: got {in_words(given)}, expected a {kind.__name__}")
    one_of("unit", unit, ("component", "layer", "head"))
    if answer_tokens is None or (input is None) == (cache is None):
        raise ValueError("direct_logit_attribution: expected answer_tokens, and one of input and cache")
    cache = model.run_with_cache(input)[1] if cache is None else cache
    options: dict[str, Any] = {"pos_slice": pos, "return_labels": True}
    if unit == "head":
        stack, labels = cache.stack_head_results(**options, incl_remainder=True)
    else:
        stack, labels = (cache.decompose_resid if unit == "component" else cache.accumulated_resid)(**options)
    logits = cache.logit_attrs(stack, answer_tokens, incorrect_tokens, pos, has_batch_dim=cache.has_batch_dim)
    return DirectLogitAttribution(logits, labels, unit)
