"""`BridgeConfig`: a model's numbers under the field's names, read from its Hugging Face config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass
class BridgeConfig:
    """What a model is, in the names that analysis code reads.

    >>> bridge.cfg.n_heads, bridge.cfg.n_key_value_heads
    (4, 2)

    `n_key_value_heads` is the number of distinct key (and value) heads the model computes, whatever
    its checkpoint's config calls it. `d_vocab_out` is the size of the model's last axis.
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    act_fn: str
    normalization_type: str
    positional_embedding_type: str
    parallel_attn_mlp: bool
    model_name: str
    architecture: str
    eps: float
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_experts: int | None = None
    experts_per_token: int | None = None
    norms_per_block: int = 2
    sliding_window: int | None = None
    attn_only: bool = False
    gated_mlp: bool = False
    final_rms: bool = False
    default_prepend_bos: bool = True
    seed: int | None = None
    # Names old scripts set; asking for a hook is what turns it on, so these do nothing.
    use_attn_result: bool = False
    use_attn_in: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)
