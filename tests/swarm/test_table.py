"""The table of announcements under attack: bombs for its parser, records of strangers, too many, for too long."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.swarm.processes import Server, Servers
from transformer_lens.distributed import AutoDistributedConfig, AutoDistributedModelForCausalLM
from transformer_lens.distributed.network.node import Node, need_engine, peer_of
from transformer_lens.distributed.network.records import (
    LONGEST_LIFE,
    MAX_RECORDS_EACH,
    MAX_SERVERS,
    Announcement,
    Table,
    announced,
    read_record,
)

LISTEN = "/ip4/127.0.0.1/tcp/0"
TUPLE, DICTIONARY = 0x40, 0x50
"""hivemind's extension types."""


def bomb(levels: int, code: int = TUPLE) -> bytes:
    """Extension types inside one another; 200 levels of tuples are 714 bytes."""
    data = bytes(msgpack.packb(None))
    for _ in range(levels):
        data = bytes(msgpack.packb(msgpack.ExtType(code, data)))
    return data


UPSTREAM = """
import sys
from hivemind.utils.serializer import MSGPackSerializer
try:
    MSGPackSerializer.loads(bytes.fromhex(sys.argv[1]))
except Exception:
    pass
"""


def test_hivemind_itself_still_dies_of_it() -> None:
    """Pins the fault of hivemind 1.1.12: once this fails, `bounded` in network/records.py can go."""
    found = subprocess.run([sys.executable, "-c", UPSTREAM, bomb(400).hex()], capture_output=True, check=False)
    assert found.returncode == -signal.SIGSEGV
    assert subprocess.run([sys.executable, "-c", UPSTREAM, bomb(20).hex()], capture_output=True).returncode == 0


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with closing(Servers(tmp_path)) as found:
        yield found


Records = list[tuple[bytes, bytes, bytes, float]]
"""Place, peer, value and end of each."""


def store(node: Node, server: Server, records: Records) -> list[bool]:
    """Ask a server to keep raw bytes; whether it says it did, for each, or nothing if it could not read them."""
    engine = need_engine()
    from hivemind.proto import dht_pb2

    async def call() -> list[bool]:
        keys, subkeys, values, ends = map(list, zip(*records, strict=True))
        request = dht_pb2.StoreRequest(
            keys=keys, subkeys=subkeys, values=values, expiration_time=ends, in_cache=[False] * len(keys)
        )
        stub = node._dht.protocol.get_stub(engine.p2p.PeerID.from_base58(server.peer))
        try:
            return list((await stub.rpc_store(request, timeout=60)).store_ok)
        except engine.p2p.p2p_daemon_bindings.utils.P2PHandlerError:
            return []

    return node.wait(call())


def is_there(server: Server) -> bool:
    with closing(Node([server.address])) as node:
        return node.ping(server.peer, 20)[0] > 0


def test_a_bomb_does_not_end_a_server(servers: Servers, tmp_path: Path) -> None:
    me = tmp_path / "me.key"
    server = servers.start("tiny-falcon", "0:4", "--allow", peer_of(me))
    with closing(Node([server.address])) as stranger:
        for payload in (bomb(400), bomb(400, DICTIONARY), bomb(20_000), bomb(1, 0x51), b"\xc1" * 99, b""):
            ends = time.time() + 60
            assert not any(store(stranger, server, [(bytes(20), b"", payload, ends)]))
            assert not any(store(stranger, server, [(bytes(20), payload, b"x", ends)]))
    with closing(Node([server.address], identity=me)) as node:
        assert node.ping(server.peer, 20)[1]
    assert server.process.poll() is None


class Exploding:
    """What a hostile peer packs its answers with."""

    @staticmethod
    def dumps(_: object) -> bytes:
        return bomb(400)


