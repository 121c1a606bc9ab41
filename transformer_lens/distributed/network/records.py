"""What a server announces: which blocks it has, under each block's uid and its own peer id. Read as a stranger's word.

A record that does not fit is passed over. It is a hint only: a client asks the server itself before it sends anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

STATES = ("serving", "draining", "gone")
"""`gone` takes the place of a record until that would have ended."""
LIVES = 2.5
"""How many times the announcing period a record stays, so that one lost announcement does no harm."""
MAX_BYTES = 512
MAX_SERVERS = 4096
"""Servers of one model that a client looks at."""
PEER = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,64}")
"""A libp2p peer id in base 58."""
FIELDS = ("blocks", "state", "seconds_per_block", "load", "version")


@dataclass(frozen=True)
class Announcement:
    """A server, as it announced itself.

    >>> here = Announcement("12D3KooWSDoCAofrZc2bysLM1WbuvujxsPhdtRtyU1vTJvwpagEQ", range(0, 2))
    >>> read_record(here.peer, here.record(), 4) == here
    True
    """

    peer: str
    blocks: range
    state: str = "serving"
    seconds_per_block: float = 0.0
    load: float = 0.0
    version: str = ""

    def record(self) -> dict[str, Any]:
        """What is kept under a block's uid."""
        values = ([self.blocks.start, self.blocks.stop], self.state, self.seconds_per_block, self.load, self.version)
        return dict(zip(FIELDS, values, strict=True))


def read_record(peer: Any, value: Any, n_layers: int | None = None) -> Announcement | None:
    """An announcement out of a record; `None` for what is none.

    >>> read_record("somebody", {"blocks": [0, 10**9]}) is None
    True
    """
    if not isinstance(peer, str) or not PEER.fullmatch(peer):
        return None
    if not isinstance(value, dict) or set(value) != set(FIELDS):
        return None
    blocks, state, version = value["blocks"], value["state"], value["version"]
    if not isinstance(blocks, list) or len(blocks) != 2 or not all(type(end) is int for end in blocks):
        return None
    if not 0 <= blocks[0] < blocks[1] <= (2**15 if n_layers is None else n_layers):
        return None
    if state not in STATES or not isinstance(version, str) or len(version) > 64 or not version.isprintable():
        return None
    speeds = value["seconds_per_block"], value["load"]
    if not all(type(speed) in (int, float) and math.isfinite(speed) and 0 <= speed <= 1e6 for speed in speeds):
        return None
    return Announcement(peer, range(*blocks), state, float(speeds[0]), float(speeds[1]), version)


def announced(found: Mapping[str, Mapping[Any, Any]], uids: Iterable[str]) -> list[Announcement]:
    """The servers of a model, one announcement of each, the latest. `found`: uid -> peer id -> (record, when it ends).

    >>> peer = "12D3KooWSDoCAofrZc2bysLM1WbuvujxsPhdtRtyU1vTJvwpagEQ"
    >>> record = Announcement(peer, range(0, 2)).record()
    >>> [found.blocks for found in announced({"m.0": {peer: (record, 60.0)}, "m.1": {peer: (7, 9.0)}}, ["m.0", "m.1"])]
    [range(0, 2)]
    """
    uids = list(uids)
    latest: dict[str, tuple[float, Announcement]] = {}
    for layer, uid in enumerate(uids):
        for peer, entry in found.get(uid, {}).items():
            record, ends = entry
            read = read_record(peer, record, len(uids))
            if read is None or layer not in read.blocks or (peer not in latest and len(latest) >= MAX_SERVERS):
                continue
            if peer not in latest or ends > latest[peer][0]:
                latest[peer] = (ends, read)
    rows = [read for _, read in latest.values() if read.state != "gone"]
    return sorted(rows, key=lambda row: (row.blocks.start, row.blocks.stop, row.peer))


def may_be_kept(peer: bytes, value: bytes) -> bool:
    """Whether this is the record of an announcement, in msgpack, as peers send it to be kept for others.

    >>> may_be_kept(b"", b"")
    False
    """
    import msgpack

    if len(peer) > MAX_BYTES or len(value) > MAX_BYTES:
        return False
    few = {"max_array_len": 8, "max_map_len": 8, "max_ext_len": 0}
    try:
        return read_record(msgpack.unpackb(peer, **few), msgpack.unpackb(value, **few)) is not None
    except (ValueError, TypeError, msgpack.UnpackException):
        return False
