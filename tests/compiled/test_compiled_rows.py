"""The rows of the budget table about compiled runners can be measured, in small and without kernels."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import compiled_rows
from benchmarks.budgets import Place, Subject
from benchmarks.models import make_config, make_model
from benchmarks.timing import Effort


@pytest.mark.parametrize("key", compiled_rows.COMPILED_ROWS)
def test_every_row_can_be_measured(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_rows, "BACKEND", "eager")
    once = Effort(min_pairs=1, min_seconds=0.0, max_pairs=1, warm_up=0)
    place = Place(torch.device("cpu"), torch.float32, once, long_tokens=8, new_tokens=2)
    config = make_config("falcon", "tiny", num_hidden_layers=2)
    subject = Subject("falcon tiny", make_model(config, place.device), place, "tiny")
    torch._dynamo.reset()
    with torch.no_grad():
        row = compiled_rows.COMPILED_ROWS[key](subject)
    assert (row.key, row.model, row.budget) == (key, "falcon tiny", 1.03)
    if key not in ("compiled_steered", "compiled_decode"):
        assert row.detail["logits_equal"]
    json.dumps(row.to_dict(), allow_nan=False)
    subject.bridge.detach()
    torch._dynamo.reset()
