"""Hostile pieces of calls: an exchange never raises, holds no more than it may, and an honest call comes through."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distributed.test_frames import bytes_held
from transformer_lens.distributed.network.frames import (
    FETCH,
    MAGIC,
    PING,
    REPLY,
    REQUEST,
    SEND,
    Call,
    Exchange,
    FrameError,
    FrameRefused,
    Room,
    conversation,
)

ROOM = Room(message=64, receiving=96, receiving_all=160, answers=128, answers_all=256, kept=64, calls=3, seconds=60)
PIECE = 16
SIZES = st.integers(0, 80) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1])
SECONDS = st.sampled_from([20.0, 0.0, -1.0, float("nan"), float("inf"), 1e300])
CALLS = st.integers(0, 4).map(lambda n: bytes([n]) * 16)
FRAMES = st.binary(max_size=70) | st.builds(
    lambda wanted, call, total, offset, seconds, data: REQUEST.pack(MAGIC, wanted, call, total, offset, seconds) + data,
    st.sampled_from([SEND, SEND, SEND, FETCH, PING, 3, 255]),
    CALLS,
    SIZES,
    SIZES | st.sampled_from([0, 0, 16, 32]),
    st.just(20.0) | SECONDS,
    st.binary(max_size=20),
)
PEERS = st.sampled_from(["eve", "mallory", "trudy", "honest2"])


@settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    hostile=st.lists(st.tuples(PEERS, FRAMES, st.integers(0, 40)), max_size=40),
    message=st.binary(min_size=1, max_size=64),
)
def test_an_exchange_under_attack(hostile: list[tuple[str, bytes, int]], message: bytes) -> None:
    now = [0.0]
    exchange = Exchange(ROOM, PIECE, clock=lambda: now[0])
    waiting = iter(hostile)

    def attack(times: int) -> None:
        for _, (peer, frame, size) in zip(range(times), waiting, strict=False):
            now[0] += 0.25
            found = exchange.take(peer, frame)
            if isinstance(found, Call):
                assert len(found.message) == found.total <= ROOM.message
                exchange.finish(found, b"a" * (size + 1))
                found = exchange.part(found, 0)
            assert found[:4] == MAGIC and len(found) <= REPLY.size + max(PIECE, 2000)
            declared = {
                name: sum(c.have for c in calls.values() if c.answer is None)
                for name, calls in exchange.of_peer.items()
            }
            assert all(held <= ROOM.receiving for held in declared.values())
            assert bytes_held(exchange, peer) <= ROOM.receiving + ROOM.answers
            assert bytes_held(exchange) <= ROOM.receiving_all + ROOM.answers_all
            assert all(len(calls) <= 2 * ROOM.calls for calls in exchange.of_peer.values())

    talk = conversation(message, 20.0, most=64, piece=PIECE, call=b"h" * 16)
    frame = next(talk)
    try:
        while True:
            attack(3)
            found = exchange.take("honest", frame)
            if isinstance(found, Call):
                attack(3)
                exchange.finish(found, found.message[::-1])
                found = exchange.part(found, 0)
            frame = talk.send(found)
    except StopIteration as done:
        ended = done.value == message[::-1]
    except FrameRefused as error:
        ended = error.retry  # no room now, which the honest client is told
    assert ended
    attack(99)
    now[0] += ROOM.seconds + 1
    exchange.forget()
    assert bytes_held(exchange) == 0 and not exchange.of_peer


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    replies=st.lists(
        st.binary(max_size=60)
        | st.builds(
            lambda status, total, offset, data: REPLY.pack(MAGIC, status, total, offset) + data,
            st.integers(0, 6),
            SIZES,
            SIZES | st.sampled_from([0, 16, 32]),
            st.binary(max_size=40),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_a_conversation_with_a_hostile_server(replies: list[bytes]) -> None:
    """It ends with an answer of at most `most` bytes, or with an error of its own."""
    talk: Any = conversation(b"x" * 40, 20.0, most=50, piece=PIECE)
    next(talk)
    answer, told = b"", ""
    try:
        for reply in replies:
            assert len(talk.send(reply)) <= REQUEST.size + PIECE
    except StopIteration as done:
        answer = done.value
    except (FrameError, FrameRefused) as error:
        told = str(error)
    assert len(answer) <= 50 and len(told) <= 2200
