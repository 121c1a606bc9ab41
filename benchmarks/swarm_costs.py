"""The costs of running a model over servers: message sizes and memory in bytes, times in seconds.

Tests compare the bytes with the messages and sessions of real servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FRAME = 512
"""The most bytes of a message without hooks that are not tensor data."""
INTEGER = 8
"""Bytes of an int64, in which masks, positions and rows are sent."""


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model that determine its costs.

    >>> FALCON_180B.kv_bytes(positions=1, rows=1, blocks=80) // 1000
    163
    """

    n_layers: int
    d_model: int
    kv_heads: int
    """Key-value heads in a layer's cache: one per group, even where transformers keeps more."""
    d_head: int
    itemsize: int = 2
    """Bytes per number: 2 for bfloat16."""

    def stream_bytes(self, positions: int, rows: int = 1) -> int:
        """The residual stream, [rows, positions, d_model]."""
        return positions * rows * self.d_model * self.itemsize

    def request_bytes(self, new: int, before: int = 0, rows: int = 1) -> int:
        """The tensors of a step of `new` positions after `before` others: stream, position ids and the whole mask."""
        return self.stream_bytes(new, rows) + INTEGER * (new + (before + new) * rows)

    def reply_bytes(self, new: int, rows: int = 1) -> int:
        """The tensors of its reply, if nothing is captured."""
        return self.stream_bytes(new, rows)

    def kv_bytes(self, positions: int, rows: int = 1, blocks: int = 1) -> int:
        """Keys and values on a server, and again on one that takes over."""
        return 2 * positions * rows * blocks * self.kv_heads * self.d_head * self.itemsize

    def kept_bytes(self, positions: int, rows: int = 1, spans: int = 1) -> int:
        """What the client keeps to replay a text: the stream that entered each span."""
        return spans * self.stream_bytes(positions, rows)


FALCON_180B = Sizes(n_layers=80, d_model=14848, kv_heads=8, d_head=64)
"""`tiiuae/falcon-180B` in bfloat16."""
MIXTRAL_8X22B = Sizes(n_layers=56, d_model=6144, kv_heads=8, d_head=128)
"""`mistralai/Mixtral-8x22B-v0.1` in bfloat16."""


def hop_seconds(latency: float, compute: float, size: float = 0.0, bandwidth: float = float("inf")) -> float:
    """The time of one call: a round trip, the blocks, and `size` bytes sent and received at `bandwidth` per second."""
    return latency + compute + size / bandwidth


def token_seconds(hops: Sequence[float]) -> float:
    """The time of one token: its hops in sequence."""
    return sum(hops)


def replay_seconds(chunks: Sequence[int], latency: float, compute: float, per_position: float = 0.0) -> float:
    """The time to refill another server's cache: every chunk of the text again, in sequence.

    >>> replay_seconds([65, 1, 1, 1], latency=0.125, compute=0.0625, per_position=0.015625)
    1.75

    A call takes `compute` for one position and `per_position` for each further one.
    """
    return sum(hop_seconds(latency, compute + (chunk - 1) * per_position) for chunk in chunks)
