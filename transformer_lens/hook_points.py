"""Hooks on any module: `HookPoint`, a named place, and `HookedRootModule`, a module that has some."""

from transformer_lens.hook_point import HookEntry, HookPoint
from transformer_lens.hooked_root import Capture, HookedRootModule

__all__ = ["Capture", "HookEntry", "HookPoint", "HookedRootModule"]
