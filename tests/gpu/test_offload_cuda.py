"""What only a GPU can show: layers on a GPU, in the CPU's memory and on disk, or on several GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor

from tests.support import FAMILIES, family
from tests.support import tokens as token_ids
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.access.weights import read_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; run `make gpu` on one"),
]
TOLERANCE = 1e-3
"""Of the largest value: float32 on a GPU beside float32 on a CPU."""
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def dispatched(name: str, layers: list[Any], folder: Path) -> tuple[TransformerBridge, TransformerBridge]:
    """The same model on the CPU, and with its ends on GPU 0 and its layers as named."""
    plain, there = family(name), family(name)
    there.load_state_dict(plain.state_dict())
    base = there.base_model_prefix
    blocks = "h" if base == "transformer" else "layers"
    places: dict[str, Any] = {f"{base}.{n}": 0 for n, _ in there.base_model.named_children() if n != blocks}
    places |= {"lm_head": 0} | {f"{base}.{blocks}.{i}": place for i, place in enumerate(layers)}
    return TransformerBridge(plain), TransformerBridge(dispatch_model(there, places, offload_dir=str(folder)))


def compare(plain: TransformerBridge, there: TransformerBridge) -> None:
    ids = token_ids()
    floats = [name for name, point in plain.hook_dict.items() if not point.integer]

    def close(got: Tensor, expected: Tensor, what: str) -> None:
        scale = float(expected.abs().clamp(max=1e4).max())
        assert float((got.cpu() - expected).abs().max()) <= TOLERANCE * max(scale, 1.0), what

    with torch.no_grad():
        _, want = plain.run_with_cache(ids, names_filter=lambda name: True)
        _, got = there.run_with_cache(ids, names_filter=lambda name: True)
        for name in floats:
            close(got[name], want[name], name)
            hooks = [(name, lambda value, hook: value * 1.25)]
            expected = plain.run_with_hooks(ids, fwd_hooks=hooks)
            close(there.run_with_hooks(ids, fwd_hooks=hooks), expected, f"edited at {name}")


@pytest.mark.parametrize("layers", [[0, "cpu"], ["cpu", "disk"]], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_on_a_gpu_in_memory_and_on_disk(name: str, layers: list[Any], tmp_path: Path) -> None:
    plain, there = dispatched(name, layers, tmp_path)
    compare(plain, there)
    norm = there.blocks[1].ln1.original_component  # type: ignore[index]
    assert norm.weight.is_meta and read_weight(norm).device.type == "cuda"


@several
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_on_two_gpus(name: str, tmp_path: Path) -> None:
    compare(*dispatched(name, [0, 1], tmp_path))
