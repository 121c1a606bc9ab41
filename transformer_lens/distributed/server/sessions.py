"""What each peer may take of a server: turns, and sessions, the keys and values of texts being generated.

Each peer has a budget within a common one that leaves room for others. Calls run one at a time, peers taking turns, so
that many calls of one peer delay only its own.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformer_lens.distributed.protocol.messages import PEAK, FullError, Limits


def has_room(more: int, mine: int, most: int, everyone: int, most_of_all: int) -> bool:
    """Whether a peer that has `mine` of what `everyone` has may have `more`.

    Besides its own limit, it may have as much as is left for the others: half if alone, a third each for two equal
    peers. So a newcomer finds room, until there are very many.
    """
    return mine + more <= min(most, most_of_all - everyone)


@dataclass
class Session:
    """One text: its cache, the cache's length, and the last answer in case it is asked for again."""

    cache: Any
    bytes_per_position: int  # for one row
    rows: int
    length: int = 0
    used: float = 0
    last: tuple[bytes, bytes] | None = None

    def held(self) -> int:
        """Bytes of its keys and values."""
        return self.length * self.rows * self.bytes_per_position


class Sessions:
    """The sessions of every peer. Raises `FullError` when a budget is used up."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.clock = clock
        self.of_peer: dict[str, dict[str, Session]] = {}

    def expire(self) -> None:
        """Forget the sessions that nobody asked for in time."""
        oldest = self.clock() - self.limits.session_seconds
        for peer, sessions in list(self.of_peer.items()):
            for name in [name for name, session in sessions.items() if session.used < oldest]:
                del sessions[name]
            if not sessions:
                del self.of_peer[peer]

    def open(self, peer: str, name: str, make: Callable[[], Session]) -> Session:
        """The session of this name, made if new."""
        sessions = self.of_peer.get(peer, {})
        if name not in sessions:
            if len(sessions) >= self.limits.sessions:
                raise FullError(f"this peer has {len(sessions)} sessions, as many as it may; close one, or wait")
            everyone = sum(map(len, self.of_peer.values()))
            if not has_room(1, len(sessions), self.limits.sessions, everyone, self.limits.sessions_of_all):
                raise FullError(f"this server has {everyone} sessions, and no more for this peer; wait, or ask another")
            sessions[name] = make()
            self.of_peer[peer] = sessions
        sessions[name].used = self.clock()
        return sessions[name]

    def held(self, peer: str | None = None) -> int:
        """The bytes of keys and values of a peer, or of all."""
        return sum(session.held() for session in self._sessions(peer))

    def kept(self, peer: str | None = None) -> int:
        """The bytes of answers kept for a peer, or for all."""
        return sum(len(session.last[1]) for session in self._sessions(peer) if session.last)

    def check_room(self, peer: str, session: Session, positions: int) -> None:
        """Raise unless the peer's keys and values may grow by these positions."""
        held, more = self.held(peer), positions * session.rows * session.bytes_per_position
        told = f"keys and values of this peer would take {held + more} bytes, and"
        if held + more > self.limits.session_bytes:
            raise FullError(f"{told} it may have {self.limits.session_bytes}")
        if not has_room(more, held, self.limits.session_bytes, self.held(), self.limits.session_bytes_of_all):
            everyone = f"all peers have {self.held()} of {self.limits.session_bytes_of_all}"
            raise FullError(f"{told} {everyone}; a peer may have as much as is left")

    def keep(self, peer: str, session: Session, digest: bytes, answer: bytes) -> None:
        """Replace the session's last answer, if the new one fits; without it, the client starts again."""
        session.last, limits = None, self.limits
        if has_room(len(answer), self.kept(peer), limits.kept, self.kept(), limits.kept_of_all):
            session.last = digest, answer

    def drop(self, peer: str, name: str) -> None:
        """Forget a session, on whichever blocks, and free its memory."""
        sessions = self.of_peer.get(peer, {})
        for found in [found for found in sessions if found == name or found.startswith(f"{name}:")]:
            del sessions[found]
        if not sessions:
            self.of_peer.pop(peer, None)

    def _sessions(self, peer: str | None) -> list[Session]:
        peers = self.of_peer if peer is None else {peer: self.of_peer.get(peer, {})}
        return [session for sessions in peers.values() for session in sessions.values()]


@dataclass(eq=False)
class Call:
    """A waiting or running call, and the bytes that its message takes."""

    peer: str
    size: int


class CallQueue:
    """The calls of every peer. Raises `FullError` when a budget is used up."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._changed = threading.Condition()
        self._queues: dict[str, deque[Call]] = {}  # the running call is the first of the first peer

    def load(self) -> int:
        with self._changed:
            return sum(map(len, self._queues.values()))

    @contextmanager
    def turn(self, peer: str, size: int) -> Iterator[None]:
        """Wait for the turn of a call whose message has this size; the turn lasts as long as the block."""
        call = Call(peer, PEAK * size)
        with self._changed:
            self._check(call)
            self._queues.setdefault(peer, deque()).append(call)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._first() is call)
            yield
        finally:
            with self._changed:
                had_turn, queue = self._first() is call, self._queues[peer]
                queue.remove(call)
                if had_turn or not queue:
                    del self._queues[peer]
                if had_turn and queue:
                    self._queues[peer] = queue  # behind those of all other peers
                self._changed.notify_all()

    def finish(self) -> None:
        """Wait until no call waits or runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queues)

    def _check(self, call: Call) -> None:
        everyone, limits = [one for queue in self._queues.values() for one in queue], self.limits
        mine = [one for one in everyone if one.peer == call.peer]
        if not has_room(1, len(mine), limits.calls, len(everyone), limits.calls_of_all):
            raise FullError(f"{len(mine)} calls of this peer and {len(everyone)} of all wait or run, and no more may")
        sizes = sum(one.size for one in mine), sum(one.size for one in everyone)
        if not has_room(call.size, sizes[0], limits.waiting, sizes[1], limits.waiting_of_all):
            raise FullError(f"{sizes[0]} bytes of this peer and {sizes[1]} of all wait or run, and no more may")

    def _first(self) -> Call:
        return next(iter(self._queues.values()))[0]
