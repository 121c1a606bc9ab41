"""A server's announcements: which blocks it has, under each block's uid and its own peer id.

They are untrusted: malformed ones are skipped, and a client asks the server itself before it sends anything. A value
under a peer id is signed with the key that the id is the hash of, which needs the extra `[swarm]`.
"""

import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

STATES = ("serving", "draining", "gone")  # `gone` replaces a record until it would have expired
LIVES = 2.5  # a record's lifetime in announcing periods, so that one lost announcement does no harm
MAX_BYTES = 512
LONGEST_LIFE = 3600.0  # seconds after which every record has to be announced anew
MAX_SERVERS = 4096  # the most servers of one model that a client considers, and of one block that are read
MAX_RECORDS = 2**14  # the most records that a server keeps for others, of at most 2 KiB each
MAX_RECORDS_EACH = 512  # the most of one peer: one for each of its blocks
PEER = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,64}")  # a libp2p peer id in base 58
FIELDS = ("blocks", "state", "seconds_per_block", "load", "version")


@dataclass(frozen=True)
class Announcement:
    """A server as it announced itself."""

    peer: str
    blocks: range
    state: str = "serving"
    seconds_per_block: float = 0.0
    load: float = 0.0
    version: str = ""

    def record(self) -> dict[str, Any]:
        values = ([self.blocks.start, self.blocks.stop], self.state, self.seconds_per_block, self.load, self.version)
        return dict(zip(FIELDS, values, strict=True))


def read_record(peer: Any, value: Any, n_layers: int | None = None) -> Announcement | None:
    """The announcement in a record; `None` if malformed."""
    if not isinstance(peer, str) or not PEER.fullmatch(peer):
        return None
    if not isinstance(value, dict) or set(value) != set(FIELDS):
        return None
    blocks, state, *speeds, version = (value[name] for name in FIELDS)
    fits = (
        isinstance(blocks, list)
        and [type(end) for end in blocks] == [int, int]
        and 0 <= blocks[0] < blocks[1] <= (2**15 if n_layers is None else n_layers)
        and state in STATES
        and all(type(speed) in (int, float) and 0 <= speed <= 1e6 for speed in speeds)
        and isinstance(version, str)
        and len(version) <= 64
        and version.isprintable()
    )
    return Announcement(peer, range(*blocks), state, float(speeds[0]), float(speeds[1]), version) if fits else None


def announced(found: Mapping[str, Mapping[Any, Any]], uids: Iterable[str]) -> list[Announcement]:
    """The latest announcement of each of a model's servers. `found`: uid -> peer id -> (record, expiry)."""
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


