"""What it costs to run a model over servers: bytes of messages and memory, seconds of a token and of a recovery.

Sizes are in bytes, times in seconds. Tests compare the bytes with messages and sessions of real servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FRAME = 512
"""At most this much of a message is not tensors, where no hooks go with it: the head, and names and shapes."""
INTEGER = 8
"""Masks, positions and rows are sent as int64."""


@dataclass(frozen=True)
class Sizes:
    """A model's measures, as far as they cost anything.

    >>> FALCON_180B.kv_bytes(positions=1, rows=1, blocks=80) // 1000
    163
    """

    n_layers: int
    d_model: int
    kv_heads: int
    """Keys of each position in a layer's cache: one for each group, also where transformers would keep more."""
    d_head: int
    itemsize: int = 2
    """Bytes of a number: 2 for bfloat16."""

    def stream_bytes(self, positions: int, rows: int = 1) -> int:
        """The residual stream, [rows, positions, d_model]."""
        return positions * rows * self.d_model * self.itemsize

    def request_bytes(self, new: int, before: int = 0, rows: int = 1) -> int:
        """The tensors of a step of `new` positions after `before` others: stream, position ids, and the mask of all."""
        return self.stream_bytes(new, rows) + INTEGER * (new + (before + new) * rows)

    def reply_bytes(self, new: int, rows: int = 1) -> int:
        """The tensors of its answer, where nothing is captured."""
        return self.stream_bytes(new, rows)

    def kv_bytes(self, positions: int, rows: int = 1, blocks: int = 1) -> int:
        """Keys and values on a server, and as many again on another one that takes over."""
        return 2 * positions * rows * blocks * self.kv_heads * self.d_head * self.itemsize

    def kept_bytes(self, positions: int, rows: int = 1, spans: int = 1) -> int:
        """What the client keeps of a text to replay it: the stream that went into each span."""
        return spans * self.stream_bytes(positions, rows)


FALCON_180B = Sizes(n_layers=80, d_model=14848, kv_heads=8, d_head=64)
"""`tiiuae/falcon-180B` in bfloat16."""
MIXTRAL_8X22B = Sizes(n_layers=56, d_model=6144, kv_heads=8, d_head=128)
"""`mistralai/Mixtral-8x22B-v0.1` in bfloat16."""


def hop_seconds(latency: float, compute: float, size: float = 0.0, bandwidth: float = float("inf")) -> float:
    """One call: a round trip, what the blocks take, and the bytes of question and answer at `bandwidth` per second.

    >>> hop_seconds(latency=0.125, compute=0.0625, size=62_500, bandwidth=1_000_000)
    0.25
    """
    return latency + compute + size / bandwidth


def token_seconds(hops: Sequence[float]) -> float:
    """One token: the calls of its hops, each of which needs the answer of the one before.

    >>> 1 / token_seconds([0.25, 0.25])  # tokens each second
    2.0
    """
    return sum(hops)


def replay_seconds(chunks: Sequence[int], latency: float, compute: float, per_position: float = 0.0) -> float:
    """Filling another server's cache: every chunk of the text again, one call after the other, in the same chunks.

    >>> replay_seconds([65, 1, 1, 1], latency=0.125, compute=0.0625, per_position=0.015625)
    1.75

    A call of these blocks takes `compute` for one position and `per_position` for each further one.
    """
    return sum(hop_seconds(latency, compute + (chunk - 1) * per_position) for chunk in chunks)
