"""`collect`: write the activations of a whole data set to disk, in shards that are either whole or absent.

The model runs in this thread, a second one writes. A shard depends on data and options alone, so a killed job resumes
at its next shard, and ends with the same bytes.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import transformer_lens.collect.manifest as manifest
from transformer_lens.checks import directory_to_write
from transformer_lens.collect.files import ABOUT_TOKENS, DTYPES, Column, ShardFile, advised
from transformer_lens.collect.plan import Batch, Cursor, Layout, Options, Reading, ShardPlan, TokenStream, plan_shard
from transformer_lens.collect.store import ActivationStore

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

NamesFilter = str | Callable[[str], bool] | Sequence[str] | None
T = TypeVar("T")
logger = logging.getLogger(__name__)

WAITING = 4  # batches that may wait for the writer, which bounds a job's memory


def stop_after(names: Sequence[str]) -> int | None:
    """The smallest `stop_at_layer` at which all these hooks fire; `None` for the whole model."""
    stop = 0
    for name in names:
        if name.startswith("blocks."):
            stop = max(stop, int(name.split(".")[1]) + 1)
        elif name != "hook_embed":
            return None
    return stop


def probe(bridge: "TransformerBridge", names: Sequence[str], dtype: torch.dtype | None) -> dict[str, Column]:
    """What is stored of each hook, found by running two tokens. Raises `ValueError` for hooks that have no value for
    each token.
    """
    for name in names:
        axes = bridge.hook_dict[name].axes
        if "query_pos" in axes:
            raise ValueError(
                f"{name!r} has an entry for each pair of positions ({axes}), so what belongs to a token grows with its "
                "context; collect attn.hook_rot_q and attn.hook_rot_k (attn.hook_q and attn.hook_k) and multiply, or "
                "use run_with_cache"
            )
        if axes.split()[:2] != ["batch", "pos"]:
            raise ValueError(
                f"{name!r} has the axes {axes!r}, and only hooks with a value for each token, 'batch pos ...', can be "
                "collected"
            )
    with torch.no_grad():
        cache = _cached(bridge, torch.zeros(1, 2, dtype=torch.long), names)
    found = {}
    for name in names:
        value, rest = cache[name], bridge.hook_dict[name].axes.split()[2:]
        kept = dtype if dtype is not None and value.is_floating_point() else value.dtype
        if kept not in DTYPES:
            raise ValueError(f"{name!r} is {value.dtype}, which safetensors cannot hold; pass dtype=torch.bfloat16")
        found[name] = Column(kept, tuple(value.shape[2:]), " ".join(["token", *rest]))
    return found


def on_cpu(values: Mapping[str, Tensor], ready: torch.cuda.Event | None) -> Iterator[tuple[str, Tensor]]:
    """Values of one batch on the CPU; those that a GPU has `ready` only then are copied while it goes on."""
    if ready is None:
        yield from values.items()
        return
    beside = torch.cuda.Stream()
    beside.wait_event(ready)
    for name, value in values.items():
        with torch.cuda.stream(beside):
            copied = value.to("cpu", non_blocking=True)
        beside.synchronize()
        yield name, copied


@contextmanager
def compiled(
    bridge: "TransformerBridge", names: Sequence[str], layout: Layout
) -> Iterator[Callable[[Tensor], Mapping[str, Tensor]]]:
    """The whole model as one graph that reads these hooks, for batches of one shape, to which smaller ones are padded:
    so what is stored does not depend on the batches before.
    """

    def read(ids: Tensor) -> Mapping[str, Tensor]:
        rows, columns = ids.shape
        whole = ids.new_full((layout.batch_size, layout.context_size), layout.pad)
        whole[:rows, :columns] = ids
        whole[rows:] = whole[0]
        runner(whole, return_type=None, padding_side="right")
        # In memory of their own: the next batch overwrites the runner's.
        return {name: buffer[:rows, :columns].clone() for name, buffer in runner.cache.items()}

    with bridge.compile(reads=[list(names)], dynamic=False) as runner:
        yield read


def _cached(bridge: "TransformerBridge", ids: Tensor, names: Sequence[str]) -> Any:
    """The values at these hooks. Padding is on the right and affects nothing before it, so the call needs no mask."""
    stop = stop_after(names)
    options: Any = {"stop_at_layer": stop, "return_type": None if stop is None else "logits", "padding_side": "right"}
    return bridge.run_with_cache(ids, names_filter=list(names), return_cache_object=False, **options)[1]


def capture(
    bridge: "TransformerBridge",
    hooks: Mapping[str, Column],
    batch: Batch,
    read: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The stored tokens' values at every hook, in the dtype they are stored in; `read` runs the model otherwise."""
    ids = torch.from_numpy(batch.ids).to(bridge.input_device())
    cache = _cached(bridge, ids, list(hooks)) if read is None else read(ids)
    everything = bool(batch.keep.all())
    kept = torch.from_numpy(batch.keep.reshape(-1).nonzero()[0])
    values = {}
    for name, column in hooks.items():
        flat = cache[name].reshape(-1, *cache[name].shape[2:])
        some = flat if everything else flat.index_select(0, kept.to(flat.device))
        values[name] = _cast(name, some, column.dtype)
    return values


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if dtype is torch.float16 and value.dtype is not dtype and bool((cast.isinf() & ~value.isinf()).any()):
        raise ValueError(
            f"{name!r} reaches {float(value.abs().max()):.4g}, beyond float16's 65504; pass dtype=torch.bfloat16"
        )
    return cast


