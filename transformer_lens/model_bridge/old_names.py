"""Switches that older scripts flip. They note the wish in `cfg` and do nothing else."""

from __future__ import annotations

from transformer_lens.model_bridge.config import BridgeConfig


class OldSwitches:
    """Asking for a hook is what turns it on, so there is nothing to switch.

    >>> bridge.set_use_attn_result(True)
    >>> bridge.cfg.use_attn_result
    True
    """

    cfg: BridgeConfig

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """`attn.hook_result` is there when it is named."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """`hook_attn_in` is there when it is named."""
        self.cfg.use_attn_in = use_attn_in

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """`hook_q_input`, `hook_k_input` and `hook_v_input` are there when they are named."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """`hook_mlp_in` is always there."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in
