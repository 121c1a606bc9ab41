"""Small helpers that analysis code expects beside the bridge."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens.checks import a_tensor, a_text, as_array, in_words, is_tensor, one_of, whole
from transformer_lens.hooks.names import get_act_name
from transformer_lens.hooks.slicing import Slice, SliceInput
from transformer_lens.model_bridge.calls.padding import checked_mask, kept_mask

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge

__all__ = [
    "USE_DEFAULT_VALUE",
    "Slice",
    "SliceInput",
    "batch_addmm",
    "get_act_name",
    "get_attention_mask",
    "get_device",
    "get_tokens_with_bos_removed",
    "lm_cross_entropy_loss",
    "test_prompt",
    "to_numpy",
    "tokenize_and_concatenate",
    "vanilla_addmm",
]

USE_DEFAULT_VALUE = None
"""The default of a keyword that then follows the model."""


def lm_cross_entropy_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "#batch pos"] | Bool[Tensor, "#batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos_minus_1"]:
    """The next-token cross-entropy loss in nats, computed in float32.

    >>> lm_cross_entropy_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
    tensor(1.3863)

    A prediction counts if its token and the next are both unmasked; a mask `[1, pos]` holds for every text. `per_token`
    returns each prediction's loss, zero if it does not count. Raises `ValueError` if none counts or shapes do not fit.
    """
    a_tensor("logits", logits)
    a_tensor("tokens", tokens)
    if logits.ndim != 3 or tokens.shape != logits.shape[:2]:
        raise ValueError(
            f"loss: got logits {list(logits.shape)} and tokens {list(tokens.shape)}, expected [batch, pos, d_vocab] "
            "and [batch, pos]"
        )
    rows, pos = tokens.shape
    shared = is_tensor(attention_mask) and list(attention_mask.shape) == [1, pos]
    mask = None if attention_mask is None else checked_mask(attention_mask, 1 if shared else rows, pos, logits.device)
    log_probs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    losses = -log_probs.gather(-1, tokens[:, 1:, None].to(logits.device)).squeeze(-1)
    if mask is not None:
        counts = (mask[:, 1:] & mask[:, :-1]).expand_as(losses)
        losses = losses.masked_fill(~counts, 0.0)
    if per_token:
        return losses
    if not losses.numel():
        raise ValueError("loss: there is no token to predict")
    if mask is None:
        return losses.mean()
    if not counts.any():
        raise ValueError("loss: the attention mask leaves no token to predict")
    return losses.sum() / counts.sum()


def to_numpy(tensor: Tensor | np.ndarray | list[float] | float) -> np.ndarray:
    """Convert anything that holds numbers to a NumPy array; bfloat16, which NumPy lacks, becomes float32.

    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16))
    array([1., 1.], dtype=float32)
    """
    array = as_array("to_numpy", tensor, "rows of one length")
    if array.dtype.kind not in "biufc":
        raise TypeError(f"to_numpy: got {in_words(tensor)}, expected numbers")
    return array


def get_device() -> str:
    """The name of the device to use: an accelerator that PyTorch sees ("cuda", "mps"), else "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def vanilla_addmm(input: Tensor, mat1: Float[Tensor, "m n"], mat2: Float[Tensor, "n out"]) -> Float[Tensor, "m out"]:
    """`input + mat1 @ mat2`.

    >>> vanilla_addmm(torch.ones(2), torch.eye(2), torch.eye(2))
    tensor([[2., 1.],
            [1., 2.]])
    """
    for what, tensor in (("input", input), ("mat1", mat1), ("mat2", mat2)):
        a_tensor(what, tensor)
    return torch.addmm(input, mat1, mat2)


def batch_addmm(
    bias: Tensor, weight: Float[Tensor, "d_in d_out"], x: Float[Tensor, "*leading d_in"]
) -> Float[Tensor, "*leading d_out"]:
    """`x @ weight + bias` in one kernel, over any leading axes of `x`.

    >>> batch_addmm(torch.ones(3), torch.zeros(2, 3), torch.zeros(5, 4, 2)).shape
    torch.Size([5, 4, 3])
    """
    for what, tensor in (("bias", bias), ("weight", weight), ("x", x)):
        a_tensor(what, tensor)
    return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def get_attention_mask(
    tokenizer: Any, tokens: Int[Tensor, "batch pos"], prepend_bos: bool, padding_side: str | None = None
) -> Int[Tensor, "batch pos"]:
    """The attention mask of token ids, as `to_tokens` recorded it, else inferred from pad tokens at one end.

    >>> get_attention_mask(bridge.tokenizer, bridge.to_tokens(["Mary", "Mary and John"]), prepend_bos=True).sum(-1)
    tensor([3, 5])

    If BOS is also the pad token, `prepend_bos` counts the last token of the padding on the left as BOS.
    """
    a_tensor("tokens", tokens)
    known = kept_mask(tokens)
    if known is not None:
        return known.to(tokens)
    if tokenizer is None or tokenizer.pad_token_id is None:
        return torch.ones_like(tokens)
    side = _side(tokenizer, padding_side)
    real = tokens.ne(tokenizer.pad_token_id).long()
    if side == "right":
        return real.flip(-1).cummax(-1).values.flip(-1)
    mask = real.cummax(-1).values
    if prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        first = (mask == 0).sum(-1) - 1
        rows = first >= 0
        mask[rows, first[rows]] = 1
    return mask


