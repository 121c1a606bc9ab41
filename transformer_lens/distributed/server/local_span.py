"""`LocalSpan`: a server in this process, reached by the same messages as one on another machine."""

from __future__ import annotations

import itertools
from typing import Any

from transformer_lens.distributed.protocol.messages import Limits, SpanUnreachable
from transformer_lens.distributed.server.server import SpanServer


class LocalSpan:
    """A span whose server is in this process.

    >>> from transformer_lens.distributed.protocol.messages import Request, pack_request, unpack_reply
    >>> span = LocalSpan("tiny-falcon", range(0, 2))
    >>> unpack_reply(span.send(pack_request(Request("info", 0, 0))), Limits()).info["n_layers"]
    4
    >>> span.close()

    Arguments as for `SpanServer`.
    """

    _numbers = itertools.count(1)

    def __init__(self, name: str, blocks: range, *, limits: Limits | None = None, **options: Any) -> None:
        self.server = SpanServer(name, blocks, limits=limits, **options)
        self.blocks = blocks
        self.peer = f"local-{next(self._numbers)}"
        self.closed = False

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        """The answer to one message; a server in this process is waited for without a limit."""
        if self.closed:
            raise SpanUnreachable(f"{self.peer} was closed")
        return self.server.handle(message)

    def close(self) -> None:
        """Stop the server."""
        self.closed = True
        self.server.close()
