"""The models that are measured: Falcon-like (in the 40B layout) and Mixtral-like, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM

N_CTX = 4096

# The 40B layout: grouped queries, attention and MLP in parallel, a norm for each.
FALCON_40B: Mapping[str, Any] = {
    "new_decoder_architecture": True,
    "num_ln_in_parallel_attn": 2,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The 7B layout: one key and value for all queries, one norm for both branches.
FALCON_7B: Mapping[str, Any] = {
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "num_ln_in_parallel_attn": None,
}
FALCON_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_kv_heads": 2,
        "num_hidden_layers": 24,
    },
    "100m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_kv_heads": 4,
        "num_hidden_layers": 12,
    },
    # As deep and as narrow as the small models that people start with.
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_kv_heads": 3,
        "num_hidden_layers": 30,
    },
    "250m": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_kv_heads": 4,
        "num_hidden_layers": 20,
    },
}
MIXTRAL: Mapping[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 24,
    },
    "100m": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 640,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 8,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 384,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "num_local_experts": 4,
        "tie_word_embeddings": True,
    },
    "250m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 832,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "num_hidden_layers": 12,
    },
}
# The published shapes, for a GPU that can hold them.
FULL_SIZE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "falcon-7b": (
        "falcon",
        {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_attention_heads": 71,
            "num_hidden_layers": 32,
            **FALCON_7B,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
        },
    ),
}
FAMILIES = ("falcon", "mixtral")
MORE_FAMILIES = (*FAMILIES, "falcon-7b-layout")
"""Other packages cannot boot every Falcon, so they are timed on this layout as well."""
SIZES = tuple(FALCON_SIZES)


def make_config(family: str, size: str = "", **changes: Any) -> Any:
    """The config of a family at a size of the tables above, with changes."""
    if family == "falcon":
        config: Any = FalconConfig(**{**FALCON_40B, **FALCON_SIZES.get(size, {}), **changes})
    elif family == "falcon-7b-layout":
        return make_config("falcon", size, **{**FALCON_7B, **changes})
    elif family == "mixtral":
        config = MixtralConfig(**{**MIXTRAL, **MIXTRAL_SIZES.get(size, {}), **changes})
    else:
        raise ValueError(f"family: got {family!r}, expected one of {', '.join(MORE_FAMILIES)}")
    config._attn_implementation = "sdpa"
    return config


def make_model(config: Any, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model in evaluation mode, made on its device and in its dtype, so that it is held once."""
    kind = FalconForCausalLM if isinstance(config, FalconConfig) else MixtralForCausalLM
    torch.manual_seed(seed)
    config.architectures = [kind.__name__]  # as a checkpoint's config says; other packages go by it
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    # Left to itself, generation on random weights would stop at a token that happens to end the text.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def twin_of(model: nn.Module) -> Any:
    """A second tree of modules on the very same parameters and buffers.

    The bare model has to stay untouched beside the wrapped one, and a copy of the weights would not
    fit beside the largest models, nor share the processor's caches with them.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def parameter_count(config: Any) -> int:
    """How many parameters a config stands for, without making any."""
    kind = FalconForCausalLM if isinstance(config, FalconConfig) else MixtralForCausalLM
    with torch.device("meta"):
        model = kind(config)
    return sum(parameter.numel() for parameter in model.parameters())


def random_tokens(config: Any, pos: int, device: torch.device, batch: int = 1) -> torch.Tensor:
    """Random token ids that avoid the special ones."""
    generator = torch.Generator().manual_seed(pos)
    return torch.randint(3, config.vocab_size, (batch, pos), generator=generator).to(device)
