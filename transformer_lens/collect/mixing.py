"""Random batches of tokens out of a bounded buffer, which is filled up as they are taken."""

from collections.abc import Iterator

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


class Coming:
    """A stream of token runs, taken in portions of any size; `rest` is what is left of the last run."""

    def __init__(self, runs: Iterator[Rows], rest: Rows | None = None) -> None:
        self._runs = runs
        self.rest = rest or {}

    def take(self, tokens: int) -> Rows:
        """The next tokens: fewer at the end, and none after it."""
        parts = []
        while tokens and self._some():
            parts.append(at(self.rest, slice(tokens)))
            self.rest = at(self.rest, slice(tokens, None))
            tokens -= count(parts[-1])
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _some(self) -> bool:
        """Whether tokens are left; a run may hold none."""
        while not count(self.rest):
            following = next(self._runs, None)
            if following is None:
                return False
            self.rest = following
        return True


class Mixer:
    """Takes random batches out of a buffer of `size` tokens, which is full until nothing comes any more."""

    def __init__(self, coming: Coming, size: int, batch_size: int, random: np.random.Generator) -> None:
        self.coming, self.random = coming, random
        self.size, self.batch_size = size, batch_size
        self.buffer: Rows = {}
        self.filled = 0

    def __iter__(self) -> Iterator[Rows]:
        while batch := self.take():
            yield batch

    def take(self) -> Rows:
        """The next batch: smaller at the end, and empty after it."""
        # A run at a time: until it is copied, what was taken keeps its place mapped.
        while self.filled < self.size and (some := self.coming.take(min(RUN, self.size - self.filled))):
            self.put(some)
        if not self.filled:
            return {}
        places = self.random.choice(self.filled, min(self.batch_size, self.filled), replace=False)
        batch = at(self.buffer, torch.from_numpy(places))
        self._close(places)
        return batch

    def put(self, some: Rows) -> None:
        """Copy tokens behind those that are in the buffer."""
        end = self.filled + count(some)
        for name, values in some.items():
            if name not in self.buffer:
                self.buffer[name] = values.new_empty(self.size, *values.shape[1:])
            self.buffer[name][self.filled : end] = values
        self.filled = end

    def _close(self, taken: np.ndarray) -> None:
        """Move the last tokens into the places of those that were taken."""
        left = self.filled - len(taken)
        last = torch.from_numpy(np.setdiff1d(np.arange(left, self.filled), taken))
        free = torch.from_numpy(taken[taken < left])
        for values in self.buffer.values():
            values[free] = values[last]
        self.filled = left
