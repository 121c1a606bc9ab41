"""The rows about collecting: `bridge.collect` beside the bare forward stopped at the same layer, and reading it back.

python -m benchmarks.bench --row collect read_batches --size 100m
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.budgets import Row, Subject
from benchmarks.models import random_tokens
from benchmarks.timing import Figure, timed

CONTEXT, BATCH, BATCHES = 256, 4, 2
SLOWER = 1 / 0.9
"""At least 0.9 times the tokens per second of the bare forward."""
READ_TOKENS, READ_BATCH = 65536, 4096


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="bench-collect-"))


def collecting(subject: Subject) -> Row:
    """Every kind of cost: planning, capturing, casting to bfloat16, writing, fsync, checksums."""
    bridge = subject.bridge
    tokens = random_tokens(subject.config, CONTEXT, subject.place.device, batch=BATCH * BATCHES)
    layer = max(1, bridge.cfg.n_layers // 2)
    name = f"blocks.{layer - 1}.hook_resid_post"
    options: dict[str, Any] = {"context_size": CONTEXT, "batch_size": BATCH, "shard_tokens": 2 * BATCH * CONTEXT}
    folders: list[Path] = []

    def bare() -> None:
        for batch in tokens.split(BATCH):
            bridge(batch, stop_at_layer=layer)

    def collect() -> None:
        folders.append(_folder())
        bridge.collect(tokens, name, folders[-1], dtype=torch.bfloat16, progress=False, **options)

    def clear() -> None:
        while folders:
            shutil.rmtree(folders.pop())

    found = subject.compare(bare, collect, setup=clear)
    clear()
    rate = tokens.numel() / found.other.median
    what = f"collecting one resid_post as bfloat16, {tokens.numel()} tokens / bare forward stopped at that layer"
    # A tiny model computes faster than files are made; the budget is for models that people collect from.
    budget = SLOWER if subject.size != "tiny" else None
    return subject.ratio_row(
        "collect", what, found, budget, tokens_per_second=rate, of_the_bare_rate=1 / found.ratio.median
    )


def read_batches(subject: Subject) -> Row:
    """Shuffled batches of a residual stream out of the page cache, through the buffer."""
    bridge, folder = subject.bridge, _folder()
    tokens = random_tokens(subject.config, CONTEXT, subject.place.device, batch=READ_TOKENS // CONTEXT)
    options: dict[str, Any] = {"context_size": CONTEXT, "batch_size": 16, "dtype": torch.bfloat16, "progress": False}
    store = bridge.collect(tokens, "hook_embed", folder, **options)
    batches = store.batches("hook_embed", READ_BATCH, buffer_tokens=READ_TOKENS // 4)
    width = bridge.cfg.d_model
    encoder = torch.nn.Linear(width, 4 * width)

    def read() -> None:
        for _ in batches:
            pass

    def step() -> None:
        # One step of a small sparse autoencoder's encoder and its transpose, forwards and backwards, on one batch.
        with torch.enable_grad():
            hidden = torch.relu(encoder(torch.ones(READ_BATCH, width)))
            (hidden @ encoder.weight).square().mean().backward()

    repeats = max(3, subject.place.effort.min_pairs)
    seconds = [timed(read, subject.place.device) for _ in range(repeats)]
    trained = [timed(step, subject.place.device) / READ_BATCH for _ in range(3)]
    shutil.rmtree(folder)
    figure = Figure.of([second / len(store) * 1e6 for second in seconds])
    rates = {
        "tokens_per_second": 1e6 / figure.median,
        "megabytes_per_second": 2 * width / figure.median,
        "training_step_tokens_per_second": 1 / Figure.of(trained).median,
    }
    what = f"shuffled batches of {READ_BATCH} tokens of {width} bfloat16 values, per token"
    return subject.row("read_batches", what, figure, "us", None, **rates)


COLLECT_ROWS: Mapping[str, Callable[[Subject], Row]] = {"collect": collecting, "read_batches": read_batches}
