"""`ActivationStore`: what `collect` wrote, memory-mapped, by token, document or hook, or in shuffled batches."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from transformer_lens.checks import a_path, as_array, in_words, is_tensor, is_whole, nearest, needed, whole
from transformer_lens.collect.files import ABOUT_TOKENS, Column
from transformer_lens.collect.manifest import Manifest, ShardRecord
from transformer_lens.collect.mixing import RUN, Mixer, Rows, count
from transformer_lens.utilities import get_act_name

Names = str | Sequence[str | tuple[str, int]] | None
Index = int | slice | Sequence[int] | Tensor | np.ndarray
CHUNK = 8192  # tokens a statistic reads at a time
OPEN = 128  # shards mapped at a time, far below the limit of open files per process


class Shards:
    """The files of a store, mapped when first read."""

    def __init__(self, out_dir: Path, records: Sequence[ShardRecord]) -> None:
        self.out_dir = out_dir
        self.records = list(records)
        self.starts = np.cumsum([0, *(record.tokens for record in records)])
        """The number of each shard's first token, then the total number of tokens."""
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, object]:
        # Workers of a DataLoader map the files themselves.
        return {**self.__dict__, "_open": OrderedDict()}

    def tensors(self, place: int) -> dict[str, Tensor]:
        """The tensors of the shard at a place in `records`. Raises `ValueError` for a damaged file."""
        if place not in self._open:
            record = self.records[place]
            if trouble := record.problem(self.out_dir, checksum=False):
                again = "make the same collect call again to have it computed, the other shards stay"
                raise ValueError(f"{trouble}; {again}")
            path = self.out_dir / record.file
            try:  # in the file's own memory; writing there does not change the file
                self._open[place] = load_file(path)
            except SafetensorError as error:
                again = "make the same collect call again with check=True"
                raise ValueError(f"{path} is no safetensors file any more; {again}") from error
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(place)
        return self._open[place]


class StoredTensor:
    """One tensor over all tokens of a store; indexing along the tokens reads them.

    >>> store["blocks.0.hook_resid_post"][3:5].shape, store["token_ids"][0].item()  # doctest: +SKIP
    (torch.Size([2, 128]), 1)
    """

    def __init__(self, shards: Shards, name: str, column: Column) -> None:
        self.name, self.dtype, self.axes = name, column.dtype, column.axes
        self.shape = (len(shards), *column.shape)
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
        expected = "token numbers, a slice, or a mask"
        wanted = as_array(repr(self.name), index, expected)
        if wanted.dtype == np.bool_ and wanted.shape == (len(self),):
            wanted = wanted.nonzero()[0]
        if wanted.size and wanted.dtype.kind not in "iu":
            raise TypeError(f"{self.name!r}: got an index of {wanted.dtype}, expected {expected}")
        return self._gather(wanted.reshape(-1).astype(np.int64)).reshape(*wanted.shape, *self.shape[1:])

    def _range(self, start: int, stop: int) -> Tensor:
        starts, parts = self._shards.starts, []
        for place in range(int(np.searchsorted(starts, start, "right")) - 1, int(np.searchsorted(starts, stop))):
            begin = int(starts[place])
            parts.append(self._shards.tensors(place)[self.name][max(0, start - begin) : stop - begin])
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


