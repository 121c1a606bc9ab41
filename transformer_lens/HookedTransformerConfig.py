"""`HookedTransformerConfig` under its known import path."""

from transformer_lens.model_bridge.config import BridgeConfig as HookedTransformerConfig

__all__ = ["HookedTransformerConfig"]
