"""Small random models from a config (`boot_native`), each in the transformers family that matches it."""

from __future__ import annotations

from collections.abc import Mapping
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
from transformer_lens.model_bridge.supported_architectures import adapter_class

READ_ALWAYS = (
    *("positional_embedding_type", "normalization_type", "gated_mlp", "dtype", "device", "attn_scale"),
    *("d_head", "d_mlp", "d_vocab_out", "tie_word_embeddings"),
)
OF_BRIDGE = (
    *("model_name", "default_prepend_bos", "seed", "initializer_range", "tokenizer_name"),
    *("use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "ungroup_grouped_query_attention"),
)
"""Fields that every model reads, or that follow from others; and those that the bridge's config keeps."""


FAMILIES: Mapping[tuple[str, str, bool], tuple[str, tuple[str, ...]]] = {
    ("standard", "LN", False): ("gpt2", ()),
    ("rotary", "LN", False): ("gpt_neox", ("parallel_attn_mlp", "rotary_dim", "rotary_base")),
    ("rotary", "RMS", True): (
        "llama",
        (*("rotary_base", "num_experts", "experts_per_token"), "sliding_window", "final_rms"),
    ),
}
"""For each kind of positions, norm and MLP: the `model_type`, and the further fields that it reads."""


def _made(cfg: BridgeConfig, family: str) -> PreTrainedConfig:
    """The config of a family (`mixtral` is Llama's with experts), its values under the names its adapter reads."""
    family = "mixtral" if family == "llama" and cfg.num_experts else family
    adapter = adapter_class(family)
    values = {theirs: getattr(cfg, ours) for ours, theirs in adapter.cfg_names.items() if ours != "n_key_value_heads"}
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict.fromkeys(adapter.dropouts, 0.0)
    if family == "gpt2":
        return transformers.GPT2Config(**values, n_inner=cfg.d_mlp)
    part = (cfg.rotary_dim or cfg.d_head) / cfg.d_head
    rope = {"rope_type": "default", "rope_theta": cfg.rotary_base or 10000.0, "partial_rotary_factor": part}
    values["rope_parameters"] = rope
    if family == "gpt_neox":
        return transformers.GPTNeoXConfig(**values, use_parallel_residual=cfg.parallel_attn_mlp)
    values |= {"num_key_value_heads": cfg.n_key_value_heads, "head_dim": cfg.d_head}
    if family == "llama":
        return transformers.LlamaConfig(**values)
    return transformers.MixtralConfig(**{**values, "num_experts_per_tok": cfg.experts_per_token or 2})


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
    family, more = FAMILIES[kind]
    for name in ("n_layers", "d_model", "n_heads", "n_ctx", "d_vocab"):
        whole(f"boot_native: {name}", getattr(cfg, name), 1)
    one_of("boot_native: act_fn", cfg.act_fn, tuple(ACT2FN))
    default = BridgeConfig(n_layers=1, d_model=1, n_ctx=1, n_heads=1)
    read = {*adapter_class(family).cfg_names, *READ_ALWAYS, *OF_BRIDGE, *more}
    unheeded = [field.name for field in fields(cfg) if field.name not in read]
    asked = [name for name in unheeded if getattr(cfg, name) != getattr(default, name)]
    if family != "llama" and cfg.n_key_value_heads != cfg.n_heads:
        asked.append("n_key_value_heads")
    if family != "llama" and cfg.d_head * cfg.n_heads != cfg.d_model:
        asked.append("d_head")
    if cfg.attn_scale != cfg.d_head**0.5:
        asked.append("attn_scale")
    if not cfg.num_experts:
        asked += [name for name in ("sliding_window", "experts_per_token") if name in more and getattr(cfg, name)]
    made = _made(cfg, family)
    if cfg.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[made.model_type]:
        asked.remove("architecture")
    if cfg.d_vocab_out not in (-1, cfg.d_vocab):
        asked.append("d_vocab_out")
    if asked:
        raise ValueError(
            f"boot_native: {', '.join(f'{name}={getattr(cfg, name)!r}' for name in asked)}: the "
            f"{made.model_type} model that the rest of this config describes has no such thing; leave it out, "
            "or wrap a Hugging Face model of your own: TransformerBridge(model)"
        )
    made.tie_word_embeddings = cfg.tie_word_embeddings
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
