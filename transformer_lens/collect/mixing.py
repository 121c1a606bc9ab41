"""Random batches of tokens out of a bounded buffer, which is filled up as they are taken."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Tensors [token, ...] of the same tokens, by name."""
RUN = 256  # tokens that are read together: enough for an efficient disk read, few compared with any buffer


def count(rows: Rows) -> int:
    """How many tokens these are."""
    return len(next(iter(rows.values()))) if rows else 0


def at(rows: Rows, index: slice | Tensor) -> Rows:
    return {name: values[index] for name, values in rows.items()}


@dataclass
class Mixer:
    """Takes batches out of runs of tokens: random ones, out of a buffer of `size` tokens that is full until nothing
    comes any more, or, without `shuffle`, in the order of the runs.
    """

    runs: Iterator[Rows]
    size: int
    batch_size: int
    random: np.random.Generator
    shuffle: bool
    rest: Rows = field(default_factory=dict)  # what is left of the last run
    buffer: Rows = field(default_factory=dict)
    filled: int = 0

    def __iter__(self) -> Iterator[Rows]:
        while batch := self.take():
            yield batch

    def take(self) -> Rows:
        """The next batch: smaller at the end, and empty after it."""
        if not self.shuffle:
            return self._coming(self.batch_size)
        # A run at a time: until it is copied, what was taken keeps its place mapped.
        while self.filled < self.size and (some := self._coming(min(RUN, self.size - self.filled))):
            self.put(some)
        if not self.filled:
            return {}
        taken = self.random.choice(self.filled, min(self.batch_size, self.filled), replace=False)
        batch = at(self.buffer, torch.from_numpy(taken))
        # The last tokens move into the places of those that were taken.
        left = self.filled - len(taken)
        last = torch.from_numpy(np.setdiff1d(np.arange(left, self.filled), taken))
        free = torch.from_numpy(taken[taken < left])
        for values in self.buffer.values():
            values[free] = values[last]
        self.filled = left
        return batch

    def _coming(self, tokens: int) -> Rows:
        """The next tokens of the runs: fewer at the end, and none after it."""
        parts = []
        while tokens:
            if count(self.rest):
                parts.append(at(self.rest, slice(tokens)))
                self.rest = at(self.rest, slice(tokens, None))
                tokens -= count(parts[-1])
            elif (following := next(self.runs, None)) is not None:  # a run may hold none
                self.rest = following
            else:
                break
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def put(self, some: Rows) -> None:
        """Copy tokens behind those that are in the buffer."""
        end = self.filled + count(some)
        for name, values in some.items():
            if name not in self.buffer:
                self.buffer[name] = values.new_empty(self.size, *values.shape[1:])
            self.buffer[name][self.filled : end] = values
        self.filled = end
