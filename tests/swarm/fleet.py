"""Servers that stay, servers that a test kills, and one client of both, for a model and a result to compare with."""

from __future__ import annotations

import os
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from tests.swarm.forked import ForkedServers
from tests.swarm.processes import Server, daemons, wait_until
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM
from transformer_lens.distributed.client.routing import ServerFacts
from transformer_lens.distributed.client.spans import Span, ask
from transformer_lens.distributed.client.swarm import Swarm
from transformer_lens.distributed.protocol.messages import Limits, Request, unpack_reply, unpack_request

SETTINGS = {
    "ban_timeout": 0.5,
    "min_backoff": 0.1,
    "max_backoff": 1,
    "connect_timeout": 10,
    "ping_timeout": 10,
    "request_timeout": 60,
    "update_period": 600,  # only a failure makes the client look again
}
CALLS = ("forward", "backward", "step")


@dataclass(frozen=True)
class Call:
    """A call that the client is about to make."""

    peer: str
    nth: int
    """How many others this server was asked for before."""
    kind: str
    size: int
    """Bytes of the message."""


Trap = Callable[[Call], None]


class WatchedSpan:
    """A span of the swarm; a test may do something right before a call."""

    def __init__(self, span: Span, swarm: Watched) -> None:
        self.span, self.swarm = span, swarm
        self.peer, self.blocks = span.peer, span.blocks
        self.kinds: list[str] = []
        """Of the calls so far."""

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        kind = unpack_request(message, Limits()).kind
        if kind in CALLS:
            self.kinds.append(kind)
            self.swarm.trap(Call(self.peer, len(self.kinds) - 1, kind, len(message)))
        return self.span.send(message, timeout)


class Watched:
    """Chosen servers of a swarm: those in front are asked first, whatever their speed is."""

    def __init__(self, swarm: Swarm, order: Sequence[str], trap: Trap) -> None:
        self.swarm, self.order, self.trap = swarm, list(order), trap
        self.known: dict[int, WatchedSpan] = {}

    def spans(self) -> Sequence[Any]:
        for span in self.swarm.spans():
            if id(span) not in self.known:
                self.known[id(span)] = WatchedSpan(span, self)
        there = [self.known[id(span)] for span in self.swarm.spans()]
        return [span for span in there if span.peer in self.order]

    def refresh(self) -> None:
        self.swarm.refresh()

    def facts(self, span: Any) -> ServerFacts:
        return ServerFacts(span.peer, span.blocks, latency=10.0 ** self.order.index(span.peer))

    def close(self) -> None:
        """The swarm goes on."""

    def kinds(self, peer: str) -> list[str]:
        return [kind for span in self.known.values() if span.peer == peer for kind in span.kinds]


