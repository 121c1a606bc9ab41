"""`skeleton_bridge`: the names and shapes of a model from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.info import find_config
from transformer_lens.model_bridge.loading import model_class


def skeleton_bridge(model: str | Path | PreTrainedConfig, **loading: Any) -> TransformerBridge:
    """A bridge on a model without weights (torch's meta device): for `hook_table()`, `hook_dict` and `cfg`.

    >>> from transformer_lens.model_bridge import skeleton_bridge
    >>> bridge = skeleton_bridge("falcon-40b")
    >>> next(row.sizes() for row in bridge.hook_table() if row.name.endswith("attn.hook_k"))
    'batch pos kv_head=8 d_head=64'

    `model` and `loading` as in `model_info`. It has no tokenizer and cannot run. Raises `ValueError` for a
    configuration that cannot run, `OSError` for one that cannot be read.
    """
    config = find_config(model, loading)
    kind = model_class(config)
    with torch.device("meta"):
        empty: Any = kind.from_config(config) if kind is AutoModelForCausalLM else kind(config)
    bridge = TransformerBridge(empty)
    if not isinstance(model, PreTrainedConfig):
        bridge.cfg.model_name = str(model)
    return bridge
