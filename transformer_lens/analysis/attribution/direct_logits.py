"""Direct logit attribution: what each component adds to a logit directly, through the unembedding.

With the final norm's scale held fixed, a logit is a sum over the components of the residual stream (Elhage et al. 2021,
"A Mathematical Framework for Transformer Circuits").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from transformer_lens import ActivationCache, TransformerBridge, asking
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Answer, Input, answer_ids, columns
from transformer_lens.checks import a_text, in_words, one_of, whole
from transformer_lens.factored_matrix import wide
from transformer_lens.text_table import Records

__all__ = ["DirectLogitAttribution", "direct_logit_attribution"]


@dataclass(frozen=True, eq=False, repr=False)
class DirectLogitAttribution(Records):
    """What each component adds to a logit or a logit difference; the values sum to `logit`, up to rounding."""

    labels: list[str]
    """`embed`, `L0H1`, `0_attn_out`, `0_mlp_out`, `L0E2`, `L0N3`; `bias` of layers, and `final_bias`."""
    values: Float[Tensor, "component batch"]
    logit: Float[Tensor, " batch"]
    """The model's own logit or logit difference."""

    def __getitem__(self, label: str | tuple[int, int]) -> Float[Tensor, " batch"]:
        """What one component adds in each text. Raises `KeyError` for an unknown label."""
        label = a_text("label", asking.part_label(label))
        if label not in self.labels:
            some = ", ".join(self.labels[:6])
            raise KeyError(f"direct logit attribution: got {label!r}, expected one of {some}, ...")
        return self.values[self.labels.index(label)]

    @checked
    def top(self, n: int) -> list[tuple[str, float]]:
        """The `n` components with the largest mean contribution by size."""
        means = self.values.mean(1)
        order = means.abs().argsort(descending=True, stable=True)[:n].tolist()
        return [(self.labels[at], float(means[at])) for at in order]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One row for each component and text."""
        each = zip(self.labels, self.values.tolist(), strict=True)
        return [{"component": label, "text": i, "value": value} for label, row in each for i, value in enumerate(row)]

    def __repr__(self) -> str:
        return f"DirectLogitAttribution to {len(self.labels)} parts in {self.values.shape[1]} texts"


def _experts(cache: ActivationCache, **options: Any) -> Any:
    stack, labels = PARTS["head"](cache, **options)
    asking.refuse_shared_experts(cache._bridge, "parts='expert'")
    experts: Any = cache.stack_expert_results(**options)
    routed = [f"{i}_mlp_out" for i in asking.layers_with(cache._bridge, "mlp.hook_expert_out")]
    kept = [number for number, label in enumerate(labels) if label not in routed]
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
    """Split the logit of `answer` (minus that of `wrong_answer`) at one position of every text into components: `parts`
    is "component" (attention and MLP of each layer), "head" (heads and whole MLPs), "neuron" (heads and neurons) or
    "expert" (heads and experts). With the final norm's scale held fixed they sum to the logit; `final_bias` is what the
    biases of the final norm and the unembedding add.

    >>> prompt = "When Noah and Adam went to the church, Adam bought a ball for"
    >>> _, cache = bridge.run_with_cache(prompt)
    >>> adds = direct_logit_attribution(bridge, cache, " Noah", " Adam")
    >>> adds.top(1)[0][0], torch.allclose(adds.values.sum(0), adds.logit, atol=1e-4)
    ('L3H3', True)

    Where a model caps or multiplies its logits, these are the logits before. The cache has to be that of a whole run
    (the default filter). Pad on the left, so that -1 is each text's last token.
    `transformer_lens.analysis.experts.logit_attribution` also reads several positions. Raises `ValueError` for parts
    that the model does not have, and for a cache without its batch axis.
    """
    one_of("parts", parts, tuple(PARTS))
    if not isinstance(cache, ActivationCache):
        raise TypeError(f"cache: got {in_words(cache)}, expected an ActivationCache")
    if not cache.has_batch_dim:
        raise ValueError("cache: it has no batch axis; cache without remove_batch_dim")
    whole_run = cache["unembed.hook_out"]
    position = asking.position_number(position, whole_run.shape[1])
    logits = whole_run[:, position]
    right = answer_ids(bridge, "answer", answer, len(logits))
    wrong = None if wrong_answer is None else answer_ids(bridge, "wrong_answer", wrong_answer, len(logits))
    stack, labels = PARTS[parts](cache, pos_slice=position, return_labels=True)
    values = cache.logit_attrs(stack, right, wrong, pos_slice=position)
    norm: Any = bridge.get_submodule("ln_final")
    shift, weight, offset = (one.detach().to(values) for one in (norm.b, bridge.W_U, bridge.b_U))
    bias = shift @ weight + offset
    logit, final = (_logit(one, right, wrong) for one in (logits.to(values), bias.expand_as(logits)))
    return DirectLogitAttribution([*labels, "final_bias"], torch.cat([values, final[None]]), logit)


def _logit(logits: Float[Tensor, "row d_vocab"], right: Tensor, wrong: Tensor | None) -> Float[Tensor, " row"]:
    rows = torch.arange(len(logits))
    return logits[rows, right] if wrong is None else logits[rows, right] - logits[rows, wrong]


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution:
    """The components of a logit or a logit difference: one row for each text and position read."""

    batch: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    logit: Float[Tensor, " row"]
    """The model's own logit, or logit difference."""
    embedding: Float[Tensor, " row"]
    attention: Float[Tensor, "row layer"]
    experts: Float[Tensor, "row layer expert"]
    """Zero where an expert was not chosen."""
    chosen: Int[Tensor, "row layer chosen"]
    """The experts chosen, highest weight first."""
    by_choice: Float[Tensor, "row layer chosen"]
    """What each chosen expert adds."""

    def total(self) -> Float[Tensor, " row"]:
        """The sum of all components: `logit`, up to rounding."""
        return self.embedding + self.attention.sum(-1) + self.experts.sum((-1, -2))

    def __repr__(self) -> str:
        rows, layers, experts = self.experts.shape
        return f"LogitAttribution of {rows} rows to the embedding, {layers} attentions and {layers} x {experts} experts"


