"""What each expert's output adds to a logit, on the direct path through the final norm.

With the final norm's scale taken as it was, a logit is a sum over the parts of the stream: the
embedding, each layer's attention and each chosen expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.gradient_runs import wide
from transformer_lens.asking import Answer, Input, answer_ids, columns, need_experts, refuse_embeddings
from transformer_lens.checks import whole


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution:
    """The parts of a logit, or of a logit difference: one row for each text and position read."""

    batch: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    logit: Float[Tensor, " row"]
    """What the model computed: the answer's logit, less that of the wrong answer."""
    embedding: Float[Tensor, " row"]
    attention: Float[Tensor, "row layer"]
    experts: Float[Tensor, "row layer expert"]
    """Zero where an expert was not chosen."""
    chosen: Int[Tensor, "row layer chosen"]
    """The experts chosen, best first."""
    by_choice: Float[Tensor, "row layer chosen"]
    """What each of them adds."""

    def total(self) -> Float[Tensor, " row"]:
        """The sum of all parts: `logit`, but for rounding."""
        return self.embedding + self.attention.sum(-1) + self.experts.sum((-1, -2))

    def __repr__(self) -> str:
        rows, layers, experts = self.experts.shape
        return f"LogitAttribution of {rows} rows to the embedding, {layers} attentions and {layers} x {experts} experts"


@checked
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
    """Split the logit of `answer`, less that of `wrong_answer` where one is given, into what the embedding, each
    attention and each chosen expert add to it, in logits. An answer is a token id, a text of one token, or one of these
    for each text of a batch.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> parts = logit_attribution(bridge, prompt, " Mary", " John")
    >>> torch.allclose(parts.total(), parts.logit, atol=1e-4)
    True

    `position` counts among the tokens of each text that are not padding, so -1 is its last one; `None` reads every such
    token. The formula is direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits"): `part / scale * ln_final.weight @ (W_U[answer] - W_U[wrong])`, with `scale` that of the run. The parts
    sum to the logit but for the model's own rounding: on tiny-mixtral, whose logits reach 15, within 1e-5 in float32
    and 0.3 in bfloat16.

    Raises `ValueError` for a dense model, for an answer of several tokens or outside the vocabulary, and for a position
    that a text does not have.
    """
    need_experts(bridge.cfg, "expert logit attribution")
    refuse_embeddings(input)
    tokens, mask, attention_mask = bridge.input_and_mask(input, prepend_bos, padding_side)
    batch, positions = _rows(mask, position)
    right = answer_ids(bridge, "answer", answer, len(tokens))[batch]
    wrong = None if wrong_answer is None else answer_ids(bridge, "wrong_answer", wrong_answer, len(tokens))[batch]
    read, column = positions.unique(return_inverse=True)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            tokens,
            return_type=None,
            names_filter=_names(bridge.cfg.n_layers),
            device="cpu",
            pos_slice=read.tolist(),
            attention_mask=attention_mask,
        )
        return _attribution(bridge, cache, batch, positions, column, right, wrong)


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
    """What each expert's weighted output adds to the logit of `answer`, less that of `wrong_answer`, at one position,
    in logits; zero where an expert was not chosen; over a batch, the mean. `logit_attribution` has the rest: attention
    and embedding, each text, all positions; and says how it is computed.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> adds = expert_logit_attribution(bridge, prompt, " Mary", " John")
    >>> adds.shape, divmod(int(adds.argmax()), 4)  # the layer and the expert that adds most
    (torch.Size([3, 4]), (2, 1))
    """
    options: dict[str, Any] = {"prepend_bos": prepend_bos, "padding_side": padding_side}
    return logit_attribution(bridge, input, answer, wrong_answer, position, **options).experts.mean(0)


def _names(n_layers: int) -> list[str]:
    inside = ("hook_attn_out", "mlp.hook_expert_indices", "mlp.hook_expert_weights", "mlp.hook_expert_out")
    blocks = [f"blocks.{i}.{name}" for i in range(n_layers) for name in inside]
    return ["hook_embed", *blocks, "ln_final.hook_scale", "unembed.hook_out"]


def _rows(mask: Tensor, position: int | None) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Text and column of every token to read. Raises `ValueError` for a position a text does not have."""
    if position is None:
        batch, column = mask.nonzero(as_tuple=True)
        return batch, column
    return torch.arange(len(mask)), columns(mask, whole("position", position))


def _attribution(
    bridge: TransformerBridge,
    cache: ActivationCache,
    batch: Int[Tensor, " row"],
    position: Int[Tensor, " row"],
    column: Int[Tensor, " row"],
    right: Int[Tensor, " row"],
    wrong: Int[Tensor, " row"] | None,
) -> LogitAttribution:
    """The parts at the rows to read; `column` is where their position is in what the cache kept."""
    layers = range(bridge.cfg.n_layers)
    norm, head = (cast(Any, bridge.get_submodule(name)).original_component for name in ("ln_final", "unembed"))

    def at(name: str) -> Shaped[Tensor, "row ..."]:
        found: Tensor = cache[name][batch, column]
        return wide(found) if found.is_floating_point() else found

    def stacked(name: str) -> Shaped[Tensor, "row layer ..."]:
        return torch.stack([at(f"blocks.{i}.{name}") for i in layers], 1)

    def of_answers(one: Callable[[Tensor], Tensor]) -> Float[Tensor, "row ..."]:
        return one(right) if wrong is None else one(right) - one(wrong)

    def along(part: Float[Tensor, "row ... d_model"]) -> Float[Tensor, "row ..."]:
        """What a part of the stream adds to the logit."""
        between = [1] * (part.ndim - 2)
        return (part * direction.reshape(len(part), *between, -1)).sum(-1)

    wanted = of_answers(lambda answers: wide(head.weight[answers.to(head.weight.device)].cpu()))
    direction: Float[Tensor, "row d_model"] = wanted * norm.weight.cpu() / at("ln_final.hook_scale")
    logits, chosen = at("unembed.hook_out"), stacked("mlp.hook_expert_indices")
    # One layer at a time: all experts' outputs widened at once would be the largest tensor here.
    outputs = [along(at(f"blocks.{i}.mlp.hook_expert_out")) for i in layers]
    by_choice = torch.stack(outputs, 1) * stacked("mlp.hook_expert_weights")
    experts = by_choice.new_zeros(*by_choice.shape[:2], int(bridge.cfg.num_experts or 0))
    return LogitAttribution(
        batch=batch,
        position=position,
        logit=of_answers(lambda answers: logits.gather(-1, answers[:, None])[:, 0]),
        embedding=along(at("hook_embed")),
        attention=along(stacked("hook_attn_out")),
        experts=experts.scatter_add_(-1, chosen, by_choice),
        chosen=chosen,
        by_choice=by_choice,
    )
