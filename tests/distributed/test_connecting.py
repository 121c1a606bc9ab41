"""What `connect` takes up, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.faults import FaultySpan, Schedule
from transformer_lens.distributed import AutoDistributedModelForCausalLM, LocalSpan, StaticSpans

TOKENS = torch.tensor([[1, 5, 7]])


def test_connecting_anew_forgets_who_failed() -> None:
    """Whoever mends a server and connects to it again does not wait for its ban to end."""
    local = LocalSpan("tiny-falcon", range(0, 4))
    spans = [FaultySpan(local, "first", Schedule({0: "dies_before"})), FaultySpan(local, "second")]
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=StaticSpans(spans))
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert list(model.route.health.banned()) == ["first"]
        mended = StaticSpans([FaultySpan(local, "first")])
        model.connect(mended)
        assert model.route.health.banned() == {}
        assert torch.equal(model(TOKENS).logits, expected)


def test_a_connection_that_does_not_fit_changes_nothing() -> None:
    local = LocalSpan("tiny-falcon", range(0, 4))
    spans = [FaultySpan(local, "first", Schedule({0: "dies_before"})), FaultySpan(local, "second")]
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=StaticSpans(spans))
    with torch.no_grad():
        expected = model(TOKENS).logits
        with pytest.raises(ValueError, match=r"no span has the blocks \[0, 1\]"):
            model.connect([LocalSpan("tiny-falcon", range(2, 4))])
        assert list(model.route.health.banned()) == ["first"]
        assert torch.equal(model(TOKENS).logits, expected)
