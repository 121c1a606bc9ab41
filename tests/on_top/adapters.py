"""LoRA on small models, and the same models with the adapter multiplied out by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.support import family

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
TARGETS: dict[str, dict[str, Any]] = {
    "falcon": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    "mixtral": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": EXPERTS},
}
RANK, ALPHA = 3, 6


def model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A small model; grouped_mm has no float64, so its experts are eager."""
    return family(name, dtype=dtype, **({"experts": "eager"} if name == "mixtral" else {}))


def config(name: str, **changes: Any) -> LoraConfig:
    """LoRA on every projection, and on every expert and the router where there are any."""
    return LoraConfig(r=RANK, lora_alpha=ALPHA, **{**TARGETS["mixtral" if name == "mixtral" else "falcon"], **changes})


def randomise(peft_model: nn.Module, adapter: str = "default") -> None:
    """B starts at zero, which hides everything."""
    for key, parameter in peft_model.named_parameters():
        if f"lora_B.{adapter}" in key:
            nn.init.normal_(parameter, std=0.1)


def adapted(base: nn.Module, name: str, **changes: Any) -> PeftModel:
    """The model with an adapter that does something."""
    peft_model = get_peft_model(base, config(name, **changes)).eval()
    randomise(peft_model)
    return peft_model


def deltas(peft_model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Tensor]]:
    """What an adapter adds to which parameter of the base model, from its A and B alone."""
    for path, layer in peft_model.named_modules():
        if not hasattr(layer, "lora_A") or adapter not in layer.lora_A:
            continue
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        name = getattr(layer, "parameter_name", "weight")
        if name in ("gate_up_proj", "down_proj"):
            experts = layer.get_base_layer().gate_up_proj.shape[0]
            # B's columns are (rank, expert), A's rows (expert, rank)
            stacked = torch.stack(
                [b[:, expert::experts] @ a[expert * RANK : (expert + 1) * RANK] for expert in range(experts)]
            )
            yield _base_path(path, name), stacked * ALPHA / RANK
        else:
            yield _base_path(path, name), b @ a * ALPHA / RANK


def _base_path(path: str, name: str) -> str:
    return f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{name}"


@torch.no_grad()
def multiplied_out(plain: nn.Module, peft_model: nn.Module, *adapters: str) -> Any:
    """A copy of the base model with the adapters added to its weights."""
    merged: Any = copy.deepcopy(plain)
    found = 0
    for adapter in adapters or ("default",):
        for path, delta in deltas(peft_model, adapter):
            merged.get_parameter(path).add_(delta)
            found += 1
    assert found
    return merged
