"""A linear map inside another component: it has no hooks of its own, its owner names what matters."""

from transformer_lens.model_bridge.generalized_components.base import ComponentBridge


class LinearBridge(ComponentBridge):
    """A projection such as `query_key_value` or `o_proj`."""
