"""An announcement is believed if the owner of its peer id signed it, for this block and this time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_lens.distributed.network.node import peer_of
from transformer_lens.distributed.network.records import (
    SIGNED_BYTES,
    Announcement,
    peer_of_key,
    sign,
    signed,
    validator,
)


class Record(NamedTuple):
    """What hivemind hands a validator."""

    key: bytes
    subkey: bytes
    value: bytes
    expiration_time: float


class Owner(NamedTuple):
    identity: bytes
    peer: bytes
    record: bytes

    def put(self, **changes: Any) -> Record:
        """This peer's announcement, as it is sent."""
        plain = Record(b"place", self.peer, self.record, int(time.time()) + 100.1)._replace(**changes)
        return plain._replace(value=validator(object, self.identity).sign_value(plain))


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> list[Owner]:
    found = []
    for name in ("one", "other"):
        path = Path(tmp_path_factory.mktemp("keys")) / name
        peer = peer_of(path)
        record = msgpack.packb(Announcement(peer, range(0, 2)).record())
        found.append(Owner(path.read_bytes(), msgpack.packb(peer), record))
    return found


def believed(record: Record) -> bool:
    return bool(validator(object, None).validate(record))


def test_what_the_owner_signed_is_believed(owners: list[Owner]) -> None:
    record = owners[0].put()
    assert believed(record) and validator(object, None).strip_value(record) == owners[0].record
    assert len(record.value) < SIGNED_BYTES / 2


def test_nothing_else_is_believed(owners: list[Owner]) -> None:
    one, other = owners
    good = one.put()
    assert not believed(good._replace(key=b"elsewhere"))
    assert not believed(good._replace(expiration_time=good.expiration_time + 1))
    assert not believed(good._replace(subkey=other.peer))
    assert not believed(other.put(subkey=one.peer))  # signed, by somebody else
    assert not believed(one.put(value=msgpack.packb({"blocks": 7})))  # signed, and no announcement
    assert not believed(good._replace(value=one.record))
    assert validator(object, None).sign_value(good) == good.value  # without a key nothing is signed
    parts = msgpack.unpackb(good.value)
    for nth in range(3):
        changed = list(parts)
        changed[nth] = changed[nth][:-1] + bytes([changed[nth][-1] ^ 1])
        assert not believed(good._replace(value=msgpack.packb(changed)))
        assert not believed(good._replace(value=msgpack.packb([*parts[:nth], "text", *parts[nth + 1 :]])))
    assert not believed(good._replace(value=good.value + bytes(SIGNED_BYTES)))


def test_keys_of_another_kind(owners: list[Owner]) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    for fake in (public, b"no key"):
        peer = msgpack.packb(peer_of_key(fake))
        assert signed(b"place", peer, msgpack.packb([owners[0].record, fake, b"signed"]), 1.0) is None


@given(st.binary(max_size=64), st.lists(st.binary(max_size=9) | st.integers(-9, 9), max_size=4))
def test_any_bytes_may_come(noise: bytes, parts: list[Any]) -> None:
    assert signed(b"", noise, noise, 0.0) is None
    assert signed(b"", noise, msgpack.packb(parts), 0.0) is None


def test_the_peer_id_is_that_of_the_identity_file(owners: list[Owner]) -> None:
    for owner in owners:
        public = msgpack.unpackb(sign(owner.identity, b"", owner.peer, owner.record, 1.0))[1]
        assert msgpack.packb(peer_of_key(public)) == owner.peer
