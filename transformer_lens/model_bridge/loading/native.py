"""Small random models from a config (`boot_native`), each in the transformers family that matches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from transformer_lens.checks import in_words, one_of, whole
from transformer_lens.model_bridge.config import BridgeConfig

COMMON = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab", "act_fn", "eps")
READ_ALWAYS = (
    *("positional_embedding_type", "normalization_type", "gated_mlp", "dtype", "device", "attn_scale"),
    *("n_key_value_heads", "d_vocab_out", "tie_word_embeddings"),
)
OF_BRIDGE = (
    *("model_name", "default_prepend_bos", "seed", "initializer_range", "tokenizer_name"),
    *("use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "ungroup_grouped_query_attention"),
)
"""Fields that every model reads, or that follow from others; and those that the bridge's config keeps."""


def _sizes(cfg: BridgeConfig) -> dict[str, Any]:
    """What every transformers config has, under its own names."""
    named = {"num_hidden_layers": cfg.n_layers, "num_attention_heads": cfg.n_heads, "hidden_size": cfg.d_model}
    return {**named, "max_position_embeddings": cfg.n_ctx}


def _gpt2(cfg: BridgeConfig) -> PreTrainedConfig:
    dropout = {f"{where}_pdrop": 0.0 for where in ("attn", "embd", "resid")}
    own = {"n_inner": cfg.d_mlp, "activation_function": cfg.act_fn, "layer_norm_epsilon": cfg.eps}
    return transformers.GPT2Config(**_sizes(cfg), **own, **dropout)


def _rotary(cfg: BridgeConfig) -> dict[str, Any]:
    part = (cfg.rotary_dim or cfg.d_head) / cfg.d_head
    rope = {"rope_type": "default", "rope_theta": cfg.rotary_base or 10000.0, "partial_rotary_factor": part}
    return {**_sizes(cfg), "intermediate_size": cfg.d_mlp, "hidden_act": cfg.act_fn, "rope_parameters": rope}


def _gpt_neox(cfg: BridgeConfig) -> PreTrainedConfig:
    return transformers.GPTNeoXConfig(
        **_rotary(cfg), layer_norm_eps=cfg.eps, use_parallel_residual=cfg.parallel_attn_mlp
    )


def _llama(cfg: BridgeConfig) -> PreTrainedConfig:
    own = {"num_key_value_heads": cfg.n_key_value_heads, "head_dim": cfg.d_head, "rms_norm_eps": cfg.eps}
    sizes = {**_rotary(cfg), **own}
    if not cfg.num_experts:
        return transformers.LlamaConfig(**sizes)
    experts = {"num_local_experts": cfg.num_experts, "num_experts_per_tok": cfg.experts_per_token or 2}
    return transformers.MixtralConfig(**sizes, **experts, sliding_window=cfg.sliding_window)


Made = tuple[Callable[[BridgeConfig], PreTrainedConfig], tuple[str, ...]]
FAMILIES: Mapping[tuple[str, str, bool], Made] = {
    ("standard", "LN", False): (_gpt2, ()),
    ("rotary", "LN", False): (_gpt_neox, ("parallel_attn_mlp", "rotary_dim", "rotary_base")),
    ("rotary", "RMS", True): (
        _llama,
        (*("rotary_base", "num_experts", "experts_per_token"), "sliding_window", "final_rms"),
    ),
}
"""For each kind of positions, norm and MLP: how to make the model, and the further fields that it reads."""


def native_config(cfg: BridgeConfig) -> PreTrainedConfig:
    """The Hugging Face config of the model that a `BridgeConfig` describes.

    >>> native_config(BridgeConfig(n_layers=2, d_model=32, n_heads=4, n_ctx=64, d_vocab=50)).model_type
    'gpt2'

    Raises `ValueError` for a combination that no family has, naming the fields.
    """
    kind = (cfg.positional_embedding_type, cfg.normalization_type, cfg.gated_mlp)
    if kind not in FAMILIES:
        have = "; ".join(f"{p!r}, {n!r}, gated_mlp={g}" for p, n, g in FAMILIES)
        raise ValueError(
            f"boot_native: got positional_embedding_type={kind[0]!r}, normalization_type={kind[1]!r}, "
            f"gated_mlp={kind[2]}, expected one of the combinations that models of transformers have: {have}"
        )
    make, more = FAMILIES[kind]
    for name in ("n_layers", "d_model", "n_heads", "n_ctx", "d_vocab"):
        whole(f"boot_native: {name}", getattr(cfg, name), 1)
    one_of("boot_native: act_fn", cfg.act_fn, tuple(ACT2FN))
    default = BridgeConfig(n_layers=1, d_model=1, n_ctx=1, n_heads=1)
    unheeded = [field.name for field in fields(cfg) if field.name not in {*COMMON, *READ_ALWAYS, *OF_BRIDGE, *more}]
    asked = [name for name in unheeded if getattr(cfg, name) != getattr(default, name)]
    if make is not _llama and cfg.n_key_value_heads != cfg.n_heads:
        asked.append("n_key_value_heads")
    if make is not _llama and cfg.d_head * cfg.n_heads != cfg.d_model:
        asked.append("d_head")
    if cfg.attn_scale != cfg.d_head**0.5:
        asked.append("attn_scale")
    if not cfg.num_experts:
        asked += [name for name in ("sliding_window", "experts_per_token") if name in more and getattr(cfg, name)]
    if cfg.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[make(cfg).model_type]:
        asked.remove("architecture")
    if cfg.d_vocab_out not in (-1, cfg.d_vocab):
        asked.append("d_vocab_out")
    if asked:
        raise ValueError(
            f"boot_native: {', '.join(f'{name}={getattr(cfg, name)!r}' for name in asked)}: the "
            f"{make(cfg).model_type} model that the rest of this config describes has no such thing; leave it out, "
            "or wrap a Hugging Face model of your own: TransformerBridge(model)"
        )
    made = make(cfg)
    made.vocab_size, made.tie_word_embeddings = cfg.d_vocab, cfg.tie_word_embeddings
    made.bos_token_id = made.eos_token_id = made.pad_token_id = None
    # What TransformerLens draws from where a config names no range.
    made.initializer_range = 0.8 / cfg.d_model**0.5 if cfg.initializer_range < 0 else cfg.initializer_range
    return made


def described(config: BridgeConfig | Mapping[str, Any]) -> BridgeConfig:
    """A config, or a mapping of its fields, as a config of its own."""
    if not isinstance(config, (BridgeConfig, Mapping)):
        raise TypeError(f"boot_native: got {in_words(config)}, expected a HookedTransformerConfig or a dict")
    return BridgeConfig.from_dict(config if isinstance(config, Mapping) else config.to_dict())


def keep(asked: BridgeConfig, cfg: BridgeConfig) -> None:
    """Give the config of a bridge what the one asked for says about the bridge."""
    for name in OF_BRIDGE:
        setattr(cfg, name, getattr(asked, name))


def native_model(cfg: BridgeConfig, tokenizer: Any = None) -> nn.Module:
    """A random model in evaluation mode; the same one for the same `seed`, leaving the global generator alone."""
    if cfg.d_vocab == -1 and tokenizer is not None:
        cfg.d_vocab = len(tokenizer)
    made = native_config(cfg)
    with torch.random.fork_rng(devices=[], enabled=cfg.seed is not None):
        if cfg.seed is not None:
            torch.manual_seed(cfg.seed)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(made, dtype=cfg.dtype).eval()
    return model.to(cfg.device)
