"""`HookedRootModule` under its known import path."""

from transformer_lens.hooks.root import HookedRootModule as HookedRootModule
