"""Small helpers that analysis code expects beside the bridge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens.checks import a_tensor, a_text, in_words, is_tensor, whole
from transformer_lens.hook_names import get_act_name
from transformer_lens.model_bridge.padding import checked_mask
from transformer_lens.slicing import Slice, SliceInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge

__all__ = ["Slice", "SliceInput", "get_act_name", "get_device", "lm_cross_entropy_loss", "test_prompt", "to_numpy"]


def lm_cross_entropy_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "#batch pos"] | Bool[Tensor, "#batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos_minus_1"]:
    """Next-token cross entropy in nats, computed in float32.

    >>> lm_cross_entropy_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
    tensor(1.3863)

    A prediction counts where both its own token and the next one are unmasked; a mask `[1, pos]` holds for every
    text. `per_token` gives one value per prediction, zero where it does not count. Raises `ValueError` if none counts,
    and for shapes that do not fit.
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
    losses = -log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
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
    """A NumPy array of anything that holds numbers; bfloat16, which NumPy has not, becomes float32.

    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16))
    array([1., 1.], dtype=float32)
    """
    if isinstance(tensor, Tensor):
        tensor = a_tensor("to_numpy", tensor).detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    try:
        array = np.asarray(tensor)
    except ValueError as error:
        raise TypeError(f"to_numpy: got {in_words(tensor)}, expected rows of one length") from error
    if array.dtype.kind not in "biufc":
        raise TypeError(f"to_numpy: got {in_words(tensor)}, expected numbers")
    return array


def get_device() -> torch.device:
    """The accelerator PyTorch has, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def test_prompt(
    prompt: str, answer: str, model: TransformerBridge, prepend_space_to_answer: bool = True, top_k: int = 10
) -> str:
    """How well the model expects `answer` after `prompt`: rank, probability, and the likeliest tokens, as text.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> print(test_prompt(prompt, "Mary", bridge, top_k=2))
    ' Mary': rank 0, probability 99.99%
      0   99.99%  ' Mary'
      1    0.00%  ' Tom'

    An answer of several tokens is scored as a sequence: each token after the prompt and those before it, and the
    probability of them all. The likeliest tokens are those after the prompt. Raises `ValueError` for an empty answer
    and `TypeError` for several.
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