class RunningStatistics:
    """Statistics of vectors that arrive in batches, in float64.

    >>> from transformer_lens.collect import RunningStatistics
    >>> running = RunningStatistics()
    >>> running.update(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> running.mean.tolist(), running.variance.tolist(), running.norm_mean.item()
    ([1.5, 2.0], [2.25, 4.0], 2.5)

    The variance divides by the number of tokens; batches are merged with the formula of Chan, Golub and LeVeque (1979),
    which does not cancel. Norms are Euclidean, over the last axis.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = self._norms = torch.zeros((), dtype=torch.float64)

    def update(self, values: Shaped[Tensor, "token ..."]) -> None:
        """Add a batch. Raises `ValueError` if its shape differs from earlier ones."""
        if not is_tensor(values) or values.ndim < 1:
            raise TypeError(f"statistics: got {in_words(values)}, expected a tensor [token, ...]")
        if not len(values):
            return
        exact = values.detach().to(torch.float64)
        if self.count and exact.shape[1:] != self._mean.shape:
            raise ValueError(f"statistics: got {list(exact.shape[1:])} for a token, before {list(self._mean.shape)}")
        count, mean, total = len(exact), exact.mean(0), self.count + len(exact)
        shift = mean - self._mean
        squares = (exact - mean).square().sum(0) + shift.square() * (self.count * count / total)
        self._squares, self._mean = self._squares + squares, self._mean + shift * (count / total)
        self._norms = self._norms + exact.norm(dim=-1).sum(0)
        self.count = total

    @property
    def mean(self) -> Float[Tensor, " *shape"]:
        """The mean over tokens."""
        return self._seen(self._mean)

    @property
    def variance(self) -> Float[Tensor, " *shape"]:
        """The mean squared distance from the mean, per coordinate."""
        return self._seen(self._squares) / self.count

    @property
    def norm_mean(self) -> Float[Tensor, " *shape"]:
        """The mean length of the vectors along the last axis."""
        return self._seen(self._norms) / self.count

    def _seen(self, value: Tensor) -> Tensor:
        if not self.count:
            raise ValueError("statistics: no values were seen yet")
        return value

    def __repr__(self) -> str:
        return f"RunningStatistics of {self.count} tokens"


class ActivationStore:
    """The activations in a folder, read when indexed. While a job still runs, its finished shards are shown.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> store = bridge.collect(["Mary and John", "went to the store"], ["hook_embed"], folder, progress=False)
    >>> store["hook_embed"][2:4].shape, bridge.to_string(store.document(1)["token_ids"])
    (torch.Size([2, 128]), '<|bos|>went to the store')

    `store[name]` is a tensor over all tokens (`StoredTensor`), by hook name, short key such as `("resid_post", 1)`, or
    one of `context_ids`, `document_ids`, `token_ids`, `positions` and `document_positions`. `store[i]`, `store[a:b]`
    and `store[[i, j]]` give everything about some tokens. Raises `ValueError` for a folder without a manifest, and for
    a missing or damaged shard, saying what to do.
    """

    def __init__(self, out_dir: str | Path) -> None:
        self.out_dir = a_path("out_dir", out_dir)
        self.manifest = Manifest.read(self.out_dir)
        # If several processes share a job, later shards may be finished before earlier ones.
        self._shards = Shards(self.out_dir, [record for _, record in sorted(self.manifest.records().items())])
        hooks = {
            name: Column(getattr(torch, hook["dtype"]), tuple(hook["shape"]), hook["axes"])
            for name, hook in self.manifest.job["hooks"].items()
        }
        columns = {**hooks, **ABOUT_TOKENS}
        self._tensors = {name: StoredTensor(self._shards, name, column) for name, column in columns.items()}

    @property
    def hooks(self) -> list[str]:
        """The names of the collected hooks."""
        return list(self.manifest.job["hooks"])

    @property
    def complete(self) -> bool:
        """Whether all shards of the job exist."""
        return self.manifest.complete

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        state = f"{len(self._shards.records)} shards, {'complete' if self.complete else 'not complete'}"
        lines = [f"ActivationStore({str(self.out_dir)!r}): {len(self)} tokens, {state}"]
        return "\n".join([*lines, *(f"  {self._tensors[name]!r}" for name in self.hooks)])

    def __getitem__(self, index: str | tuple[str, int] | Index) -> Any:
        if isinstance(index, (str, tuple)):
            return self._named(index)
        return {name: tensor[index] for name, tensor in self._tensors.items()}

    def _named(self, key: str | tuple[Any, ...]) -> StoredTensor:
        if not isinstance(key, (str, tuple)) or not len(key) >= 1:
            raise TypeError(f"name: got {in_words(key)}, expected a name, or a short key such as ('resid_post', 1)")
        name = key if isinstance(key, str) else get_act_name(*key[:3])
        if name not in self._tensors:
            raise KeyError(f"{name!r} was not collected; the nearest names are {nearest(name, self._tensors)}")
        return self._tensors[name]

    def _several(self, given: Names) -> list[str]:
        """The chosen tensors: one name, several (short keys too), or every hook for `None`."""
        if given is None:
            return self.hooks
        several = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
        if not several or not all(isinstance(one, (str, tuple)) for one in several):
            raise TypeError(f"names: got {in_words(given)}, expected a hook's name, several, or None for all hooks")
        return [self._named(one).name for one in several]

    def document(self, number: int) -> dict[str, Tensor]:
        """Everything about the tokens of one document. Raises `KeyError` if none of its tokens is stored."""
        number = whole("document", number)
        parts: list[dict[str, Tensor]] = []
        for place, record in enumerate(self._shards.records):
            if record.first_document <= number <= record.last_document:
                tensors = self._shards.tensors(place)
                ids = tensors["document_ids"].numpy()
                rows = slice(*(int(np.searchsorted(ids, number, side=side)) for side in ("left", "right")))
                if rows.start != rows.stop:
                    parts.append({name: tensors[name][rows] for name in self._tensors})
        if not parts:
            why = "there may be fewer documents, or a filter"
            raise KeyError(f"document {number}: none of its tokens is stored; {why}")
        return {name: torch.cat([part[name] for part in parts]) for name in self._tensors}

    def batches(
        self,
        names: Names | int = None,
        batch_size: int = 4096,
        *,
        shuffle: bool = True,
        buffer_tokens: int = 65536,
        seed: int = 0,
        drop_last: bool = False,
    ) -> "ActivationBatches":
        """Batches of tokens as a torch `IterableDataset`, each token once per epoch.

        One name gives tensors [token, ...], several (`None`: all hooks) give dictionaries of them. Shuffling mixes
        short runs of tokens in a buffer of `buffer_tokens`, which bounds memory; `seed` and `set_epoch(n)` choose the
        order. Use it as `DataLoader(batches, batch_size=None, num_workers=n)`. `store.batches(1024)` is short for all
        hooks with that batch size.
        """
        chosen: Any = names
        if is_whole(names):
            chosen, batch_size = None, chosen
        several = self._several(chosen)
        chosen = several[0] if isinstance(names, str) else several
        return ActivationBatches(self, chosen, batch_size, shuffle, buffer_tokens, seed, drop_last)

    def statistics(self, names: Names = None) -> dict[str, RunningStatistics]:
        """The mean, variance and mean norm of hooks over all tokens, in one pass.

        >>> store.statistics()["hook_embed"].mean.shape  # doctest: +SKIP
        torch.Size([128])
        """
        found = {}
        for name in self._several(names):
            tensor, running = self._named(name), RunningStatistics()
            for start in range(0, len(self), CHUNK):
                running.update(tensor[start : start + CHUNK])
            found[tensor.name] = running
        return found

    def to_numpy(self, name: str, index: Index = slice(None)) -> np.ndarray:
        """Some tokens of one tensor as an array; bfloat16, which NumPy lacks, becomes float32."""
        values: Tensor = self._named(name)[index]
        return (values.float() if values.dtype == torch.bfloat16 else values.clone()).numpy()

    def to_dataset(self, names: Names = None, **options: Any) -> Any:
        """A Hugging Face `Dataset`, one row per token; `options` go to `from_generator`. Needs the extra `[data]`."""
        made = needed("datasets", "to_dataset needs datasets: pip install 'transformer-lens-bridge[data]'").Dataset
        chosen = list(self._tensors) if names is None else self._several(names)
        # The library caches by these arguments, so they identify the content; it would split a list into shards.
        version = f"{self.manifest.job_sha256} {len(self)}"
        arguments = {"out_dir": str(self.out_dir), "chosen": tuple(chosen), "version": version}
        return made.from_generator(_rows, gen_kwargs=arguments, **options)

    def check(self) -> list[str]:
        """Verify every shard's checksum and list what is wrong; `collect(..., check=True)` repairs it."""
        return [trouble for record in self._shards.records if (trouble := record.problem(self.out_dir))]


