"""`bridge.verify()` on every layout: hooks inside modules, equations, every hook, under both attention kinds."""

from itertools import product
from typing import Any

import pytest
import torch

from tests.equivalence.grid import EXPERTS, SPELLINGS, Case, falcon_cases, layout_of, wrap
from tests.support import mixtral, tokens
from transformer_lens import TransformerBridge


def falcons() -> list[Any]:
    """Every layout under one kind of attention; `test_exactness.py` holds the values under each to an oracle."""
    found = []
    for case in falcon_cases(dtypes=("fp32",)):
        number = list(SPELLINGS).index(layout_of(case.values[0].changes))
        other = case.values[0].attn != ("sdpa", "eager")[(number // 4 + number) % 2]
        found.append(pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] if other else case.marks))
    return found


@pytest.mark.parametrize("case", falcons())
def test_every_falcon_layout(case: Case) -> None:
    report = wrap(case.model()).verify(tokens(2, 5))
    assert report.passed, str(report)


def mixtrals() -> list[Any]:
    """Every shape and implementation of the experts, with attention's kinds in turn: experts know nothing of those."""
    found = []
    attentions = list(product(["sdpa", "eager"], [None, 3]))
    for number, (shape, experts) in enumerate(product([(1, 1), (2, 1), (4, 2), (8, 3)], EXPERTS)):
        for other, (attn, window) in enumerate(attentions):
            marks = [] if other == number % 4 else [pytest.mark.slow]
            found.append(pytest.param(shape, experts, attn, window, marks=marks))
    return found


@pytest.mark.parametrize("shape, experts, attn, window", mixtrals(), ids=str)
def test_mixtral_shapes(shape: tuple[int, int], experts: str, attn: str, window: int | None) -> None:
    n_experts, chosen = shape
    changes = {"num_local_experts": n_experts, "num_experts_per_tok": chosen, "sliding_window": window}
    bridge = TransformerBridge(mixtral(attn, experts, torch.float32, **changes))
    report = bridge.verify(tokens(2, 5))
    assert report.passed, str(report)
