"""The shapes of the published models, from their model cards, so that `info falcon-40b` needs no network."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import transformers


def _fields(names: tuple[str, ...], *values: int, **more: Any) -> dict[str, Any]:
    return dict(zip(names, values, strict=True)) | more


_sizes = partial(_fields, ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"))
_gated = partial(_fields, ("intermediate_size", "num_key_value_heads", "max_position_embeddings"))
# As in the published configs, `multi_query` stays True with the new architecture, which wins over it.
_NEW = {"new_decoder_architecture": True}
_RW = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
_11B = {**_NEW, "num_kv_heads": 8, "num_ln_in_parallel_attn": 1, "max_position_embeddings": 8192}
_A3B = {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "norm_topk_prob": True}

PUBLISHED: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    "bloom-7b1": (transformers.BloomConfig, _sizes(4096, 32, 30, 250880)),
    "falcon-rw-1b": (transformers.FalconConfig, _sizes(2048, 32, 24, 50304, **_RW)),
    "falcon-7b": (transformers.FalconConfig, _sizes(4544, 71, 32, 65024)),
    "falcon-11b": (transformers.FalconConfig, _sizes(4096, 32, 60, 65024, **_11B)),
    "falcon-40b": (transformers.FalconConfig, _sizes(8192, 128, 60, 65024, **_NEW, num_kv_heads=8)),
    "falcon-180b": (transformers.FalconConfig, _sizes(14848, 232, 80, 65024, **_NEW, num_kv_heads=8)),
    "gemma-7b": (transformers.GemmaConfig, _sizes(3072, 16, 28, 256000, **_gated(24576, 16, 8192))),
    "gemma-2-9b": (transformers.Gemma2Config, _sizes(3584, 16, 42, 256000, **_gated(14336, 8, 8192))),
    "gpt2": (transformers.GPT2Config, _sizes(768, 12, 12, 50257)),
    "llama-2-7b": (transformers.LlamaConfig, _sizes(4096, 32, 32, 32000, **_gated(11008, 32, 4096))),
    "llama-3-8b": (transformers.LlamaConfig, _sizes(4096, 32, 32, 128256, **_gated(14336, 8, 8192))),
    "mistral-7b": (transformers.MistralConfig, _sizes(4096, 32, 32, 32000, **_gated(14336, 8, 32768))),
    "mixtral-8x7b": (transformers.MixtralConfig, _sizes(4096, 32, 32, 32000, **_gated(14336, 8, 32768))),
    "mixtral-8x22b": (transformers.MixtralConfig, _sizes(6144, 48, 56, 32768, **_gated(16384, 8, 65536))),
    "pythia-6.9b": (transformers.GPTNeoXConfig, _sizes(4096, 32, 32, 50432, intermediate_size=16384)),
    "qwen2-7b": (transformers.Qwen2Config, _sizes(3584, 28, 28, 152064, **_gated(18944, 4, 131072))),
    "qwen3-8b": (transformers.Qwen3Config, _sizes(4096, 32, 36, 151936, **_gated(12288, 8, 40960))),
    "qwen3-30b-a3b": (transformers.Qwen3MoeConfig, _sizes(2048, 32, 48, 151936, **_gated(6144, 4, 40960, **_A3B))),
    "starcoder": (transformers.GPTBigCodeConfig, _sizes(6144, 48, 40, 49152, n_positions=8192, n_inner=24576)),
}
"""Name -> config class, and the fields that differ from its defaults or decide a size."""


def published_config(name: str) -> Any:
    """The config of a published model."""
    kind, fields = PUBLISHED[name]
    return kind(**fields, name_or_path=name)
