"""Spans as a client sees them: some blocks, and a way to send messages to whoever runs them.

`LocalSpan` is a server in this process, reached by the same messages as one on another machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from transformer_lens.distributed.messages import Limits, Reply, Request, pack_request, unpack_reply
from transformer_lens.distributed.server import SpanServer


class SpanError(RuntimeError):
    """A server answered that it cannot do what was asked, or answered something else; `info` is what it added."""

    def __init__(self, text: str, info: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.info = info or {}


class Span(Protocol):
    """Some blocks of a model, wherever they run."""

    blocks: range

    def send(self, message: bytes) -> bytes:
        """The answer to one message."""


class LocalSpan:
    """A span whose server is in this process.

    >>> span = LocalSpan("tiny-falcon", range(0, 2))
    >>> ask(span, Request("info", 0, 0)).info["n_layers"]
    4
    >>> span.close()

    Arguments as for `SpanServer`.
    """

    def __init__(self, name: str, blocks: range, *, limits: Limits | None = None, **options: Any) -> None:
        self.server = SpanServer(name, blocks, limits=limits, **options)
        self.blocks = blocks

    def send(self, message: bytes) -> bytes:
        """The answer to one message."""
        return self.server.handle(message)

    def close(self) -> None:
        """Stop the server."""
        self.server.close()


def ask(span: Span, request: Request, limits: Limits | None = None) -> Reply:
    """One call: a request and its reply. Raises `SpanError` with the server's words if it refused.

    >>> ask(LocalSpan("tiny-falcon", range(0, 2)), Request("forward", 0, 4))
    Traceback (most recent call last):
    ...
    transformer_lens.distributed.spans.SpanError: blocks 0 to 2: MessageError: blocks 0 to 4 were asked for, ...
    """
    limits = limits or Limits()
    where = f"blocks {span.blocks.start} to {span.blocks.stop}"
    message = pack_request(request)
    if len(message) > limits.message:
        raise SpanError(f"{where}: the request has {len(message)} bytes, and a message has at most {limits.message}")
    reply = unpack_reply(span.send(message), limits)
    if reply.error:
        raise SpanError(f"{where}: {reply.error}", reply.info)
    return reply


class Route:
    """The spans that a model's blocks run on: for every block, the first span given that has it."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers = n_layers
        self.spans: list[Span] = []
        self.closing: deque[tuple[Span, str]] = deque()
        """Sessions of texts that are gone, to be closed with the next call."""

    def close_sessions(self) -> None:
        """Tell the servers which keys and values nobody will ask for again."""
        while self.closing:
            span, session = self.closing.popleft()
            ask(span, Request("close", 0, 0, session=session))

    def connect(self, spans: Sequence[Span], expected: dict[str, Any]) -> None:
        """Use these spans from now on. Raises `ValueError` if a block is missing or a server has another model."""
        missing = sorted(set(range(self.n_layers)) - {layer for span in spans for layer in span.blocks})
        if missing:
            raise ValueError(f"no span has the blocks {missing} of {self.n_layers}; give spans for all of them")
        for span in spans:
            told = ask(span, Request("info", 0, 0)).info
            for what, wanted in expected.items():
                if told.get(what) != wanted:
                    raise ValueError(
                        f"the span of blocks {span.blocks.start} to {span.blocks.stop} serves another model: its "
                        f"{what} is {told.get(what)!r}, and this model's is {wanted!r}"
                    )
            if told.get("blocks") != [span.blocks.start, span.blocks.stop]:
                raise ValueError(f"a span says it has {span.blocks}, and its server says {told.get('blocks')}")
        self.spans = list(spans)

    def __deepcopy__(self, memo: dict[int, Any]) -> Route:
        """A copy of a model asks the same servers."""
        other = Route(self.n_layers)
        other.spans = list(self.spans)
        return other

    def at(self, layer: int) -> Span:
        """The span that runs a block."""
        found = next((span for span in self.spans if layer in span.blocks), None)
        if found is None:
            raise ValueError(
                f"block {layer} runs on another machine, and this model is connected to none; "
                "call model.connect(spans) first, or pass spans= to from_pretrained"
            )
        return found
