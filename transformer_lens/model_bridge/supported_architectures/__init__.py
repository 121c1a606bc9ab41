"""The registry: which adapter describes which `model_type`. Adapters are imported when first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

ADAPTERS: dict[str, str | type[ArchitectureAdapter]] = {
    "falcon": "transformer_lens.model_bridge.supported_architectures.falcon:FalconArchitectureAdapter",
    "mixtral": "transformer_lens.model_bridge.supported_architectures.mixtral:MixtralArchitectureAdapter",
}


def register_adapter(adapter: type[ArchitectureAdapter]) -> type[ArchitectureAdapter]:
    """Make an adapter known under its `model_type`; usable as a class decorator."""
    ADAPTERS[adapter.model_type] = adapter
    return adapter


def adapter_for(config: Any) -> ArchitectureAdapter:
    """The adapter of a Hugging Face config.

    >>> adapter_for(FalconConfig()).cfg.n_heads
    71

    Raises `ValueError` for a family that is not supported, or a configuration it cannot run.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in ADAPTERS:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(ADAPTERS))}. "
            "docs/adding_an_architecture.md shows how to describe another family"
        )
    found = ADAPTERS[model_type]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = register_adapter(getattr(import_module(module), name))
    return found(config)
