"""Held-out accuracy of the tiny models: indirect objects, repeats, and how tokens spread on experts."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformer_lens.data.generate import IOIExample, ioi_examples, repeated_random_tokens
from transformer_lens.model_bridge.tokens import ids_of, single_token


def plain_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id but the special ones: what random sequences are drawn from.

    >>> plain_token_ids(tokenizer)  # doctest: +SKIP
    [3, 4, 5, ...]
    """
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


def padded_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """BOS (where the tokenizer has one) and the texts, padded on the right, and the position of each last token. The
    attention is causal, so right padding needs no mask, and any token will do.

    >>> tokens, last = padded_prompts(tokenizer, ["When Mary"])  # doctest: +SKIP
    """
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [front + ids_of(tokenizer, text) for text in texts]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
    padded = [row + [pad] * (width - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor([len(row) - 1 for row in rows])


@torch.no_grad()
def ioi_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[IOIExample] | None = None
) -> float:
    """The share of prompts (by default 400 with unseen name pairs) where the most likely token of the whole vocabulary
    is the indirect object.

    >>> ioi_accuracy(model, tokenizer)  # doctest: +SKIP
    0.99
    """
    examples = examples if examples is not None else ioi_examples(400, seed=1)
    tokens, last = padded_prompts(tokenizer, [example.prompt for example in examples])
    logits = model(tokens).logits[torch.arange(len(tokens)), last]
    answers = [single_token(tokenizer, example.answer) for example in examples]
    return float((logits.argmax(-1) == torch.tensor(answers)).float().mean())


@torch.no_grad()
def repeated_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] = (8, 12, 16, 20, 24),
    batch: int = 40,
    seed: int = 1,
) -> float:
    """The share of right predictions over the whole vocabulary in the second half of repeated random sequences, from
    its second token on (its first token cannot be told from the past).

    >>> repeated_accuracy(model, tokenizer)  # doctest: +SKIP
    0.98
    """
    rng, token_ids = Random(seed), plain_token_ids(tokenizer)
    right = total = 0
    for length in lengths:
        tokens = repeated_random_tokens(token_ids, length, batch, tokenizer.bos_token_id, rng)
        hits = model(tokens).logits[:, length + 1 : -1].argmax(-1) == tokens[:, length + 2 :]
        right, total = right + int(hits.sum()), total + hits.numel()
    return right / total


@torch.no_grad()
def expert_shares(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The share of held-out tokens that each expert of each layer is given: [layers, experts]. Half of the tokens are
    indirect-object prompts, half repeated random sequences.

    >>> expert_shares(model, tokenizer)[0].sum()  # doctest: +SKIP
    tensor(1.)
    """
    text, last = padded_prompts(tokenizer, [example.prompt for example in ioi_examples(100, seed=2)])
    random = repeated_random_tokens(plain_token_ids(tokenizer), 12, 100, tokenizer.bos_token_id, Random(2))
    real = torch.arange(text.shape[1]) <= last[:, None]
    shares = [_routed(model, text, real), _routed(model, random, torch.ones_like(random).bool())]
    counts = torch.stack(shares).sum(0)
    return counts / counts.sum(-1, keepdim=True)


def _routed(model: PreTrainedModel, tokens: Tensor, real: Tensor) -> Tensor:
    """How many real tokens each expert of each layer is given: [layers, experts]."""
    config = model.config
    counts = []
    for logits in model(tokens, output_router_logits=True).router_logits:
        chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices[real.reshape(-1)]
        counts.append(torch.bincount(chosen.reshape(-1), minlength=config.num_local_experts))
    return torch.stack(counts).float()
