"""The rows of the budget table about compiled runners can be measured, in small and without kernels."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import compiled_rows, gpu
from benchmarks.budgets import Place, Subject
from benchmarks.models import make_config, make_model
from benchmarks.timing import Effort

BUDGETS = {"compiled_inside": None, "batch_edited": 1.05}


@pytest.mark.parametrize("key", compiled_rows.COMPILED_ROWS)
def test_every_row_can_be_measured(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_rows, "BACKEND", "eager")
    once = Effort(min_pairs=1, min_seconds=0.0, max_pairs=1, warm_up=0)
    place = Place(torch.device("cpu"), torch.float32, once, long_tokens=8, new_tokens=2)
    family = "mixtral" if key == "batch_edited" else "falcon"
    config = make_config(family, "tiny", num_hidden_layers=2)
    subject = Subject(f"{family} tiny", make_model(config, place.device), place, "tiny")
    torch._dynamo.reset()
    with torch.no_grad():
        row = compiled_rows.COMPILED_ROWS[key](subject)
    assert (row.key, row.model, row.budget) == (key, f"{family} tiny", BUDGETS.get(key, 1.03))
    if key.startswith(("compiled_nothing", "compiled_read")):
        assert row.detail["logits_equal"]
    json.dumps(row.to_dict(), allow_nan=False)
    subject.bridge.detach()
    torch._dynamo.reset()


def test_the_script_for_a_gpu_walks_its_rows_and_names_those_it_has_no_time_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("BACKEND", "MODE"):  # which the script sets
        monkeypatch.setattr(compiled_rows, name, getattr(compiled_rows, name))
    first = dict(list(compiled_rows.COMPILED_ROWS.items())[:1])
    monkeypatch.setattr(compiled_rows, "COMPILED_ROWS", first)
    monkeypatch.setattr(gpu, "FAMILIES", ("falcon",))
    once = Effort(min_pairs=1, min_seconds=0.0, max_pairs=1, warm_up=0)
    place = Place(torch.device("cpu"), torch.float32, once, long_tokens=8, new_tokens=2)
    rows, left = gpu.compiled(place, "tiny", dry_run=True)
    assert [row.key for row in rows] == ["compiled_nothing"] and left == []
    monkeypatch.setattr(gpu, "COMPILED_SECONDS", -1)
    assert gpu.compiled(place, "tiny", dry_run=True) == ([], ["compiled_nothing of falcon"])
    torch._dynamo.reset()
