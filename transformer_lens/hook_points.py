"""`HookPoint` and `HookedRootModule` under their known import path."""

from transformer_lens.hook_point import HookEntry, HookPoint
from transformer_lens.hooked_root import Capture, HookedRootModule

__all__ = ["Capture", "HookEntry", "HookPoint", "HookedRootModule"]
