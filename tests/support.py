"""Small models built from bare configs, and the sweep of Falcon layouts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from transformer_lens.model_bridge.upstream import CACHE, output_name

VOCAB = 61

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(FalconForCausalLM.forward).parameters else "past_key_values"

FALCON_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Larger than the default, so that a wrong value anywhere is far above rounding.
    "initializer_range": 0.3,
}

MIXTRAL_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}

# The published layouts by name, small.
LAYOUTS: dict[str, dict[str, Any]] = {
    "7b": {"multi_query": True},
    "11b": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "rw": {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    "rw-rope": {"multi_query": False, "parallel_attn": False, "bias": True},
}


def falcon_config(attn: str = "sdpa", **changes: Any) -> FalconConfig:
    """A small Falcon config; `changes` as in LAYOUTS."""
    config = FalconConfig(**{**FALCON_SMALL, **changes})
    config._attn_implementation = attn
    return config


def falcon(attn: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> FalconForCausalLM:
    """A small random Falcon in evaluation mode."""
    return perturbed(FalconForCausalLM(falcon_config(attn, **changes)), dtype)


def mixtral(
    attn: str = "sdpa", experts: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> MixtralForCausalLM:
    """A small random Mixtral in evaluation mode."""
    config = MixtralConfig(**{**MIXTRAL_SMALL, **changes})
    config._attn_implementation = attn
    if experts is not None:
        config._experts_implementation = experts
    return perturbed(MixtralForCausalLM(config), dtype)


def perturbed(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Norm weights and biases start at one and zero, which hides mistakes: move them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().to(dtype)


def family(name: str, **changes: Any) -> PreTrainedModel:
    """A small model by layout name: a key of LAYOUTS, or "mixtral"."""
    return mixtral(**changes) if name == "mixtral" else falcon(**{**LAYOUTS[name], **changes})


FAMILIES = (*LAYOUTS, "mixtral")


def tokens(batch: int = 2, pos: int = 7) -> torch.Tensor:
    """Random token ids that avoid the special ones."""
    return torch.randint(3, VOCAB, (batch, pos))


def falcon_sweep() -> Iterator[dict[str, Any]]:
    """Every point of the sweep in the design: 192 configurations, of which 98 run."""
    for alibi, parallel, new, multi_query, norms, kv in product(
        (False, True), (True, False), (True, False), (True, False), (None, 1, 2), (1, 2, 4, 8)
    ):
        yield {
            "alibi": alibi,
            "parallel_attn": parallel,
            "new_decoder_architecture": new,
            "multi_query": multi_query,
            "num_ln_in_parallel_attn": norms,
            "num_kv_heads": kv,
        }


def torch_hooks(model: torch.nn.Module) -> int:
    """How many torch hooks sit on a model's modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def with_cache(cache: Any) -> dict[str, Any]:
    """A KV cache as a keyword of a Hugging Face model, under the name that the installed transformers has for it."""
    return {CACHE_ARGUMENT: cache}


def cache_of(output: Any) -> Any:
    """The KV cache in what a Hugging Face model returned."""
    return getattr(output, output_name(output, CACHE))
