"""The bridge between Hugging Face models and named, hookable activations."""

from transformer_lens.model_bridge.bridge import TransformerBridge

__all__ = ["TransformerBridge"]