def _rows(out_dir: str, chosen: tuple[str, ...], version: str) -> Iterator[dict[str, Any]]:
    store = ActivationStore(out_dir)
    for start in range(0, len(store), CHUNK):
        parts = {name: store.to_numpy(name, slice(start, start + CHUNK)) for name in chosen}
        for row in range(len(next(iter(parts.values())))):
            yield {name: values[row] for name, values in parts.items()}


class ActivationBatches(IterableDataset[Tensor | Rows]):
    """Batches of a store's tensors, each token once in an epoch; `ActivationStore.batches` makes them.

    Short runs of tokens are read in random order and mixed in a bounded buffer. The order depends only on `seed`, the
    epoch and the number of workers. In `DataLoader(batches, batch_size=None, num_workers=n)` each worker has its part.
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

    def __len__(self) -> int:
        """How many batches a pass in one process gives; each further worker may end with a smaller one of its own."""
        whole_ones, rest = divmod(len(self.store), self.batch_size)
        return whole_ones + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Tensor | Rows]:
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        runs = np.arange(0, len(self.store), RUN)
        if self.shuffle:
            runs = np.random.default_rng([self.seed, self.epoch]).permutation(runs)
        mine: list[int] = runs[part::parts].tolist()
        tokens = sum(min(RUN, len(self.store) - run) for run in mine)
        rows = ({name: self.store[name][run : run + RUN] for name in self.names} for run in mine)
        random = np.random.default_rng([self.seed, self.epoch, part])
        for batch in Mixer(rows, min(self.buffer_tokens, tokens), self.batch_size, random, self.shuffle):
            if count(batch) == self.batch_size or not self.drop_last:
                yield batch[self.names[0]] if self.single else batch
