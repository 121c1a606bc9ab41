"""Calls that are cut into pieces arrive whole, run once, and a server holds no more than it has room for."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_lens.distributed.network.frames import (
    ANSWER,
    FETCH,
    MAGIC,
    MORE,
    PONG,
    REPLY,
    REQUEST,
    SEND,
    Call,
    Exchange,
    FrameError,
    FrameRefused,
    Room,
    conversation,
    ping,
    pong,
    refused,
)

ID = bytes(range(16))
ROOM = Room(message=100, receiving=150, receiving_all=250, answers=120, answers_all=200, kept=30, calls=4, seconds=10)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def exchange_of(piece: int = 10, room: Room = ROOM, about: bytes = b"here") -> tuple[Exchange, Clock]:
    clock = Clock()
    return Exchange(room, piece, clock, lambda: about), clock


def send(offset: int, data: bytes, total: int, call: bytes = ID, seconds: float = 5.0) -> bytes:
    return REQUEST.pack(MAGIC, SEND, call, total, offset, seconds) + data


def fetch(offset: int, call: bytes = ID) -> bytes:
    return REQUEST.pack(MAGIC, FETCH, call, 0, offset, 5.0)


def read(reply: bytes | Call) -> tuple[int, int, int, bytes]:
    assert isinstance(reply, bytes)
    _, status, total, offset = REPLY.unpack_from(reply)
    return status, total, offset, reply[REPLY.size :]


def refusal(reply: bytes | Call) -> FrameRefused:
    """The refusal in a reply, as a client reads it."""
    assert isinstance(reply, bytes)
    with pytest.raises(FrameRefused) as caught:
        pong(reply)
    return caught.value


def bytes_held(exchange: Exchange, peer: str | None = None) -> int:
    """The bytes of messages and answers that it holds, for one peer or for all."""
    calls = [call for calls in exchange.of_peer.values() for call in calls.values()]
    return sum(call.have + len(call.answer or b"") for call in calls if peer in (None, call.peer))


def called(exchange: Exchange, message: bytes, answer: bytes, peer: str = "me", call: bytes = ID) -> Call:
    """A call that was sent in one piece, and answered."""
    found = exchange.take(peer, send(0, message, len(message), call))
    assert isinstance(found, Call)
    exchange.finish(found, answer)
    return found


# -- both sides together ---------------------------------------------------------------------------


@given(
    message=st.binary(min_size=1, max_size=100),
    answer=st.binary(min_size=1, max_size=100),
    pieces=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    lost=st.lists(st.sampled_from(["request", "reply", "twice", ""]), max_size=30),
)
def test_a_call_arrives_whole_and_runs_once_whatever_is_lost_or_repeated(message, answer, pieces, lost) -> None:
    exchange, _ = exchange_of(max(pieces))
    faults = list(lost)
    ran: list[bytes] = []

    def deliver(frame: bytes) -> bytes:
        found = exchange.take("me", frame)
        if isinstance(found, bytes):
            return found
        if found.answer is None:
            ran.append(found.message)
            exchange.finish(found, answer)
        return exchange.part(found, 0)

    def converse() -> Generator[bytes, bytes, None]:
        found.append((yield from conversation(message, 5, most=100, piece=pieces[0])))

    found: list[bytes] = []
    talk = converse()
    frame = next(talk, None)
    while frame is not None:
        fault = faults.pop() if faults else ""
        if fault == "request":
            continue  # the client tries the same piece again
        reply = deliver(frame)
        if fault == "reply":
            continue
        if fault == "twice":
            assert deliver(frame) == reply
        try:
            frame = talk.send(reply)
        except StopIteration:
            break
    assert found == [answer]
    assert ran == [message]


@given(st.binary(max_size=200))
def test_a_server_answers_any_bytes_and_holds_nothing_for_them(frame: bytes) -> None:
    exchange, _ = exchange_of()
    assert isinstance(exchange.take("me", frame), bytes)
    assert bytes_held(exchange) == 0 and not exchange.of_peer


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.sampled_from([SEND, FETCH, 9]),
            st.integers(0, 2),
            st.integers(0, 120),
            st.integers(0, 120),
            st.sampled_from([5.0, 0.0, -1.0, float("nan"), float("inf")]),
            st.integers(0, 12),
            st.floats(0, 6),
            st.integers(0, 120),
        ),
        max_size=60,
    )
)
def test_whatever_peers_send_the_budgets_hold(frames) -> None:
    exchange, clock = exchange_of()
    for peer, wanted, call, total, offset, seconds, size, later, answer in frames:
        clock.now += later
        frame = REQUEST.pack(MAGIC, wanted, bytes([call]) * 16, total, offset, seconds) + b"x" * size
        found = exchange.take(peer, frame)
        if isinstance(found, Call):
            assert found.peer == peer and len(found.message) == found.total <= ROOM.message
            if found.answer is None and answer:
                exchange.finish(found, b"y" * answer)
        for one, calls in exchange.of_peer.items():
            waiting = [held for held in calls.values() if not held.fetched]
            assert len(waiting) <= ROOM.calls
            assert sum(held.total for held in waiting if held.have < held.total) <= ROOM.receiving
            assert sum(len(held.answer or b"") for held in calls.values()) <= max(ROOM.answers, answer), one
        everyone = [held for calls in exchange.of_peer.values() for held in calls.values()]
        assert sum(held.have for held in everyone) <= ROOM.receiving_all + 12
        assert sum(len(held.answer or b"") for held in everyone) <= max(ROOM.answers_all, answer)
    clock.now += ROOM.seconds + 1
    exchange.forget()
    assert not exchange.of_peer


# -- the client's side -----------------------------------------------------------------------------


def reply(status: int, total: int = 0, offset: int = 0, data: bytes = b"") -> bytes:
    return REPLY.pack(MAGIC, status, total, offset) + data


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        ([b""], "not one of this protocol"),
        ([b"TLF9" + bytes(40)], "not one of this protocol"),
        ([reply(MORE, offset=4)], "after 5 of 8 bytes the server answered out of turn"),
        ([reply(ANSWER, 1, 0, b"y")], "after 5 of 8 bytes the server answered out of turn"),
        ([reply(PONG, offset=5)], "out of turn"),
        ([reply(MORE, offset=5), reply(MORE, offset=8)], "after 8 of 8 bytes the server answered out of turn"),
        ([reply(MORE, offset=5), reply(ANSWER, 21, 0, b"y")], "the answer has 21 bytes, and at most 20 are read"),
        ([reply(MORE, offset=5), reply(ANSWER, 0)], "a piece of the answer does not follow the 0 of 0"),
        ([reply(MORE, offset=5), reply(ANSWER, 9)], "a piece of the answer does not follow the 0 of 9"),
        ([reply(MORE, offset=5), reply(ANSWER, 9, 1, b"y")], "does not follow the 0 of 9"),
        ([reply(MORE, offset=5), reply(ANSWER, 2, 0, b"yyy")], "does not follow the 0 of 2"),
        ([reply(MORE, offset=5), reply(ANSWER, 9, 0, b"yyy"), reply(ANSWER, 9, 0, b"yyy")], "follow the 3 of 9"),
        ([reply(MORE, offset=5), reply(ANSWER, 9, 0, b"yyy"), reply(ANSWER, 8, 3, b"yyy")], "follow the 3 of 9"),
        ([reply(MORE, offset=5), reply(ANSWER, 9, 0, b"yyy"), reply(MORE, 9, 3, b"yyy")], "follow the 3 of 9"),
    ],
)
def test_answers_that_are_none(replies: list[bytes], error: str) -> None:
    talk = conversation(b"12345678", 5, most=20, piece=5)
    next(talk)
    for one in replies[:-1]:
        talk.send(one)
    with pytest.raises(FrameError, match=error):
        talk.send(replies[-1])


@pytest.mark.parametrize("retry", [True, False])
def test_a_refusal_has_the_servers_words(retry: bool) -> None:
    talk = conversation(b"12345678", 5, most=20, piece=5)
    next(talk)
    with pytest.raises(FrameRefused, match="not now") as caught:
        talk.send(refused("not now", retry))
    assert caught.value.retry is retry
    assert len(str(refusal(refused("y" * 5000, retry)))) == 2000
    assert str(refusal(refused("", retry) + b"\xff")) == "�"


def test_a_ping_brings_what_the_server_tells() -> None:
    exchange, _ = exchange_of(about=b"well")
    found = exchange.take("me", ping())
    assert isinstance(found, bytes) and pong(found) == b"well"
    with pytest.raises(FrameError, match="a ping was answered with something else"):
        pong(reply(MORE))
    assert not exchange.of_peer


# -- the server's side -----------------------------------------------------------------------------


def test_pieces_out_of_place_are_refused_and_the_call_goes_on() -> None:
    exchange, _ = exchange_of()
    missing = refusal(exchange.take("me", send(3, b"345", 9)))
    assert "whose beginning is not here" in str(missing) and missing.retry
    assert read(exchange.take("me", send(0, b"012", 9))) == (MORE, 0, 3, b"")
    for offset, data, total in ((4, b"4", 9), (3, b"345", 8), (3, b"3456789", 9), (3, b"", 9), (3, b"x" * 11, 90)):
        wrong = refusal(exchange.take("me", send(offset, data, total)))
        assert f"a piece of {len(data)} bytes at {offset} of {total} does not follow the 3 of 9" in str(wrong)
        assert not wrong.retry
    assert read(exchange.take("me", send(0, b"xxx", 9)))[2] == 3  # a repeated piece changes nothing
    assert refusal(exchange.take("you", send(3, b"345", 9))).retry  # another peer's call of this id
    assert refusal(exchange.take("me", fetch(0))).retry
    assert read(exchange.take("me", send(3, b"345", 9)))[2] == 6
    found = exchange.take("me", send(6, b"678", 9))
    assert isinstance(found, Call) and found.message == b"012345678"
    assert exchange.take("me", send(6, b"678", 9)) is found  # while it runs
    assert read(exchange.take("me", send(0, b"012", 9)))[0] == MORE
    exchange.finish(found, b"yes")
    assert read(exchange.take("me", send(6, b"678", 9))) == (ANSWER, 3, 0, b"yes")
    assert refusal(exchange.take("you", fetch(0))).retry
    assert refusal(exchange.take("me", fetch(3))).retry


def test_sizes_are_checked_before_anything_is_kept() -> None:
    exchange, _ = exchange_of()
    large = refusal(exchange.take("me", send(0, b"x", 101)))
    assert "the message has 101 bytes, and at most 100 are read" in str(large) and not large.retry
    assert "0 bytes" in str(refusal(exchange.take("me", send(0, b"x", 0))))
    assert refusal(exchange.take("me", send(0, b"x", 2**64 - 1))) and not exchange.of_peer
    assert "a piece of 11 bytes at 0 of 20" in str(refusal(exchange.take("me", send(0, b"x" * 11, 20))))
    assert not exchange.of_peer  # pieces have at most 10 bytes here
    assert read(exchange.take("me", send(0, b"x", 100, b"a" * 16)))[0] == MORE
    busy = refusal(exchange.take("me", send(0, b"x", 51, b"b" * 16)))
    assert "this peer has messages of 100 bytes under way" in str(busy) and busy.retry
    assert read(exchange.take("me", send(0, b"x", 50, b"b" * 16)))[0] == MORE
    assert read(exchange.take("you", send(0, b"x", 100, b"b" * 16)))[0] == MORE


def test_a_message_that_is_whole_is_not_under_way() -> None:
    exchange, _ = exchange_of(piece=100)
    assert isinstance(exchange.take("me", send(0, b"x" * 100, 100, b"a" * 16)), Call)
    assert read(exchange.take("me", send(0, b"x", 100, b"b" * 16)))[0] == MORE


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_small_pieces_take_no_more_memory_than_large_ones(size: int) -> None:
    exchange, total = Exchange(piece=1000), 40_000
    frames = (send(offset, b"x" * size, total + 1) for offset in range(0, total, size))
    asked, talk = 0, conversation(b"q", 5, most=total + 1)
    next(talk)
    tracemalloc.start()
    try:
        for frame in frames:
            exchange.take("me", frame)
        assert bytes_held(exchange) == total
        assert tracemalloc.get_traced_memory()[0] < 1.5 * total
        for offset in range(0, total, size):
            asked = REQUEST.unpack_from(talk.send(reply(ANSWER, total + 1, offset, b"y" * size)))[4]
        assert asked == total
        assert tracemalloc.get_traced_memory()[0] < 3 * total
    finally:
        tracemalloc.stop()


def test_all_peers_together_have_a_limit() -> None:
    exchange, _ = exchange_of(piece=100)
    for peer in "abc":
        assert read(exchange.take(peer, send(0, b"x" * 80, 100)))[0] == MORE
    full = refusal(exchange.take("d", send(0, b"x" * 80, 100)))
    assert "too many messages are on their way" in str(full) and full.retry
    assert "d" not in exchange.of_peer and bytes_held(exchange) == 240
    assert bytes_held(exchange, "a") == 80


def test_calls_of_a_peer_have_a_limit() -> None:
    exchange, _ = exchange_of()
    for number in range(4):
        assert read(exchange.take("me", send(0, b"x", 2, bytes([number]) * 16)))[0] == MORE
    full = refusal(exchange.take("me", send(0, b"x", 2, b"z" * 16)))
    assert "this peer has 4 calls under way, as many as it may" in str(full) and full.retry
    assert isinstance(exchange.take("me", send(1, b"x", 2, bytes(16))), Call)


def test_what_nobody_asks_for_is_forgotten_in_time() -> None:
    exchange, clock = exchange_of()
    exchange.take("me", send(0, b"x", 2))
    running = exchange.take("you", send(0, b"x", 1))
    assert isinstance(running, Call)
    running.task = "being computed"
    clock.now += 9
    called(exchange, b"q", b"answer", "she")
    clock.now += 2
    exchange.forget()
    assert set(exchange.of_peer) == {"you", "she"}
    assert refusal(exchange.take("me", send(1, b"x", 2))).retry
    clock.now += 100
    exchange.forget()
    assert set(exchange.of_peer) == {"you"}
    exchange.finish(running, b"late")
    assert read(exchange.take("you", fetch(0)))[3] == b"late"


def test_answers_have_budgets_and_fetched_ones_go_first() -> None:
    exchange, clock = exchange_of(piece=100)
    calls = []
    for number in range(4):
        clock.now += 1
        calls.append(called(exchange, b"q", bytes([number]) * 40, call=bytes([number]) * 16))
    assert [call.call[0] for call in exchange.of_peer["me"].values()] == [1, 2, 3]  # 120 bytes at most
    exchange.part(calls[2], 0)
    assert [call.call[0] for call in exchange.of_peer["me"].values()] == [1, 3]  # it was fetched, and is over `kept`
    clock.now += 1
    called(exchange, b"q", b"y" * 20, call=b"s" * 16)
    exchange.part(exchange.of_peer["me"][b"s" * 16], 0)
    assert read(exchange.take("me", send(0, b"q", 1, b"s" * 16)))[3] == b"y" * 20  # asked for again
    called(exchange, b"q", b"y" * 100, "you", b"t" * 16)
    assert (
        bytes_held(exchange) - sum(call.have for calls in exchange.of_peer.values() for call in calls.values()) <= 200
    )
    assert b"t" * 16 in exchange.of_peer["you"]


def test_a_deadline_is_counted_from_the_last_piece() -> None:
    exchange, clock = exchange_of()
    exchange.take("me", send(0, b"x", 2, seconds=5))
    clock.now += 3
    found = exchange.take("me", send(1, b"x", 2, seconds=2))
    assert isinstance(found, Call) and found.deadline == clock.now + 2
    for seconds in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        assert "has no time" in str(refusal(exchange.take("me", send(0, b"x", 2, b"n" * 16, seconds))))


def test_the_layout_on_the_wire_is_this() -> None:
    frame = next(conversation(b"hello", 2.5, most=9, call=ID))
    assert frame == b"TLF1\x01" + ID + struct.pack("<QQd", 5, 0, 2.5) + b"hello"
    assert refused("no", retry=False) == b"TLF1\x03" + struct.pack("<QQ", 0, 0) + b"no"
    assert refused("no", retry=True)[4] == 4
