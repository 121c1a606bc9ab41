"""Servers found on the network: their blocks and latency, and spans that send messages to them."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from transformer_lens.distributed.client.routing import ServerFacts, permitted
from transformer_lens.distributed.network.node import Node
from transformer_lens.distributed.network.records import STATES, Announcement, announced
from transformer_lens.distributed.protocol.messages import (
    Limits,
    MessageError,
    SpanError,
    SpanUnreachable,
    limits_of,
    unpack_reply,
)

logger = logging.getLogger(__name__)

WEIGHT = 0.3  # the weight of the latest ping in the moving average


class RemoteSpan:
    """Blocks on another machine."""

    def __init__(self, swarm: "Swarm", peer: str, blocks: range) -> None:
        self.swarm = swarm
        self.peer = peer
        self.blocks = blocks
        self._reached = False

    def __repr__(self) -> str:
        return f"RemoteSpan({self.peer!r}, {self.blocks})"

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        """As `Span.send`; first, and after a failure, the peer has to answer a ping within `connect_timeout`."""
        settings = self.swarm.config
        seconds = settings.request_timeout if timeout is None else timeout
        until = time.monotonic() + seconds
        try:
            if not self._reached:
                self.swarm.node.ping(self.peer, min(seconds, settings.connect_timeout))
            self._reached = True
            most = limits_of(settings.limits).answer
            return self.swarm.node.call(self.peer, message, max(0.001, until - time.monotonic()), most)
        except SpanUnreachable:
            self._reached = False
            raise


@dataclass
class Server:
    """What is known of a server."""

    announcement: Announcement
    span: RemoteSpan
    latency: float | None = None  # in seconds, as a moving average; `None` if never measured
    failed: bool = False  # whether the last ping failed
    pinged: float = float("-inf")
    info: dict[str, Any] = field(default_factory=dict)  # the server's answer to the ping

    @property
    def state(self) -> str:
        if self.failed:
            return "no answer"
        told = self.info.get("state")
        return told if told in STATES else self.announcement.state

    def describe(self) -> dict[str, Any]:
        """What is known, as plain data, with times in seconds and `None` for the unknown."""
        there = self.announcement
        return {
            "peer": there.peer,
            "blocks": [there.blocks.start, there.blocks.stop],
            "state": self.state,
            "load": self.number("load", there.load),
            **{name: self.number(name) for name in ("sessions", "kv_bytes", "kv_bytes_free")},
            "latency": self.latency,
            "seconds_per_block": self.number("seconds_per_block", there.seconds_per_block),
            "version": there.version,
        }

    def number(self, name: str, otherwise: Any = None) -> Any:
        """A number from its answer, else from its announcement."""
        value = self.info.get(name)
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1e18
        return value if fits else otherwise


class Swarm:
    """The servers of a model's blocks, found through `initial_peers` of its config.

    >>> config = AutoDistributedConfig.from_pretrained("tiny-falcon", initial_peers=[address])  # doctest: +SKIP
    >>> Swarm(config).spans()  # doctest: +SKIP
    [RemoteSpan('12D3KooW...', range(0, 2)), RemoteSpan('12D3KooW...', range(2, 4))]

    `node` is a connection to use, else one is made, with the key of the file `identity` if given. Raises `ValueError`
    for a config without peers, and `SpanUnreachable` if none of them answers.
    """

    def __init__(self, config: Any, node: Node | None = None, identity: str | os.PathLike[str] | None = None) -> None:
        if node is None and not config.initial_peers:
            raise ValueError(
                "initial_peers: got none, expected addresses of servers, such as "
                "/ip4/127.0.0.1/tcp/31337/p2p/12D3KooW..., which `transformer-lens serve` prints"
            )
        self.config = config
        self.uids = [config.block_uid(layer) for layer in range(config.num_hidden_layers)]
        self._servers: dict[str, Server] = {}
        self._looking: Future[None] | None = None
        self._updates: Future[None] | None = None
        self._lock = threading.Lock()
        self._owns_node = node is None
        self.node = node or Node(config.initial_peers, identity=identity, startup_timeout=config.daemon_startup_timeout)
        try:
            self.refresh()
            self._updates = self.node.begin(self._update())
        finally:
            if self._updates is None:
                self.close()

    def spans(self) -> Sequence[RemoteSpan]:
        """The spans of servers that take calls, as far as known."""
        return [server.span for server in self.known() if server.state != "draining"]

    def known(self) -> list[Server]:
        """The servers that may be used, including those that are leaving."""
        return [server for peer, server in list(self._servers.items()) if permitted(self.config, peer)]

    def facts(self, span: Any) -> ServerFacts:
        """The speed of a span's server; one that answered no ping comes after all that did."""
        server = self._servers.get(span.peer)
        if server is None or server.failed or server.latency is None:
            return ServerFacts(span.peer, span.blocks, latency=self.config.ping_timeout)
        latency, told = server.latency, server.describe()
        return ServerFacts(span.peer, span.blocks, latency, told["seconds_per_block"], told["load"])

    def refresh(self) -> None:
        """Look again now, and wait for the result. Raises `SpanUnreachable` if this process lost its daemon."""
        with self._lock:  # several callers wait for one look
            if self._looking is None or self._looking.done():
                self._looking = self.node.begin(self._look())
            looking = self._looking
        looking.result()

    def close(self) -> None:
        if self._updates is not None:
            self._updates.cancel()
        if self._owns_node:
            self.node.close()

    async def _update(self) -> None:
        while True:
            await asyncio.sleep(self.config.update_period)
            try:
                await self._look()
            except SpanUnreachable as error:
                logger.warning("could not look for servers: %s", error)

    async def _look(self) -> None:
        if self.node.dead:
            raise SpanUnreachable(self.node.dead)
        found = announced(await self.node.found(self.uids), self.uids)
        servers = {}
        for there in found:
            before = self._servers.get(there.peer)
            if before is not None and before.span.blocks == there.blocks:
                servers[there.peer] = replace(before, announcement=there)
            else:
                servers[there.peer] = Server(there, RemoteSpan(self, there.peer, there.blocks))
                logger.info("found server %s with blocks %s", there.peer, there.blocks)
        for peer in self._servers.keys() - servers.keys():
            logger.info("server %s is gone", peer)
        self._servers = servers
        began, most = time.monotonic(), self.config.max_pinged
        while chosen := self._to_ping(began, most):
            await asyncio.gather(*(self._ping(server) for server in chosen))
            most *= 2  # whoever announces much must not hide those who answer

    def _to_ping(self, began: float, most: int) -> list[Server]:
        """Up to `most` servers of each block that none answered for since then, those pinged longest ago first."""
        chosen: dict[str, Server] = {}
        known = sorted(self.known(), key=lambda server: server.pinged)
        for layer in range(len(self.uids)):
            there = [server for server in known if layer in server.span.blocks]
            if not any(server.pinged >= began and not server.failed for server in there):
                waiting = [server for server in there if server.pinged < began]
                chosen |= {server.span.peer: server for server in waiting[:most]}
        return list(chosen.values())

    async def _ping(self, server: Server) -> None:
        server.pinged = time.monotonic()
        try:
            took, told = await self.node.pinged(server.span.peer, self.config.ping_timeout)
            server.info = unpack_reply(told, Limits()).info
        except (SpanError, MessageError) as error:
            server.failed = True
            logger.debug("ping: %s", error)
            return
        server.failed = False
        server.latency = took if server.latency is None else server.latency + WEIGHT * (took - server.latency)