class Fleet:
    """A model whose client and lasting servers all tests share. `lasting`: the blocks of each of those."""

    def __init__(self, name: str, lasting: Sequence[str], folder: Path) -> None:
        self.name = name
        self.servers = ForkedServers(folder)
        self.local = TransformerBridge.boot_transformers(name)
        first = self.start(lasting[0])
        self.address = first.address
        self.lasting = {lasting[0]: first, **{blocks: self.start(blocks) for blocks in lasting[1:]}}
        for server in self.lasting.values():
            assert server.address
        self.model = AutoDistributedModelForCausalLM.from_pretrained(name, **self.options)
        self.bridge = TransformerBridge(self.model, self.local.tokenizer)
        self.swarm: Swarm = self.model._swarm
        self.seconds: list[float] = []
        """How long each recovery took."""

    @property
    def options(self) -> dict[str, Any]:
        return {"initial_peers": [self.address], "dht_prefix": self.prefix, **SETTINGS}

    @property
    def prefix(self) -> str:
        return f"faults-{self.name}"

    def start(self, blocks: str, *options: str) -> Server:
        peers = [self.address] if self.servers.all else []
        return self.servers.start(self.name, blocks, "--prefix", self.prefix, *options, peers=peers)

    def start_many(self, *blocks: str) -> list[Server]:
        """Victims, which start side by side; known to the client when this returns."""
        found = [self.start(each) for each in blocks]
        self.meet(found)
        return found

    def meet(self, servers: Sequence[Server]) -> None:
        """Let the client know these servers."""
        peers = {server.peer for server in servers}

        def known() -> bool:
            self.swarm.refresh()
            return peers <= {span.peer for span in self.swarm.spans()}

        wait_until("the client to find the servers", known)

    @contextmanager
    def using(self, *servers: Server | str, trap: Trap = lambda call: None) -> Iterator[Watched]:
        """Only these servers, the first one first; a string stands for a lasting one, by its blocks."""
        chosen = [self.lasting[server] if isinstance(server, str) else server for server in servers]
        self.model.route.close_sessions()
        self.model.route.recoveries.clear()
        source = Watched(self.swarm, [server.peer for server in chosen], trap)
        self.model.connect(source)
        yield source
        self.seconds += [recovery.seconds for recovery in self.model.route.recoveries]

    def failed(self) -> list[str]:
        """Who failed since `using` began, each once."""
        return list(dict.fromkeys(peer for one in self.model.route.recoveries for peer in one.peers))

    def told(self, server: Server | str) -> dict[str, Any]:
        """What a server says of itself."""
        peer = (self.lasting[server] if isinstance(server, str) else server).peer
        return ask(next(span for span in self.swarm.spans() if span.peer == peer), Request("info", 0, 0)).info

    def pinged(self, server: Server) -> dict[str, Any]:
        """The same by a ping, which waits for no call."""
        return unpack_reply(self.swarm.node.ping(server.peer, 30)[1], Limits()).info

    @contextmanager
    def settings(self, **changed: Any) -> Iterator[None]:
        """Other time limits and numbers of tries for a while."""
        config = self.model.config
        before = {name: getattr(config, name) for name in changed}
        try:
            for name, value in changed.items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)

    def summary(self) -> str:
        if not self.seconds:
            return "no recoveries"
        middle, most = statistics.median(self.seconds), max(self.seconds)
        return (
            f"{self.name}: {len(self.seconds)} recoveries, median {1000 * middle:.0f} ms, at most {1000 * most:.0f} ms"
        )

    def close(self) -> None:
        """Stop everything; nothing of it may be there afterwards."""
        self.model.close()
        mine = {pid for server in self.servers.all for pid in daemons(server.process.pid)}
        self.servers.close()
        assert all(server.process.poll() is not None for server in self.servers.all)
        wait_until("the daemons to end", lambda: not mine & set(daemons()), 10)


# -- what goes wrong -------------------------------------------------------------------------------


def kill_before(server: Server, nth: int, kind: str = "") -> Trap:
    """`kill -9` right before the nth call of a server (of this kind, if given)."""
    seen: list[str] = []

    def trap(call: Call) -> None:
        if call.peer == server.peer and kind in ("", call.kind):
            seen.append(call.kind)
            if len(seen) == nth + 1:
                server.kill()

    return trap


def kill_on_arrival(server: Server, nth: int) -> Trap:
    """`kill -9` when the nth call has come to its daemon, and the server, which is stopped, has not read it yet."""
    daemon = daemons(server.process.pid)[0]

    def trap(call: Call) -> None:
        if call.peer == server.peer and call.nth == nth:
            server.signal(signal.SIGSTOP)
            before = bytes_read(daemon)
            Thread(target=kill_then, args=(before + call.size,)).start()

    def kill_then(level: int) -> None:
        wait_until("the call to arrive", lambda: bytes_read(daemon) >= level, 30, 0.001)
        server.kill()

    return trap


def bytes_read(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def kill_daemon_before(server: Server, nth: int) -> Trap:
    """The libp2p daemon of a server dies, and the server with it."""

    def trap(call: Call) -> None:
        if call.peer == server.peer and call.nth == nth:
            os.kill(daemons(server.process.pid)[0], signal.SIGKILL)

    return trap


def stop_before(server: Server, nth: int) -> Trap:
    """The server hangs from its nth call on; it is still there, and may go on later."""

    def trap(call: Call) -> None:
        if call.peer == server.peer and call.nth == nth:
            server.signal(signal.SIGSTOP)

    return trap
