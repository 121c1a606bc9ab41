"""What identifies a job: everything that changes the model's numbers, the tokenizer and the environment.

A resumed job has to find all of it unchanged.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

LIBRARIES = ("transformer-lens-bridge", "torch", "transformers", "tokenizers", "safetensors", "numpy")
SAMPLED = 256
"""Values per parameter in the fingerprint of the weights, in addition to the sum of all its bits."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNHEEDED = frozenset(
    {"training", "gradient_checkpointing", "layer_idx", "name_or_path", "max_seq_len_cached", "preparations"}
)
"""Module settings that change no number of a forward, or follow from its length."""
ADAPTERS = frozenset({"_active_adapter", "_disable_adapters"})
"""The PEFT layer settings whose names begin with an underscore."""
WRITTEN_ELSEWHERE = frozenset({"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures"})
"""Config entries recorded elsewhere, or without effect on the computation."""


def model_identity(bridge: TransformerBridge) -> dict[str, Any]:
    """The model's name and revision, with a fingerprint of its weights."""
    model: Any = bridge.original_model
    config = model.config
    return {
        "name": bridge.cfg.model_name,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": bridge.cfg.architecture,
        "weights": weights_fingerprint(model),
        "dtype": dtype_name(bridge.cfg.dtype),
        "attention": config._attn_implementation,
        "experts": getattr(config, "_experts_implementation", None),
        "hooked": [name for name, point in bridge.hook_dict.items() if point.has_hooks()],
        "in_hooks_places": {
            name: f"{type(module).__name__} {weights_fingerprint(module)}"
            for owner in (bridge, *bridge.components())
            for slot, name in owner.full_names.items()
            if (module := owner._modules.get(slot)) is not None and module is not bridge.hook_dict.get(name)
        },
    }


def model_state(bridge: TransformerBridge) -> dict[str, Any]:
    """Everything else that changes a model's numbers, by name: its config, and every module's class and settings.

    Adapters and whether they are active, disabled, merged or scaled are such settings. Settings that all layers share
    are recorded once, under a `*`.
    """
    model: Any = bridge.original_model
    config = model.config.to_diff_dict()
    state = {f"config.{name}": value for name, value in config.items() if name not in WRITTEN_ELSEWHERE}
    found: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        place = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
        kept = {n for n in vars(module) if n in ADAPTERS or not (n.startswith("_") or n in UNHEEDED)}
        settings = {name: value for name, value in vars(module).items() if name in kept and _plain(value)}
        for name, value in {"class": type(module).__name__, **settings}.items():
            found.setdefault(f"{place}.{name}".lstrip("."), []).append(value)
    state |= {name: values[0] if all(v == values[0] for v in values) else values for name, values in found.items()}
    device = bridge.input_device().type
    autocast = torch.is_autocast_enabled(device)
    return {**state, "autocast": dtype_name(torch.get_autocast_dtype(device)) if autocast else None}


def _plain(value: Any) -> bool:
    """Whether a value is a number, a text, or a collection of these."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def weights_fingerprint(model: nn.Module) -> str:
    """A checksum of every parameter and buffer: name, shape, the sum of its bits, and some of its values."""
    found = sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor.data
        # Offloaded weights are not here to read; of sharded ones, each process has its part.
        if type(here) is Tensor and not here.is_meta and here.numel():
            found.update(_content(here.detach()))
    return found.hexdigest()


def _content(tensor: Tensor) -> bytes:
    """The sum of a tensor's bits, which depends on every value, and a sample, which depends on their order."""
    flat = tensor.reshape(-1)
    some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
    total = int(flat.view(BITS[flat.element_size()]).sum(dtype=torch.int64))
    return f"{total} ".encode() + some.view(torch.uint8).numpy().tobytes()


def tokenizer_identity(tokenizer: Any) -> dict[str, Any] | None:
    """What turned texts into tokens; for a fast tokenizer also its normaliser, splitting and merges."""
    if tokenizer is None:
        return None
    rules = None
    if tokenizer.is_fast:  # calls leave their padding in it
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = _checksum({key: value for key, value in whole.items() if key not in ("padding", "truncation")})
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": _checksum(sorted(tokenizer.get_vocab().items())),
        "rules": rules,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }


def _checksum(document: Any) -> str:
    return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What else affects the last bits of a number."""
    versions = {name: version(name) for name in LIBRARIES}
    threads = torch.get_num_threads() if device.type == "cpu" else None
    precision = torch.get_float32_matmul_precision()
    return {"versions": versions, "device": device.type, "threads": threads, "matmul_precision": precision}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")
