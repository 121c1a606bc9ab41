"""What identifies a job, all that changes its numbers, and its manifest: what was asked, and the shards with checksums.

A job that goes on has to find all of it unchanged. The manifest does not depend on when, or in how many runs, it ran.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transformer_lens.collect.files import dtype_name, locked, sha256_of, write_json
from transformer_lens.collect.plan import Cursor

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

FORMAT = 2
MANIFEST = "manifest.json"
SHOWN = 6  # the most differences an error lists
LIBRARIES = ("transformer-lens-bridge", "torch", "transformers", "tokenizers", "safetensors", "numpy")
SAMPLED = 256  # values per parameter in the fingerprint of the weights, in addition to the sum of all its bits
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNHEEDED = frozenset(  # module settings that change no number of a forward, or follow from its length
    {"training", "gradient_checkpointing", "layer_idx", "name_or_path", "max_seq_len_cached", "preparations"}
)
ADAPTERS = frozenset({"_active_adapter", "_disable_adapters"})  # PEFT layer settings with an underscore
WRITTEN_ELSEWHERE = frozenset({"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures"})
"""Config entries recorded elsewhere, or without effect on the computation."""


def model_identity(bridge: "TransformerBridge") -> dict[str, Any]:
    """The model's name and revision, with a fingerprint of its weights."""
    model: Any = bridge.original_model
    config = model.config
    return {
        "name": bridge.cfg.model_name,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": bridge.cfg.architecture,
        "weights": weights_fingerprint(model),
        "dtype": dtype_name(bridge.cfg.dtype),
        "attention": config._attn_implementation,
        "experts": getattr(config, "_experts_implementation", None),
        "hooked": [name for name, point in bridge.hook_dict.items() if point.has_hooks()],
        "in_hooks_places": {
            name: f"{type(module).__name__} {weights_fingerprint(module)}"
            for owner in (bridge, *bridge.components())
            for slot, name in owner.full_names.items()
            if (module := owner._modules.get(slot)) is not None and module is not bridge.hook_dict.get(name)
        },
    }


def model_state(bridge: "TransformerBridge") -> dict[str, Any]:
    """Everything else that changes a model's numbers, by name: its config, and every module's class and settings.

    Adapters and whether they are active, disabled, merged or scaled are such settings. Settings that all layers share
    are recorded once, under a `*`.
    """
    model: Any = bridge.original_model
    config = model.config.to_diff_dict()
    state = {f"config.{name}": value for name, value in config.items() if name not in WRITTEN_ELSEWHERE}
    found: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        place = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
        kept = {n for n in vars(module) if n in ADAPTERS or not (n.startswith("_") or n in UNHEEDED)}
        settings = {name: value for name, value in vars(module).items() if name in kept and _plain(value)}
        for name, value in {"class": type(module).__name__, **settings}.items():
            found.setdefault(f"{place}.{name}".lstrip("."), []).append(value)
    state |= {name: values[0] if all(v == values[0] for v in values) else values for name, values in found.items()}
    device = bridge.input_device().type
    autocast = torch.is_autocast_enabled(device)
    return {**state, "autocast": dtype_name(torch.get_autocast_dtype(device)) if autocast else None}


def _plain(value: Any) -> bool:
    """Whether a value is a number, a text, or a collection of these."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def weights_fingerprint(model: nn.Module) -> str:
    """A checksum of every parameter and buffer: name, shape, the sum of its bits, and some of its values."""
    found = sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor.data
        # Offloaded weights are not here to read; of sharded ones, each process has its part.
        if type(here) is Tensor and not here.is_meta and here.numel():
            # The sum of all bits depends on every value, and a sample on their order.
            flat = here.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
            total = int(flat.view(BITS[flat.element_size()]).sum(dtype=torch.int64))
            found.update(f"{total} ".encode() + some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def tokenizer_identity(tokenizer: Any) -> dict[str, Any] | None:
    """What turned texts into tokens; for a fast tokenizer also its normaliser, splitting and merges."""
    if tokenizer is None:
        return None
    rules = None
    if tokenizer.is_fast:  # calls leave their padding in it
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = _checksum({key: value for key, value in whole.items() if key not in ("padding", "truncation")})
    vocabulary = _checksum(sorted(tokenizer.get_vocab().items()))
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"class": type(tokenizer).__name__, "vocabulary": vocabulary, "rules": rules, **special}


def _checksum(document: Any) -> str:
    return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What else affects the last bits of a number."""
    versions = {name: version(name) for name in LIBRARIES}
    threads = torch.get_num_threads() if device.type == "cpu" else None
    precision = torch.get_float32_matmul_precision()
    return {"versions": versions, "device": device.type, "threads": threads, "matmul_precision": precision}


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard."""

    shard: int
    file: str
    bytes: int
    sha256: str
    tokens: int  # the number of stored tokens, after the filters
    contexts: int
    first_document: int
    last_document: int
    begin: Cursor
    end: Cursor
    last: bool  # whether the data end with this shard
    data_sha256: str  # the checksum of the token ids read for it

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        return cls(**{**entry, "begin": Cursor(**entry["begin"]), "end": Cursor(**entry["end"])})

    def problem(self, out_dir: Path, checksum: bool = True) -> str:
        """What is wrong with the shard's file, in words; empty if nothing is."""
        path = out_dir / self.file
        if not path.is_file():
            return f"{self.file} is missing"
        if path.stat().st_size != self.bytes:
            return f"{self.file} has {path.stat().st_size} bytes, expected {self.bytes}"
        if checksum and (found := sha256_of(path)) != self.sha256:
            return f"{self.file} has the sha256 {found}, expected {self.sha256}"
        return ""


