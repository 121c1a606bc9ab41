"""The registry: which adapter describes which `model_type`. Adapters are imported when first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

HERE = "transformer_lens.model_bridge.supported_architectures"
ADAPTERS: dict[str, str | type[ArchitectureAdapter]] = {
    "falcon": f"{HERE}.falcon:FalconArchitectureAdapter",
    "gemma": f"{HERE}.llama:GemmaArchitectureAdapter",
    "gemma2": f"{HERE}.llama:Gemma2ArchitectureAdapter",
    "gpt2": f"{HERE}.gpt2:GPT2ArchitectureAdapter",
    "gpt_neox": f"{HERE}.gpt_neox:GPTNeoXArchitectureAdapter",
    "llama": f"{HERE}.llama:LlamaArchitectureAdapter",
    "mistral": f"{HERE}.llama:MistralArchitectureAdapter",
    "mixtral": f"{HERE}.mixtral:MixtralArchitectureAdapter",
    "qwen2": f"{HERE}.llama:Qwen2ArchitectureAdapter",
    "qwen3": f"{HERE}.llama:Qwen3ArchitectureAdapter",
    "qwen3_moe": f"{HERE}.llama:Qwen3MoeArchitectureAdapter",
}
"""`model_type` -> the adapter, or where it is."""


def register_adapter(adapter: type[ArchitectureAdapter]) -> type[ArchitectureAdapter]:
    """Make an adapter known under its `model_type`; usable as a class decorator."""
    ADAPTERS[adapter.model_type] = adapter
    return adapter


def adapter_class(model_type: Any) -> type[ArchitectureAdapter]:
    """The adapter of a `model_type`. Raises `ValueError` for a family that is not supported."""
    if model_type not in ADAPTERS:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(ADAPTERS))}. "
            "docs/adding_an_architecture.md shows how to describe another family"
        )
    found = ADAPTERS[model_type]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = register_adapter(getattr(import_module(module), name))
    return found


def adapter_for(config: Any) -> ArchitectureAdapter:
    """The adapter of a Hugging Face config.

    >>> adapter_for(FalconConfig()).cfg.n_heads
    71

    Raises `ValueError` for a family that is not supported, or a configuration it cannot run.
    """
    return adapter_class(getattr(config, "model_type", None))(config)
