"""Atomic files (written aside, flushed, renamed); every tensor's place in a shard is known before its first batch."""

import errno
import fcntl
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import file_digest
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = tomllib.loads(Path(__file__).with_name("names.toml").read_text("utf-8"))
DTYPES: Mapping[torch.dtype, str] = {getattr(torch, name): known for name, known in NAMES["dtypes"].items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


class Column(NamedTuple):
    """One tensor of a shard: a value or an array for each token."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()  # the shape for one token
    axes: str = "token"

    def to_dict(self) -> dict[str, Any]:
        return {"axes": self.axes, "shape": list(self.shape), "dtype": dtype_name(self.dtype)}


ABOUT_TOKENS = {  # what is stored about each token: its context, document, id, and positions in context and document
    **dict.fromkeys(("context_ids", "document_ids"), Column(torch.int64)),
    **dict.fromkeys(("token_ids", "positions", "document_positions"), Column(torch.int32)),
}


class ShardFile:
    """A shard being written, to a temporary file that no other process writes."""

    def __init__(self, path: Path, columns: Mapping[str, Column], tokens: int, about: Mapping[str, str]) -> None:
        """Lay out the safetensors header and the place of each tensor."""
        self.path = path
        self.aside = path.with_name(path.name + ".part")
        self.columns = columns
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **about}}
        end = 0
        # The widest first, so that each begins at a multiple of its item size.
        for name, column in sorted(columns.items(), key=lambda pair: -pair[1].dtype.itemsize):
            begin, end = end, end + tokens * prod(column.shape) * column.dtype.itemsize
            shape = [tokens, *column.shape]
            entries[name] = {"dtype": DTYPES[column.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.bytes = len(self.header) + end
        self._places = {name: len(self.header) + entries[name]["data_offsets"][0] for name in columns}
        self._file: int | None = None

    def open(self) -> None:
        """Create the file at its full size. Raises `OSError` if the disk has too little room."""
        handle = os.open(self.aside, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = self.aside.exists() and self.aside.stat().st_ino == os.fstat(handle).st_ino
        except BlockingIOError:
            mine = False
        if not mine:
            os.close(handle)
            raise ValueError(
                f"{self.path.name} is being written by another process; give each process of a job its own "
                "shard=(rank, world)"
            )
        self._file = handle
        os.ftruncate(handle, 0)
        os.posix_fallocate(handle, 0, self.bytes)
        self._write(memoryview(self.header), 0)

    def write(self, some: Iterable[tuple[str, Tensor]]) -> None:
        """Write the next tokens of some tensors."""
        for name, values in some:
            column = self.columns[name]
            if values.dtype != column.dtype or tuple(values.shape[1:]) != column.shape:
                raise ValueError(
                    f"{name!r}: got {values.dtype} {list(values.shape[1:])} for a token, expected {column.dtype} "
                    f"{list(column.shape)}, as in the job's first batch"
                )
            if values.numel():
                raw = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
                self._write(raw, self._places[name])
                self._places[name] += len(raw)

    def _write(self, raw: memoryview, place: int) -> None:
        assert self._file is not None
        while len(raw):
            written = os.pwrite(self._file, raw, place)
            raw, place = raw[written:], place + written

    def finish(self) -> str:
        """Flush the file to disk and rename it into place; returns its sha256."""
        assert self._file is not None
        os.fsync(self._file)
        found = sha256_of(self.aside)
        os.replace(self.aside, self.path)
        flush_folder(self.path.parent)
        os.close(self._file)
        self._file = None
        return found

    def abandon(self) -> None:
        if self._file is not None:
            with suppress(FileNotFoundError):
                self.aside.unlink()
            os.close(self._file)
            self._file = None


def flush_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock out a job's other processes; the lock vanishes however this process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file atomically."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def advised(error: OSError, out_dir: Path, finished: int) -> OSError:
    """The same error with advice, and what is kept."""
    advice = NAMES["advice"].get(errno.errorcode.get(error.errno or 0), str(error))
    kept = f"{finished} finished shard{'s are' if finished != 1 else ' is'} kept"
    return OSError(error.errno, f"{advice}; {kept}, and the same call goes on from there", str(out_dir))
