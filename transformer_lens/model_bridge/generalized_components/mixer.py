"""Mixers other than attention, such as state-space layers: what enters and leaves them."""

from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook


class MixerBridge(ComponentBridge):
    """A state-space or linear-attention module; its output is at the block's `hook_mixer_out`."""

    hooks = (Hook("hook_in", "batch pos d_model", "the normalised stream that enters the mixer", Port(side="in")),)
