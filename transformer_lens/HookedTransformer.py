"""`HookedTransformer` under its known import path: a `TransformerBridge` whose loading processes weights by default."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from transformer_lens.checks import one_of, whole
from transformer_lens.hook_points import HookedRootModule
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.calls.inputs import Output
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.loading.native import described, keep, native_model
from transformer_lens.utilities import USE_DEFAULT_VALUE

__all__ = ["USE_DEFAULT_VALUE", "HookedRootModule", "HookedTransformer", "HookedTransformerConfig", "Loss", "Output"]

HookedTransformerConfig = BridgeConfig
Loss = Tensor

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
INSTEAD = {
    "checkpoint_index": "revision= names a checkpoint of a training run",
    "checkpoint_value": "revision= names a checkpoint of a training run",
    "n_devices": "device_map= puts layers on several devices",
}
"""Keywords of TransformerLens that ask for what is not there, and what to do."""


class _AnyBridge(type):
    """Scripts ask whether a model is a `HookedTransformer` to know what they can call: every bridge is one."""

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or (
            cls is HookedTransformer and isinstance(instance, TransformerBridge)
        )


class HookedTransformer(TransformerBridge, metaclass=_AnyBridge):
    """The bridge, made in the words of TransformerLens 2 and 3.

    >>> model = HookedTransformer.from_pretrained("tiny-mixtral")
    >>> model.processed
    ('fold_ln', 'center_unembed', 'fold_value_biases')
    >>> isinstance(bridge, HookedTransformer)
    True

    `HookedTransformer(cfg)` makes a random model as `boot_native` does, `HookedTransformer(hf_model)` wraps one, and
    `undo_processing()` restores the original weights.
    """

    def __init__(
        self,
        cfg: BridgeConfig | Mapping[str, Any] | nn.Module,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: str | None = None,
    ) -> None:
        if isinstance(cfg, nn.Module):
            super().__init__(cfg, tokenizer)
        else:
            asked = described(cfg)
            asked.device = asked.device if move_to_device else torch.device("cpu")
            super().__init__(native_model(asked, tokenizer), tokenizer)
            keep(asked, self.cfg)
        self._pad_at(default_padding_side)

    def _pad_at(self, side: str | None) -> None:
        if side is not None:
            one_of("default_padding_side", side, ("left", "right"))
            self._tokens().tokenizer.padding_side = side

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model_name: str | Path,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        hf_model: nn.Module | None = None,
        device: torch.device | str | None = None,
        n_devices: int = 1,
        tokenizer: Any = None,
        move_to_device: bool = True,
        fold_value_biases: bool = True,
        default_prepend_bos: bool | None = USE_DEFAULT_VALUE,
        default_padding_side: str | None = None,
        dtype: torch.dtype | str | None = None,
        first_n_layers: int | None = None,
        **from_pretrained_kwargs: Any,
    ) -> Self:
        """Load a model by name or directory, and process its weights as TransformerLens does.

        >>> HookedTransformer.from_pretrained("tiny-falcon", fold_ln=False, center_unembed=False).processed
        ('center_writing_weights', 'fold_value_biases')

        Log-probabilities do not change, and a step that does not apply to the family is left out. Further keywords are
        those of `boot_transformers`. Raises `ValueError` for what is not supported, and says what there is: training
        checkpoints and devices by number, refactored attention matrices.
        """
        asked = (checkpoint_index is not None, checkpoint_value is not None, n_devices != 1)
        for name, instead in compress(INSTEAD.items(), asked):
            raise ValueError(f"from_pretrained: {name} is not supported; {instead}")
        if first_n_layers is not None:
            from_pretrained_kwargs["num_hidden_layers"] = whole("first_n_layers", first_n_layers, 1)
        if dtype is None and hf_model is None and "torch_dtype" not in from_pretrained_kwargs:
            dtype = "float32"
        model = cls.boot_transformers(
            None if hf_model is not None else model_name,
            device=device if move_to_device else None,
            dtype=dtype,
            tokenizer=tokenizer,
            hf_model=hf_model,
            **from_pretrained_kwargs,
        )
        model.cfg.model_name = str(model_name)
        if default_prepend_bos is not None:
            one_of("default_prepend_bos", default_prepend_bos, (True, False))
            model.cfg.default_prepend_bos = default_prepend_bos
        model._pad_at(default_padding_side)
        steps = (fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices)
        model.enable_compatibility_mode(True, False, *steps)
        return model

    @classmethod
    def from_pretrained_no_processing(cls, model_name: str | Path, **options: Any) -> Self:
        """Load a model without processing its weights, unless a keyword asks for a step.

        >>> HookedTransformer.from_pretrained_no_processing("tiny-falcon").processed
        ()
        """
        return cls.from_pretrained(model_name, **{**dict.fromkeys(STEPS, False), **options})
