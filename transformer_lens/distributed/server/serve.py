"""A span's server on the network: it answers calls, announces itself, and shuts down in order."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformer_lens.distributed.network.frames import Call, Exchange, Room, refused
from transformer_lens.distributed.network.node import Node
from transformer_lens.distributed.network.records import LIVES, LONGEST_LIFE, PEER, Announcement
from transformer_lens.distributed.protocol.messages import Reply, SpanUnreachable, pack_reply
from transformer_lens.distributed.server.server import SpanServer

logger = logging.getLogger(__name__)

QUIET = 3.0  # a text whose last step is this many seconds old does not delay shutdown
LOOKS = 0.1  # seconds between two checks of whether a draining server is done


class ServedSpan:
    """A span that other machines can call.

    >>> served = ServedSpan(SpanServer("tiny-falcon", range(0, 2)), Node(listen=address))  # doctest: +SKIP

    `allow` are the peer ids that get answers; `None` means all. While `run` runs, it announces itself every
    `update_period` seconds.
    """

    def __init__(
        self, server: SpanServer, node: Node, *, allow: Collection[str] | None = None, update_period: float = 60
    ) -> None:
        self.server = server
        self.node = node
        self.allow = None if allow is None else frozenset(allow)
        self.update_period = update_period
        self.exchange = Exchange(
            Room(message=server.limits.message, seconds=min(60.0, server.limits.session_seconds)),
            about=lambda: pack_reply(Reply(info=server.info())),
        )
        self.calls = 0  # the number of answered calls
        self._seen: set[str] = set()
        # A waiting call holds a thread; beyond its limits, the server refuses at once.
        self._threads = ThreadPoolExecutor(server.limits.calls_of_all + 1, thread_name_prefix="call")
        node.serve(self._answer)

    async def _answer(self, frame: bytes, peer: str) -> bytes:
        if self.allow is not None and peer not in self.allow:
            self._note(peer, "is not on the list of those that are served")
            return refused("this peer is not on the list of those that are served here", retry=True)
        self._note(peer, "calls for the first time")
        found = self.exchange.take(peer, frame)
        if isinstance(found, bytes):
            return found
        if found.task is None:
            found.task = asyncio.get_running_loop().create_task(self._compute(found))
        await asyncio.shield(found.task)
        return self.exchange.part(found, 0)

    def _note(self, peer: str, what: str) -> None:
        if peer not in self._seen:
            if len(self._seen) >= 10_000:  # peer ids cost nothing
                self._seen.clear()
            self._seen.add(peer)
            logger.info("peer %s %s", peer, what)

    async def _compute(self, call: Call) -> None:
        begin = time.perf_counter()
        loop = asyncio.get_running_loop()
        message, call.received = call.message, bytearray()  # one copy
        try:
            answer = await loop.run_in_executor(self._threads, self.server.handle, message, call.peer, call.deadline)
            self.exchange.finish(call, answer)
        finally:
            if call.answer is None:  # a fault of ours, or the end of this process: the caller is told by libp2p
                self.exchange.drop(call)
        self.calls += 1
        took = 1000 * (time.perf_counter() - begin)
        logger.debug("peer %s: %d bytes, answered %d in %.1f ms", call.peer, call.total, len(answer), took)

    def announce(self, state: str = "serving") -> bool:
        """Announce the span and its state; returns whether it worked."""
        info = self.server.info()
        here = Announcement(
            self.node.peer, self.server.blocks, state, info["seconds_per_block"], info["load"], info["version"]
        )
        uids = [self.server.config.block_uid(layer) for layer in self.server.blocks]
        try:
            stored = self.node.store(uids, here.record(), LIVES * self.update_period)
        except SpanUnreachable as error:
            logger.error("could not announce: %s", error)
            return False
        if not stored:
            logger.warning("no peer kept the announcement of blocks %s; trying again", self.server.blocks)
        return stored

    def run(
        self,
        stop: threading.Event,
        now: threading.Event,
        drain_seconds: float,
        ready: Callable[[], None] = lambda: None,
    ) -> bool:
        """Serve until `stop`, drain for at most `drain_seconds` or until `now`, and leave.

        `ready` is called once the blocks are announced. Returns `False` if the daemon ended by itself, else `True`.
        """
        self.announce()
        ready()
        next_time = time.monotonic() + self.update_period
        while not stop.wait(min(1.0, max(0.05, next_time - time.monotonic()))):
            if self.node.ended.is_set():
                return False
            self.server.tidy()
            if time.monotonic() >= next_time:
                self.announce()
                next_time = time.monotonic() + self.update_period
        self.drain(drain_seconds, now.is_set)
        return True

    def drain(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse new work, let running work finish, and withdraw the announcement."""
        self.server.draining = True
        logger.info("leaving: nothing new is taken, what runs has %g s", seconds)
        self.announce("draining")
        until = time.monotonic() + seconds
        while self.busy() and time.monotonic() < until and not hurry():
            time.sleep(LOOKS)
        self.announce("gone")
        logger.info("left after %d calls, %d sessions were open", self.calls, self.server.info()["sessions"])

    def busy(self) -> bool:
        """Whether a call waits or runs, an answer is unfetched, or a text took a step a moment ago."""
        self.server.tidy()
        latest = self.server.sessions.clock() - QUIET
        texts = [text for sessions in list(self.server.sessions.of_peer.values()) for text in list(sessions.values())]
        return (
            self.server.queue.load() > 0 or self.exchange.unfetched() > 0 or any(text.used > latest for text in texts)
        )

    def close(self) -> None:
        self.node.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.server.close()


def check_options(update_period: float, drain_seconds: float, allow: Any) -> None:
    """Raise `ValueError` for the first option that does not fit."""
    if not 0 < update_period < float("inf"):
        raise ValueError(f"update_period: got {update_period}, expected a number above 0 and finite")
    if update_period * LIVES > LONGEST_LIFE:
        most = LONGEST_LIFE / LIVES
        raise ValueError(f"update_period: got {update_period}, expected at most {most:g}: no record is kept for longer")
    if not 0 <= drain_seconds < float("inf"):
        raise ValueError(f"drain_seconds: got {drain_seconds}, expected a time in seconds, 0 or more")
    for peer in allow or ():
        if not PEER.fullmatch(peer):
            raise ValueError(f"allow: got {peer!r}, expected a peer id such as 12D3KooW..., which a client logs")
