"""`ActivationCache` under its known import path."""

from transformer_lens.cache.activation_cache import ActivationCache

__all__ = ["ActivationCache"]
