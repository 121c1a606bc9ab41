"""Two bridges on the same weights: one over spans of blocks that are reached by messages, one as usual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, Limits, LocalSpan
from transformer_lens.distributed.protocol.messages import unpack_request

CUTS = {"tiny-falcon": (2,), "tiny-mixtral": (1, 2)}
"""Where the spans begin, after the first."""


class CountingSpan:
    """A span that remembers the calls that went through it, not the end of texts, which comes when those are freed."""

    def __init__(self, span: LocalSpan) -> None:
        self.span = span
        self.blocks = span.blocks
        self.peer = span.peer
        self.sent: list[bytes] = []
        self.server = span.server

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        if unpack_request(message, Limits()).kind != "close":
            self.sent.append(message)
        return self.span.send(message, timeout)


def spans_of(name: str, n_layers: int, cuts: tuple[int, ...] = (), **options: Any) -> list[CountingSpan]:
    """Spans that begin at 0 and at each cut."""
    ends = [*cuts, n_layers]
    return [
        CountingSpan(LocalSpan(name, range(first, end), **options)) for first, end in zip([0, *cuts], ends, strict=True)
    ]


@dataclass
class Pair:
    """The same model over spans and in this process."""

    remote: TransformerBridge
    local: TransformerBridge
    spans: list[CountingSpan]
    tokens: Tensor

    def __iter__(self) -> Iterator[TransformerBridge]:
        return iter((self.remote, self.local))

    def calls(self) -> int:
        """How many calls went out since the last time this was asked."""
        number = sum(len(span.sent) for span in self.spans)
        for span in self.spans:
            span.sent.clear()
        return number


def make_pair(name: str, cuts: tuple[int, ...], shipped: str | None = None, **options: Any) -> Pair:
    """`name` a shipped model or a directory; `options` for loading either way."""
    prefix = {} if shipped else {"dht_prefix": "mine"}
    local = TransformerBridge.boot_transformers(name, **options)
    spans = spans_of(name, local.cfg.n_layers, cuts, **prefix, **options)
    model = AutoDistributedModelForCausalLM.from_pretrained(name, spans=spans, **prefix, **options)
    for span in spans:
        span.sent.clear()
    torch.manual_seed(0)
    tokens = torch.randint(3, min(local.cfg.d_vocab, 700), (2, 9))
    return Pair(TransformerBridge(model, local.tokenizer), local, spans, tokens)


@pytest.fixture(scope="session", params=list(CUTS))
def shipped(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A shipped model over two or three spans."""
    pair = make_pair(request.param, CUTS[request.param], shipped=request.param)
    yield pair
    for span in pair.spans:
        span.span.close()


@pytest.fixture
def pair(shipped: Pair) -> Iterator[Pair]:
    """The same, with no gradient left and no message counted."""
    shipped.calls()
    for span in shipped.spans:
        span.server.sessions.of_peer.clear()
    yield shipped
    for bridge in shipped:
        bridge.reset_hooks()
        for parameter in bridge.original_model.parameters():
            parameter.grad = None
