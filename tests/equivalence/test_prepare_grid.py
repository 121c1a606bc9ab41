"""`prepare_model` over every runnable Falcon: outputs and parameters' gradients are those of the unprepared model."""

from __future__ import annotations

import pytest
import torch

from tests.equivalence.grid import Case, falcon_cases
from tests.support import tokens
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter


@pytest.mark.parametrize("case", falcon_cases())
def test_outputs_and_gradients_are_bitwise_the_unprepared_ones(case: Case) -> None:
    model, ids = case.model(), tokens()
    bare = model(ids)
    bare.logits.float().square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    preparation = FalconArchitectureAdapter.prepare_model(model)
    prepared = model(ids)
    assert torch.equal(prepared.logits, bare.logits)
    prepared.logits.float().square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    preparation.undo()
    assert torch.equal(model(ids).logits, bare.logits)