def shard_name(number: int) -> str:
    """The file name of a shard; its record has another extension."""
    return f"shard-{number:06d}.safetensors"


@dataclass
class Manifest:
    """The manifest in a folder, and the records beside it."""

    out_dir: Path
    job: dict[str, Any]
    state: dict[str, Any]
    environment: dict[str, Any]
    complete: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = [self.job, self.state, self.environment]
        self.job, self.state, self.environment = json.loads(json.dumps(given, default=str))
        self.job_sha256 = _checksum(self.job)

    @classmethod
    def read(cls, out_dir: Path) -> Self:
        """Read a folder's manifest. Raises `ValueError` if there is none, or if it was edited by hand."""
        path = out_dir / MANIFEST
        if not path.is_file():
            raise ValueError(f"{out_dir} holds no {MANIFEST}: nothing was collected there")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            about = found["job"], found.get("state", {}), found["environment"]
            manifest = cls(out_dir, *about, complete=found["complete"], shards=found["shards"])
            stated, form = found["job_sha256"], found["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); restore it, or collect into another folder") from None
        if form != FORMAT:
            raise ValueError(f"{path} has format {form}, this version reads {FORMAT}; collect into another folder")
        if stated != manifest.job_sha256:
            raise ValueError(f"{path} was changed since it was written: its job does not have the checksum it states")
        return manifest

    def start(self, same_environment: bool) -> None:
        """Write the manifest, or continue one of the same job. Raises `ValueError` naming what differs."""
        with locked(self.out_dir):
            if not (self.out_dir / MANIFEST).exists():
                self._write([])
                return
            before = Manifest.read(self.out_dir)
        if changed := differences(before.job, self.job) + self._changed_state(before):
            advice = "choose another out_dir, or pass what it was begun with"
            raise ValueError(f"{self.out_dir} holds another job; {advice}: {_in_words(changed)}")
        if same_environment and (changed := differences(before.environment, self.environment)):
            why = "was begun in another environment, where numbers may round otherwise"
            advice = "go back to it, or pass same_environment=False to go on all the same"
            raise ValueError(f"{self.out_dir} {why}: {_in_words(changed)}; {advice}")
        self.state, self.environment = before.state, before.environment
        self.complete, self.shards = before.complete, before.shards

    def _changed_state(self, before: "Manifest") -> list[str]:
        """How the model's state differs; setting names may change between library versions."""
        names = dict.fromkeys([*before.state, *self.state])
        if before.environment["versions"] != self.environment["versions"]:
            names = {name: None for name in names if name in before.state and name in self.state}
        return [line for name in names for line in differences(before.state.get(name), self.state.get(name), name)]

    def _write(self, shards: Sequence[ShardRecord]) -> None:
        self.shards = [asdict(record) for record in shards]
        document = {
            "format": FORMAT,
            "complete": self.complete,
            "job_sha256": self.job_sha256,
            "job": self.job,
            "state": self.state,
            "environment": self.environment,
            "tokens": sum(record.tokens for record in shards),
            "shards": self.shards,
        }
        write_json(self.out_dir / MANIFEST, document)

    def keep(self, record: ShardRecord) -> None:
        """Write a shard's record, which marks it finished."""
        write_json((self.out_dir / record.file).with_suffix(".json"), asdict(record))

    def records(self) -> dict[int, ShardRecord]:
        """The finished shards by number."""
        if self.complete:
            return {entry["shard"]: ShardRecord.of(entry) for entry in self.shards}
        found = {}
        for path in sorted(self.out_dir.glob("shard-*.json")):
            try:
                record = ShardRecord.of(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} cannot be read ({error!r}); delete it to compute its shard again") from None
            found[record.shard] = record
        return found

    def finish(self) -> bool:
        """Mark the job complete if every shard exists; returns whether it is."""
        if self.complete:
            return True
        with locked(self.out_dir):
            records = self.records()
            last = [number for number, record in records.items() if record.last]
            if not last or set(records) != set(range(last[0] + 1)):
                return False
            self.complete = True
            self._write([records[number] for number in sorted(records)])
            return True


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The keys in which two nested documents differ, with both values: "b.c was 2, now 3"."""
    if isinstance(before, dict) and isinstance(now, dict):
        within = f"{name}." if name else ""
        pairs = [(f"{within}{key}", before.get(key), now.get(key)) for key in dict.fromkeys([*before, *now])]
        return [line for key, old, new in pairs for line in differences(old, new, key)]
    return [] if before == now else [f"{name} was {before!r}, now {now!r}"]


def _in_words(changed: Sequence[str]) -> str:
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return "; ".join(changed[:SHOWN]) + more
