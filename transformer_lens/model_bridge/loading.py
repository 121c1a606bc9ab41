"""Finding and loading a model: a hub name, a local directory, or one of the small models shipped here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from transformer_lens.data import TINY_MODELS, tiny_model_path
from transformer_lens.model_bridge.supported_architectures import adapter_for

logger = logging.getLogger(__name__)


def resolve_name(name_or_path: str | Path) -> str:
    """The directory of a shipped model, or the name as it is."""
    name = str(name_or_path)
    return str(tiny_model_path(name)) if name in TINY_MODELS and not Path(name).exists() else name


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name; `None` for "auto", which leaves it as it is."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: got {dtype!r}, expected a torch.dtype or the name of one, such as 'bfloat16'")
    return found


def model_class(config: Any) -> type[Any]:
    """The class the checkpoint was saved from, where it is one of its family's; else the causal model."""
    adapter_for(config)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "config_class", None) is type(config):
            return cast("type[Any]", found)
    return cast("type[Any]", transformers.AutoModelForCausalLM)


def load_model(name_or_path: str | Path, *, revision: str | None = None, **kwargs: Any) -> nn.Module:
    """Load a checkpoint with Hugging Face's own code. Raises `ValueError` before any weight is read
    if its family is not supported or its configuration cannot run."""
    name = resolve_name(name_or_path)
    trust = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    config = AutoConfig.from_pretrained(name, revision=revision, **trust)
    model: nn.Module = model_class(config).from_pretrained(name, revision=revision, **kwargs)
    return model


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any | None:
    """The checkpoint's tokenizer, or `None` with a warning where it has none."""
    try:
        return AutoTokenizer.from_pretrained(resolve_name(name_or_path), revision=revision)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer with %s (%s): the bridge takes token ids only", name_or_path, error)
        return None
