"""What one port costs a forward: hooks that are attached already, and hooks attached for one run.

    python docs/decisions/evidence/port_cost.py

One thread, alternating runs, medians of processor time, on 24 layers of `hook_resid_post`.
"""

# ruff: noqa: T201

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import FalconConfig, FalconForCausalLM

from transformer_lens.model_bridge import TransformerBridge


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = FalconConfig(hidden_size=64, num_attention_heads=8, num_hidden_layers=24, vocab_size=512)
    model = FalconForCausalLM(config).eval()
    ids = torch.randint(3, 512, (1, 16))
    bridge = TransformerBridge(model)
    names = [f"blocks.{i}.hook_resid_post" for i in range(24)]
    nothing: list[Any] = [(name, lambda tensor, hook: None) for name in names]

    def attached() -> float:
        with bridge.hooks(nothing):
            return seconds(lambda: bridge(ids))

    runs: dict[str, Callable[[], float]] = {
        "nothing hooked": lambda: seconds(lambda: bridge(ids)),
        "24 user hooks, attached before": attached,
        "24 user hooks for one run": lambda: seconds(lambda: bridge.run_with_hooks(ids, fwd_hooks=nothing)),
        "24 captures in one run": lambda: seconds(lambda: bridge.run_with_cache(ids, names_filter=names)),
    }
    times: dict[str, list[float]] = {what: [] for what in runs}
    with torch.no_grad():
        for _ in range(300):
            for what, run in runs.items():
                times[what].append(run())
    medians = {what: statistics.median(seen) * 1e6 for what, seen in times.items()}
    for what, median in medians.items():
        extra = (median - medians["nothing hooked"]) / len(names)
        print(f"{what}: {median:.0f} microseconds, {extra:.1f} for each port")


if __name__ == "__main__":
    main()
