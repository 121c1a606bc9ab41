"""Spans as a client sees them: some blocks, and a way to send messages to whoever runs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from transformer_lens.distributed.client.routing import ServerFacts
from transformer_lens.distributed.protocol.messages import (
    Limits,
    MessageError,
    Reply,
    Request,
    SpanError,
    SpanUnreachable,
    pack_request,
    printable,
    too_much,
    unpack_reply,
)


class Span(Protocol):
    """Some blocks of a model, wherever they run."""

    blocks: range
    peer: str
    """Who runs them: a libp2p peer id, or a name such as `local-1`."""

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        """The answer to one message. Raises `SpanUnreachable` if none comes within `timeout` seconds."""


class SpanSource(Protocol):
    """Where a route gets its spans from."""

    def spans(self) -> Sequence[Span]:
        """What is known now; a quick call."""

    def refresh(self) -> None:
        """Look again, as after a failure."""

    def facts(self, span: Span) -> ServerFacts:
        """What is known of a span's speed."""

    def close(self) -> None:
        """Stop looking."""


class StaticSpans:
    """Spans that somebody listed; where two have a block, the earlier one is asked first.

    >>> from transformer_lens.distributed import LocalSpan
    >>> source = StaticSpans([LocalSpan("tiny-falcon", range(0, 4))])
    >>> source.given.append(LocalSpan("tiny-falcon", range(0, 4)))
    >>> [source.facts(span).latency for span in source.spans()]
    [0.0, 1.0]
    """

    def __init__(self, given: Iterable[Span]) -> None:
        self.given: list[Span] = list(given)
        """Spans may be added and removed at any time."""

    def spans(self) -> Sequence[Span]:
        return tuple(self.given)

    def refresh(self) -> None:
        """Nothing to do: the list is all there is."""

    def facts(self, span: Span) -> ServerFacts:
        """Nothing was measured, so a span's place in the list stands for its latency."""
        return ServerFacts(span.peer, span.blocks, latency=float(self.given.index(span)))

    def close(self) -> None:
        """The spans belong to whoever made them."""


def ask(span: Span, request: Request, limits: Limits | None = None, timeout: float | None = None) -> Reply:
    """One call: a request and its reply. Raises `SpanError` with the server's words if it refused.

    `timeout` is in seconds. Raises `SpanUnreachable` if no answer came, or one that cannot be read.

    >>> from transformer_lens.distributed import LocalSpan
    >>> ask(LocalSpan("tiny-falcon", range(0, 2)), Request("forward", 0, 4))
    Traceback (most recent call last):
    ...
    transformer_lens.distributed.protocol.messages.SpanError: blocks 0 to 2 on local-...: MessageError: blocks ...
    """
    limits = limits or Limits()
    where = f"blocks {span.blocks.start} to {span.blocks.stop} on {span.peer}"
    message = pack_request(request)
    excess = too_much(message, limits)
    if excess:
        raise SpanError(f"{where}: {excess}")
    try:
        reply = unpack_reply(span.send(message, timeout), limits)
    except MessageError as error:
        raise SpanUnreachable(f"{where}: the answer cannot be read: {error}") from error
    if reply.error:
        raise SpanError(f"{where}: {printable(reply.error)}", reply.info)
    return reply
