"""Hundreds of servers that come and go, and clients that generate over them, on a clock that is computed.

`python -m benchmarks.swarm_simulation [file.json]`. Clients choose by the package's own `best_path` and `Health`;
what calls cost is `benchmarks/swarm_costs.py`. Two baselines: without bans, and with a random server for each stretch.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.swarm_costs import FALCON_180B, hop_seconds
from transformer_lens.distributed import ServerFacts
from transformer_lens.distributed.client.routing import Health, Hop, NoPath, best_path
from transformer_lens.distributed.protocol.configs import ClientSettings

Process = Generator[float, None, None]
"""Yields the seconds until it wants to go on."""
Policy = Callable[[list[ServerFacts], int, int, dict[str, float], random.Random], list[Hop]]


@dataclass(frozen=True)
class World:
    """What is simulated. Times are in seconds; the ranges are drawn from evenly."""

    servers: int = 300
    clients: int = 40
    seconds: float = 600.0
    lifetime: float = 1800.0
    """Mean time until a server dies, exponentially distributed."""
    away: float = 600.0
    """Mean time until it is back, with empty caches."""
    silent: float = 0.1
    """The part of deaths after which calls run into their time limit; after the others they fail at once."""
    span: tuple[int, int] = (8, 24)
    latency: tuple[float, float] = (0.01, 0.15)
    """Round trips, for each client and server."""
    seconds_per_block: tuple[float, float] = (0.0015, 0.005)
    seconds_per_further_position: float = 0.0001
    """Of a prompt, for each block."""
    bandwidth: float = 12.5e6
    """Bytes a second of each connection."""
    prompt: int = 64
    tokens: int = 64
    pause: float = 5.0
    """Between two texts of a client, on average."""
    announced: float = 30.0
    """How often a server announces itself, with its load."""
    expires: float = 60.0
    """How long a dead server is listed."""
    failed_call: float = 0.08
    """How long after a server's death a pending call fails (measured: 0.01 to 0.08)."""
    request_timeout: float = 15.0
    ban_timeout: float = 15.0
    max_retries: int = 5
    seed: int = 0


class Server:
    """One server's life, drawn beforehand, and its queue."""

    def __init__(self, world: World, peer: str, rng: random.Random) -> None:
        size = rng.randint(*world.span)
        # As if drawn over more blocks than there are: else hardly anybody would have the first and the last.
        first = min(max(0, rng.randint(1 - size, FALCON_180B.n_layers - 1)), FALCON_180B.n_layers - size)
        self.peer, self.blocks = peer, range(first, first + size)
        self.seconds_per_block = rng.uniform(*world.seconds_per_block)
        self.lives: list[tuple[float, float, bool]] = []
        """From when until when it is there, and whether it then falls silent."""
        at = 0.0 if rng.random() < world.lifetime / (world.lifetime + world.away) else rng.expovariate(1 / world.away)
        while at < world.seconds:
            end = at + rng.expovariate(1 / world.lifetime)
            self.lives.append((at, end, rng.random() < world.silent))
            at = end + rng.expovariate(1 / world.away)
        self.busy = 0.0
        self._free = 0.0
        self._ends: list[float] = []
        self._load, self._told = 0, float("-inf")

    def life(self, now: float) -> tuple[float, float, bool] | None:
        """The life it is in."""
        return next((life for life in self.lives if life[0] <= now < life[1]), None)

    def listed(self, now: float, expires: float) -> bool:
        """Whether it is there, or its record has not expired."""
        return any(begin <= now < end + expires for begin, end, _ in self.lives)

    def load(self, now: float, every: float) -> int:
        """The load that it announced last."""
        if now - self._told >= every:
            self._ends = [end for end in self._ends if end > now]
            self._load, self._told = len(self._ends), now
        return self._load

    def serve(self, arrival: float, work: float) -> float:
        """When a call is done; calls are served in the order in which they were sent."""
        self._free = max(self._free, arrival) + work
        self.busy += work
        self._ends.append(self._free)
        return self._free


@dataclass
class Counts:
    """What happened to the clients."""

    done: int = 0
    failed: int = 0
    generating: float = 0.0
    failures: int = 0
    recovering: float = 0.0
    per_client: dict[int, list[float]] = field(default_factory=dict)
    """Tokens and seconds."""


