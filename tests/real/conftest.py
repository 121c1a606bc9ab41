"""The two models of `make real`, each loaded once, and prompts about who gets the drink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.data.generate import name_pairs

TEMPLATE = "When {} and {} went to the store, {} gave a drink to"


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    return TransformerBridge.boot_transformers("smollm2")


@pytest.fixture(scope="session")
def gemma() -> TransformerBridge:
    return TransformerBridge.boot_transformers("gemma-3-270m")


@dataclass(frozen=True)
class IndirectObject:
    """Prompts in pairs that differ in one word, who is named again: each one's neighbour is its corrupted version."""

    tokens: Tensor
    corrupted: Tensor
    answers: Tensor
    subjects: Tensor

    @classmethod
    def of(cls, bridge: TransformerBridge, pairs: int = 4) -> IndirectObject:
        rows = [(a, b, subject) for a, b in name_pairs(held_out=True)[:pairs] for subject in (b, a)]
        tokens = bridge.to_tokens([TEMPLATE.format(*row) for row in rows])
        subjects = torch.tensor([bridge.to_single_token(f" {subject}") for *_, subject in rows])
        return cls(tokens, neighbours(tokens), neighbours(subjects), subjects)

    def difference(self, logits: Tensor) -> Any:
        """How far the answer's logit is above the subject's, mean over the prompts."""
        each = torch.arange(len(self.tokens))
        return (logits[each, -1, self.answers] - logits[each, -1, self.subjects]).mean()


def neighbours(rows: Tensor) -> Tensor:
    """Rows 0 and 1 exchanged, 2 and 3, and so on."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
