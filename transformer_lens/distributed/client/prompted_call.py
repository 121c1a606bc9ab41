"""One forward of a model with trained prompts: what its own code is given, and what the servers are told.

Prompts go in front where no cache holds positions yet; outside the model only the text's positions are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transformer_lens.distributed.client.prompts import TrainedPrompts
from transformer_lens.distributed.client.remote_cache import RemoteText
from transformer_lens.distributed.protocol.edits import Edit
from transformer_lens.model_bridge import BlockElsewhere
from transformer_lens.model_bridge.upstream import EMBEDDINGS, MASK, POSITIONS, TOKENS, Arguments, Word


def mask_in_front(mask: Tensor | None, count: int) -> Tensor | None:
    """A mask of the text with `count` columns of ones in front: prompts are attended to, also before left padding.

    >>> mask_in_front(torch.tensor([[0, 1, 1]]), 2)
    tensor([[1, 1, 0, 1, 1]])
    """
    return None if mask is None else torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


def positions_in_front(positions: Tensor | None, mask: Tensor | None, count: int, first: bool) -> Tensor | None:
    """Positions of the text, counted on from those of the prompts, which are theirs in front where it is the `first`.

    >>> positions_in_front(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1]]), 2, first=True)
    tensor([[0, 1, 0, 2, 3]])

    They are what transformers and the bridge count from a mask that has the prompts: first those, then each row's
    tokens. Padding between the two, which nobody attends to, keeps the position it came with.
    """
    if positions is None:
        return None
    real = 1 if mask is None else mask[:, -positions.shape[-1] :] != 0
    after = positions + count * real
    if not first:
        return after
    ahead = torch.arange(count).to(positions)
    return torch.cat([ahead.expand(len(after), -1), after], dim=-1)


@dataclass(frozen=True)
class PromptedCall:
    """One forward of a base model: what its own code is given, and what the servers are."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None
    position_ids: Tensor | None
    ahead: int = 0
    """Positions in front of the text's, here and in what comes out."""
    edits: Sequence[Edit] = ()


@dataclass(frozen=True)
class ModelCall:
    """One forward of a base model as it came; the model takes its arguments after the first by name."""

    arguments: Arguments
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __getitem__(self, word: Word) -> Any:
        return self.arguments.value(word, self.args, self.kwargs)


def without_prompts(call: ModelCall) -> PromptedCall:
    """The call as it came."""
    return PromptedCall(call.args, call.kwargs, call[MASK], call[POSITIONS])


def go_on(call: ModelCall, count: int) -> PromptedCall:
    """The call where a cache holds the text's beginning, and `count` prompts before it.

    The model's own code is told nothing of them: of what it computes of positions, nothing is used.
    """
    mask, positions = call[MASK], call[POSITIONS]
    positions = positions_in_front(positions, mask, count, first=False)
    return PromptedCall(call.args, call.kwargs, mask_in_front(mask, count), positions)


def begin_above(prompts: TrainedPrompts, call: ModelCall, dtype: torch.dtype) -> PromptedCall:
    """The call that begins with the stream at a later block, which holds the prompts' positions already."""
    count, held = prompts.facts.pre_seq_len, call[EMBEDDINGS].shape[1]
    if held <= count:
        raise ValueError(
            f"start_at_layer: got a stream of {held} positions, and with trained prompts it holds {count} for them and "
            "then those of the text, as stop_at_layer and hook_resid_pre give it"
        )
    return replace(without_prompts(call), ahead=count, edits=prompts.edits(dtype))


def begin(prompts: TrainedPrompts, embeddings: Tensor, call: ModelCall, longest: int) -> PromptedCall:
    """The call that reads a text from its beginning: prompts first."""
    count, new = prompts.facts.pre_seq_len, embeddings.shape[1]
    if count + new > longest:
        raise ValueError(
            f"{count} trained prompts and {new} tokens are {count + new} positions, and this model has {longest}; "
            f"give it at most {longest - count} tokens"
        )
    positions = positions_in_front(call[POSITIONS], call[MASK], count, first=True)
    mask = mask_in_front(call[MASK], count)
    given = {TOKENS: None, EMBEDDINGS: prompts.in_front(embeddings), MASK: mask, POSITIONS: positions}
    return PromptedCall(
        (), {**call.kwargs, **call.arguments.named(given)}, mask, positions, count, prompts.edits(embeddings.dtype)
    )


def _check(call: ModelCall, given: Tensor, held: int) -> None:
    """Raise `ValueError` for a mask or positions that are not those of the text."""
    if given.ndim < 2:
        raise ValueError(f"input_ids: got shape {list(given.shape)}, expected [batch, pos]")
    rows, new = given.shape[:2]
    expected = {MASK: [[rows, held + new]], POSITIONS: [[rows, new], [1, new]]}
    for word, shapes in expected.items():
        passed = call[word]
        if passed is not None and list(passed.shape) not in shapes:
            got = list(passed.shape)
            raise ValueError(
                f"{call.arguments.name(word)}: got shape {got}, expected {shapes[0]}, of the text "
                "alone; what trained prompts need is added"
            )


def with_prompts(model: Any, call: ModelCall, text: RemoteText | None) -> PromptedCall:
    """The call of a base model, whichever of these it is."""
    tokens, embeddings = call[TOKENS], call[EMBEDDINGS]
    if model.prompts is None or (tokens is None) == (embeddings is None):  # the latter is the family's to refuse
        return without_prompts(call)
    held = 0 if text is None else text.length - text.ahead
    _check(call, tokens if embeddings is None else embeddings, held)
    if text is not None and text.length:
        return go_on(call, text.ahead)
    if not BlockElsewhere.begins_at_embedding():
        return begin_above(model.prompts, call, model.dtype)
    if embeddings is None:
        embeddings = model.get_input_embeddings()(tokens)
    return begin(model.prompts, embeddings, call, model.config.max_position_embeddings)
