"""Timing two ways of doing the same work, turn and turn about in one process.

A ratio is taken pair by pair, so that what slows the machine down for a while slows both sides; what
is reported is the median of the pairs and the spread between their quartiles.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

Work = Callable[[], Any]


@dataclass(frozen=True)
class Figure:
    """The median of some samples and their quartiles."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figure:
        """Summarise samples; a single one is its own spread.

        >>> Figure.of([3.0, 1.0, 2.0])
        Figure(median=2.0, low=1.5, high=2.5, samples=3)
        """
        if not samples:
            raise ValueError("Figure.of: got no samples, expected at least one")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, low, high, len(samples))

    def to_dict(self) -> dict[str, float]:
        """The figure as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two ways timed in pairs: their seconds, and the second's over the first's."""

    bare: Figure
    other: Figure
    ratio: Figure
    difference: Figure


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `min_pairs` and `min_seconds`, at most `max_pairs`."""

    min_pairs: int = 9
    min_seconds: float = 4.0
    max_pairs: int = 200
    warm_up: int = 2

    def done(self, pairs: int, seconds: float) -> bool:
        """Whether this many pairs in this much time are enough."""
        return pairs >= self.max_pairs or (pairs >= self.min_pairs and seconds >= self.min_seconds)


QUICK = Effort(min_pairs=3, min_seconds=0.0, max_pairs=3, warm_up=1)
"""For trying the harness out; its figures mean little."""


def prepare_device(device: torch.device, threads: int = 2) -> None:
    """Fix what would otherwise differ between runs: on a CPU, the number of threads."""
    if device.type == "cpu":
        torch.set_num_threads(threads)


def synchronize(device: torch.device) -> None:
    """Wait for the device, whose kernels run on after Python has gone past them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def collector_off() -> Iterator[None]:
    """Keep the garbage collector from running inside a sample."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def timed(work: Work, device: torch.device) -> float:
    """Seconds of wall-clock time for one call, the device's kernels included.

    CUDA events would leave out the time in which the GPU waits for Python, and that is the time hooks cost.
    """
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    seconds = time.perf_counter() - start
    del result
    return seconds


def compare(
    bare: Work, other: Work, device: torch.device, effort: Effort | None = None, setup: Work | None = None
) -> Comparison:
    """Time two ways of doing the same in pairs A B, B A, A B, ...; `setup` runs before each, untimed.

    >>> compare(lambda: time.sleep(0.001), lambda: time.sleep(0.002), torch.device("cpu")).ratio.median
    1.9
    """
    effort = effort or Effort()
    ways = (bare, other)
    pairs: list[tuple[float, float]] = []
    for _ in range(effort.warm_up):
        for way in ways:
            _one(way, device, setup)
    begin = time.perf_counter()
    with collector_off():
        while not effort.done(len(pairs), time.perf_counter() - begin):
            if len(pairs) % 2:  # the second of a pair finds warmer caches: take turns
                late = _one(other, device, setup)
                pairs.append((_one(bare, device, setup), late))
            else:
                early = _one(bare, device, setup)
                pairs.append((early, _one(other, device, setup)))
            gc.collect(0)
    return Comparison(
        bare=Figure.of([a for a, _ in pairs]),
        other=Figure.of([b for _, b in pairs]),
        ratio=Figure.of([b / a for a, b in pairs]),
        difference=Figure.of([b - a for a, b in pairs]),
    )


def _one(work: Work, device: torch.device, setup: Work | None) -> float:
    if setup is not None:
        setup()
    return timed(work, device)


def live_tensor_bytes(device: torch.device) -> int:
    """Bytes of every tensor that is alive on a device, each storage counted once.

    On CUDA the allocator knows, tensors held by no Python object included.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.memory_allocated(device)
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        # What torch.compile leaves behind are tensors without memory, of classes of their own.
        if type(thing) not in (torch.Tensor, nn.Parameter):
            continue
        if thing.device == device and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