def overview(model: str, config: Any, servers: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything known of a model's servers, and the blocks that none of them serves, as plain data."""
    layers = range(config.num_hidden_layers)
    serving = [range(*server["blocks"]) for server in servers if server["state"] == "serving"]
    missing = [layer for layer in layers if not any(layer in blocks for blocks in serving)]
    about = {"model": model, "dht_prefix": config.dht_prefix, "n_layers": len(layers)}
    return {**about, "servers": servers, "missing": missing}


def may_be_kept(peer: bytes, value: bytes) -> bool:
    """Whether a value that a peer wants stored is the record of an announcement, in msgpack."""
    import msgpack

    if len(peer) > MAX_BYTES or len(value) > MAX_BYTES:
        return False
    few = {"max_array_len": 8, "max_map_len": 8, "max_ext_len": 0}
    try:
        return read_record(msgpack.unpackb(peer, **few), msgpack.unpackb(value, **few)) is not None
    except (ValueError, TypeError, msgpack.UnpackException):
        return False


SIGNED_BYTES = 2048  # the most bytes of a record with key and signature; a 2048-bit key and its signature take 550


def sign(identity: bytes, place: bytes, peer: bytes, record: bytes, ends: float) -> bytes:
    """A record signed with the key of an identity file."""
    import msgpack
    from cryptography.hazmat.primitives import serialization
    from hivemind.proto import crypto_pb2

    key: Any = serialization.load_der_private_key(crypto_pb2.PrivateKey.FromString(identity).data, password=None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(serialization.Encoding.DER, form)
    signature = key.sign(_text(place, peer, record, ends), *_scheme())
    return bytes(msgpack.packb([record, public, signature]))


def signed(place: bytes, peer: bytes, value: bytes, ends: float) -> bytes | None:
    """The record in a value if the peer's owner signed it for this place and time; else `None`."""
    import msgpack

    if len(value) > SIGNED_BYTES:
        return None
    try:
        record, public, signature = msgpack.unpackb(value, max_array_len=3, max_map_len=0, max_ext_len=0)
        known = all(isinstance(part, bytes) for part in (record, public, signature))
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    if not known or peer != msgpack.packb(peer_of_key(public)):
        return None
    return record if _verifies(public, signature, _text(place, peer, record, ends)) else None


def peer_of_key(public: bytes) -> str:
    """The peer id of an RSA key in DER: libp2p's hash of it."""
    from hivemind.p2p import PeerID
    from hivemind.proto import crypto_pb2

    key = crypto_pb2.PublicKey(key_type=crypto_pb2.RSA, data=public).SerializeToString()
    return str(PeerID(b"\x12\x20" + hashlib.sha256(key).digest()).to_base58())


def _verifies(public: bytes, signature: bytes, text: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    try:
        key = serialization.load_der_public_key(public)
        if not isinstance(key, RSAPublicKey):
            return False
        key.verify(signature, text, *_scheme())
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _scheme() -> tuple[Any, Any]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    return padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH), hashes.SHA256()


def _text(place: bytes, peer: bytes, record: bytes, ends: float) -> bytes:
    """The signed text, so that an old record can neither live longer nor move to another block."""
    import msgpack

    return bytes(msgpack.packb(["transformer_lens.announcement.1", place, peer, record, ends]))


@dataclass
class Table:
    """Which records a server keeps for others: whose, how many, and for how long."""

    allow: Collection[str] | None = None  # peers whose records are kept; `None` means all
    most: int = MAX_RECORDS
    most_each: int = MAX_RECORDS_EACH
    clock: Callable[[], float] = time.time
    kept: dict[tuple[bytes, bytes], float] = field(default_factory=dict)  # place and peer -> when it ends

    def has_room(self, place: bytes, peer: bytes, ends: float) -> bool:
        """Whether a record is kept, and counts from now on; one that replaces an earlier one always is."""
        import msgpack

        now = self.clock()
        if not ends <= now + LONGEST_LIFE or not (self.allow is None or msgpack.unpackb(peer) in self.allow):
            return False  # an expired one, which another clock may not know as such, ends by itself
        if (place, peer) not in self.kept:
            if len(self.kept) >= self.most:
                self.kept = {record: end for record, end in self.kept.items() if end >= now}
            if len(self.kept) >= self.most or sum(of == peer for _, of in self.kept) >= self.most_each:
                return False
        self.kept[place, peer] = ends
        return True


def validator(base: type[Any], identity: bytes | None, table: Table | None = None) -> Any:
    """A validator for hivemind's table that accepts only announcements signed by their owners; and room in `table`."""

    class Announcements(base):
        def sign_value(self, record: Any) -> bytes:
            if identity is None:
                return bytes(record.value)
            return sign(identity, record.key, record.subkey, record.value, record.expiration_time)

        def validate(self, record: Any) -> bool:
            known = may_be_kept(record.subkey, self.strip_value(record))
            return known and (table is None or table.has_room(record.key, record.subkey, record.expiration_time))

        def strip_value(self, record: Any) -> bytes:
            return signed(record.key, record.subkey, record.value, record.expiration_time) or b""

    return Announcements()


def bounded(serializer: type[Any], dictionary: type[Any]) -> type[Any]:
    """hivemind's serializer, reading no more than the records of one block.

    Its own follows extension types inside extension types in C, before any validator sees them: some hundred bytes from
    a stranger end the process. `dictionary` is what it keeps the records of one place in, as extension type 0x50.
    """
    import msgpack

    few = {"max_array_len": MAX_SERVERS, "max_map_len": 8, "max_str_len": MAX_BYTES, "max_bin_len": SIGNED_BYTES}

    class Bounded(serializer):
        @classmethod
        def loads(cls, buf: bytes) -> Any:
            found = msgpack.unpackb(buf, raw=False, **few)  # an extension type stays bytes
            if not isinstance(found, msgpack.ExtType):
                return found
            if found.code != 0x50:
                raise ValueError(f"extension type {found.code:#x}, and no record holds one")
            _, latest, items = msgpack.unpackb(found.data, raw=False, max_ext_len=0, **few)
            records = dictionary()
            with records.freeze():
                for key, value, ends in items:
                    records.store(key, value, ends)
            records.latest_expiration_time = latest
            return records

    return Bounded
