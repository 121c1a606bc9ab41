"""A model's numbers under the import paths of TransformerLens 4."""

from transformer_lens.model_bridge.config import BridgeConfig as TransformerBridgeConfig

HookedTransformerConfig = TransformerLensConfig = TransformerBridgeConfig

__all__ = ["HookedTransformerConfig", "TransformerBridgeConfig", "TransformerLensConfig"]
