"""What `prepare_model` costs Falcon: one copy of [batch pos d_model] per layer.

    python docs/decisions/evidence/prepare_cost.py

One thread, medians of processor time over alternating runs of one model: bare, prepared, and bare again, whose
ratio to bare is the noise.
"""

# ruff: noqa: T201

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import FalconConfig, FalconForCausalLM

from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 512},
    "100M": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 36864},
}
INPUTS = {"128 tokens": 128, "one token": 1}


def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Processor time of one forward."""
    start = time.process_time()
    model(ids)
    return time.process_time() - start


def measure(model: torch.nn.Module, ids: torch.Tensor, rounds: int) -> tuple[float, float, float, bool]:
    """Medians bare, prepared and bare again, and whether the logits are bitwise equal."""
    bare: list[float] = []
    prepared: list[float] = []
    again: list[float] = []
    expected = model(ids).logits
    equal = True
    for _ in range(rounds):
        bare.append(seconds(model, ids))
        preparation = FalconArchitectureAdapter.prepare_model(model)
        prepared.append(seconds(model, ids))
        if equal:
            equal = torch.equal(model(ids).logits, expected)
        preparation.undo()
        again.append(seconds(model, ids))
    return statistics.median(bare), statistics.median(prepared), statistics.median(again), equal


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")
    for name, shape in SHAPES.items():
        model = FalconForCausalLM(FalconConfig(**shape)).eval()
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        for what, length in INPUTS.items():
            rounds = 300 if name == "small" else 40
            ids = torch.randint(3, shape["vocab_size"], (1, length))
            with torch.no_grad():
                bare, prepared, again, equal = measure(model, ids, rounds)
            print(
                f"{name} ({millions:.1f}M), {what}: bare {bare * 1e3:.2f} ms, prepared {prepared * 1e3:.2f} ms, "
                f"ratio {prepared / bare:.3f} (bare again {again / bare:.3f}), bitwise equal {equal}"
            )


if __name__ == "__main__":
    main()
