"""TransformerLens's name for a bridge around a module that is already there."""

from typing import Any

from torch import nn

from transformer_lens.checks import a_text, device_of
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.loading.load import named_dtype
from transformer_lens.model_bridge.loading.native import described, keep
from transformer_lens.model_bridge.supported_architectures import adapter_for


def build_bridge_from_module(
    model: nn.Module,
    architecture: str,
    *,
    hf_config: Any = None,
    tl_config: Any = None,
    tokenizer: Any = None,
    dtype: Any = None,
    device: Any = None,
    model_name: str = "external",
) -> TransformerBridge:
    """`TransformerBridge(model, tokenizer)`, if what is said about the module is so.

    >>> module = bridge.original_model
    >>> build_bridge_from_module(module, "FalconForCausalLM", hf_config=module.config).cfg.model_name
    'external'

    Raises `ValueError` where an argument and the module differ.
    """
    if (hf_config is None) == (tl_config is None):
        raise ValueError("build_bridge_from_module: expected one of hf_config and tl_config")
    bridge = TransformerBridge(model, tokenizer)
    config = adapter_for(hf_config).cfg if tl_config is None else described(tl_config)
    told: dict[str, Any] = {"architecture": a_text("architecture", architecture), "dtype": named_dtype(dtype)}
    told["device"] = None if device is None else device_of("device", device)
    sizes = ("n_layers", "d_model", "n_heads", "d_head", "n_key_value_heads", "d_mlp", "n_ctx", "d_vocab")
    for name, value in (told | {size: getattr(config, size) for size in sizes}).items():
        if value not in (None, -1, found := getattr(bridge.cfg, name)):
            raise ValueError(f"build_bridge_from_module: got {name}={value!r}, and the module has {found!r}")
    if tl_config is not None:
        keep(config, bridge.cfg)
    bridge.cfg.model_name = a_text("model_name", model_name)
    return bridge
