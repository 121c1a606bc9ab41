"""The bridge between Hugging Face models and named, hookable activations."""

from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.info import ModelInfo, model_info
from transformer_lens.model_bridge.prefix_cache import PrefixCache

__all__ = ["ModelInfo", "PrefixCache", "TransformerBridge", "model_info"]
