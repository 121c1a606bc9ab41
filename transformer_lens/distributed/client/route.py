"""`Route`: runs a model's calls on chosen servers, switches servers on failure, and gives up in bounded time."""

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from transformer_lens.distributed.client.routing import LONGEST_BAN, Health, NoPath, best_path, permitted
from transformer_lens.distributed.client.spans import Span, SpanSource, StaticSpans, ask, check_answer
from transformer_lens.distributed.protocol.messages import (
    Reply,
    Request,
    SpanError,
    SpanUnreachable,
    limits_of,
    printable,
)

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers")
WHERE_KNOWN = ("hub_name", "revision")  # facts that are compared where both sides know them
SHOWN = 8  # failures, and servers that are not used, that an error tells


class Leg(NamedTuple):
    """Blocks `first` to `end` of a path, and the span that runs them."""

    span: Span
    first: int
    end: int

    def parts(self, longest: int) -> "list[Leg]":
        """The same blocks, in requests of no more than so many."""
        return [Leg(self.span, at, min(at + longest, self.end)) for at in range(self.first, self.end, longest)]


class _Look(NamedTuple):
    """What a server answered when asked what it is."""

    span: Span
    misfit: str
    when: float


@dataclass(frozen=True)
class Recovery:
    """A call that failed at first and succeeded in the end."""

    kind: str  # `forward`, `backward` or `step`
    blocks: range
    peers: tuple[str, ...]  # the peers that failed, in order, with repeats
    seconds: float  # from the first failure to the answer, including all waiting and replay
    replayed: int  # replayed steps, summed over servers


