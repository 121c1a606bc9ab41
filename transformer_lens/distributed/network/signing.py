"""Signed announcements: what is kept under a peer id was written by whoever has the key that the id is the hash of.

On the wire a value is msgpack of the record, the public key and a signature. Needs the extra `[swarm]`.
"""

from __future__ import annotations

import hashlib
from typing import Any

from transformer_lens.distributed.network.records import may_be_kept

MAX_BYTES = 2048
"""Of a record with its key and signature; a key of 2048 bits and its signature have 550."""


def sign(identity: bytes, place: bytes, peer: bytes, record: bytes, ends: float) -> bytes:
    """A record with the signature of a peer's key, as its identity file holds it."""
    import msgpack
    from cryptography.hazmat.primitives import serialization
    from hivemind.proto import crypto_pb2

    key: Any = serialization.load_der_private_key(crypto_pb2.PrivateKey.FromString(identity).data, password=None)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(serialization.Encoding.DER, form)
    signature = key.sign(_text(place, peer, record, ends), *_scheme())
    return bytes(msgpack.packb([record, public, signature]))


def signed(place: bytes, peer: bytes, value: bytes, ends: float) -> bytes | None:
    """The record in a value, if the owner of this peer id has signed it for this place and time; else `None`.

    >>> signed(b"", b"", b"anything", 0.0) is None
    True
    """
    import msgpack

    if len(value) > MAX_BYTES:
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
    """What is signed: an old record cannot be given a longer life, or be put under another block."""
    import msgpack

    return bytes(msgpack.packb(["transformer_lens.announcement.1", place, peer, record, ends]))


def validator(base: type[Any], identity: bytes | None) -> Any:
    """For hivemind's table: this peer keeps and believes announcements that their owners signed, and no others."""

    class Announcements(base):
        def sign_value(self, record: Any) -> bytes:
            if identity is None:
                return bytes(record.value)
            return sign(identity, record.key, record.subkey, record.value, record.expiration_time)

        def validate(self, record: Any) -> bool:
            found = signed(record.key, record.subkey, record.value, record.expiration_time)
            return found is not None and may_be_kept(record.subkey, found)

        def strip_value(self, record: Any) -> bytes:
            return signed(record.key, record.subkey, record.value, record.expiration_time) or b""

    return Announcements()
