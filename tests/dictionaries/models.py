"""Small models and random dictionaries that fit into them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import perturbed
from transformer_lens import TransformerBridge
from transformer_lens.dictionaries import Dictionary

MODELS = ("tiny-falcon", "tiny-mixtral", "llama")
TEXT = "When Mary and John went to the store, John gave a drink to"


def llama(dtype: torch.dtype = torch.float32) -> Any:
    """A small random Llama, which has no tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    return perturbed(LlamaForCausalLM(config), dtype)


@cache
def model(name: str) -> TransformerBridge:
    return TransformerBridge(llama()) if name == "llama" else TransformerBridge.boot_transformers(name)


def tokens(bridge: TransformerBridge) -> torch.Tensor:
    if bridge.tokenizer is None:
        return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    return bridge.to_tokens(
        [TEXT, "Mary and John went to the church, and Mary gave a ball to John"], prepend_bos=False
    )[:, :12]


def random_dictionary(
    d_in: int, d_out: int | None = None, d_sae: int = 50, skip: bool = False, **facets: Any
) -> Dictionary:
    """Features that fire on about half of all activations."""
    generator = torch.Generator().manual_seed(d_sae)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    out = d_out or d_in
    weights = {"W_enc": draw(d_in, d_sae) / d_in**0.5, "b_enc": draw(d_sae) / 10}
    weights |= {"W_dec": draw(d_sae, out) / d_sae**0.5, "b_dec": draw(out) / 10}
    weights |= {"W_skip": draw(out, d_in) / d_in**0.5} if skip else {}
    return Dictionary(weights, **facets).requires_grad_(False)
