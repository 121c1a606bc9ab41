"""`Swarm` under its short import path; the code is in `client`."""

from transformer_lens.distributed.client.swarm import Swarm

__all__ = ["Swarm"]
