"""Whose call runs next on a server: one at a time, the peers in turn, so that many calls of one delay its own alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformer_lens.distributed.protocol.messages import FullError, Limits
from transformer_lens.distributed.server.sessions import has_room


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
            return len(self._calls())

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
                self._leave(call)
                self._changed.notify_all()

    def finish(self) -> None:
        """Wait until no call waits or runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queues)

    def _calls(self) -> list[Call]:
        return [call for queue in self._queues.values() for call in queue]

    def _check(self, call: Call) -> None:
        everyone, limits = self._calls(), self.limits
        mine = [one for one in everyone if one.peer == call.peer]
        if not has_room(1, len(mine), limits.calls, len(everyone), limits.calls_of_all):
            raise FullError(f"{len(mine)} calls of this peer and {len(everyone)} of all wait or run, and no more may")
        sizes = sum(one.size for one in mine), sum(one.size for one in everyone)
        if not has_room(call.size, sizes[0], limits.waiting, sizes[1], limits.waiting_of_all):
            raise FullError(f"{sizes[0]} bytes of this peer and {sizes[1]} of all wait or run, and no more may")

    def _first(self) -> Call:
        return next(iter(self._queues.values()))[0]

    def _leave(self, call: Call) -> None:
        had_turn = self._first() is call
        queue = self._queues[call.peer]
        queue.remove(call)
        if had_turn or not queue:
            del self._queues[call.peer]
        if had_turn and queue:
            self._queues[call.peer] = queue  # behind those of all other peers
