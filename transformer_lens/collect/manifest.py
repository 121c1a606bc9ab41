"""A job's manifest: what was asked of which model and data, and the shards with their checksums.

It does not depend on when, or in how many runs, the job ran.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformer_lens.collect.files import locked, sha256_of, write_json
from transformer_lens.collect.plan import Cursor

FORMAT = 2
MANIFEST = "manifest.json"
SHOWN = 6
"""The most differences an error lists."""


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard."""

    shard: int
    file: str
    bytes: int
    sha256: str
    tokens: int
    """The number of stored tokens, after the filters."""
    contexts: int
    first_document: int
    last_document: int
    begin: Cursor
    end: Cursor
    last: bool
    """Whether the data end with this shard."""
    data_sha256: str
    """The checksum of the token ids read for it."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> ShardRecord:
        """A record as it stands in a file."""
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


def record_path(out_dir: Path, number: int) -> Path:
    """The path of a finished shard's record."""
    return (out_dir / shard_name(number)).with_suffix(".json")


class Manifest:
    """The manifest in a folder, and the records beside it."""

    def __init__(
        self, out_dir: Path, job: Mapping[str, Any], state: Mapping[str, Any], around: Mapping[str, Any]
    ) -> None:
        self.out_dir = out_dir
        self.job = json.loads(json.dumps(job))
        self.state = json.loads(json.dumps(state, default=str))
        self.environment = json.loads(json.dumps(around))
        self.job_sha256 = sha256(json.dumps(self.job, sort_keys=True).encode()).hexdigest()
        self.complete = False
        self._shards: list[dict[str, Any]] = []

    @classmethod
    def read(cls, out_dir: Path) -> Manifest:
        """Read a folder's manifest. Raises `ValueError` if there is none, or if it was edited by hand."""
        path = out_dir / MANIFEST
        if not path.is_file():
            raise ValueError(f"{out_dir} holds no {MANIFEST}: nothing was collected there")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            manifest = cls(out_dir, found["job"], found.get("state", {}), found["environment"])
            manifest.complete, manifest._shards = found["complete"], found["shards"]
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
        changed = differences(before.job, self.job) + self._changed_state(before)
        if changed:
            raise ValueError(
                f"{self.out_dir} holds another job; choose another out_dir, or pass what it was begun with: "
                f"{_in_words(changed)}"
            )
        changed = differences(before.environment, self.environment)
        if changed and same_environment:
            raise ValueError(
                f"{self.out_dir} was begun in another environment, where numbers may round otherwise: "
                f"{_in_words(changed)}; go back to it, or pass same_environment=False to go on all the same"
            )
        self.state, self.environment = before.state, before.environment
        self.complete, self._shards = before.complete, before._shards

    def _changed_state(self, before: Manifest) -> list[str]:
        """How the model's state differs; setting names may change between library versions."""
        names = dict.fromkeys([*before.state, *self.state])
        if before.environment["versions"] != self.environment["versions"]:
            names = {name: None for name in names if name in before.state and name in self.state}
        return [line for name in names for line in differences(before.state.get(name), self.state.get(name), name)]

    def _write(self, shards: Sequence[ShardRecord]) -> None:
        self._shards = [asdict(record) for record in shards]
        document = {
            "format": FORMAT,
            "complete": self.complete,
            "job_sha256": self.job_sha256,
            "job": self.job,
            "state": self.state,
            "environment": self.environment,
            "tokens": sum(record.tokens for record in shards),
            "shards": self._shards,
        }
        write_json(self.out_dir / MANIFEST, document)

    def keep(self, record: ShardRecord) -> None:
        """Write a shard's record, which marks it finished."""
        write_json(record_path(self.out_dir, record.shard), asdict(record))

    def records(self) -> dict[int, ShardRecord]:
        """The finished shards by number."""
        if self.complete:
            return {entry["shard"]: ShardRecord.of(entry) for entry in self._shards}
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
        keys = list(dict.fromkeys([*before, *now]))
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name} was {before!r}, now {now!r}"]


def _in_words(changed: Sequence[str]) -> str:
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return "; ".join(changed[:SHOWN]) + more
