"""Read, edit and differentiate every activation of an unchanged Hugging Face model by name."""

from transformer_lens.activation_cache import ActivationCache
from transformer_lens.hook_points import HookedRootModule, HookPoint
from transformer_lens.model_bridge.bridge import TransformerBridge

__all__ = ["ActivationCache", "HookPoint", "HookedRootModule", "TransformerBridge"]
