"""Where documents come from: files, data sets, texts or token ids, in a fixed order, read from any number on."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from transformer_lens.checks import as_array

TEXT_SUFFIXES = (".txt", ".text")
JSON_SUFFIXES = (".jsonl", ".ndjson")


class Source(NamedTuple):
    """Documents by number: texts, rows of a table, or token ids."""

    read: Callable[[int], Iterator[Any]]  # yields the documents from a number on
    about: Mapping[str, Any]  # what identifies the data in a manifest
    documents: int | None = None  # the number of documents, if known without reading them


def open_source(data: Any) -> Source:
    """The documents of anything `collect` takes. Raises `ValueError` for a bad path, `TypeError` for other things."""
    if isinstance(data, (str, Path)):
        return _files([Path(data)])
    if isinstance(data, (list, tuple)) and data and all(isinstance(item, Path) for item in data):
        return _files(data)
    library = sys.modules.get("datasets")  # whoever passes one of its data sets has imported it
    if library is not None:
        if isinstance(data, (library.DatasetDict, library.IterableDatasetDict)):
            split = next(iter(data), "train")
            raise ValueError(f"data: got a DatasetDict, expected one of its splits: data[{split!r}]")
        if isinstance(data, library.IterableDataset):
            return Source(lambda start: iter(data.skip(start)), {"kind": "datasets.IterableDataset"})
        if isinstance(data, library.Dataset):
            about = {"kind": "datasets.Dataset", "rows": len(data)}
            return Source(lambda start: iter(data.select(range(start, len(data)))), about, len(data))
    return _in_memory(data)


def _in_memory(data: Any) -> Source:
    if isinstance(data, (Tensor, np.ndarray)):
        ids = as_array("data", data, "token ids [document, pos]")
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"data: got {ids.dtype} of shape {list(ids.shape)}, expected token ids [document, pos]")
        return Source(lambda start: iter(ids[start:]), {"kind": "token ids", "shape": list(ids.shape)}, len(ids))
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            f"data: got {type(data).__name__}, expected a path, a list of paths, texts or token ids, a token tensor, "
            "a Hugging Face data set, or another iterable of documents"
        )
    if isinstance(data, Sequence):
        about = {"kind": "list", "documents": len(data)}
        return Source(lambda start: (data[i] for i in range(start, len(data))), about, len(data))
    return Source(lambda start: islice(iter(data), start, None), {"kind": "iterable"})


def _files(paths: Sequence[Path]) -> Source:
    found = [file for path in paths for file in _inside(path)]
    sizes = [[file.name, file.stat().st_size] for file in found]
    return Source(lambda start: islice(_documents(found), start, None), {"kind": "files", "files": sizes})


def _inside(path: Path) -> list[Path]:
    known = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
    expected = f"expected {', '.join(known)}, or a folder of them"
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in known)
        if not files:
            raise ValueError(f"data: {path} holds no file that could be read; {expected}")
        return files
    if not path.is_file():
        raise ValueError(f"data: there is no file {str(path)!r}; for a text rather than a file, pass a list: [text]")
    if path.suffix not in known:
        raise ValueError(f"data: got the file {path.name!r}, {expected}")
    return [path]


def _documents(files: Sequence[Path]) -> Iterator[Any]:
    """The documents of files, one for each line that is not blank: a text, or a JSON object."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip():
                        yield json.loads(line) if file.suffix in JSON_SUFFIXES else line.rstrip("\r\n")
                except json.JSONDecodeError as error:
                    told = f"not JSON ({error}); one object in each line is expected"
                    raise ValueError(f"{file}, line {number}: {told}") from None


@dataclass(frozen=True)
class Encoder:
    """Turns documents into token ids: tokenizes texts, and takes token ids unchanged."""

    tokenizer: Any
    text_key: str
    bos: int | None  # prepended to each text that does not begin with it, unless `None`
    eos: int | None  # appended to each text, unless `None`
    d_vocab: int
    padding: int | None = None  # cut off at both ends of given token ids, unless `None`

    def encode(self, documents: Sequence[tuple[int, Any]]) -> list[tuple[int, np.ndarray]]:
        contents = [(number, self._content(number, document)) for number, document in documents]
        texts = [content for _, content in contents if isinstance(content, str)]
        if texts and self.tokenizer is None:
            raise ValueError("data: got texts, and this bridge has no tokenizer; pass token ids, or a tokenizer to it")
        encoded = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        return [
            (number, self._framed(next(encoded)) if isinstance(content, str) else self._ids(number, content))
            for number, content in contents
        ]

    def _content(self, number: int, document: Any) -> Any:
        if not isinstance(document, Mapping):
            return document
        if self.text_key not in document:
            has = ", ".join(map(repr, document))
            raise ValueError(f"document {number} has no {self.text_key!r}, only {has}; name the text with text_key")
        return document[self.text_key]

    def _framed(self, ids: Sequence[int]) -> np.ndarray:
        if not len(ids):
            return np.empty(0, np.int64)
        front = [] if self.bos is None or ids[0] == self.bos else [self.bos]
        back = [] if self.eos is None else [self.eos]
        return np.asarray([*front, *ids, *back], np.int64)

    def _ids(self, number: int, content: Any) -> np.ndarray:
        expected = "a text, or the token ids of one"
        array = as_array(f"document {number}", content, expected)
        if array.size == 0 and array.ndim == 1:
            return np.empty(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            got = type(content).__name__ if array.dtype.kind not in "iuf" else f"{array.dtype} {list(array.shape)}"
            raise TypeError(f"document {number}: got {got}, expected {expected}")
        if int(array.min()) < 0 or int(array.max()) >= self.d_vocab:
            got = f"token ids from {array.min()} to {array.max()}"
            raise ValueError(f"document {number}: got {got}, expected 0 to {self.d_vocab - 1}")
        real = (array != self.padding).nonzero()[0] if self.padding is not None else range(len(array))
        return array[real[0] : real[-1] + 1].astype(np.int64) if len(real) else np.empty(0, np.int64)
