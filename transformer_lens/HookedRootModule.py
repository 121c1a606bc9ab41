"""`HookedRootModule` under its known import path."""

from transformer_lens.hooked_root import HookedRootModule

__all__ = ["HookedRootModule"]
