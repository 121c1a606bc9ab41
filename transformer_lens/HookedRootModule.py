"""`HookedRootModule` under its known import path."""

from transformer_lens.hooks.root import HookedRootModule

__all__ = ["HookedRootModule"]
