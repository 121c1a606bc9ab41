"""The Hugging Face model inside a bridge: parameters, state, device and configs are its own, under its own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn

from transformer_lens.checks import in_words
from transformer_lens.model_bridge.access.weights import execution_device, inner_model
from transformer_lens.model_bridge.architecture_adapter import head_of
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components.base import is_replica

MODEL = "original_model"


class ModelFacts:
    """What can change in a model; read when asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    def dtype(self) -> torch.dtype:
        parameter: nn.Parameter = next(self.model.parameters())
        return parameter.dtype

    @property
    def device(self) -> torch.device:
        return execution_device(self.model.get_input_embeddings())

    @property
    def d_vocab(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def d_vocab_out(self) -> int | None:
        inner: Any = inner_model(self.model)[1]
        head = head_of(inner)
        # A user's own module need not declare its width.
        return self.d_vocab if head is None else getattr(inner._modules[head], "out_features", None)


class HandedOn:
    """An attribute of the model that its bridge has under the same name."""

    def __init__(self, meaning: str) -> None:
        self.__doc__ = meaning

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, bridge: WrappedModel | None, owner: type) -> Any:
        return self if bridge is None else getattr(bridge.original_model, self.name)

    def __set__(self, bridge: WrappedModel, value: Any) -> None:
        standing = getattr(bridge.original_model, self.name)
        if not isinstance(value, type(standing)):
            raise TypeError(f"{self.name}: got {in_words(value)}, expected a {type(standing).__name__}")
        setattr(bridge.original_model, self.name, value)


class WrappedModel(nn.Module):
    """What a bridge passes on to `original_model`, so that moving, casting, saving and training work as usual."""

    original_model: nn.Module
    cfg: BridgeConfig

    @property
    def dtype(self) -> torch.dtype:
        return self.cfg.dtype

    @property
    def device(self) -> torch.device:
        """The device of the token embedding."""
        return self.cfg.device

    def input_device(self) -> torch.device:
        """The device on which the token embedding runs, also of a replica that `DataParallel` made."""
        embedding = self.get_input_embeddings()
        return embedding.weight.device if is_replica(embedding) else self.cfg.device

    config = HandedOn("The model's own Hugging Face config.")
    generation_config = HandedOn("What `generate` does unless told otherwise.")
    can_generate = HandedOn("Whether the model's class generates text.")
    main_input_name = HandedOn("What the model calls its token ids.")
    input_modalities = HandedOn("What the model reads; text.")
    output_modalities = HandedOn("What the model writes; text.")
    name_or_path = HandedOn("Where the model was loaded from.")
    get_input_embeddings = HandedOn("Its token embedding.")
    set_input_embeddings = HandedOn("Exchange its token embedding.")
    get_output_embeddings = HandedOn("Its head, where that predicts tokens.")
    set_output_embeddings = HandedOn("Exchange its head.")
    resize_token_embeddings = HandedOn("Give it a vocabulary of another size.")
    tie_weights = HandedOn("Make its head share the token embedding's weight again, where its config says so.")
    _supports_logits_to_keep = HandedOn("Whether it can be asked for the last logits alone; an assistant is.")

    def __setattr__(self, name: str, value: Any) -> None:
        modules = self.__dict__.get("_modules", {})
        model = modules.get(MODEL)
        if model is not None and name in model._modules and name not in modules:
            raise AttributeError(
                f"{name} is the model's own module: set it there (bridge.original_model.{name} = ...), and hooks follow"
            )
        super().__setattr__(name, value)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the model, and modules in hooks' places, as `torch.nn.Module.to` does."""
        for child in self.children():
            child.to(*args, **kwargs)
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own parameters under their own names."""
        self._name_children()
        return self.original_model.named_parameters(*args, **kwargs)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Every module, with those below `original_model` under the model's own names."""
        self._name_children()
        start = f"{prefix}." if prefix else ""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield start + name.removeprefix(start).removeprefix(f"{MODEL}."), module

    def _name_children(self) -> None:
        """Make the modules directly below the model attributes, since torch finds parameters by attribute."""
        children = self.original_model._modules
        self.__dict__.update({name: child for name, child in children.items() if name not in self._modules})
