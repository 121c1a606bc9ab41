"""Sessions of a server: the keys and values of texts that are being generated, with a budget for each peer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformer_lens.distributed.messages import Limits


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


class Sessions:
    """The sessions of every peer. Raises `ValueError` where a peer is at the end of its budget."""

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
        self.expire()
        sessions = self.of_peer.setdefault(peer, {})
        if name not in sessions:
            if len(sessions) >= self.limits.sessions:
                raise ValueError(f"this peer has {len(sessions)} sessions, as many as it may; close one, or wait")
            sessions[name] = make()
        sessions[name].used = self.clock()
        return sessions[name]

    def check_room(self, peer: str, session: Session, positions: int) -> None:
        """Raise unless the peer's keys and values may grow by these positions."""
        held = sum(s.length * s.rows * s.bytes_per_position for s in self.of_peer[peer].values())
        more = positions * session.rows * session.bytes_per_position
        if held + more > self.limits.session_bytes:
            raise ValueError(
                f"keys and values of this peer would take {held + more} bytes, and it may have "
                f"{self.limits.session_bytes}"
            )

    def drop(self, peer: str, name: str) -> None:
        """Forget a session, on whichever of the blocks; its memory is free at once."""
        sessions = self.of_peer.get(peer, {})
        for found in [found for found in sessions if found == name or found.startswith(f"{name}:")]:
            del sessions[found]
        if not sessions:
            self.of_peer.pop(peer, None)
