"""How far a lens is from the model: divergence and loss at each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens.analysis.arguments import checked
from transformer_lens.checks import in_words
from transformer_lens.text_table import Tabular, TextTable


@checked
def divergence(
    log_probs: Float[Tensor, "token d_vocab"], logits: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """KL(p || q) of each token in nats: the sum of p (log p - log q), where p is given by its log-probabilities and q
    by logits.

    >>> divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log())
    tensor([0.1438])
    """
    if logits.shape != log_probs.shape or not logits.is_floating_point() or not log_probs.is_floating_point():
        raise ValueError(f"logits: got {in_words(logits)}, expected those of log_probs, {in_words(log_probs)}")
    return (log_probs.exp() * (log_probs - logits.log_softmax(-1))).sum(-1)


@checked
def next_token_loss(
    logits: Float[Tensor, "token d_vocab"], following: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """The cross-entropy of each token's prediction with the token that follows, in nats; zero where none does (-1).

    >>> next_token_loss(torch.zeros(2, 4), torch.tensor([3, -1]))
    tensor([1.3863, 0.0000])
    """
    if following.is_floating_point() or following.shape != logits.shape[:-1]:
        raise ValueError(
            f"following: got {in_words(following)}, expected the token ids that follow, {list(logits.shape[:-1])}"
        )
    return torch.nn.functional.cross_entropy(logits, following, ignore_index=-1, reduction="none")


@dataclass(frozen=True, eq=False, repr=False)
class LensScores(Tabular):
    """Each layer's prediction under a tuned lens and under the logit lens. The last row is the model itself.

    >>> zeros = torch.zeros(2)
    >>> print(LensScores(zeros, zeros + 1, zeros + 2, zeros + 3))
    Nats per token: divergence from the model's prediction, and loss on the next token
    stream  KL    KL, logit lens  loss  loss, logit lens
    0_pre   0.00  1.00            2.00  3.00
    final   0.00  1.00            2.00  3.00
    """

    kl: Float[Tensor, " component"]
    kl_logit_lens: Float[Tensor, " component"]
    cross_entropy: Float[Tensor, " component"]
    cross_entropy_logit_lens: Float[Tensor, " component"]

    def table(self) -> TextTable:
        """The scores as a table."""
        columns = (self.kl, self.kl_logit_lens, self.cross_entropy, self.cross_entropy_logit_lens)
        labels = [*(f"{i}_pre" for i in range(len(self.kl) - 1)), "final"]
        rows = [[label, *(f"{float(column[i]):z.2f}" for column in columns)] for i, label in enumerate(labels)]
        title = "Nats per token: divergence from the model's prediction, and loss on the next token"
        return TextTable(title, ["stream", "KL", "KL, logit lens", "loss", "loss, logit lens"], rows)

    def __repr__(self) -> str:
        return f"LensScores of {len(self.kl) - 1} layers; print it for a table"