@checked
@torch.no_grad()
def logit_attribution(
    bridge: TransformerBridge,
    input: Input,
    answer: Answer,
    wrong_answer: Answer | None = None,
    position: int | None = -1,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
) -> LogitAttribution:
    """Split the logit of `answer`, or the logit difference with `wrong_answer`, into what the embedding, each attention
    layer and each chosen expert add. An answer is a token id, a text of one token, or one of these for each text.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> parts = logit_attribution(moe, prompt, " Mary", " John")
    >>> torch.allclose(parts.total(), parts.logit, atol=1e-4)
    True

    `position` counts each text's tokens, padding excluded, so -1 is its last one; `None` reads every token. The formula
    is direct logit attribution (Elhage et al. 2021): `part / scale * ln_final.weight @ (W_U[answer] - W_U[wrong])`,
    with the run's `scale`. The parts sum to the logit up to the model's own rounding: on tiny-mixtral, whose logits
    reach 15, within 1e-5 in float32 and 0.3 in bfloat16. Raises `ValueError` for a dense model, an answer of several
    tokens or outside the vocabulary, and a position that a text does not have.
    """
    n_experts = asking.need_whole_mlps(bridge, "expert logit attribution")
    if bridge.cfg.normalization_type.startswith("LN") or bridge.b_U.any():
        raise ValueError("expert logit attribution: the final norm centres, or the unembedding has a bias")
    asking.refuse_embeddings(input)
    tokens, mask, attention_mask = bridge.input_and_mask(input, prepend_bos, padding_side)
    if position is None:
        batch, positions = mask.nonzero(as_tuple=True)
    else:
        batch, positions = torch.arange(len(mask)), columns(mask, whole("position", position))
    right = answer_ids(bridge, "answer", answer, len(tokens))
    wrong = None if wrong_answer is None else answer_ids(bridge, "wrong_answer", wrong_answer, len(tokens))
    read, column = positions.unique(return_inverse=True)
    layers = range(bridge.cfg.n_layers)
    inside = ("hook_attn_out", "mlp.hook_expert_indices", "mlp.hook_expert_weights", "mlp.hook_expert_out")
    blocks = [f"blocks.{i}.{name}" for i in layers for name in inside]
    names = ["hook_embed", *blocks, "ln_final.hook_scale", "unembed.hook_out"]
    how: dict[str, Any] = {"return_type": None, "device": "cpu", "attention_mask": attention_mask}
    cache: ActivationCache = bridge.run_with_cache(tokens, names_filter=names, pos_slice=read.tolist(), **how)[1]

    def at(name: str) -> Shaped[Tensor, "row layer chosen"]:
        return torch.stack([cache[f"blocks.{i}.{name}"][batch, column] for i in layers], 1)

    def adds(parts: Float[Tensor, "component batch pos d_model"]) -> Float[Tensor, "row component"]:
        return cache.logit_attrs(parts, right, wrong)[:, batch, column].T

    stream = adds(torch.stack([cache["hook_embed"], *(cache["attn_out", i] for i in layers)]))
    # One layer at a time: all experts' outputs widened at once would be the largest tensor here.
    outputs = [adds(cache[f"blocks.{i}.mlp.hook_expert_out"].movedim(2, 0)) for i in layers]
    chosen, by_choice = at("mlp.hook_expert_indices"), torch.stack(outputs, 1) * at("mlp.hook_expert_weights")
    experts = by_choice.new_zeros(*by_choice.shape[:2], n_experts).scatter_add_(-1, chosen, by_choice)
    logits = wide(cache["unembed.hook_out"][batch, column])
    logit = _logit(logits, right[batch], None if wrong is None else wrong[batch])
    return LogitAttribution(batch, positions, logit, stream[:, 0], stream[:, 1:], experts, chosen, by_choice)


@checked
def expert_logit_attribution(
    bridge: TransformerBridge,
    input: Input,
    answer: Answer,
    wrong_answer: Answer | None = None,
    position: int = -1,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
) -> Float[Tensor, "layer expert"]:
    """What each expert's weighted output adds to the logit of `answer`, or to the logit difference, at one position, as
    a mean over the batch; zero where an expert was not chosen. See `logit_attribution` for the formula.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> adds = expert_logit_attribution(moe, prompt, " Mary", " John")
    >>> adds.shape, divmod(int(adds.argmax()), 4)  # the layer and the expert that adds most
    (torch.Size([3, 4]), (2, 1))
    """
    options: dict[str, Any] = {"prepend_bos": prepend_bos, "padding_side": padding_side}
    return logit_attribution(bridge, input, answer, wrong_answer, position, **options).experts.mean(0)
