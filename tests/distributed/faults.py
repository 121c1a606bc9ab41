"""Servers in this process that go wrong on purpose, and a clock that waits for nothing.

Every server checks after every call that its caches hold exactly the positions that its sessions say they hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from transformer_lens import TransformerBridge
from transformer_lens.distributed import (
    AutoDistributedModelForCausalLM,
    Limits,
    LocalSpan,
    SpanSource,
    SpanUnreachable,
    StaticSpans,
)
from transformer_lens.distributed.client.routing import Health
from transformer_lens.distributed.protocol.configs import ClientSettings
from transformer_lens.distributed.protocol.messages import Reply, Request, pack_reply, unpack_reply, unpack_request

Work = Callable[[TransformerBridge], Any]
CALLS = ("forward", "backward", "step")


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Stop(KeyboardInterrupt):
    """Somebody pressed Ctrl-C."""


@dataclass
class Schedule:
    """Which call goes wrong, and how, counted over all servers that share it."""

    faults: dict[int, str] = field(default_factory=dict)
    calls: int = 0

    def next(self) -> str:
        self.calls += 1
        return self.faults.get(self.calls - 1, "")


class FaultySpan:
    """A server that does what its schedule says. Its own name, blocks and sessions, on shared weights."""

    def __init__(self, span: LocalSpan, peer: str, schedule: Schedule | None = None) -> None:
        self.server = span.server
        self.blocks = span.blocks
        self.peer = peer
        self.schedule = schedule or Schedule()
        self.dead = False
        self.late: list[bytes] = []
        """Messages that were not computed when the client gave up waiting."""
        self.sent: list[Request] = []
        self.failed_at: int | None = None
        """How many calls it had got when it failed."""

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        assert timeout is not None and timeout > 0
        request = unpack_request(message, Limits())
        if self.dead:
            raise SpanUnreachable(f"{self.peer} is gone")
        while self.late:
            self.handle(self.late.pop(0))
        if request.kind not in CALLS:
            return self.handle(message)
        self.sent.append(request)
        fault = self.schedule.next()
        if not fault:
            return self.handle(message)
        self.failed_at = len(self.sent)
        answer: bytes = getattr(self, fault)(message)
        return answer

    def handle(self, message: bytes) -> bytes:
        answer = self.server.handle(message, self.peer)
        for session in self.server.sessions.of_peer.get(self.peer, {}).values():
            lengths = {layer.keys.shape[-2] for layer in session.cache.layers if layer.is_initialized}
            assert lengths == {session.length}, "positions were computed into a cache twice, or are missing"
        return answer

    # -- faults ------------------------------------------------------------------------------------------

    def dies_before(self, message: bytes) -> bytes:
        self.dead = True
        raise SpanUnreachable(f"{self.peer} broke off")

    def dies_after(self, message: bytes) -> bytes:
        self.handle(message)
        return self.dies_before(message)

    def hangs(self, message: bytes) -> bytes:
        """Computed when the client does not wait any more."""
        self.late.append(message)
        raise SpanUnreachable(f"{self.peer} did not answer in time")

    def loses_answer(self, message: bytes) -> bytes:
        self.handle(message)
        raise SpanUnreachable(f"{self.peer} broke off")

    def garbles(self, message: bytes) -> bytes:
        return b"\0" + self.handle(message)[1:]

    def answers_too_little(self, message: bytes) -> bytes:
        reply = unpack_reply(self.handle(message), Limits())
        return pack_reply(Reply({"nonsense": torch.ones(1)}, turns=reply.turns))

    def is_busy(self, message: bytes) -> bytes:
        return pack_reply(Reply(error="FullError: busy", info={"retry": "full"}))

    def restarts(self, message: bytes) -> bytes:
        self.server.sessions.of_peer.pop(self.peer, None)
        raise SpanUnreachable(f"{self.peer} broke off")

    def forgets(self, message: bytes) -> bytes:
        self.server.sessions.of_peer.pop(self.peer, None)
        return self.handle(message)

    def denies(self, message: bytes) -> bytes:
        """Says that it has nothing of the text, whose keys and values it holds."""
        return pack_reply(Reply(error="nothing is here", info={"held": 0}))

    def interrupts_before(self, message: bytes) -> bytes:
        raise Stop

    def interrupts_after(self, message: bytes) -> bytes:
        self.handle(message)
        raise Stop


class Place:
    """A model, and the weights of all spans that tests want of it."""

    def __init__(self, name: str, primary: list[range], other: list[range]) -> None:
        self.name = name
        self.local = TransformerBridge.boot_transformers(name)
        self.primary, self.other = primary, other
        whole = range(0, self.local.cfg.n_layers)
        self.loaded = {blocks: LocalSpan(name, blocks) for blocks in {*primary, *other, whole}}
        self.whole: list[range] = [whole]
        self.nobody: list[range] = []
        self.bridge = TransformerBridge(AutoDistributedModelForCausalLM.from_pretrained(name), self.local.tokenizer)

    def spans(self, cuts: list[range], name: str, schedule: Schedule | None = None) -> list[FaultySpan]:
        found = [FaultySpan(self.loaded[blocks], f"{name}-{n}", schedule) for n, blocks in enumerate(cuts)]
        for span in found:
            span.server.sessions.of_peer.pop(span.peer, None)
        return found

    def connected(self, source: SpanSource, **settings: Any) -> tuple[TransformerBridge, Clock]:
        """The bridge on other spans, as if it was new; its route waits for nothing."""
        route, clock = self.bridge.original_model.route, Clock()
        route.clock, route.sleep = clock, clock.sleep
        given = {"ban_timeout": 15, "min_backoff": 1, "max_backoff": 60, "max_retries": 5, **settings}
        route.health = Health(ClientSettings(**given), clock)
        route.recoveries.clear()
        route.closing.clear()
        self.bridge.original_model.connect(source)
        return self.bridge, clock

    def close(self) -> None:
        for span in self.loaded.values():
            span.close()


def every_call(
    place: Place, fault: str, replicas: list[range], run: Callable[[TransformerBridge], Any]
) -> Iterator[Run]:
    """`run` over and over, with the fault at its first call, its second, ... until it makes no more calls."""
    for nth in itertools.count():
        schedule = Schedule({nth: fault})
        first = place.spans(place.primary, "first", schedule)
        bridge, clock = place.connected(StaticSpans([*first, *place.spans(replicas, "replica")]))
        found = run(bridge)
        if schedule.calls <= nth:
            return
        lost = [one.peers for one in bridge.original_model.route.recoveries]
        yield Run(nth, found, next(span for span in first if span.failed_at is not None), lost, clock)


@dataclass
class Run:
    """One run with one fault."""

    nth: int
    found: Any
    faulty: FaultySpan
    lost: list[tuple[str, ...]]
    """Who failed, in each call that was repaired."""
    clock: Clock