def test_a_bomb_in_an_answer_does_not_end_those_who_ask(servers: Servers) -> None:
    config = AutoDistributedConfig.from_pretrained("tiny-falcon", dht_prefix="bombed")
    uids = [config.block_uid(layer) for layer in range(4)]
    with closing(Node(listen=LISTEN)) as hostile:
        assert hostile.store(uids, Announcement(hostile.peer, range(0, 4)).record(), 600)
        hostile._dht.protocol.serializer = Exploding
        server = servers.start("tiny-falcon", "0:4", "--prefix", "bombed", peers=hostile.addresses[:1])
        assert server.address  # it asked the hostile peer where to announce itself
        asked = subprocess.run(
            [
                *(sys.executable, "-m", "transformer_lens", "status", "tiny-falcon", "--prefix", "bombed"),
                *("--initial-peers", hostile.addresses[0], "--initial-peers", server.address),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert asked.returncode in (0, 1), asked.stderr
        assert server.process.poll() is None and is_there(server)


def test_the_list_of_peers_covers_the_table(servers: Servers, tmp_path: Path) -> None:
    mine, friend = tmp_path / "mine.key", tmp_path / "friend.key"
    options = ("--prefix", "listed", "--identity", str(mine), "--allow", peer_of(friend))
    server = servers.start("tiny-falcon", "0:2", *options)
    with (
        closing(Node([server.address], listen=LISTEN)) as stranger,
        closing(Node([server.address], listen=LISTEN, identity=friend, allow=[peer_of(mine)])) as known,
        closing(Node([server.address])) as client,
    ):
        for node in (stranger, known):
            node.store(["listed.2", "listed.3"], Announcement(node.peer, range(2, 4)).record(), 60)
        stranger.close()  # it keeps its own
        uids = [f"listed.{layer}" for layer in range(4)]
        found = announced(client.wait(client.found(uids)), uids)
    assert {row.peer for row in found} == {server.peer, known.peer}


def test_records_have_a_life_and_a_number() -> None:
    now, record = 1e9, msgpack.packb
    table = Table(None, most=3, most_each=2, clock=lambda: now)
    for ends in (now + LONGEST_LIFE + 1, float("inf"), float("nan")):
        assert not table.has_room(b"a", record("x"), ends)
    assert table.has_room(b"a", record("x"), now + 9) and table.has_room(b"b", record("x"), now + 9)
    assert not table.has_room(b"c", record("x"), now + 9)  # two are one peer's share
    assert table.has_room(b"a", record("y"), now + 99)
    assert not table.has_room(b"b", record("y"), now + 9)  # three are all
    assert table.has_room(b"a", record("x"), now + 50)  # another one in its place
    now += 20
    assert table.has_room(b"b", record("y"), now + 9)  # one of the three has ended
    assert not Table({"z"}).has_room(b"a", record("x"), time.time() + 1)
    assert Table({"x"}).has_room(b"a", record("x"), time.time() + 1)


def test_a_server_keeps_few_records_of_one_peer_and_none_for_years(servers: Servers) -> None:
    server = servers.start("tiny-falcon", "0:4", "--prefix", "small")
    with closing(Node([server.address], listen=LISTEN)) as node:
        value = Announcement(node.peer, range(0, 1)).record()
        from hivemind.dht.crypto import DHTRecord
        from hivemind.dht.routing import DHTID

        def record(nth: int, seconds: float) -> tuple[bytes, bytes, bytes, float]:
            key, subkey, ends = DHTID.generate(f"x.{nth}").to_bytes(), msgpack.packb(node.peer), time.time() + seconds
            made = DHTRecord(key, subkey, msgpack.packb(value), ends)
            return key, subkey, node._dht.protocol.record_validator.sign_value(made), ends

        assert store(node, server, [record(0, 10 * 365 * 86400)]) == [False]
        kept = store(node, server, [record(nth, 600) for nth in range(MAX_RECORDS_EACH + 20)])
        assert kept == [True] * MAX_RECORDS_EACH + [False] * 20
    assert is_there(server)


def test_sixty_fake_announcements_do_not_lock_a_client_out(servers: Servers, tmp_path: Path) -> None:
    """Of peers that nobody can reach, each with a key of its own, as an attacker would make them."""
    server = servers.start("tiny-falcon", "0:4", "--prefix", "crowded")
    uids = [f"crowded.{layer}" for layer in range(4)]
    keys = [tmp_path / f"{number}.key" for number in range(60)]
    with closing(Node([server.address], listen=LISTEN)) as node:
        own = (node.peer, node._identity)
        for key in keys:
            node.peer = peer_of(key)
            node._dht.protocol.record_validator = validator_of(key.read_bytes())
            assert node.store(uids, Announcement(node.peer, range(0, 4)).record(), 600)
        node.peer, _ = own
    began = time.monotonic()
    model = AutoDistributedModelForCausalLM.from_pretrained(
        "tiny-falcon", initial_peers=[server.address], dht_prefix="crowded", max_retries=2
    )
    with model:
        assert len(model._swarm.known()) == 61
        with torch.no_grad():
            model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=2)
    assert time.monotonic() - began < 60


def validator_of(identity: bytes) -> Any:
    from transformer_lens.distributed.network.records import validator

    return validator(need_engine().dht.validation.RecordValidatorBase, identity)


# -- random bytes and records ----------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=9) | st.binary(max_size=9), inner, max_size=4)
        | st.builds(msgpack.ExtType, st.sampled_from([TUPLE, DICTIONARY, 0x51, 7]), inner.map(msgpack.packb))
    ),
    max_leaves=12,
)
"""Anything that msgpack holds, with hivemind's extension types inside one another."""
READ = (ValueError, TypeError, AttributeError, msgpack.UnpackException, OverflowError)
"""What hivemind catches around its parser."""


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200) | VALUES.map(msgpack.packb))
@example(bomb(400))
@example(bomb(400, DICTIONARY))
@example(msgpack.packb([[] for _ in range(MAX_SERVERS + 1)]))
def test_any_bytes_may_be_read(data: bytes) -> None:
    engine = need_engine()
    serializer = engine.dht.protocol.DHTProtocol.serializer
    try:
        found = serializer.loads(data)
    except READ:
        return
    kinds = (engine.dht.storage.DictionaryDHTValue, type(None), bool, int, float, str, bytes, list, dict)
    assert isinstance(found, (*kinds, msgpack.Timestamp))


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=70) | st.just("1" * 40), VALUES, st.dictionaries(st.text(max_size=9), VALUES, max_size=6))
def test_any_announcement_may_come(peer: str, value: Any, fields: dict[str, Any]) -> None:
    good = Announcement("1" * 40, range(0, 2)).record()
    for record in (value, fields, {**good, **fields}, *({**good, name: value} for name in good)):
        found = read_record(peer, record, 4)
        assert found is None or (found.blocks.stop <= 4 and found.peer == peer)
        rows = announced({"a.0": {peer: (record, 1.0)}, "a.1": {peer: (record, 2.0)}}, ["a.0", "a.1"])
        assert all(0 <= row.blocks.start < row.blocks.stop <= 2 for row in rows)