class Background:
    """Runs calls in another thread; the first error stops it, and is raised in the calling thread."""

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._given: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collect-writer")
        self._stopped = False

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called; blocks while too many calls are waiting."""
        while self._given and (len(self._given) >= self._waiting or self._given[0].done()):
            self._given.popleft().result()
        self._given.append(self._thread.submit(self._run, function))

    def _run(self, function: Callable[[], None]) -> None:
        if not self._stopped:
            # Nothing runs after a failed call: a shard that lacks values must not be finished.
            self._stopped = True
            function()
            self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            for given in self._given:
                given.result()


class Job:
    """One process's part of a job. The constructor checks everything that can be checked before the first batch."""

    def __init__(self, bridge: "TransformerBridge", data: Any, names: Any, out_dir: Path, options: Options) -> None:
        self.options, self.out_dir = options, out_dir
        self.reading = Reading.of("collect", bridge, data, options)
        self.layout = self.reading.layout
        self.bridge, self.hooks = bridge, probe(bridge, bridge.select_names(names), options.dtype)
        identity = {
            "model": manifest.model_identity(bridge),
            "tokenizer": manifest.tokenizer_identity(bridge.tokenizer),
            "data": dict(self.reading.source.about),
            "text_key": options.text_key,
            "prepend_bos": self.reading.encoder.bos is not None,
            "append_eos": self.reading.encoder.eos is not None,
            "hooks": {name: hook.to_dict() for name, hook in self.hooks.items()},
            "stop_at_layer": stop_after(list(self.hooks)),
            **asdict(self.layout),
            **({"compiled": True} if options.compiled else {}),
        }
        state, around = manifest.model_state(bridge), manifest.environment(bridge.input_device())
        self.manifest = manifest.Manifest(out_dir, identity, state, around)
        self.sharing = bridge.attachment.sharding.shards
        self._writes: bool = self.sharing.rank == 0  # the first of the processes that share the model has the files
        self.done: dict[int, manifest.ShardRecord] = {}
        self._begun: deque[ShardFile] = deque(maxlen=WAITING + 2)

    def run(self) -> None:
        self.done, broken, finished = self._agreed(self._start)
        if finished:
            return
        reads: Any = compiled(self.bridge, [*self.hooks], self.layout) if self.options.compiled else nullcontext()
        try:
            with Background(WAITING) as writer, self._bar() as bar, torch.no_grad(), reads as read:
                for plan in self._missing(set(self.done) - set(broken)):
                    self._compute(plan, writer, bar, read)
        finally:
            for file in self._begun:
                file.abandon()
        self._agreed(self.manifest.finish)

    def _agreed(self, function: Callable[[], T]) -> T:
        """Run `function` in the first process; every process returns its result or raises its error."""
        if self.sharing.size == 1:
            return self._advised(function)
        answer: list[Any] = [None, None]
        if self._writes:
            try:
                answer[0] = self._advised(function)
            except (ValueError, OSError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, group_src=0, group=self.sharing.group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]  # type: ignore[no-any-return]

    def _start(self) -> tuple[dict[int, manifest.ShardRecord], list[int], bool]:
        """The finished shards, the broken ones among them, and whether nothing is left to do."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.manifest.start(self.options.same_environment)
        done = self.manifest.records()
        broken = [number for number, record in done.items() if record.problem(self.out_dir, self.options.check)]
        for number in broken:
            logger.warning("%s is missing or not as it was written: computing it again", manifest.shard_name(number))
        return done, broken, not broken and self.manifest.finish()

    def _advised(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except OSError as error:
            raise advised(error, self.out_dir, len(self.done)) from error

    def _missing(self, kept: set[int]) -> Iterator[ShardPlan]:
        """The shards this process has to compute; the data of finished ones are not read."""
        rank, world = self.options.shard
        stream: TokenStream | None = None
        cursor, number, last = Cursor(), 0, False
        while not last:
            before = self.done.get(number)
            if before is not None and number in kept:
                cursor, last = before.end, before.last
            else:
                if stream is None:
                    stream = self._open(number)
                plan = plan_shard(stream, number, cursor, self.layout)
                if plan is None:
                    raise ValueError("data: got no tokens at all")
                if before is not None and before.data_sha256 != plan.digest():
                    raise changed_data(self.out_dir, number)
                cursor, last = plan.end, plan.last
                if number % world == rank:
                    yield plan
            number += 1

    def _open(self, number: int) -> TokenStream:
        """The data, read from the shard before `number`, which has to be unchanged."""
        before = self.done.get(number - 1)
        if before is None:
            return self.reading.tokens(0)
        stream = self.reading.tokens(before.begin.document)
        again = plan_shard(stream, before.shard, before.begin, self.layout)
        if again is None or again.digest() != before.data_sha256 or again.last != before.last:
            raise changed_data(self.out_dir, before.shard)
        return stream

    def _bar(self) -> "AbstractContextManager[tqdm[Any] | None]":
        if not (self.options.progress and self._writes):
            # Not even a hidden bar, which would wait for the lock that tqdm shares among forked processes.
            return nullcontext()
        rank, world = self.options.shard
        done = sum(r.end.tokens - r.begin.tokens for r in self.done.values() if r.shard % world == rank)
        bar = tqdm(initial=done, unit=" tokens", unit_scale=True, desc="collect")
        return cast("AbstractContextManager[tqdm[Any]]", bar)

    def _expected_tokens(self, plan: ShardPlan) -> int | None:
        """An estimate of this process's total tokens, from the documents so far; `None` if unknown."""
        most, documents = self.layout.max_tokens, self.reading.source.documents
        if plan.last:
            most = plan.end.tokens
        elif documents is not None and plan.end.document:
            guess = plan.end.tokens * documents // plan.end.document
            most = guess if most is None else min(most, guess)
        return None if most is None else most // self.options.shard[1]

    def _compute(self, plan: ShardPlan, writer: Background, bar: "tqdm[Any] | None", read: Any) -> None:
        about = {"job": self.manifest.job_sha256, "shard": str(plan.number)}
        path = self.out_dir / manifest.shard_name(plan.number)
        file = ShardFile(path, {**ABOUT_TOKENS, **self.hooks}, int(plan.keep.sum()), about)

        def later(step: Callable[..., None], *given: Any) -> None:
            if self._writes:
                writer.call(partial(self._advised, partial(step, *given)))

        self._begun.append(file)
        later(file.open)
        later(file.write, plan.columns().items())
        for batch in plan.batches(self.layout.batch_size):
            values = capture(self.bridge, self.hooks, batch, read)
            on_gpu = any(value.is_cuda for value in values.values())
            later(file.write, on_cpu(values, torch.cuda.current_stream().record_event() if on_gpu else None))
            if bar is not None:
                bar.total = self._expected_tokens(plan)
                bar.update(batch.tokens)
        later(self._finish, plan, file)

    def _finish(self, plan: ShardPlan, file: ShardFile) -> None:
        before = self.done.get(plan.number)
        record = manifest.ShardRecord(
            shard=plan.number,
            file=file.path.name,
            sha256=file.finish(),
            bytes=file.bytes,
            tokens=int(plan.keep.sum()),
            contexts=len(plan.ids),
            first_document=int(plan.documents[0, 0]),
            last_document=int(plan.documents.max()),
            begin=plan.begin,
            end=plan.end,
            last=plan.last,
            data_sha256=plan.digest(),
        )
        if before is None:
            self.manifest.keep(record)
        elif before != record:
            raise ValueError(
                f"{file.path} was computed again and differs from what its record states: model or environment are not "
                "what they were; collect into another folder"
            )
        self.done[plan.number] = record


