"""`Node` and `peer_of` under their short import path; the code is in `network`."""

from transformer_lens.distributed.network.node import Node, peer_of

__all__ = ["Node", "peer_of"]
