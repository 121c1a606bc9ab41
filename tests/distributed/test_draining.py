"""What a server tells of itself, calls whose time is over, and a server that leaves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from transformer_lens.distributed import Limits, SpanServer
from transformer_lens.distributed.protocol.messages import Reply, Request, pack_request, unpack_reply

STREAM = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def server() -> Iterator[SpanServer]:
    found = SpanServer("tiny-falcon", range(1, 3))
    yield found
    found.close()


def asked(server: SpanServer, kind: str, deadline: float | None = None, **fields: Any) -> Reply:
    tensors = {} if kind in ("info", "close") else {"stream": STREAM}
    message = pack_request(Request(kind, 1, 3, tensors=tensors, **fields))
    return unpack_reply(server.handle(message, "me", deadline), Limits())


def test_what_a_server_tells_of_itself(server: SpanServer) -> None:
    told = asked(server, "info").info
    assert (told["state"], told["sessions"], told["kv_bytes"], told["seconds_per_block"]) == ("serving", 0, 0, 0)
    assert told["kv_bytes_free"] == Limits().session_bytes_of_all
    begin = time.perf_counter()
    asked(server, "step", session="a")
    took = time.perf_counter() - begin
    told = server.info()
    each = 2 * 2 * server.bridge.cfg.n_key_value_heads * server.bridge.cfg.d_head * 4  # keys and values, 2 blocks
    assert (told["sessions"], told["kv_bytes"]) == (1, 2 * 5 * each)
    assert told["kv_bytes_free"] == Limits().session_bytes_of_all - told["kv_bytes"]
    assert 0 < told["seconds_per_block"] <= took / 2
    assert told["load"] == 0
    asked(server, "close", session="a")
    assert (server.info()["sessions"], server.info()["kv_bytes"]) == (0, 0)
    assert told["version"]


def test_nothing_is_computed_after_its_time(server: SpanServer) -> None:
    reply = asked(server, "step", time.monotonic() - 0.001, session="a")
    assert "waited longer for its turn than its time limit" in reply.error
    assert reply.info["retry"]
    assert server.info()["sessions"] == 0
    assert not asked(server, "step", time.monotonic() + 60, session="a").error


def test_a_server_that_leaves_goes_on_with_its_texts_alone(server: SpanServer) -> None:
    other = SpanServer("tiny-falcon", range(1, 3))
    for each in (server, other):
        assert not asked(each, "step", session="a").error
    server.draining = True
    assert asked(server, "info").info["state"] == server.info()["state"] == "draining"
    going_on = [asked(each, "step", session="a", start=5) for each in (server, other)]
    assert torch.equal(going_on[0].tensors["stream"], going_on[1].tensors["stream"])
    for kind, fields in (("forward", {}), ("backward", {"grad": True}), ("step", {"session": "b"})):
        reply = asked(server, kind, **fields)
        assert "this server is leaving and takes nothing new" in reply.error and reply.info["retry"]
        assert "leaving" not in asked(other, kind, **fields).error
    assert server.info()["sessions"] == 1
    assert asked(server, "close", session="a").info == {"closed": "a"}
    assert server.info()["sessions"] == 0
    other.close()


def test_a_server_that_leaves_makes_no_session_for_a_later_step(server: SpanServer) -> None:
    server.draining = True
    assert asked(server, "step", session="new", start=5).error
    assert server.info()["sessions"] == 0


def test_sessions_that_ran_out_are_not_told_of() -> None:
    server = SpanServer("tiny-falcon", range(1, 3), limits=Limits(session_seconds=0.01))
    asked(server, "step", session="a")
    time.sleep(0.02)
    server.tidy()
    assert (server.info()["sessions"], server.info()["kv_bytes"]) == (0, 0)
    server.close()
