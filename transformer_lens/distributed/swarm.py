"""`Swarm` under the name that scripts know; it is in `client`."""

from transformer_lens.distributed.client.swarm import Swarm

__all__ = ["Swarm"]