def changed_data(out_dir: Path, number: int) -> ValueError:
    """The error for data that differ from those the job began with."""
    return ValueError(
        f"data: shard {number} of {out_dir} was made from other tokens; pass the documents of the first call, in their "
        "order, or choose another out_dir"
    )


def collect(
    bridge: "TransformerBridge", dataset: Any, names: NamesFilter, out_dir: str | Path, **options: Any
) -> ActivationStore:
    """Write a data set's activations at some hooks to disk, and open them.

    >>> import tempfile
    >>> from transformer_lens.collect import collect
    >>> folder = tempfile.mkdtemp()
    >>> texts = ["Mary and John", "went to the store"]
    >>> store = collect(bridge, texts, "blocks.1.hook_resid_post", folder, progress=False)
    >>> store["blocks.1.hook_resid_post"].shape
    (11, 128)

    `dataset` is a `.txt` file (one document per line), a `.jsonl` file, a folder or list of such paths, a list of texts
    or of token ids, a token tensor [document, pos], a Hugging Face data set, or any iterable that yields the same
    documents in the same order each time. `names` are as in `run_with_cache`. Make the same call again to resume a
    killed job; the finished files are byte for byte those of an uninterrupted one.

    - `context_size` tokens are a context (default: the model's, at most 1024), `batch_size` contexts a batch.
    - `packing` fills contexts with one document after another; without it each document has its own, padded.
    - `prepend_bos` (default: if the model has one) and `append_eos` frame each text; token ids are taken as they are.
    - `drop_bos`, `drop_first` (positions of each context) are not stored; padding never is.
    - `max_tokens` ends the data early; `text_key` names the text in a row.
    - `dtype` to store floats in (default: as computed); `shard_tokens` is about how many tokens a file has.
    - `shard=(rank, world)`: this process computes every `world`-th shard; the last to finish completes the manifest.
    - `check` first compares finished shards with their checksums, and recomputes those that differ.
    - `same_environment=False` resumes under other library versions, device or threads.
    - `compiled` runs the model as one graph (`bridge.compile`); what is stored is equal within rounding.
    - `progress` shows tokens per second and the time left.

    Processes that share a model make the same call together, and the first of them writes. Raises `ValueError` for
    another job's folder, naming what differs (including the model's weights, config, adapters and module settings), for
    changed data, and for hooks without a value for each token; `OSError` for a full or read-only disk. Finished shards
    stay valid.
    """
    Job(bridge, dataset, names, directory_to_write("out_dir", out_dir), Options.of(options)).run()
    return ActivationStore(out_dir)
