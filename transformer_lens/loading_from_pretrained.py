"""TransformerLens's names for loading; any name or directory that transformers can load is a model name here."""

from __future__ import annotations

from typing import Any

from transformer_lens.checks import a_text
from transformer_lens.data import TINY_MODELS
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.loading.info import find_config, model_info
from transformer_lens.model_bridge.supported_architectures import adapter_for
from transformer_lens.model_bridge.supported_architectures.published import PUBLISHED

__all__ = ["MODEL_ALIASES", "OFFICIAL_MODEL_NAMES", "get_num_params_of_pretrained", "get_official_model_name"]
__all__ += ["get_pretrained_model_config"]
OFFICIAL_MODEL_NAMES: tuple[str, ...] = (*TINY_MODELS, *PUBLISHED)
"""The shipped models, and those whose sizes are known without a network."""
MODEL_ALIASES: dict[str, tuple[str, ...]] = {}
"""TransformerLens's short names for hub names: there are none."""


def get_official_model_name(model_name: str) -> str:
    """Return the name: every hub name of a supported family is official.

    >>> get_official_model_name("mistralai/Mixtral-8x7B-v0.1")
    'mistralai/Mixtral-8x7B-v0.1'
    """
    a_text("model_name", model_name)
    return model_name


def get_pretrained_model_config(model_name: str, **options: Any) -> BridgeConfig:
    """A model's config; its weights are not read.

    >>> get_pretrained_model_config("tiny-mixtral").num_experts
    4
    """
    return adapter_for(find_config(model_name, options)).cfg


def get_num_params_of_pretrained(model_name: str) -> int:
    """A model's number of parameters, from its config alone.

    >>> get_num_params_of_pretrained("tiny-mixtral")
    632960
    """
    return model_info(model_name).parameters
