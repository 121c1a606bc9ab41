"""Calls of any size, cut into pieces that each fit one small message and its answer.

Pure bytes, without a network. `conversation` is the client's side, `Exchange` the server's: it checks declared sizes
before it stores anything, holds at most what `Room` allows, and runs a repeated call once.
"""

import math
import struct
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformer_lens.distributed.protocol.messages import Limits

PIECE = 3 * 2**20  # bytes of a piece. The engine's messages end at 4 MiB; above 1 MiB its throughput is constant.
MAGIC = b"TLF1"
REQUEST = struct.Struct("<4sB16sQQd")
"""Magic, the request kind, the call, its total bytes, this piece's offset, seconds left for the call."""
REPLY = struct.Struct("<4sBQQ")  # magic, the status, the answer's total bytes, this piece's offset (or bytes received)

PING, SEND, FETCH = range(3)
PONG, MORE, ANSWER, REFUSED, NOT_NOW = range(5)
LONGEST = 7 * 24 * 3600.0  # the longest time limit of a call, in seconds


class FrameError(ValueError):
    """A malformed or oversized answer."""


class FrameRefused(ValueError):
    """The other side rejects a piece; with `retry`, it or another may take it later."""

    def __init__(self, text: str, retry: bool) -> None:
        super().__init__(text)
        self.retry = retry


def ping() -> bytes:
    """A piece that asks whether a server is there; the answer's data describe it."""
    return REQUEST.pack(MAGIC, PING, bytes(16), 0, 0, 1.0)


def pong(reply: bytes) -> bytes:
    """A server's description of itself. Raises `FrameError` and `FrameRefused`."""
    status, _, _, data = _read_reply(reply)
    if status != PONG:
        raise FrameError("a ping was answered with something else")
    return data


def conversation(
    message: bytes, seconds: float, most: int, piece: int = PIECE, call: bytes | None = None
) -> Generator[bytes, bytes, bytes]:
    """Yield the pieces of a call, receive the answer to each, and return the answer to the whole.

    `seconds` are left for the call, `most` and `piece` are the largest answer and a piece in bytes. Raises `FrameError`
    for malformed answers, and `FrameRefused` with the server's words.
    """
    call = call or uuid.uuid4().bytes
    sent = 0
    while True:
        part = message[sent : sent + piece]
        reply = yield REQUEST.pack(MAGIC, SEND, call, len(message), sent, seconds) + part
        status, total, offset, data = _read_reply(reply)
        sent += len(part)
        if status == ANSWER and sent == len(message):
            break
        if status != MORE or offset != sent or sent == len(message):
            raise FrameError(f"after {sent} of {len(message)} bytes the server answered out of turn")
    received = bytearray()
    if total > most:
        raise FrameError(f"the answer has {total} bytes, and at most {most} are read")
    whole = total
    while True:
        have = len(received)
        if status != ANSWER or offset != have or total != whole or len(data) > total - have or not data:
            raise FrameError(f"a piece of the answer does not follow the {have} of {whole} bytes before it")
        received += data
        if len(received) == whole:
            return bytes(received)
        asked = REQUEST.pack(MAGIC, FETCH, call, whole, len(received), seconds)
        status, total, offset, data = _read_reply((yield asked))


def _read_reply(reply: bytes) -> tuple[int, int, int, bytes]:
    if len(reply) < REPLY.size or reply[:4] != MAGIC:
        raise FrameError("the answer is not one of this protocol")
    _, status, total, offset = REPLY.unpack_from(reply)
    data = bytes(memoryview(reply)[REPLY.size :])
    if status in (REFUSED, NOT_NOW):
        raise FrameRefused(data[:2000].decode("utf-8", "replace"), retry=status == NOT_NOW)
    return status, total, offset, data


@dataclass(frozen=True)
class Room:
    """What a server holds for pending calls, in bytes."""

    message: int = Limits().message  # the largest message
    receiving: int = 2 * Limits().message  # the declared size of one peer's incomplete messages
    receiving_all: int = 8 * Limits().message  # the received bytes of all peers' incomplete messages
    answers: int = Limits().answer  # one peer's unfetched answers
    answers_all: int = 4 * Limits().answer
    kept: int = 16 * 2**20  # one peer's fetched answers, kept in case it asks again
    calls: int = 32  # one peer's calls, from their first piece until the answer is fetched
    seconds: float = 60  # an incomplete message or an answer is forgotten after this long without a request


@dataclass(eq=False)
class Call:
    """One call on the server: its message as it arrives, then its answer until that is fetched."""

    peer: str
    call: bytes
    total: int
    used: float
    deadline: float = 0.0  # when the caller stops waiting, on the exchange's clock
    received: bytearray = field(default_factory=bytearray)  # one buffer: many small pieces take no more than few
    have: int = 0
    answer: bytes | None = None
    fetched: bool = False
    task: Any = None  # what computes the answer; set by the transport, and read when a call is repeated

    @property
    def message(self) -> bytes:
        return bytes(self.received)


