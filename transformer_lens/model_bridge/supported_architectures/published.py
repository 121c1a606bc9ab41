"""The shapes of the published models, so that `info falcon-40b` needs no network. Sizes are those of the model cards.

Only what decides sizes and layout is here: not the RoPE base, dropout or token ids. Weights never come from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import FalconConfig, MixtralConfig

# As in the published configs, `multi_query` stays True beside the new architecture, which wins over it.
_NEW = {"new_decoder_architecture": True, "vocab_size": 65024}

PUBLISHED: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    "falcon-rw-1b": (
        FalconConfig,
        {
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "vocab_size": 50304,
            "alibi": True,
            "parallel_attn": False,
            "multi_query": False,
            "bias": True,
        },
    ),
    "falcon-7b": (
        FalconConfig,
        {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "vocab_size": 65024},
    ),
    "falcon-11b": (
        FalconConfig,
        {
            **_NEW,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_kv_heads": 8,
            "num_hidden_layers": 60,
            "num_ln_in_parallel_attn": 1,
            "max_position_embeddings": 8192,
        },
    ),
    "falcon-40b": (
        FalconConfig,
        {**_NEW, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "num_hidden_layers": 60},
    ),
    "falcon-180b": (
        FalconConfig,
        {**_NEW, "hidden_size": 14848, "num_attention_heads": 232, "num_kv_heads": 8, "num_hidden_layers": 80},
    ),
    "mixtral-8x7b": (
        MixtralConfig,
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "intermediate_size": 14336,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
    ),
    "mixtral-8x22b": (
        MixtralConfig,
        {
            "hidden_size": 6144,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "num_hidden_layers": 56,
            "intermediate_size": 16384,
            "vocab_size": 32768,
            "max_position_embeddings": 65536,
        },
    ),
}
"""Name -> config class, and the fields that differ from its defaults or decide a size."""


def published_config(name: str) -> Any:
    """The config of a published model.

    >>> from transformer_lens.model_bridge.supported_architectures.published import published_config
    >>> published_config("falcon-40b").num_kv_heads
    8
    """
    kind, fields = PUBLISHED[name]
    return kind(**fields, name_or_path=name)
