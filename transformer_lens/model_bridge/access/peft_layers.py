"""PEFT models: where the model is inside, and what an adapted weight is. PEFT is optional and never imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def inner_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The Hugging Face model inside a `PeftModel`, and its path there; ("", model) for any other model.

    >>> inner_model(model)[0]
    ''

    Raises `ValueError` for adapters that lengthen the prompt, whose positions are not the caller's.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return "", model
    wrapped: Any = model
    for name, config in wrapped.peft_config.items():
        if config.is_prompt_learning:
            raise ValueError(
                f"adapter {name!r} ({config.peft_type.value}) adds positions of its own to every call, so hooks would "
                "not show the positions of the tokens given; bridge the model without it"
            )
    return "base_model.model", wrapped.get_base_model()


def computing_module(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers, which change its stacked parameters during a call."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    while lora is not None and isinstance(module, lora.ParamWrapper):
        module = module.base_layer
    return module


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT wraps a module."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def adapted_weight(layer: Any, name: str, read: Callable[[nn.Module, str], Tensor]) -> Tensor:
    """The weight of an adapted layer: the base layer's plus `scaling * B @ A` of each active adapter.

    Source: Hu et al. 2021 (LoRA), and PEFT's `get_delta_weight`. Raises `ValueError` for other kinds of adapters.
    """
    weight = read(layer.base_layer, name)
    if name != getattr(layer, "parameter_name", "weight"):  # a wrapper of another parameter, or a bias
        return weight
    if layer.merged and layer.disable_adapters:
        raise ValueError("this adapter is merged and disabled; unmerge it, PEFT does so at the next forward")
    if layer.merged or layer.disable_adapters:
        return weight
    active = [adapter for adapter in layer.active_adapters if adapter in getattr(layer, "lora_A", ())]
    if not active and not any(adapter in layer._get_available_adapters() for adapter in layer.active_adapters):
        return weight
    kind = type(layer).__name__
    if not active or any(adapter in layer.lora_variant or layer.lora_bias[adapter] for adapter in active):
        raise ValueError(
            f"the {name} under a {kind} of {type(layer).__module__} cannot be read: only plain LoRA is a matrix added "
            "to a weight; merge the adapter (merge_adapter()), or disable it, to read this weight"
        )
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for adapter in active:
        total = total + layer.get_delta_weight(adapter).to(total.dtype)
    return total.to(weight.dtype)
