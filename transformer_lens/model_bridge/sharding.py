"""Models sharded over several processes: which tensors are shards, and how to gather and slice them.

Read from the plan that transformers applied (`DistributedConfig`). Hooks see the whole tensor, the same in every
process, and an edit is sliced back into shards. Axes are counted from the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transformer_lens.model_bridge.config import BridgeConfig

DIVIDED_SIDES: Mapping[str, str | None] = {
    "colwise": "out",
    "rowwise": "in",
    "colwise_gather_output": None,
    "colwise_rep": None,
    "rowwise_split_input": None,
    "rowwise_rep": None,
    "embedding_rowwise": None,
    "embedding_colwise": None,
    "moe_tp_experts": None,
    "ep_dispatch_experts": None,
    "replicate": None,
}
"""transformers' parallel styles, and the side on which each has shards of the last axis, if any."""

INSIDE_EXPERTS: Mapping[str, str] = {"moe_tp_experts": "d_mlp", "ep_dispatch_experts": "expert"}
"""The axis along which a style of the experts shards their weights."""


@dataclass(frozen=True)
class Shards:
    """The processes that share a tensor, and this one's rank. One alone has it whole."""

    group: Any = None
    rank: int = 0
    size: int = 1

    def even(self, total: int) -> list[int]:
        """The sizes of `total` entries' shards, as `torch.chunk` makes them: the last may be smaller."""
        each = -(-total // self.size)
        return [min(each, max(0, total - each * rank)) for rank in range(self.size)]

    def gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """Gather the whole tensor; its gradient is sliced. A collective call."""
        if self.size == 1:
            return x
        return _apply(_Gather, x, self, dim, sizes or [x.shape[dim]] * self.size)

    def slice(self, whole: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """This process's shard; the gradients of all shards are gathered. A collective call."""
        if self.size == 1:
            return whole
        return _apply(_Slice, whole, self, dim, sizes or self.even(whole.shape[dim]))

    def summed(self, part: Tensor) -> Tensor:
        """The sum over processes, each with the gradient of the sum."""
        return part if self.size == 1 else _apply(_Summed, part, self)

    def entering(self, x: Tensor) -> Tensor:
        """A whole tensor that enters sharded work, so that gradients are summed over processes."""
        return x if self.size == 1 else _apply(_Entering, x, self)


ALONE = Shards()


def _apply(function: Any, *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.rest = (shards, dim, sizes)
        longest, ours = max(sizes), sizes[shards.rank]
        padded = x.transpose(0, dim).contiguous()
        if ours < longest:
            padded = torch.cat([padded, padded.new_zeros(longest - ours, *padded.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=shards.group)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.transpose(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        shards, dim, sizes = ctx.rest
        return _apply(_Slice, grads[0], shards, dim, sizes), None, None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, shards: Shards, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.rest = (shards, dim, sizes)
        start = sum(sizes[: shards.rank])
        return whole.narrow(dim, start, sizes[shards.rank]).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        shards, dim, sizes = ctx.rest
        return _apply(_Gather, grads[0], shards, dim, sizes), None, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, part: Tensor, shards: Shards) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=shards.group)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _apply(_Summed, grads[0], ctx.shards), None


@dataclass(frozen=True)
class Interior:
    """How processes share the inside of one module: the sharded axes, and the config of one process's part."""

    cfg: BridgeConfig
    shards: Shards = ALONE
    axes: tuple[str, ...] = ()

    def dim(self, axes: str) -> int | None:
        """The sharded axis of a tensor with these axes, counted from the end; `None` if it is whole."""
        names = axes.split()
        return next((at - len(names) for at, name in enumerate(names) if name in self.axes), None)


class Sharding:
    """What a plan means for a model's hooks: the style of each module, and the processes that share it."""

    def __init__(self, styles: Mapping[str, str], shards: Shards, cfg: BridgeConfig) -> None:
        self.styles = styles
        self.shards = shards
        self.cfg = cfg

    def style(self, path: str) -> str | None:
        """The style of a module. Raises `ValueError` for one whose tensors the bridge cannot gather."""
        style = self.styles.get(_any_layer(path))
        if style is not None and style not in DIVIDED_SIDES:
            raise ValueError(
                f"{path} is divided among processes in the style {style!r}, which the bridge cannot make whole; "
                f"it knows {', '.join(map(repr, DIVIDED_SIDES))}. Change that entry of the plan in DistributedConfig"
            )
        return style

    def divides(self, path: str, side: str) -> bool:
        """Whether a module's input ("in") or output ("out") is a shard."""
        style = self.style(path)
        return style is not None and DIVIDED_SIDES[style] == side

    def of_port(self, path: str, side: str) -> Shards:
        """The processes that share the tensor at a port."""
        return self.shards if self.divides(path, side) else ALONE

    def of_experts(self, path: str) -> Interior:
        """How processes share experts: the neurons of each, or whole experts."""
        axis = INSIDE_EXPERTS.get(self.style(path) or "")
        return Interior(self.cfg) if axis is None else Interior(self.cfg, self.shards, (axis,))

    def of_attention(self, path: str, inputs: Sequence[str], output: str) -> Interior:
        """How processes share attention: by heads, if its projections are sharded."""
        divided = {self.divides(at, "out") for at in inputs} | {self.divides(output, "in")}
        if divided == {False}:
            return Interior(self.cfg)
        heads, groups, size = self.cfg.n_heads, self.cfg.n_key_value_heads, self.shards.size
        if len(divided) > 1 or len(set(inputs)) < 3 or heads % size or groups % size:
            raise ValueError(
                f"{path}: {heads} query and {groups} key-value heads cannot be shared by {size} processes in this "
                "plan; heads are shared whole, with q, k and v 'colwise' and the output 'rowwise', or keep attention "
                "together with 'colwise_gather_output' and 'rowwise_split_input'"
            )
        local = replace(self.cfg, n_heads=heads // size, n_key_value_heads=groups // size)
        local.follow(self.cfg.facts)
        return Interior(local, self.shards, ("head", "kv_head"))


def sharding_of(model: nn.Module, cfg: BridgeConfig) -> Sharding:
    """What the model's plan, if any, means. Raises `ValueError` for an unknown division."""
    config: Any = getattr(model.config, "distributed_config", None)
    if config is not None and (config.pp_size > 1 or config.dp_size > 1):
        raise ValueError(
            f"DistributedConfig(pp_size={config.pp_size}, fsdp_size={config.fsdp_size}): the bridge supports tensor "
            "and expert parallelism (tp_size, ep_size); each process has to see the same batch"
        )
    divided = next(((name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if divided is None:
        return Sharding({}, ALONE, cfg)
    if config is None:
        raise ValueError(
            f"{divided[0]} is divided among processes, and not by transformers; load the model with "
            "from_pretrained(..., distributed_config=DistributedConfig(...)), whose plan tells hooks what is whole"
        )
    mesh = divided[1].device_mesh
    return Sharding(_styles(model, config), Shards(mesh.get_group(), mesh.get_local_rank(), mesh.size()), cfg)


def _styles(model: Any, config: Any) -> dict[str, str]:
    """The style of each module; rules of expert parallelism precede those of tensor parallelism."""
    experts = dict(model.ep_plan) if config.ep_size > 1 else {}
    tensors = dict(model.tp_plan) if config.tp_size > 1 else {}
    return {**tensors, **experts}


def _any_layer(path: str) -> str:
    """A module's path as in a plan: `layers.*.mlp`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
