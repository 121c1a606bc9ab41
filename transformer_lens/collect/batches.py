"""Shuffled batches of a store: short runs of tokens are read in random order and mixed in a bounded buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from transformer_lens.checks import whole

if TYPE_CHECKING:
    from transformer_lens.collect.store import ActivationStore

RUN = 256
"""Tokens read together: enough for an efficient disk read, few compared with any buffer."""

Batch = Tensor | dict[str, Tensor]


class ActivationBatches(IterableDataset[Batch]):
    """Batches of a store's tensors, each token once in an epoch; `ActivationStore.batches` makes them.

    The order depends only on `seed`, the epoch and the number of workers. In
    `DataLoader(batches, batch_size=None, num_workers=n)` each worker reads its own part.
    """

    def __init__(
        self,
        store: ActivationStore,
        names: str | list[str],
        batch_size: int,
        shuffle: bool,
        buffer_tokens: int,
        seed: int,
        drop_last: bool,
    ) -> None:
        super().__init__()
        batch_size, seed = whole("batch_size", batch_size, 1), whole("seed", seed, 0)
        buffer_tokens = whole("buffer_tokens", buffer_tokens, 1)
        if shuffle and buffer_tokens < batch_size:
            raise ValueError(f"buffer_tokens: got {buffer_tokens}, expected at least the batch_size, {batch_size}")
        self.store = store
        self.single = isinstance(names, str)
        self.names = [names] if isinstance(names, str) else list(names)
        self.batch_size, self.shuffle, self.buffer_tokens = batch_size, shuffle, buffer_tokens
        self.seed, self.drop_last, self.epoch = seed, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = whole("epoch", epoch, 0)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        runs = np.arange(0, len(self.store), RUN)
        if self.shuffle:
            runs = np.random.default_rng([self.seed, self.epoch]).permutation(runs)
        mine = runs[part::parts]
        chosen = self._mixed(mine, part) if self.shuffle else self._in_order(mine)
        for batch in chosen:
            if len(batch[self.names[0]]) == self.batch_size or not self.drop_last:
                yield batch[self.names[0]] if self.single else batch

    def _read(self, run: int) -> dict[str, Tensor]:
        return {name: self.store[name][run : run + RUN] for name in self.names}

    def _in_order(self, runs: np.ndarray) -> Iterator[dict[str, Tensor]]:
        held = [self._empty(0)]
        for run in runs:
            held.append(self._read(int(run)))
            if sum(len(piece[self.names[0]]) for piece in held) >= self.batch_size:
                joined = {name: torch.cat([piece[name] for piece in held]) for name in self.names}
                whole = len(joined[self.names[0]]) // self.batch_size * self.batch_size
                for start in range(0, whole, self.batch_size):
                    yield {name: values[start : start + self.batch_size] for name, values in joined.items()}
                held = [{name: values[whole:] for name, values in joined.items()}]
        rest = {name: torch.cat([piece[name] for piece in held]) for name in self.names}
        if len(rest[self.names[0]]):
            yield rest

    def _mixed(self, runs: np.ndarray, part: int) -> Iterator[dict[str, Tensor]]:
        """Take a random batch out of the buffer, and refill its places with the next tokens."""
        random = np.random.default_rng([self.seed, self.epoch, part])
        tokens = sum(min(RUN, len(self.store) - int(run)) for run in runs)
        size = min(self.buffer_tokens, tokens)
        buffer, coming = self._empty(size), _Coming(self._read(int(run)) for run in runs)
        coming.put(buffer, np.arange(size))
        left = tokens - size
        while left:
            places = random.choice(size, self.batch_size, replace=False)
            yield self._take(buffer, places)
            filled = places[:left]
            left -= coming.put(buffer, filled)
            if len(filled) < len(places):  # nothing is left to put into the others
                buffer = self._take(buffer, np.setdiff1d(np.arange(size), places[len(filled) :]))
        order = random.permutation(len(buffer[self.names[0]]))
        for start in range(0, len(order), self.batch_size):
            yield self._take(buffer, order[start : start + self.batch_size])

    def _take(self, buffer: dict[str, Tensor], places: np.ndarray) -> dict[str, Tensor]:
        wanted = torch.from_numpy(places)
        return {name: values[wanted] for name, values in buffer.items()}

    def _empty(self, tokens: int) -> dict[str, Tensor]:
        stored = {name: self.store[name] for name in self.names}
        return {name: torch.empty(tokens, *of.shape[1:], dtype=of.dtype) for name, of in stored.items()}


class _Coming:
    """A stream of token runs, handed out in portions of any size."""

    def __init__(self, runs: Iterator[dict[str, Tensor]]) -> None:
        self._runs = runs
        self._run: dict[str, Tensor] = {}
        self._begin = self._end = 0

    def put(self, buffer: dict[str, Tensor], places: np.ndarray) -> int:
        """Put the next tokens into these places of a buffer; returns how many."""
        done = 0
        while done < len(places):
            if self._begin == self._end:
                self._run = next(self._runs)
                self._begin, self._end = 0, len(next(iter(self._run.values())))
            some = min(len(places) - done, self._end - self._begin)
            where = torch.from_numpy(places[done : done + some])
            for name, values in self._run.items():
                buffer[name][where] = values[self._begin : self._begin + some]
            done, self._begin = done + some, self._begin + some
        return done