def _side(tokenizer: Any, padding_side: str | None) -> str:
    side: str = tokenizer.padding_side if padding_side is None else padding_side
    one_of("padding_side", side, ("left", "right"))
    return side


def get_tokens_with_bos_removed(
    tokenizer: Any, tokens: Int[Tensor, "batch pos"], padding_side: str | None = None
) -> Int[Tensor, "batch pos_minus_1"]:
    """Remove the first token of each row, wherever the padding is.

    >>> get_tokens_with_bos_removed(bridge.tokenizer, torch.tensor([[1, 5, 6]]))
    tensor([[5, 6]])
    """
    a_tensor("tokens", tokens)
    side = _side(tokenizer, padding_side)
    if side == "right":
        return tokens[..., 1:]
    mask = get_attention_mask(tokenizer, tokens, prepend_bos=True, padding_side=side)
    kept = torch.ones_like(tokens, dtype=torch.bool).scatter(-1, mask.argmax(-1, keepdim=True), False)
    return tokens[kept].view(*tokens.shape[:-1], -1)


def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: Any,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = None,
    set_format: bool = True,
) -> Any:
    """Turn a `datasets` data set of texts into rows of `max_length` tokens: texts joined by EOS, then cut.

    >>> texts = datasets.Dataset.from_dict({"text": ["Mary and John"] * 9})  # doctest: +SKIP
    >>> tokenize_and_concatenate(texts, bridge.tokenizer, max_length=8)[0]["tokens"].shape  # doctest: +SKIP
    torch.Size([8])

    `add_bos_token` starts each row with BOS. Leftover tokens of a batch of texts are dropped. `num_proc` does not work
    with `streaming`. `set_format` gives tensors. Raises `ValueError` if the tokenizer lacks a token that is needed.
    """
    library = sys.modules.get("datasets")  # whoever passes one of its data sets has imported it
    if library is None or not isinstance(dataset, (library.Dataset, library.IterableDataset)):
        raise TypeError(f"dataset: got {in_words(dataset)}, expected a data set of the library `datasets`")
    one_of("column_name", column_name, tuple(dataset.column_names or [column_name]))
    if num_proc is not None:
        num_proc = whole("num_proc", num_proc, 1)
    width = whole("max_length", max_length, 2) - bool(add_bos_token)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None or (add_bos_token and bos is None):
        raise ValueError("tokenize_and_concatenate: the tokenizer needs an EOS token, and a BOS token if that is added")

    def rows(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        texts = tokenizer(batch[column_name], add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.concatenate([[*text, eos] for text in texts])
        cut = ids[: len(ids) // width * width].reshape(-1, width)
        return {"tokens": np.insert(cut, 0, bos, axis=1) if add_bos_token else cut}

    options: dict[str, Any] = {} if streaming else {"num_proc": num_proc}
    made = dataset.map(rows, batched=True, remove_columns=list(dataset.column_names or [column_name]), **options)
    return made.with_format("torch") if set_format else made


def test_prompt(
    prompt: str, answer: str, model: TransformerBridge, prepend_space_to_answer: bool = True, top_k: int = 10
) -> str:
    """Report how well the model predicts `answer` after `prompt`: its rank, its probability and the top tokens.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> print(test_prompt(prompt, "Mary", bridge, top_k=2))
    ' Mary': rank 0, probability 99.99%
      0   99.99%  ' Mary'
      1    0.00%  ' Tom'

    If the answer has several tokens, each is scored given those before it, and so is the whole sequence; the top tokens
    are those right after the prompt. Raises `ValueError` for an empty answer, `TypeError` for several answers.
    """
    if not callable(getattr(model, "to_answer_tokens", None)):
        raise TypeError(f"model: got {in_words(model)}, expected a TransformerBridge")
    for what, given in (("prompt", prompt), ("answer", answer)):
        a_text(what, given)
    top_k = whole("top_k", top_k, 1)
    answer = " " + answer if prepend_space_to_answer and not answer.startswith(" ") else answer
    ids = model.to_answer_tokens(answer)
    tokens = model.to_tokens(prompt)
    with torch.no_grad():
        both = torch.cat([tokens, tokens.new_tensor([ids])], dim=1)
        logits = model(both, attention_mask=torch.ones_like(both))[0, tokens.shape[1] - 1 : -1].float()
    each = logits.log_softmax(-1)
    chances = each[torch.arange(len(ids)), ids]
    ranks = (each > chances[:, None]).sum(-1).tolist()
    texts = [repr(answer)] if len(ids) == 1 else [*map(repr, model.to_str_tokens(ids))]
    lines = [
        f"{text}: rank {rank}, probability {chance:.2%}"
        for text, rank, chance in zip(texts, ranks, chances.exp().tolist(), strict=True)
    ]
    if len(ids) > 1:
        lines.append(f"{answer!r}: {len(ids)} tokens, probability of all of them {float(chances.sum().exp()):.2%}")
    best = each[0].exp().topk(min(top_k, each.shape[-1]))
    words = model.to_str_tokens(best.indices)
    for place, (probability, word) in enumerate(zip(best.values.tolist(), words, strict=True)):
        lines.append(f"{place:3d}  {probability:7.2%}  {word!r}")
    return "\n".join(lines)


test_prompt.__test__ = False  # type: ignore[attr-defined]  # pytest collects by name
