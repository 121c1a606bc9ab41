"""A linear map inside another component, without hooks of its own."""

from collections.abc import Mapping

from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Part


class LinearBridge(ComponentBridge):
    """A projection such as `query_key_value` or `o_proj`."""


def linears(places: Mapping[str, str]) -> dict[str, Part]:
    """Linear layers by role, from where each is."""
    return {role: Part(LinearBridge, at) for role, at in places.items()}
