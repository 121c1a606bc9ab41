"""Models sharded over several processes: which tensors are shards, and how to gather and slice them.

Read from the plan that transformers applied (`DistributedConfig`). Hooks see the whole tensor, the same in every
process, and an edit is sliced back into shards. Axes are counted from the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from transformer_lens.model_bridge.config import BridgeConfig

DIVIDED_SIDES: Mapping[str, str | None] = {
    **{"colwise": "out", "rowwise": "in"},
    **dict.fromkeys(("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep")),
    **dict.fromkeys(("embedding_rowwise", "embedding_colwise")),
    **dict.fromkeys(("moe_tp_experts", "ep_dispatch_experts", "replicate")),
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
        where: dict[str, Any] = {"dim": dim, "sizes": sizes or [x.shape[dim]] * self.size}
        return _Linear.by(x, partial(self._gathered, **where), partial(self._sliced, **where))

    def slice(self, whole: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        """This process's shard; the gradients of all shards are gathered. A collective call."""
        if self.size == 1:
            return whole
        where: dict[str, Any] = {"dim": dim, "sizes": sizes or self.even(whole.shape[dim])}
        return _Linear.by(whole, partial(self._sliced, **where), partial(self._gathered, **where))

    def summed(self, part: Tensor) -> Tensor:
        """The sum of everybody's part. The gradient of the sum is that of each part."""
        return part if self.size == 1 else _Linear.by(part, self._sum, None)

    def entering(self, x: Tensor) -> Tensor:
        """A whole tensor as it enters work that is divided: each process's gradient is a part of its gradient."""
        return x if self.size == 1 else _Linear.by(x, lambda x: x.view_as(x), self._sum)

    def _sum(self, part: Tensor) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def _gathered(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        longest, ours = max(sizes), sizes[self.rank]
        padded = x.transpose(0, dim).contiguous()
        if ours < longest:
            padded = torch.cat([padded, padded.new_zeros(longest - ours, *padded.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.transpose(0, dim).contiguous()

    def _sliced(self, whole: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        part = whole.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank])
        return part.clone(memory_format=torch.contiguous_format)


ALONE = Shards()


class _Linear(torch.autograd.Function):
    """`there(x)`, whose gradient goes `back`: as it is, where that is `None`."""

    @classmethod
    def by(cls, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] | None) -> Tensor:
        apply: Callable[..., Tensor] = cls.apply
        return apply(x, there, back)

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Any, back: Any) -> Tensor:
        ctx.ways = back, (None if back is None else there)
        return there(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        back, there = ctx.ways
        return grads[0] if back is None else _Linear.by(grads[0], back, there), None, None


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
        """The style of a module. Raises `ValueError` for one whose tensors the bridge cannot make whole."""
        style = self.styles.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path))  # a plan writes `layers.*.mlp`
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


def sharding_of(model: Any, cfg: BridgeConfig) -> Sharding:
    """What the model's plan means, or that it has none. Raises `ValueError` for a division that is not understood."""
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
    styles: dict[str, str] = dict(model.tp_plan) if config.tp_size > 1 else {}
    if config.ep_size > 1:  # its rules go before those of tensor parallelism
        styles |= model.ep_plan
    return Sharding(styles, Shards(mesh.get_group(), mesh.get_local_rank(), mesh.size()), cfg)
