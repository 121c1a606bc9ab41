"""`collect(compiled=True)` against the same job run eagerly."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import _dynamo as dynamo

from tests.compiled.test_compiled_runner import small
from tests.support import VOCAB, torch_hooks
from transformer_lens.collect import collect

NAMES = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_rot_k", "blocks.1.mlp.hook_post"]
OPTIONS: dict[str, Any] = {"context_size": 8, "batch_size": 3, "shard_tokens": 48, "progress": False}


@pytest.fixture(autouse=True)
def _eager_graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without kernels, which these tests are not about."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, **options, backend="eager"))
    dynamo.reset()
    yield
    dynamo.reset()


def documents() -> list[list[int]]:
    return [torch.randint(3, VOCAB, (length,)).tolist() for length in (9, 30, 4, 17, 25, 6, 11, 2, 40)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_the_store_is_that_of_an_eager_job(name: str, packing: bool, tmp_path: Path) -> None:
    bridge, data = small(name), documents()
    eager = collect(bridge, data, NAMES, tmp_path / "eager", packing=packing, **OPTIONS)
    counted = dynamo.utils.counters["stats"]["unique_graphs"]
    with dynamo.config.patch(error_on_recompile=True):
        store = collect(bridge, data, NAMES, tmp_path / "compiled", packing=packing, compiled=True, **OPTIONS)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1
    assert len(files(tmp_path / "compiled")) > 2
    for hook in NAMES:
        got, expected = torch.as_tensor(store[hook][:]), torch.as_tensor(eager[hook][:])
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert torch_hooks(bridge.original_model) == 0 and bridge.attachment.runners == []


def test_a_job_resumes_with_the_same_bytes_and_is_not_mixed_with_an_eager_one(tmp_path: Path) -> None:
    bridge, data = small("7b"), documents()
    whole, part = tmp_path / "whole", tmp_path / "part"
    collect(bridge, data, NAMES[:1], whole, compiled=True, **OPTIONS)
    shutil.copytree(whole, part)
    lost = sorted(part.glob("*.safetensors"))[1]
    lost.unlink()
    dynamo.reset()
    collect(bridge, data, NAMES[:1], part, compiled=True, **OPTIONS)
    assert files(part) == files(whole)
    with pytest.raises(ValueError, match="compiled"):
        collect(bridge, data, NAMES[:1], whole, **OPTIONS)


def test_what_no_graph_shows_and_python_hooks_are_refused(tmp_path: Path) -> None:
    bridge = small("7b")
    with pytest.raises(ValueError, match="no graph can show it; declare hook_resid_pre or attn.hook_q"):
        collect(bridge, documents(), "blocks.0.hook_q_input", tmp_path / "one", compiled=True, **OPTIONS)
    looking = bridge.hooks([("blocks.0.hook_resid_pre", lambda value, hook: None)])
    with looking, pytest.raises(ValueError, match="Python hooks are on the model; take them off"):
        collect(bridge, documents(), NAMES[:1], tmp_path / "two", compiled=True, **OPTIONS)
    assert torch_hooks(bridge.original_model) == 0
