"""`detect_head`: how well each head's attention pattern matches a known pattern, as in TransformerLens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Heads, check_one_text, head_pairs, layers_with, refuse_embeddings
from transformer_lens.checks import a_list, a_tensor, in_words, is_tensor, one_of

__all__ = [
    "HEAD_NAMES",
    "ErrorMeasure",
    "HeadName",
    "detect_head",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_previous_token_head_detection_pattern",
]
logger = logging.getLogger(__name__)

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
HEAD_NAMES: tuple[HeadName, ...] = get_args(HeadName)
ErrorMeasure = Literal["abs", "mul"]
Tokens = Int[Tensor, " pos"] | Int[Tensor, "1 pos"]


def get_previous_token_head_detection_pattern(tokens: Tokens) -> Float[Tensor, "pos pos"]:
    """1 where a query (row) attends to the previous token.

    >>> get_previous_token_head_detection_pattern(torch.tensor([5, 6, 5]))
    tensor([[0., 0., 0.],
            [1., 0., 0.],
            [0., 1., 0.]])
    """
    length = len(_one_text(tokens))
    return torch.ones(length, length).tril(-1).triu(-1)


def get_duplicate_token_head_detection_pattern(tokens: Tokens) -> Float[Tensor, "pos pos"]:
    """1 where a query attends to an earlier occurrence of its own token.

    >>> get_duplicate_token_head_detection_pattern(torch.tensor([5, 6, 5]))
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [1., 0., 0.]])
    """
    ids = _one_text(tokens).cpu()
    return (ids[:, None] == ids[None, :]).float().tril(-1)


def get_induction_head_detection_pattern(tokens: Tokens) -> Float[Tensor, "pos pos"]:
    """1 where a query attends to a token that followed an earlier occurrence of its own; an immediate repeat, which
    points at itself, counts too.

    >>> get_induction_head_detection_pattern(torch.tensor([5, 6, 7, 5]))[3]
    tensor([0., 1., 0., 0.])
    """
    duplicates = get_duplicate_token_head_detection_pattern(tokens)
    return torch.nn.functional.pad(duplicates[:, :-1], (1, 0))


def _one_text(tokens: Tokens) -> Int[Tensor, " pos"]:
    """The ids of one text. Raises `TypeError` for anything else."""
    check_one_text("tokens", tokens, ids_only=True)
    return tokens.reshape(-1)


PATTERNS = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


@checked
@torch.no_grad()
def detect_head(
    model: TransformerBridge,
    seq: str | Sequence[str] | Int[Tensor, "batch pos"],
    detection_pattern: HeadName | Float[Tensor, "*batch pos pos"],
    heads: Heads | None = None,
    cache: ActivationCache | None = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
    batch_size: int = 8,
) -> Float[Tensor, "layer head"]:
    """How well each head's attention matches a pattern: a named one, or your own lower-triangular `[pos, pos]`, also
    one for each text. `heads` limits it to some heads (`["L3H2", "0.1", (1, 0)]`, `{3: [0, 2]}`); all others score -1.

    >>> text = "The ball is for Mary. The cup is for John. The ball is for"
    >>> scores = detect_head(bridge, text, "previous_token_head")
    >>> scores.shape, (scores > 0.5).nonzero().tolist()
    (torch.Size([4, 4]), [[0, 2], [0, 3]])

    "mul": the fraction of a head's attention that lies on the pattern (0 to 1), ignoring excluded attention; a head
    with none left scores 0. "abs": 1 minus the absolute difference from the pattern, averaged over queries (-1 to 1).
    `exclude_bos` drops attention to the first token, `exclude_current_token` each token's attention to itself. For
    several texts the score is the mean over texts, without padding, `batch_size` of them at a time. A `cache` of
    `run_with_cache(seq)` saves the run. Raises `ValueError` for patterns, measures, heads and texts that do not fit.
    """
    one_of("error_measure", error_measure, get_args(ErrorMeasure))
    some = layers_with(model, "attn.hook_pattern") if heads is None else range(model.cfg.n_layers)
    wanted = [(layer, head) for layer, head in head_pairs(model.cfg, heads) if layer in some]
    if not isinstance(seq, str):
        seq = a_tensor("seq", seq) if isinstance(seq, Tensor) else list(a_list("seq", seq))
    if not len(seq) or batch_size < 1:
        raise ValueError(f"detect_head: got {len(seq)} texts and batch_size {batch_size}, expected one or more")
    refuse_embeddings(seq)
    tokens, mask, _ = model.input_and_mask(seq)
    texts = [row[real] for row, real in zip(tokens, mask, strict=True)]
    patterns = [_pattern(detection_pattern, text, number, len(texts)) for number, text in enumerate(texts)]
    if error_measure == "mul" and any(bool(((p != 0) & (p != 1)).any()) for p in patterns):
        logger.warning("detect_head: the pattern has values other than 0 and 1, and 'mul' weighs attention by them")
    layers = sorted({layer for layer, _ in wanted})
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    total = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    size = batch_size if cache is None else len(texts)
    for start in range(0, len(texts), size):
        batch = slice(start, start + size)
        found: Any = cache
        if cache is None:
            how: dict[str, Any] = {"names_filter": names, "return_type": None, "attention_mask": mask[batch]}
            _, found = model.run_with_cache(tokens[batch], stop_at_layer=layers[-1] + 1, **how)
        for layer in layers:
            attention = _of_batch(found, layer, mask[batch])
            for row, (real, pattern) in enumerate(zip(mask[batch], patterns[batch], strict=True)):
                counts = torch.ones_like(pattern).tril(-1 if exclude_current_token else 0)
                counts[:, 0] *= not exclude_bos
                seen = attention[row][:, real][:, :, real].float().cpu()
                total[layer] += _scores(seen, pattern, counts, error_measure)
    scores = torch.full_like(total, -1.0)
    for layer, head in wanted:
        scores[layer, head] = total[layer, head] / len(texts)
    return scores


def _scores(seen: Float[Tensor, "head pos pos"], pattern: Tensor, counts: Tensor, measure: str) -> Tensor:
    if measure == "abs":
        return 1 - ((seen - pattern).abs() * counts).sum((-1, -2)) / len(pattern)
    counted = seen * counts
    # A head with no attention left scores 0, not 0 / 0.
    return (counted * pattern).sum((-1, -2)) / counted.sum((-1, -2)).clamp(min=1e-30)


def _of_batch(cache: Any, layer: int, mask: Tensor) -> Float[Tensor, "batch head pos pos"]:
    """A layer's patterns with a batch axis. Raises `ValueError` if the cache is of other texts."""
    if not isinstance(cache, ActivationCache):
        raise TypeError(f"cache: got {in_words(cache)}, expected an ActivationCache")
    found = cache["pattern", layer]
    found = found if found.ndim == 4 else found[None]
    batch, pos = mask.shape
    if (found.shape[0], *found.shape[2:]) != (batch, pos, pos):
        expected = f"[{batch}, head, {pos}, {pos}] as seq has it"
        raise ValueError(f"cache: its pattern of layer {layer} has shape {list(found.shape)}, expected {expected}")
    return found


def _pattern(given: HeadName | Tensor, text: Int[Tensor, " pos"], number: int, texts: int) -> Float[Tensor, "pos pos"]:
    length = len(text)
    if length < 2:
        raise ValueError(f"seq: text {number} has {length} tokens, expected two or more")
    if isinstance(given, str):
        if given not in PATTERNS:
            raise ValueError(f"detection_pattern: got {given!r}, expected a tensor or one of {', '.join(HEAD_NAMES)}")
        return PATTERNS[given](text)
    if not is_tensor(given):
        raise TypeError(f"detection_pattern: got {in_words(given)}, expected a tensor or a name")
    pattern = given[number] if given.ndim == 3 and len(given) == texts else given
    if list(pattern.shape) != [length, length]:
        expected = f"[{length}, {length}] for the {length} tokens of text {number}"
        raise ValueError(f"detection_pattern: got shape {list(given.shape)}, expected {expected}")
    pattern = pattern.float().cpu()
    if not bool(pattern.isfinite().all()) or bool(pattern.triu(1).any()):
        raise ValueError("detection_pattern: expected finite numbers, zero above the diagonal (no head looks ahead)")
    return pattern