@dataclass(eq=False)
class Exchange:
    """The calls of all peers, whose pieces may arrive in any order and repeatedly."""

    room: Room = field(default_factory=Room)
    piece: int = PIECE
    clock: Callable[[], float] = time.monotonic
    about: Callable[[], bytes] = bytes  # the answer to a ping
    of_peer: dict[str, dict[bytes, Call]] = field(default_factory=dict, init=False)

    def take(self, peer: str, frame: bytes) -> bytes | Call:
        """The answer to a piece, or the call whose answer is still to be computed."""
        try:
            if len(frame) < REQUEST.size or frame[:4] != MAGIC:
                raise FrameRefused("not a piece of this protocol", retry=False)
            _, wanted, call, total, offset, seconds = REQUEST.unpack_from(frame)
            data = bytes(memoryview(frame)[REQUEST.size :])
            if wanted == PING:
                return REPLY.pack(MAGIC, PONG, 0, 0) + self.about()
            self.forget()
            found = self.of_peer.get(peer, {}).get(call)
            if wanted == FETCH:
                if found is None or found.answer is None or offset >= len(found.answer):
                    raise FrameRefused("an answer, or a place in one, that is not here (any more)", retry=True)
                return self.part(found, offset)
            if wanted != SEND or not 0 < seconds <= LONGEST:
                raise FrameRefused("a piece that asks for nothing known, or has no time", retry=False)
            return self._receive(found or self._new(peer, call, total, offset), total, offset, seconds, data)
        except FrameRefused as error:
            return refused(str(error), error.retry)

    def finish(self, call: Call, answer: bytes) -> None:
        """Set the answer of a call, which is kept until it is fetched."""
        call.answer, call.received, call.task = answer, bytearray(), None
        call.used = self.clock()
        for most, mine in ((self.room.answers, True), (self.room.answers_all, False)):
            answered = [c for c in self._all() if c.answer is not None and (c.peer == call.peer or not mine)]
            self._make_room(answered, most)

    def part(self, call: Call, offset: int) -> bytes:
        assert call.answer is not None
        data = call.answer[offset : offset + self.piece]
        call.used = self.clock()
        call.fetched = call.fetched or offset + len(data) == len(call.answer)
        fetched = [other for other in self.of_peer.get(call.peer, {}).values() if other.fetched]
        self._make_room(fetched, self.room.kept, self.room.calls, least=0)
        return REPLY.pack(MAGIC, ANSWER, len(call.answer), offset) + data

    def drop(self, call: Call) -> None:
        calls = self.of_peer.get(call.peer, {})
        if calls.get(call.call) is call:
            del calls[call.call]
        if not calls:
            self.of_peer.pop(call.peer, None)

    def forget(self) -> None:
        """Forget what nobody asked for in time, except calls still being computed."""
        oldest = self.clock() - self.room.seconds
        for call in [call for call in self._all() if call.task is None and call.used < oldest]:
            self.drop(call)

    def unfetched(self) -> int:
        """The number of complete calls whose answer was not fetched."""
        return sum(call.have == call.total and not call.fetched for call in self._all())

    def _all(self) -> Iterator[Call]:
        return (call for calls in self.of_peer.values() for call in calls.values())

    def _new(self, peer: str, call: bytes, total: int, offset: int) -> Call:
        if offset:
            raise FrameRefused("a piece of a call whose beginning is not here (any more)", retry=True)
        if not 0 < total <= self.room.message:
            raise FrameRefused(f"the message has {total} bytes, and at most {self.room.message} are read", retry=False)
        held = [other for other in self.of_peer.get(peer, {}).values() if not other.fetched]
        if len(held) >= self.room.calls:
            raise FrameRefused(f"this peer has {len(held)} calls under way, as many as it may", retry=True)
        declared = sum(other.total for other in held if other.have < other.total)
        if declared + total > self.room.receiving:
            raise FrameRefused(f"this peer has messages of {declared} bytes under way; send them first", retry=True)
        made = Call(peer, call, total, self.clock())
        self.of_peer.setdefault(peer, {})[call] = made
        return made

    def _receive(self, call: Call, total: int, offset: int, seconds: float, data: bytes) -> bytes | Call:
        call.used = self.clock()
        fits = total == call.total and offset + len(data) <= total and data
        if not fits or len(data) > self.piece or (offset > call.have):
            if not call.have:
                self.drop(call)
            raise FrameRefused(
                f"a piece of {len(data)} bytes at {offset} of {total} does not follow the {call.have} of {call.total} "
                "that are here",
                retry=False,
            )
        if call.answer is not None:
            return self.part(call, 0)
        if offset == call.have:
            if sum(other.have for other in self._all()) + len(data) > self.room.receiving_all:
                self.drop(call)
                raise FrameRefused("too many messages are on their way to this server", retry=True)
            call.received += data
            call.have += len(data)
            call.deadline = self.clock() + seconds
        if call.have == call.total and offset + len(data) == call.total:
            return call
        return REPLY.pack(MAGIC, MORE, 0, offset + len(data))

    def _make_room(self, answered: Iterable[Call], most: int, calls: float = math.inf, least: int = 1) -> None:
        """Forget answers beyond `most` bytes or `calls`, fetched and old ones first, all but `least` of them."""
        held = sorted(answered, key=lambda call: (not call.fetched, call.used))
        total = sum(len(call.answer or b"") for call in held)
        for left, call in zip(range(len(held), least, -1), held, strict=False):
            if total > most or left > calls:
                total -= len(call.answer or b"")
                self.drop(call)


def refused(text: str, retry: bool) -> bytes:
    return REPLY.pack(MAGIC, NOT_NOW if retry else REFUSED, 0, 0) + text[:2000].encode()
