"""`bridge.verify()` over blocks in another process: the checks that make sense there, and what they find."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, LocalSpan
from transformer_lens.distributed.client import models

ABSENT = ["z @ W_O", "experts", "inside", "static cache"]


@pytest.fixture(params=["tiny-falcon", "tiny-mixtral"])
def remote(request: pytest.FixtureRequest) -> Iterator[TransformerBridge]:
    """A shipped model, its blocks in two spans."""
    layers = TransformerBridge.boot_transformers(request.param).cfg.n_layers
    spans = [LocalSpan(request.param, range(0, 2)), LocalSpan(request.param, range(2, layers))]
    yield TransformerBridge(AutoDistributedModelForCausalLM.from_pretrained(request.param, spans=spans))
    for span in spans:
        span.close()


def test_remote_models_pass(remote: TransformerBridge) -> None:
    report = remote.verify()
    assert report.passed, report
    assert list(report.not_applicable) == ABSENT
    assert report.without_results() == []
    for check in ("fires", "shape", "kept", "noise", "left padding"):
        assert {r.hook for r in report.results if r.check == check} == set(remote.hook_dict)
    writes = {r.hook for r in report.results if r.check == "writing"}
    assert writes == {f"blocks.{layer}.attn.hook_z" for layer in range(remote.cfg.n_layers)}
    assert json.loads(report.to_json())["not_applicable"] == dict(report.not_applicable)


def test_steps_without_their_past_fail(remote: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the cache goes by another name, and every call reads \"no cache\"."""
    monkeypatch.setattr(models, "remote_text", lambda cache, route, n_layers: None)
    failures = remote.verify().failures()
    assert {"decoding", "writing", "generation"} <= {failure.check for failure in failures}
    assert "blocks.0.attn.hook_pattern" in {failure.hook for failure in failures}
