"""Components whose inside stays closed: linear maps, and mixers other than attention."""

from collections.abc import Mapping

from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, Part


class LinearBridge(ComponentBridge):
    """A projection such as `query_key_value` or `o_proj`, without hooks of its own."""


def linears(places: Mapping[str, str]) -> dict[str, Part]:
    """Linear layers by role, from where each is."""
    return {role: Part(LinearBridge, at) for role, at in places.items()}


class MixerBridge(ComponentBridge):
    """A state-space or linear-attention module; its output is at the block's `hook_mixer_out`."""

    hooks = (Hook("hook_in", "batch pos d_model", "the normalised stream that enters the mixer", Port(side="in")),)
