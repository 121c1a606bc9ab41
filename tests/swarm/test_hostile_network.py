"""Hostile peers over real libp2p: raw pieces of calls, floods, half-sent messages, a peer that is on no list."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.hostile import seeds
from tests.swarm.processes import Servers
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedConfig, AutoDistributedModelForCausalLM
from transformer_lens.distributed.network import frames
from transformer_lens.distributed.network.frames import (
    ANSWER,
    FETCH,
    MAGIC,
    MORE,
    NOT_NOW,
    REFUSED,
    REPLY,
    REQUEST,
    SEND,
    Room,
)
from transformer_lens.distributed.network.node import Node, peer_of
from transformer_lens.distributed.protocol.messages import Limits, Request, pack_request, unpack_reply

PROMPT = torch.tensor([[1, 5, 7, 9, 30, 12]])
MESSAGES = [pack_request(request) for request in seeds(experts=True)]


def status_of(node: Node, peer: str, frame: bytes) -> int:
    """What a raw piece is answered with."""
    reply = node.wait(node._once(peer, frame, 20, 20))
    assert reply[:4] == MAGIC
    return int(REPLY.unpack_from(reply)[1])


def piece(wanted: int, call: bytes, total: int, offset: int, seconds: float = 20.0, data: bytes = b"") -> bytes:
    return REQUEST.pack(MAGIC, wanted, call, total, offset, seconds) + data


def noise() -> list[bytes]:
    """Pieces that no client sends; every one is refused."""
    call = os.urandom(16)
    most = Limits().message
    wrong = [b"", b"\0", MAGIC, b"TLB1" * 20, os.urandom(200), MAGIC + os.urandom(200)[:40], bytes(3 * 2**20)]
    wrong += [piece(SEND, call, total, 0, data=b"x") for total in (0, most + 1, 2**63, 2**64 - 1)]
    wrong += [piece(SEND, call, 9, offset, data=b"x") for offset in (1, 8, 9, 2**64 - 1)]
    wrong += [piece(SEND, call, 9, 0, s, b"x") for s in (0.0, -1.0, float("nan"), float("inf"), 1e300)]
    wrong += [piece(SEND, call, 2, 0, data=b"xyz"), piece(SEND, call, 2, 0), piece(77, call, 9, 0, data=b"x")]
    wrong += [piece(FETCH, call, 9, offset) for offset in (0, 1, 2**64 - 1)]
    return wrong


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server, an honest model on it that may call, and keys of others who may, too."""
    folder = tmp_path_factory.mktemp("hostile")
    servers = Servers(folder)
    keys = [folder / f"{who}.key" for who in ("honest", "eve", "mallory")]
    allowed = [text for key in keys for text in ("--allow", peer_of(key))]
    server = servers.start("tiny-falcon", "0:4", "--prefix", "hostile", *allowed)
    config = AutoDistributedConfig.from_pretrained("tiny-falcon", initial_peers=[server.address], dht_prefix="hostile")
    yield server, config, keys
    servers.close()


def generate_between(config: Any, key: Path, attack: Any) -> None:
    """An honest client's text, with an attack before each of its tokens, is what one process makes."""
    from transformer_lens.distributed.client.swarm import Swarm

    local = TransformerBridge.boot_transformers("tiny-falcon").original_model
    swarm = Swarm(config, identity=key)
    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", config=config, spans=swarm)

    def between(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        attack()
        return scores

    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    found = model.generate(PROMPT, logits_processor=[between], **options)
    assert torch.equal(found, local.generate(PROMPT, **options))
    model.close()
    swarm.close()


def test_raw_pieces_of_a_peer_that_may_call(world: Any) -> None:
    server, config, (honest, eve, other) = world
    node = Node([server.address], identity=eve)
    statuses: list[int] = []

    def attack() -> None:
        statuses.extend(status_of(node, server.peer, frame) for frame in noise())
        for message in MESSAGES:
            whole = piece(SEND, os.urandom(16), len(message), 0, data=message)
            assert status_of(node, server.peer, whole) == ANSWER

    for nth in range(Room().calls + 3):  # half-sent messages, of which the rest never comes
        found = status_of(node, server.peer, piece(SEND, os.urandom(16), 999, 0, data=b"x"))
        assert found == (MORE if nth < Room().calls else NOT_NOW)
    node.close()
    node = Node([server.address], identity=other)
    generate_between(config, honest, attack)
    assert len(statuses) > 100 and set(statuses) <= {REFUSED, NOT_NOW}
    assert "Traceback" not in server.log
    assert server.process.poll() is None
    node.close()


def test_a_flood(world: Any) -> None:
    server, config, (honest, _, mallory) = world
    node = Node([server.address], identity=mallory)
    big = pack_request(Request("forward", 0, 4, tensors={"stream": torch.randn(16, 200, 128)}))
    statuses: list[bytes] = []

    def flood(_: int) -> None:
        try:
            statuses.append(node.call(server.peer, big, 20))
        except RuntimeError as error:
            statuses.append(str(error).encode())

    with ThreadPoolExecutor(16) as threads:
        running: list[Any] = []
        generate_between(config, honest, lambda: running.extend(threads.submit(flood, n) for n in range(12)))
    assert len(statuses) == len(running) >= 90
    answers = [unpack_reply(found, Limits()) for found in statuses if found[:4] == b"TLB1"]
    assert any(answer.tensors for answer in answers)
    assert all(answer.tensors or answer.info.get("retry") == "full" for answer in answers)
    assert any(answer.error.startswith("FullError") for answer in answers)
    assert server.process.poll() is None
    node.close()


def test_a_peer_that_is_on_no_list(world: Any) -> None:
    server, config, (honest, *_) = world
    node = Node([server.address])
    statuses: list[int] = []

    def attack() -> None:
        whole = [piece(SEND, os.urandom(16), len(message), 0, data=message) for message in MESSAGES]
        statuses.extend(status_of(node, server.peer, frame) for frame in [*noise(), *whole, frames.ping()])

    generate_between(config, honest, attack)
    assert len(statuses) > 200 and set(statuses) <= {REFUSED, NOT_NOW}
    node.close()