class Simulation:
    """Events in the order of their time."""

    def __init__(self, world: World, policy: Policy, bans: bool) -> None:
        self.world, self.policy, self.bans = world, policy, bans
        rng = random.Random(world.seed)
        self.servers = {f"s{n:03}": Server(world, f"s{n:03}", rng) for n in range(world.servers)}
        self.now = 0.0
        self.counts = Counts()
        self._events: list[tuple[float, int, Process]] = []
        for number in range(world.clients):
            self._events.append((rng.uniform(0, world.pause), number, Client(self, number).live()))
        heapq.heapify(self._events)

    def run(self) -> dict[str, Any]:
        """All of it; what came out."""
        while self._events[0][0] < self.world.seconds:
            self.now, number, process = heapq.heappop(self._events)
            heapq.heappush(self._events, (self.now + next(process), number, process))
        return self._report()

    def _report(self) -> dict[str, Any]:
        counts, world = self.counts, self.world
        speeds = [tokens / seconds for tokens, seconds in counts.per_client.values() if seconds]
        there = [sum(min(end, world.seconds) - begin for begin, end, _ in s.lives) for s in self.servers.values()]
        shares = [s.busy / seconds for s, seconds in zip(self.servers.values(), there, strict=True) if seconds]
        moments = [world.seconds * n / 200 for n in range(200)]
        fewest = [min(self._replicas(moment)) for moment in moments]
        return {
            "texts": counts.done + counts.failed,
            "success": counts.done / max(1, counts.done + counts.failed),
            "tokens_per_second": statistics.median(speeds) if speeds else 0.0,
            "failures": counts.failures,
            "seconds_of_a_recovery": counts.recovering / max(1, counts.failures),
            "share_of_time_recovering": counts.recovering / max(1e-9, counts.generating),
            "mean_busy": statistics.fmean(shares),
            "spread_of_busy": statistics.pstdev(shares) / max(1e-9, statistics.fmean(shares)),
            "covered": statistics.fmean(few > 0 for few in fewest),
            "fewest_replicas": statistics.fmean(fewest),
        }

    def _replicas(self, moment: float) -> list[int]:
        found = [0] * FALCON_180B.n_layers
        for server in self.servers.values():
            if server.life(moment) is not None:
                for layer in server.blocks:
                    found[layer] += 1
        return found


class Lost(Exception):
    """A text that was given up."""


@dataclass
class Leg:
    """Blocks of a text on one server, and how many of its chunks that holds."""

    hop: Hop
    held: int = 0
    since: float = 0.0


@dataclass
class Tries:
    """What was tried to get one token."""

    failures: int = 0
    waits: int = 0
    began: float = 0.0


