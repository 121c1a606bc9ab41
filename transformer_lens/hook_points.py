"""`HookPoint` and `HookedRootModule` under their known import path."""

from transformer_lens.hooks.edits import Edit, Keep
from transformer_lens.hooks.point import HookEntry, HookPoint
from transformer_lens.hooks.root import Capture, HookedRootModule

__all__ = ["Capture", "Edit", "HookEntry", "HookPoint", "HookedRootModule", "Keep"]
