"""A model's blocks on a Ray cluster, under their short import path; the code is in `server`, `client` and `network`."""

from transformer_lens.distributed.client.cluster import ClusterSpans
from transformer_lens.distributed.network.cluster import down, status
from transformer_lens.distributed.server.cluster import up

__all__ = ["ClusterSpans", "down", "status", "up"]
