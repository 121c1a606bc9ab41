"""Switches that older scripts flip: a cache of everything then holds what they turn on."""

from __future__ import annotations

from collections.abc import Mapping

from transformer_lens.model_bridge.config import BridgeConfig

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "use_attn_result": ("hook_result",),
    "use_attn_in": ("hook_attn_in",),
    "use_split_qkv_input": ("hook_q_input", "hook_k_input", "hook_v_input"),
    "use_hook_mlp_in": ("hook_mlp_in",),
}
"""Each switch in `cfg`, and the hooks that it puts into a cache for which nothing is asked by name."""


class OldSwitches:
    """Naming a hook is enough to have it; a switch is for scripts that name none and expect it in their cache.

    >>> bridge.set_use_attn_result(True)
    >>> bridge.run_with_cache("Mary and John")[1]["result", 0].shape
    torch.Size([1, 5, 4, 128])
    >>> bridge.set_use_attn_result(False)
    """

    cfg: BridgeConfig

    def switched_on(self) -> frozenset[str]:
        """The hooks that are cached where nothing is asked for by name, though they are many times the stream."""
        return frozenset(hook for switch, hooks in SWITCHES.items() if getattr(self.cfg, switch) for hook in hooks)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether a cache of everything has `attn.hook_result`."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether a cache of everything has `hook_attn_in`."""
        self.cfg.use_attn_in = use_attn_in

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether a cache of everything has `hook_q_input`, `hook_k_input` and `hook_v_input`."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """`hook_mlp_in` is always there."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in