class Route:
    """Where a model's blocks run, and the servers' record so far; `settings` are the model's `ClientSettings`."""

    def __init__(self, n_layers: int, settings: Any) -> None:
        self.n_layers = n_layers
        self.settings = settings
        self.source: SpanSource | None = None
        self.expected: dict[str, Any] = {}  # what a server has to report of itself
        self.weights: list[str] = []  # the fingerprint of each block, and of what is outside; "" until one is known
        self.limits = limits_of(settings.limits)
        self.clock: Callable[[], float] = time.monotonic
        self.sleep: Callable[[float], None] = time.sleep
        self.health = Health(settings, lambda: self.clock())
        self.recoveries: deque[Recovery] = deque(maxlen=1000)  # repaired failures, latest last
        self.closing: deque[tuple[Span, str]] = deque()  # sessions of deleted texts, to be closed with the next call
        self.looked_at: dict[int, _Look] = {}  # spans whose server was asked what it is, by identity
        self._shown: list[Leg] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Route":
        """Copies of a model share the servers."""
        other = Route(self.n_layers, self.settings)
        other.source, other.expected, other.health = self.source, self.expected, self.health
        other.weights = self.weights
        other.clock, other.sleep = self.clock, self.sleep
        return other

    def connect(self, spans: Sequence[Span] | SpanSource, expected: dict[str, Any]) -> None:
        """Use these spans from now on, and forget earlier failures. Raises as a model's `connect` does."""
        source = StaticSpans(spans) if isinstance(spans, Sequence) else spans
        trial = copy.deepcopy(self)  # what is connected now stays if the new spans do not fit
        trial.weights = list(expected.pop("weights"))
        trial.source, trial.expected = source, expected
        trial.health = Health(self.health.settings, self.health.clock)
        if isinstance(spans, Sequence):
            missing = sorted(set(range(self.n_layers)) - {layer for span in spans for layer in span.blocks})
            if missing:
                raise ValueError(f"no span has the blocks {missing} of {self.n_layers}; give spans for all of them")
            for span in spans:
                misfit = trial.misfit(span, self.settings.request_timeout)
                if misfit:
                    raise ValueError(misfit)
        else:
            try:
                Tries(trial, "search for servers", 0, self.n_layers, waits=False).legs(0, self.n_layers)
            except SpanError as error:
                raise ValueError(f"these spans cannot be used: {error}") from error
        self.source, self.expected, self.health, self.weights = source, expected, trial.health, trial.weights
        self.looked_at = trial.looked_at

    def close(self) -> None:
        self.close_sessions()
        self.source = None

    def close_sessions(self) -> None:
        """Tell the servers which sessions are over; servers that do not answer expire them."""
        for _ in range(len(self.closing)):
            span, session = self.closing.popleft()
            if span.peer in self.health.banned():
                self.closing.append((span, session))  # later
                continue
            try:
                ask(span, Request("close", 0, 0, session=session), self.limits, self.settings.connect_timeout)
            except SpanError as error:
                logger.debug("a session was not closed: %s", error)
                if isinstance(error, SpanUnreachable):  # do not wait for it once for each session
                    self.health.failed(span.peer)

    def misfit(self, span: Span, timeout: float) -> str:
        """Why a span's server cannot be used, or "". It is asked once, and again after a failure."""
        seen = self.looked_at.get(id(span))
        if seen is None or (seen.misfit and self.clock() - seen.when > LONGEST_BAN * self.health.settings.ban_timeout):
            told = ask(span, Request("info", 0, 0), self.limits, timeout).info
            seen = self.looked_at[id(span)] = _Look(span, self._what_differs(span, told), self.clock())
            if seen.misfit:
                logger.warning("%s is not used: %s", span.peer, seen.misfit)
        return seen.misfit

    def _what_differs(self, span: Span, told: dict[str, Any]) -> str:
        model = f"the span of blocks {span.blocks.start} to {span.blocks.stop} serves another model: its"
        for what, wanted in self.expected.items():
            found = told.get(what)
            unknown = what in WHERE_KNOWN and None in (found, wanted)
            if found == wanted or unknown or (what in LIBRARIES and not self.settings.same_libraries):
                continue
            advice = "; same_libraries=False permits that" if what in LIBRARIES else ""
            return f"{model} {what} is {printable(repr(found), 200)}, and this model's is {wanted!r}{advice}"
        if told.get("blocks") != [span.blocks.start, span.blocks.stop]:
            said = printable(repr(told.get("blocks")), 200)
            return f"a span says it has {span.blocks}, and its server says {said}"
        weights = told.get("weights")
        if not isinstance(weights, list) or len(weights) != len(self.weights):
            return f"{model} weights have no fingerprints"
        mine = {*span.blocks, self.n_layers}
        for place, (found, wanted) in enumerate(zip(weights, self.weights, strict=True)):
            if place in mine and found and wanted and found != wanted:
                where = f"of block {place}" if place < self.n_layers else "outside the blocks"
                said = printable(repr(found), 200)
                return f"{model} weights {where} have the fingerprint {said}, and this model's {wanted!r}"
        # What no file here tells is compared with the first server that has it.
        known = (found if place in mine else "" for place, found in enumerate(weights))
        self.weights[:] = [wanted or found for found, wanted in zip(known, self.weights, strict=True)]
        return ""

    def connected(self, layer: int = 0) -> SpanSource:
        """The source of spans. Raises `ValueError` if there is none."""
        if self.source is None:
            raise ValueError(
                f"block {layer} runs on another machine, and this model is connected to none; "
                "call model.connect(spans) first, or pass spans= to from_pretrained"
            )
        return self.source

    def misfits(self) -> list[str]:
        """Why servers are not used that are there."""
        return [f"{look.span.peer} is not used: {look.misfit}" for look in self.looked_at.values() if look.misfit]

    def plan(self, first: int, end: int, banned: dict[str, float]) -> list[Leg]:
        """The fastest expected path through some blocks, on spans not known to be unusable. Raises `NoPath`."""
        source = self.connected(first)
        known = source.spans()
        self.looked_at = {key: look for key, look in self.looked_at.items() if any(look.span is s for s in known)}
        misfits = {key for key, look in self.looked_at.items() if look.misfit}
        spans = [s for s in known if permitted(self.health.settings, s.peer) and id(s) not in misfits]
        legs = []
        for peer, start, stop in best_path([source.facts(span) for span in spans], first, end, banned):
            having = (s for s in spans if s.peer == peer and s.blocks.start <= start and stop <= s.blocks.stop)
            legs.append(Leg(next(having), start, stop))
        return legs

    def end_of_leg(self, layer: int) -> int:
        """The block at which a call that begins with this one should move to another server."""
        legs = Tries(self, "search for servers", layer, self.n_layers).legs(layer, self.n_layers)
        self._show(legs)
        return legs[0].end

    def _show(self, legs: list[Leg]) -> None:
        show = self.settings.show_route
        if legs[0].first or legs == self._shown or not show or (show == "inference" and torch.is_grad_enabled()):
            return
        self._shown = legs
        logger.info("route: %s", ", ".join(f"blocks {leg.first} to {leg.end} on {leg.span.peer}" for leg in legs))


