"""Which servers run which blocks: the fastest path over their spans, and bans. Pure Python: simulations run it too."""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

LONGEST_BAN = 16  # a ban doubles with every failure in a row, up to this many times `ban_timeout`


@dataclass(frozen=True)
class ServerFacts:
    """What is known of a server's speed, in seconds."""

    peer: str
    blocks: range
    latency: float = 0.0
    """The measured round trip, as a moving average."""
    seconds_per_block: float = 0.0
    """As measured and announced by the server."""
    load: float = 0.0
    """Calls that wait or run there, as announced by the server."""

    def __post_init__(self) -> None:
        for name in ("latency", "seconds_per_block", "load"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{self.peer}: {name} is {getattr(self, name)}, expected a finite number, at least 0")

    def seconds_of_block(self) -> float:
        """The expected time of one block, taking turns with `load` other calls."""
        return self.seconds_per_block * (1 + self.load)

    def seconds(self, first: int, end: int) -> float:
        """The expected time of a call: one round trip, and its turn at each block."""
        return self.latency + (end - first) * self.seconds_of_block()


class Hop(NamedTuple):
    """One call of a path: a server, and which of its blocks it runs."""

    peer: str
    first: int
    end: int


class NoPath(LookupError):
    """No server that may be asked has some blocks."""

    def __init__(self, missing: list[int], banned: dict[str, float], known: Collection[str]) -> None:
        self.missing = missing
        self.banned = banned  # banned servers with these blocks, and the seconds left
        text = f"no server that may be asked has the blocks {missing}"
        if banned:
            waits = ", ".join(f"{peer} for {seconds:.1f} s" for peer, seconds in banned.items())
            text += f"; left out after failures: {waits}"
        super().__init__(f"{text}; {len(known)} servers are known{': ' if known else ''}{', '.join(sorted(known))}")


def best_path(
    servers: Iterable[ServerFacts], first: int, end: int, banned: Mapping[str, float] | None = None
) -> list[Hop]:
    """The path through blocks `first` to `end` with the least expected time.

    >>> servers = [ServerFacts("a", range(0, 3), 0.01, 0.001), ServerFacts("b", range(2, 4), 0.02, 0.002)]
    >>> best_path(servers, 0, 4)
    [Hop(peer='a', first=0, end=3), Hop(peer='b', first=3, end=4)]

    A hop may be any part of a server's span, and costs `ServerFacts.seconds`. Ties go to fewer hops, then to peer names
    in order, whatever the order of `servers`. `banned` maps excluded peers to the seconds left. Raises `NoPath`.
    """
    banned = banned or {}
    everybody = list(servers)
    asked = [server for server in everybody if server.peer not in banned]
    # Staying on a server costs a fixed sum per block, so one sweep over the blocks, which keeps the best way to be on
    # each server, finds the same path as a search over all pairs of boundaries.
    arrived: _Way = (0.0, 0, ())
    riding: dict[int, _Way] = {}
    for layer in range(first, end):
        here: dict[int, _Way] = {}
        for number, server in enumerate(asked):
            if layer not in server.blocks:
                continue
            seconds, hops, path = arrived
            entered = (seconds + server.latency, hops + 1, (*path, (server.peer, layer)))
            way = min(entered, riding[number]) if number in riding else entered
            here[number] = (way[0] + server.seconds_of_block(), way[1], way[2])
        if not here:
            held = {layer for server in asked for layer in server.blocks}
            missing = [layer for layer in range(first, end) if layer not in held]
            helpful = {s.peer: banned[s.peer] for s in everybody if s.peer in banned and set(missing) & set(s.blocks)}
            raise NoPath(missing, helpful, {server.peer for server in everybody})
        riding, arrived = here, min(here.values())
    starts = [*arrived[2], ("", end)]
    return [Hop(peer, begin, stop) for (peer, begin), (_, stop) in itertools.pairwise(starts)]


_Way = tuple[float, int, tuple[tuple[str, int], ...]]  # seconds and hops so far; the peer and first block of each hop


def permitted(settings: Any, peer: str) -> bool:
    """Whether `allowed_servers` and `blocked_servers` permit this peer."""
    allowed, blocked = settings.allowed_servers, settings.blocked_servers or ()
    return peer not in blocked and (allowed is None or peer in allowed)


class Health:
    """Bans of peers that failed lately, longer with each failure in a row, and waiting times, by `ClientSettings`."""

    def __init__(self, settings: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self.clock = settings, clock
        self.failures: dict[str, int] = {}  # each peer's failures in a row
        self.proven: set[str] = set()  # peers that answered a call
        self._until: dict[str, float] = {}

    def failed(self, peer: str) -> None:
        """Ban a peer after a failed call."""
        self.failures[peer] = self.failures.get(peer, 0) + 1
        times = min(2 ** (self.failures[peer] - 1), LONGEST_BAN)
        self._until[peer] = self.clock() + self.settings.ban_timeout * times

    def succeeded(self, peer: str) -> None:
        """Forget a peer's failures after a successful call."""
        self.proven.add(peer)
        self.failures.pop(peer, None)
        self._until.pop(peer, None)

    def banned(self) -> dict[str, float]:
        """The banned peers, and the seconds left."""
        now = self.clock()
        return {peer: until - now for peer, until in self._until.items() if until > now}

    def backoff(self, nth: int) -> float:
        """The seconds to wait before the `nth` retry (from 1) for lack of another server."""
        return float(min(self.settings.max_backoff, self.settings.min_backoff * 2.0 ** min(nth - 1, 64)))

    def longest(self, request_timeout: float) -> float:
        """The most seconds a call may take, with every attempt and every wait."""
        waits = range(1, self.settings.max_retries + 1)
        return (len(waits) + 1) * request_timeout + sum(map(self.backoff, waits))
