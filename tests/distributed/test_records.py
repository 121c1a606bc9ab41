"""Announcements are read as a stranger's word: what does not fit is passed over, and nothing raises."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_lens.distributed.network.records import Announcement, announced, may_be_kept, read_record

PEER = "12D3KooWSDoCAofrZc2bysLM1WbuvujxsPhdtRtyU1vTJvwpagEQ"
OTHER = "QmTvBbd4gJ2BZYLumDChjCoDuwRyjhvaaDRAWiWuLqu7kZ"
GOOD: dict[str, Any] = {
    "blocks": [1, 3],
    "state": "serving",
    "seconds_per_block": 0.5,
    "load": 2,
    "version": "0.1.0",
}
UIDS = [f"m.{layer}" for layer in range(4)]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=6),
    max_leaves=10,
)
BAD = [
    {"blocks": [3, 1]},
    {"blocks": [1, 1]},
    {"blocks": [-1, 2]},
    {"blocks": [1, 5]},
    {"blocks": [1]},
    {"blocks": [True, 3]},
    {"blocks": [1.0, 3]},
    {"blocks": (1, 3)},
    {"blocks": "13"},
    {"state": "best"},
    {"state": ["serving"]},
    {"seconds_per_block": float("nan")},
    {"seconds_per_block": -0.1},
    {"seconds_per_block": "0"},
    {"load": float("inf")},
    {"load": 1e7},
    {"load": True},
    {"version": "x" * 65},
    {"version": "\x1b[2J"},
    {"version": None},
    {"more": 1},
]


def test_what_is_announced_is_read() -> None:
    assert read_record(PEER, GOOD, 4) == Announcement(PEER, range(1, 3), "serving", 0.5, 2.0, "0.1.0")
    for state in ("draining", "gone"):
        assert read_record(OTHER, {**GOOD, "state": state}, 4).state == state
    assert read_record(PEER, Announcement(PEER, range(0, 4)).record(), 4) == Announcement(PEER, range(0, 4))


@pytest.mark.parametrize("change", BAD, ids=str)
def test_what_does_not_fit_is_passed_over(change: dict[str, Any]) -> None:
    assert read_record(PEER, {**GOOD, **change}, 4) is None


@pytest.mark.parametrize("peer", ["", "x", PEER + " ", PEER[:-1] + "0", PEER * 2, 7, None, PEER.encode()])
def test_peers_that_are_none(peer: Any) -> None:
    assert read_record(peer, GOOD, 4) is None


@given(anything, anything, st.sampled_from([*GOOD, None]))
def test_nothing_raises(peer: Any, value: Any, name: str | None) -> None:
    read_record(peer, value, 4)
    record = value if name is None else {**GOOD, name: value}
    found = read_record(PEER, record, 4)
    assert found is None or (0 <= found.blocks.start < found.blocks.stop <= 4 and found.load >= 0)
    rows = announced({"m.1": {PEER: (record, 9.0)}}, UIDS)
    assert all(1 in row.blocks for row in rows)


def test_the_latest_word_of_a_server_counts() -> None:
    later = {**GOOD, "load": 7}
    found = {
        "m.1": {PEER: (GOOD, 10.0), OTHER: ({**GOOD, "blocks": [0, 2]}, 5.0)},
        "m.2": {PEER: (later, 11.0)},
        "m.3": {OTHER: ({**GOOD, "blocks": [0, 2]}, 99.0)},  # not a block of its span
        "x.0": {OTHER: (later, 99.0)},
    }
    assert [(row.peer, row.blocks, row.load) for row in announced(found, UIDS)] == [
        (OTHER, range(0, 2), 2.0),
        (PEER, range(1, 3), 7.0),
    ]
    found["m.1"][PEER] = ({**GOOD, "state": "gone"}, 12.0)
    assert [row.peer for row in announced(found, UIDS)] == [OTHER]
    found["m.1"][OTHER] = ({**GOOD, "blocks": [0, 2], "state": "draining"}, 6.0)
    assert [row.state for row in announced(found, UIDS)] == ["draining"]


def test_what_is_kept_for_others() -> None:
    peer, value = msgpack.packb(PEER), msgpack.packb(GOOD)
    assert may_be_kept(peer, value)
    assert not may_be_kept(msgpack.packb(None), value)  # would take the place of everybody's records
    assert not may_be_kept(b"", value)
    assert not may_be_kept(peer, b"")
    assert not may_be_kept(peer, value + b"\x00")
    assert not may_be_kept(peer, msgpack.packb({**GOOD, "version": "x" * 600}))
    assert not may_be_kept(peer, msgpack.packb({**GOOD, "blocks": list(range(9))}))
    assert not may_be_kept(peer, b"\xdd\xff\xff\xff\xff")  # an array that says it has 2**32 - 1 parts


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_any_bytes_may_come(peer: bytes, value: bytes) -> None:
    assert not may_be_kept(peer, value)
