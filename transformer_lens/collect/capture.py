"""Run one batch through the model, stopping after the last hook needed, and keep the values of the stored tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transformer_lens.collect.files import DTYPES, Column
from transformer_lens.collect.identity import dtype_name
from transformer_lens.collect.plan import Batch

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge


@dataclass(frozen=True)
class Hook:
    """What is stored of a hook, with one token axis in place of batch and position."""

    axes: str
    column: Column

    def to_dict(self) -> dict[str, Any]:
        return {"axes": self.axes, "shape": list(self.column.shape), "dtype": dtype_name(self.column.dtype)}


def stop_after(names: Sequence[str]) -> int | None:
    """The smallest `stop_at_layer` at which all these hooks fire; `None` for the whole model."""
    stop = 0
    for name in names:
        place = name.split(".")
        if place[0] == "blocks":
            stop = max(stop, int(place[1]) + 1)
        elif name != "hook_embed":
            return None
    return stop


def probe(bridge: TransformerBridge, names: Sequence[str], dtype: torch.dtype | None) -> dict[str, Hook]:
    """Run two tokens to find each hook's shape. Raises `ValueError` for hooks without a value for each token."""
    for name in names:
        axes = bridge.hook_dict[name].axes
        if "query_pos" in axes:
            raise ValueError(
                f"{name!r} has an entry for each pair of positions ({axes}), so what belongs to a token grows with its "
                "context; collect attn.hook_rot_q and attn.hook_rot_k (attn.hook_q and attn.hook_k) and multiply, or "
                "use run_with_cache"
            )
        if axes.split()[:2] != ["batch", "pos"]:
            raise ValueError(
                f"{name!r} has the axes {axes!r}, and only hooks with a value for each token, 'batch pos ...', can be "
                "collected"
            )
    stop = stop_after(names)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            torch.zeros(1, 2, dtype=torch.long),
            names_filter=list(names),
            stop_at_layer=stop,
            return_cache_object=False,
            padding_side="right",
        )
    found = {}
    for name in names:
        value, rest = cache[name], bridge.hook_dict[name].axes.split()[2:]
        kept = dtype if dtype is not None and value.is_floating_point() else value.dtype
        if kept not in DTYPES:
            raise ValueError(f"{name!r} is {value.dtype}, which safetensors cannot hold; pass dtype=torch.bfloat16")
        found[name] = Hook(" ".join(["token", *rest]), Column(kept, tuple(value.shape[2:])))
    return found


@dataclass(frozen=True)
class Captured:
    """The values of one batch, which a GPU may still be computing."""

    values: Mapping[str, Tensor]
    ready: torch.cuda.Event | None

    def on_cpu(self) -> Iterator[tuple[str, Tensor]]:
        """Each hook's values on the CPU, copied while the GPU goes on."""
        if self.ready is None:
            yield from self.values.items()
            return
        beside = torch.cuda.Stream()
        beside.wait_event(self.ready)
        for name, value in self.values.items():
            with torch.cuda.stream(beside):
                copied = value.to("cpu", non_blocking=True)
            beside.synchronize()
            yield name, copied


class Capturing:
    """Runs batches and keeps what a job stores."""

    def __init__(self, bridge: TransformerBridge, hooks: Mapping[str, Hook]) -> None:
        self.bridge = bridge
        self.hooks = hooks
        self.stop_at_layer = stop_after(list(hooks))

    def run(self, batch: Batch) -> Captured:
        """The stored tokens' values at every hook, in the dtype they are stored in."""
        device = self.bridge.input_device()
        # Padding is on the right and affects nothing before it, so the call needs no mask.
        _, cache = self.bridge.run_with_cache(
            torch.from_numpy(batch.ids).to(device),
            names_filter=list(self.hooks),
            stop_at_layer=self.stop_at_layer,
            return_type=None if self.stop_at_layer is None else "logits",
            return_cache_object=False,
            padding_side="right",
        )
        everything = bool(batch.keep.all())
        kept = torch.from_numpy(batch.keep.reshape(-1).nonzero()[0])
        values = {}
        for name, hook in self.hooks.items():
            flat = cache[name].reshape(-1, *cache[name].shape[2:])
            some = flat if everything else flat.index_select(0, kept.to(flat.device))
            values[name] = _cast(name, some, hook.column.dtype)
        on_gpu = any(value.is_cuda for value in values.values())
        ready = torch.cuda.current_stream().record_event() if on_gpu else None
        return Captured(values, ready)


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if dtype is torch.float16 and value.dtype is not dtype and bool((cast.isinf() & ~value.isinf()).any()):
        raise ValueError(
            f"{name!r} reaches {float(value.abs().max()):.4g}, beyond float16's 65504; pass dtype=torch.bfloat16"
        )
    return cast
