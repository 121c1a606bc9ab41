"""Reading a weight wherever it is: in the module, offloaded by accelerate, or sharded over processes.

Everything that reads a weight uses `read_weight`, so no number is computed from an offloaded weight's empty `meta`
tensor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transformer_lens.checks import in_words
from transformer_lens.model_bridge.access.peft_layers import adapted_weight, is_adapted
from transformer_lens.model_bridge.access.quantised import dequantised


def read_weight(module: nn.Module, name: str = "weight", *, shard: bool = False) -> Tensor:
    """A weight of a module, as its forward computes with it.

    >>> read_weight(model.lm_head).shape
    torch.Size([735, 128])

    An offloaded weight is brought to the device where its module runs, for the caller alone. A sharded weight is
    gathered, a collective call; `shard=True` gives this process's shard instead. A quantised weight is dequantised, and
    an adapter is added to it: both are copies. Raises `ValueError` for a weight on the meta device that nothing can
    bring back.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {in_words(module)}, expected a module of a model")
    if is_adapted(module):
        return adapted_weight(module, name, partial(read_weight, shard=shard))
    if not isinstance(name, str) or not hasattr(module, name):
        raise ValueError(f"name: got {in_words(name)}, expected the name of a weight of {type(module).__name__}")
    weight: Tensor = getattr(module, name)
    if weight.is_meta and offloading_hook(module) is not None:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            weight = getattr(module, name)
    if weight.is_meta:
        raise ValueError(
            f"the {name} of {type(module).__name__} is on the meta device: it has a shape and no numbers; load the "
            "model with weights, or offload it with accelerate (device_map, dispatch_model, cpu_offload or "
            "disk_offload), which brings a weight back when it is read"
        )
    if isinstance(weight, DTensor):
        return weight.to_local() if shard else weight.full_tensor()
    return dequantised(module, weight)


def offloading_hook(module: nn.Module) -> Any | None:
    """The hook of accelerate that offloads this module's own weights between forward passes, or `None`."""
    hook: Any = module.__dict__.get("_hf_hook")
    return hook if hook is not None and any(h.offload for h in _each(hook) if hasattr(h, "offload")) else None


def _each(hook: Any) -> tuple[Any, ...]:
    """The hooks in a sequence of accelerate's hooks."""
    return tuple(hook.hooks) if hasattr(hook, "hooks") else (hook,)


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module's weights are, or where accelerate brings them."""
    device = next(module.parameters()).device
    hook = offloading_hook(module)
    if device.type != "meta" or hook is None:
        return device
    found = next(h.execution_device for h in _each(hook) if hasattr(h, "offload"))
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
