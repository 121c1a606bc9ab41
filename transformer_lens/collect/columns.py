"""Tensors that lie in several files, read in place: one index over all of them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transformer_lens.checks import in_words
from transformer_lens.collect.files import DTYPES
from transformer_lens.collect.manifest import ShardRecord

OPEN = 128
"""Shards that are mapped at a time, far below the files a process may have open."""
NAMES = {name: dtype for dtype, name in DTYPES.items()}

Index = int | slice | Sequence[int] | Tensor | np.ndarray


def mapped(path: Path, record: ShardRecord) -> dict[str, Tensor]:
    """The tensors of a shard, in the file's own memory; writing to them does not change the file.

    Raises `ValueError` for a file that is missing or is not as long as it was written.
    """
    trouble = record.problem(path.parent, checksum=False)
    if trouble:
        raise ValueError(f"{trouble}; make the same collect call again to have it computed, the other shards stay")
    # A private map, for torch takes no memory that must not be written.
    raw = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    begin = 8 + int.from_bytes(raw[:8].numpy().tobytes(), "little")
    if begin > len(raw):
        raise ValueError(f"{path} is no safetensors file any more; make the same collect call again with check=True")
    entries = json.loads(raw[8:begin].numpy().tobytes())
    return {
        name: raw[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]
        .view(NAMES[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


class Shards:
    """The files of a store, mapped when they are read."""

    def __init__(self, out_dir: Path, records: Sequence[ShardRecord]) -> None:
        self.out_dir = out_dir
        self.records = list(records)
        self.starts = np.cumsum([0, *(record.tokens for record in records)])
        """The number of each shard's first token, and the number of tokens."""
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, object]:
        # Workers of a DataLoader map the files themselves.
        return {**self.__dict__, "_open": OrderedDict()}

    def tensors(self, place: int) -> dict[str, Tensor]:
        """The tensors of the shard at a place in `records`."""
        if place not in self._open:
            record = self.records[place]
            self._open[place] = mapped(self.out_dir / record.file, record)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(place)
        return self._open[place]

    def pieces(self, start: int, stop: int) -> list[tuple[int, slice]]:
        """Where the tokens of a range lie: places in `records`, and slices in those shards."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        found = []
        for place in range(first, len(self.records)):
            begin, end = int(self.starts[place]), int(self.starts[place + 1])
            if begin >= stop:
                break
            found.append((place, slice(max(start, begin) - begin, min(stop, end) - begin)))
        return found


class StoredTensor:
    """One tensor over all tokens of a store, indexed along the tokens; what is indexed is read.

    >>> store["blocks.0.hook_resid_post"][3:5].shape, store["token_ids"][0].item()  # doctest: +SKIP
    (torch.Size([2, 128]), 1)
    """

    def __init__(self, shards: Shards, name: str, dtype: torch.dtype, shape: tuple[int, ...], axes: str) -> None:
        self.name, self.dtype, self.axes = name, dtype, axes
        self.shape = (len(shards), *shape)
        self._shards = shards

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredTensor({self.name!r}, {list(self.shape)}, {self.dtype}, axes={self.axes!r})"

    def __getitem__(self, index: Index) -> Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._range(start, stop) if step == 1 else self._gather(np.arange(start, stop, step))
        if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
            return self._gather(np.asarray([index]))[0]
        try:
            wanted = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths, bfloat16, or "meta"
            raise TypeError(
                f"{self.name!r}: got {in_words(index)}, expected token numbers, a slice, or a mask"
            ) from error
        if wanted.dtype == np.bool_ and wanted.shape == (len(self),):
            wanted = wanted.nonzero()[0]
        if wanted.size and wanted.dtype.kind not in "iu":
            raise TypeError(
                f"{self.name!r}: got an index of {wanted.dtype}, expected token numbers, a slice, or a mask"
            )
        return self._gather(wanted.reshape(-1).astype(np.int64)).reshape(*wanted.shape, *self.shape[1:])

    def _range(self, start: int, stop: int) -> Tensor:
        parts = [self._shards.tensors(place)[self.name][rows] for place, rows in self._shards.pieces(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, *self.shape[1:], dtype=self.dtype)

    def _gather(self, wanted: np.ndarray) -> Tensor:
        size = len(self)
        if wanted.size and not (-size <= wanted.min() and wanted.max() < size):
            raise IndexError(f"{self.name!r}: got token numbers {wanted.min()} to {wanted.max()}, the store has {size}")
        wanted = np.where(wanted < 0, wanted + size, wanted)
        found = torch.empty(len(wanted), *self.shape[1:], dtype=self.dtype)
        places = np.searchsorted(self._shards.starts, wanted, side="right") - 1
        for place in np.unique(places):
            here = (places == place).nonzero()[0]
            rows = torch.from_numpy(wanted[here] - self._shards.starts[place])
            found[torch.from_numpy(here)] = self._shards.tensors(int(place))[self.name][rows]
        return found
