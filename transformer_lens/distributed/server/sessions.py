"""What each peer may take of a server: its turn, and sessions, the keys and values of texts that are being generated.

Each peer has a budget, and all of them together have one, of which nobody gets more than is left for the others.
Calls run one at a time, the peers in turn, so that many calls of one delay its own alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformer_lens.distributed.protocol.messages import FullError, Limits


def has_room(more: int, mine: int, most: int, everyone: int, most_of_all: int) -> bool:
    """Whether a peer that has `mine` of what `everyone` has may have `more`.

    Beside its own limit, it may have as much as is left for the others: one peer alone half of it all, two equal ones
    a third each. So somebody new always finds room, until very many have come.

    >>> has_room(1, mine=49, most=100, everyone=49, most_of_all=100)
    True
    >>> has_room(1, mine=50, most=100, everyone=50, most_of_all=100)
    False
    >>> has_room(50, mine=0, most=100, everyone=50, most_of_all=100)
    True
    """
    return mine + more <= min(most, most_of_all - everyone)


@dataclass
class Session:
    """One text: its cache, how many positions that holds, and the last answer in case it has to be given again."""

    cache: Any
    bytes_per_position: int
    """Of one row."""
    rows: int
    length: int = 0
    used: float = 0
    last: tuple[bytes, bytes] | None = None

    def held(self) -> int:
        """Bytes of its keys and values."""
        return self.length * self.rows * self.bytes_per_position

    def kept(self) -> int:
        """Bytes of its last answer."""
        return len(self.last[1]) if self.last else 0


class Sessions:
    """The sessions of every peer. Raises `FullError` at the end of a budget."""

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
        """The session of this name, made if it is new."""
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
        """Bytes of the keys and values of a peer, or of all."""
        return sum(session.held() for session in self._sessions(peer))

    def kept(self, peer: str | None = None) -> int:
        """Bytes of the answers that are kept for a peer, or for all."""
        return sum(session.kept() for session in self._sessions(peer))

    def check_room(self, peer: str, session: Session, positions: int) -> None:
        """Raise unless the peer's keys and values may grow by these positions."""
        held, more = self.held(peer), positions * session.rows * session.bytes_per_position
        if held + more > self.limits.session_bytes:
            raise FullError(
                f"keys and values of this peer would take {held + more} bytes, and it may have "
                f"{self.limits.session_bytes}"
            )
        if not has_room(more, held, self.limits.session_bytes, self.held(), self.limits.session_bytes_of_all):
            raise FullError(
                f"keys and values of this peer would take {held + more} bytes, and all peers have {self.held()} of "
                f"{self.limits.session_bytes_of_all}; a peer may have as much as is left"
            )

    def keep(self, peer: str, session: Session, digest: bytes, answer: bytes) -> None:
        """Keep an answer in place of the session's last one, if it fits; without it, the client starts again."""
        session.last = None
        limits = self.limits
        if has_room(len(answer), self.kept(peer), limits.kept, self.kept(), limits.kept_of_all):
            session.last = digest, answer

    def drop(self, peer: str, name: str) -> None:
        """Forget a session, on whichever of the blocks; its memory is free at once."""
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
    """A call that waits or runs, and the bytes of its message."""

    peer: str
    size: int


class CallQueue:
    """Calls of every peer. Raises `FullError` at the end of a budget.

    >>> queue = CallQueue(Limits(calls=1))
    >>> with queue.turn("one", 100):
    ...     queue.load()
    1
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._changed = threading.Condition()
        self._queues: dict[str, deque[Call]] = {}
        """The call that runs is the first of the first peer."""

    def load(self) -> int:
        """Calls that wait or run."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    @contextmanager
    def turn(self, peer: str, size: int) -> Iterator[None]:
        """Wait until it is this call's turn, which it is inside."""
        call = Call(peer, size)
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
