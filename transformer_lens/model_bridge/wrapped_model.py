"""The Hugging Face model behind a bridge: its parameters, state and device are its own, under its own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn

from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.weight_access import execution_device


class WrappedModel(nn.Module):
    """What a bridge hands on to `original_model`, so that moving, casting, saving and training work as usual."""

    original_model: nn.Module
    cfg: BridgeConfig

    def _read_parameters(self) -> None:
        parameter = next(self.original_model.parameters())
        self.cfg.dtype = parameter.dtype
        self.cfg.device = self.input_device()

    def input_device(self) -> torch.device:
        """The device on which the token embedding runs."""
        model: Any = self.original_model
        embedding = model.get_input_embeddings()
        return execution_device(embedding)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the model, as `torch.nn.Module.to` does."""
        self.original_model.to(*args, **kwargs)
        self._read_parameters()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `half()`, `cuda()` and their like go through."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._read_parameters()
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own parameters under their own names."""
        return self.original_model.named_parameters(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's own parameters."""
        return self.original_model.parameters(recurse)