class Tries:
    """The attempts of one call so far, and what may still be tried.

    After the first there are `max_retries` more, and as many waits for a server. Every request has `request_timeout`,
    and everything together `Health.longest(request_timeout)`.
    """

    def __init__(self, route: Route, kind: str, first: int, end: int, waits: bool = True) -> None:
        self.route = route
        self.kind, self.blocks = kind, range(first, end)
        self.name = f"{kind} of blocks {first} to {end}"
        self.waits = waits
        self.failures: list[tuple[str, str]] = []  # the peers that failed, and their errors
        self._began = self._first_failure = route.clock()
        self._deadline = self._began + route.health.longest(route.settings.request_timeout)
        self.replayed = self._tried = self._losses = self._waited = 0
        self._looked = self._rested = False  # whether the source was refreshed, then waited for, since the last failure
        self._excused: set[str] = set()  # peers asked in spite of a ban, for lack of others
        self._refused: dict[str, SpanError] = {}  # peers that said no to this request
        self._longest = route.n_layers  # the most blocks of one request

    def ask(self, span: Span, request: Request) -> Reply | None:
        """A server's answer, or `None` to ask another, or for fewer blocks. Raises `SpanError` if all refuse."""
        timeout = self._timeout()
        try:
            reply = ask(span, request, self.route.limits, timeout)
            check_answer(request, reply)
        except SpanError as error:
            blocks = request.end - request.first
            if "held" in error.info:
                raise
            if isinstance(error, SpanUnreachable) or error.info.get("retry"):
                self.failed(span, error)
            elif error.info.get("fewer_blocks") and blocks > 1 and request.kind != "step":
                self._longest = blocks // 2
                logger.info("%s: in parts of %d blocks, since %s", self.name, self._longest, error)
            else:
                self._refused[span.peer] = error
                self._note(span.peer, error)
            return None
        self.route.health.succeeded(span.peer)
        return reply

    def failed(self, span: Span, error: SpanError, counts: bool = True) -> None:
        """Ban a server for a while. Raises `SpanError` if this counts as an attempt and none is left."""
        self.route.health.failed(span.peer)
        self.route.looked_at.pop(id(span), None)  # a server that returns may be another one
        self._excused.discard(span.peer)
        self._looked = self._rested = False
        self._note(span.peer, error)
        self._tried += counts
        self._check_number(self._tried)

    def lost(self, span: Span, error: SpanError) -> None:
        """Note that a server lost the text's beginning; it may be asked again at once."""
        self._note(span.peer, error)
        self._losses += 1
        self._check_number(self._losses - 1)  # the first time is no failure: keys and values may be forgotten

    def _note(self, who: str, error: SpanError) -> None:
        if not self.failures:
            self._first_failure = self.route.clock()
        self.failures.append((who, str(error)))
        logger.info("%s: %s failed: %s", self.name, who, error)

    def _check_number(self, failures: int) -> None:
        most = self.route.health.settings.max_retries
        if failures > most:
            raise self._given_up(f"{failures} failures, and max_retries is {most}")

    def legs(self, first: int, end: int) -> list[Leg]:
        """A path through these blocks, waiting for servers if need be. Raises `SpanError` in the end."""
        while True:
            banned = {peer: left for peer, left in self.route.health.banned().items() if peer not in self._excused}
            try:
                legs = self.route.plan(first, end, {**banned, **dict.fromkeys(self._refused, 0.0)})
            except NoPath as error:
                if self._refused:
                    raise next(iter(self._refused.values())) from error
                self._nobody(error)
                continue
            if all(self._fits(leg.span) for leg in legs):
                return [part for leg in legs for part in leg.parts(self._longest)]

    def instead_of(self, leg: Leg) -> list[Leg]:
        """Other legs for the blocks of a server that recently failed in another call, or none."""
        banned = self.route.health.banned()
        if leg.span.peer not in banned:
            return []
        with suppress(NoPath):
            legs = self.route.plan(leg.first, leg.end, banned)
            if all(self._fits(other.span) for other in legs):
                self._note(leg.span.peer, SpanError("it failed in another call"))
                return legs
        return []

    def _fits(self, span: Span) -> bool:
        timeout = self._timeout()
        try:
            return not self.route.misfit(span, timeout)
        except SpanError as error:  # also one that does not let this client in
            # Whoever announces much must not use up the attempts.
            self.failed(span, error, counts=span.peer in self.route.health.proven)
            return False

    def _nobody(self, error: NoPath) -> None:
        """Without a server for these blocks: refresh, then wait, then ask the peer that failed longest ago."""
        if self._rested and error.banned:
            self._excused.add(min(error.banned, key=lambda peer: (error.banned[peer], peer)))
            return
        if self._looked:
            if not self.waits or self._waited >= self.route.health.settings.max_retries:
                raise self._given_up(str(error)) from error
            self._waited += 1
            self.route.sleep(min(self._left(), self.route.health.backoff(self._waited)))
            self._rested = True
        self._looked = True
        try:
            self.route.connected().refresh()
        except SpanUnreachable as lost:
            self._note("the search for servers", lost)

    def _timeout(self) -> float:
        return min(self._left(), float(self.route.settings.request_timeout))

    def _left(self) -> float:
        """The seconds left for all attempts. Raises `SpanError` if there are none."""
        left = self._deadline - self.route.clock()
        if left <= 0:
            raise self._given_up("the time for all tries is over")
        return left

    def _given_up(self, why: str) -> SpanError:
        said = [f"{peer} said: {text}" for peer, text in self.failures] + self.route.misfits()
        more = [f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else []
        told = "; ".join([*said[-SHOWN:], *more]) or "nobody was asked"
        return SpanError(
            f"{self.name}: given up after {self.route.clock() - self._began:.1f} s: {why}. "
            f"{told}. Nothing was changed: start a server for these blocks and make the same call again, or raise "
            "max_retries or request_timeout",
            {"tried": [peer for peer, _ in self.failures]},
        )

    def done(self) -> None:
        """Finish the call; if anything failed on the way, record the recovery."""
        if not self.failures:
            return
        seconds = self.route.clock() - self._first_failure
        peers = tuple(peer for peer, _ in self.failures)
        self.route.recoveries.append(Recovery(self.kind, self.blocks, peers, seconds, self.replayed))
        told = f"recovered in {seconds:.3f} s from {', '.join(peers)}; {self.replayed} steps were replayed"
        logger.info("%s: %s", self.name, told)
