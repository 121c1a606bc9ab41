"""`CanBeUsedAsMLP`, the type that packages give an MLP: here any of the bridge's."""

from transformer_lens.model_bridge.generalized_components import MLPBridge as CanBeUsedAsMLP

__all__ = ["CanBeUsedAsMLP"]
