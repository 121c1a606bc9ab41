"""`Node` and `peer_of` under the name that scripts know; they are in `network`."""

from transformer_lens.distributed.network.node import Node, peer_of

__all__ = ["Node", "peer_of"]