class Client:
    """Generates one text after the other; goes elsewhere as a `Route` does, which would sleep where this yields."""

    def __init__(self, simulation: Simulation, number: int) -> None:
        self.sim, self.world, self.number = simulation, simulation.world, number
        self.rng = random.Random(f"{self.world.seed} {number}")
        self.latency = {peer: self.rng.uniform(*self.world.latency) for peer in simulation.servers}
        settings = ClientSettings(ban_timeout=self.world.ban_timeout, max_retries=self.world.max_retries)
        self.health = Health(settings, lambda: simulation.now)

    def live(self) -> Process:
        """Text after text."""
        counts = self.sim.counts
        mine = counts.per_client.setdefault(self.number, [0.0, 0.0])
        while True:
            begin = self.sim.now
            try:
                yield from self._text()
                counts.done += 1
                mine[0] += self.world.tokens
            except Lost:
                counts.failed += 1
            mine[1] += self.sim.now - begin
            counts.generating += self.sim.now - begin
            yield self.rng.expovariate(1 / self.world.pause)

    def _text(self) -> Process:
        chunks = [self.world.prompt, *[1] * (self.world.tokens - 1)]
        legs = yield from self._plan(0, FALCON_180B.n_layers, Tries())
        for nth in range(1, len(chunks) + 1):
            at, tries = 0, Tries()
            while at < len(legs):
                if legs[at].hop.peer in self._banned():  # by what another text met
                    yield from self._exchange(legs, at, tries)
                if (yield from self._catch_up(legs[at], chunks[:nth])):
                    at += 1
                    continue
                self.sim.counts.failures += 1
                tries.began = tries.began or self.sim.now
                tries.failures += 1
                if tries.failures > self.world.max_retries:
                    raise Lost
                yield from self._exchange(legs, at, tries)
            if tries.began:
                self.sim.counts.recovering += self.sim.now - tries.began

    def _exchange(self, legs: list[Leg], at: int, tries: Tries) -> Process:
        old = legs[at]
        found = yield from self._plan(old.hop.first, old.hop.end, tries)
        legs[at : at + 1] = [old] if [leg.hop for leg in found] == [old.hop] else found

    def _banned(self) -> dict[str, float]:
        return self.health.banned() if self.sim.bans else {}

    def _plan(self, first: int, end: int, tries: Tries) -> Generator[float, None, list[Leg]]:
        """Who runs these blocks from now on; where nobody is there, after a wait, who failed longest ago."""
        banned, rested = self._banned(), False
        while True:
            try:
                return [Leg(hop) for hop in self.sim.policy(self._known(), first, end, banned, self.rng)]
            except NoPath as error:
                if rested and error.banned:
                    del banned[min((left, peer) for peer, left in error.banned.items())[1]]
                    continue
            if tries.waits >= self.world.max_retries:
                raise Lost
            tries.waits += 1
            yield self.health.backoff(tries.waits)
            banned, rested = self._banned(), True

    def _known(self) -> list[ServerFacts]:
        now, world = self.sim.now, self.world
        return [
            ServerFacts(s.peer, s.blocks, self.latency[s.peer], s.seconds_per_block, s.load(now, world.announced))
            for s in self.sim.servers.values()
            if s.listed(now, world.expires)
        ]

    def _catch_up(self, leg: Leg, chunks: list[int]) -> Generator[float, None, bool]:
        """Send a server what it does not hold; whether it took it all."""
        server = self.sim.servers[leg.hop.peer]
        life = server.life(self.sim.now)
        if life is None or life[0] > leg.since:
            leg.held, leg.since = 0, self.sim.now  # whoever answers is another process by now
        while leg.held < len(chunks):
            seconds, answered = self._call(server, leg.hop, chunks[leg.held], sum(chunks[: leg.held]))
            yield seconds
            if not answered:
                self.health.failed(server.peer)
                return False
            leg.held += 1
        self.health.succeeded(server.peer)
        return True

    def _call(self, server: Server, hop: Hop, new: int, before: int) -> tuple[float, bool]:
        """How long a call takes, and whether it is answered."""
        now, world = self.sim.now, self.world
        latency = self.latency[server.peer]
        life = server.life(now + latency / 2)
        if life is None:
            gone = max((end, silent) for begin, end, silent in server.lives if begin <= now)
            return (world.request_timeout if gone[1] else latency), False
        each = server.seconds_per_block + (new - 1) * world.seconds_per_further_position
        done = server.serve(now + latency / 2, (hop.end - hop.first) * each)
        if done > life[1]:
            return (world.request_timeout if life[2] else life[1] + world.failed_call - now), False
        size = FALCON_180B.request_bytes(new, before) + FALCON_180B.reply_bytes(new)
        seconds = hop_seconds(latency, done - now - latency / 2, size, world.bandwidth)
        return min(seconds, world.request_timeout), seconds <= world.request_timeout


# -- policies ----------------------------------------------------------------------------------------


def best(servers: list[ServerFacts], first: int, end: int, banned: dict[str, float], _: random.Random) -> list[Hop]:
    """What the package does."""
    return best_path(servers, first, end, banned)


def anybody(
    servers: list[ServerFacts], first: int, end: int, banned: dict[str, float], rng: random.Random
) -> list[Hop]:
    """Of the servers that have the next block, one at random, to the end of its span."""
    best_path(servers, first, end, banned)  # raises where there is no path
    hops = []
    while first < end:
        chosen = rng.choice([s for s in servers if first in s.blocks and s.peer not in banned])
        hops.append(Hop(chosen.peer, first, min(end, chosen.blocks.stop)))
        first = hops[-1].end
    return hops


POLICIES: dict[str, tuple[Policy, bool]] = {
    "best path, bans": (best, True),
    "best path, no bans": (best, False),
    "random path, bans": (anybody, True),
}


def simulate(world: World, policy: str) -> dict[str, Any]:
    """One world under one policy. The same world gives the same numbers every time."""
    return Simulation(world, *POLICIES[policy]).run()


def main(arguments: Iterable[str] | None = None) -> None:
    """Print a table; write it with the world as JSON if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    for name in ("servers", "clients", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(World, name))
    for name in ("seconds", "lifetime"):
        parser.add_argument(f"--{name}", type=float, default=getattr(World, name))
    options = vars(parser.parse_args(None if arguments is None else list(arguments)))
    file = options.pop("file")
    world = World(**options)
    results = {policy: simulate(world, policy) for policy in POLICIES}
    width = max(map(len, next(iter(results.values()))))
    print(" " * width, *(f"{policy:>20}" for policy in results))
    for what in next(iter(results.values())):
        print(f"{what:{width}}", *(f"{result[what]:20.4g}" for result in results.values()))
    if file is not None:
        file.write_text(json.dumps({"world": asdict(world), "results": results}, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
