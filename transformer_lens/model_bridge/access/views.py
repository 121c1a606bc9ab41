"""Views: exactly invertible readings of a tensor, such as its heads or the q part of a fused QKV.

Each obeys the laws of a lens: get returns what was put, putting back what was read changes nothing, and a later put
wins. `put` never writes to the tensor it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from transformer_lens.model_bridge.config import BridgeConfig


class View(Protocol):
    """Reads a part of a tensor, and makes the tensor with another part in its place."""

    def get(self, x: Tensor) -> Tensor: ...

    def put(self, x: Tensor, value: Tensor) -> Tensor: ...


class Some(ABC):
    """A view of some entries of the last axis: another part is written into a copy of the tensor."""

    @abstractmethod
    def place(self, x: Tensor) -> Tensor:
        """The entries, in the tensor's own memory."""

    def get(self, x: Tensor) -> Tensor:
        return self.place(x)

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        changed = x.clone()
        place = self.place(changed)
        place.copy_(value.reshape(place.shape))
        return changed


@dataclass(frozen=True)
class Whole:
    def get(self, x: Tensor) -> Tensor:
        return x

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True)
class Heads:
    """The last axis as heads."""

    n_heads: int
    d_head: int

    def get(self, x: Shaped[Tensor, "*batch pos flat"]) -> Shaped[Tensor, "*batch pos head d_head"]:
        return x.unflatten(-1, (self.n_heads, self.d_head))  # type: ignore[no-any-return]

    def put(
        self, x: Shaped[Tensor, "*batch pos flat"], value: Shaped[Tensor, "*batch pos head d_head"]
    ) -> Shaped[Tensor, "*batch pos flat"]:
        return value.flatten(-2)


@dataclass(frozen=True)
class FusedQKV(Some):
    """One part of Falcon's fused QKV activation, in all of its layouts.

    >>> FusedQKV(kv_groups=2, heads_per_group=3, d_head=4, part="q").get(torch.zeros(1, 5, 40)).shape
    torch.Size([1, 5, 6, 4])

    The last axis is `(kv_group, heads_per_group + 2, d_head)`: a group's queries, then its key, then its value.
    Multi-query has one group, the per-head layout one head in each. The q of several groups is a copy; k and v are
    strided views, and so is q with `grouped=True`, whose heads are `(kv_group, heads_per_group)`. Source:
    `FalconAttention._split_heads` in transformers.
    """

    kv_groups: int
    heads_per_group: int
    d_head: int
    part: Literal["q", "k", "v"]
    grouped: bool = False

    def place(self, x: Float[Tensor, "*batch pos fused"]) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.kv_groups, self.heads_per_group + 2, self.d_head))
        return split[..., :-2, :] if self.part == "q" else split[..., -2 if self.part == "k" else -1, :]

    def get(self, x: Float[Tensor, "*batch pos fused"]) -> Float[Tensor, "*batch pos head d_head"]:
        return self.place(x) if self.grouped or self.part != "q" else self.place(x).flatten(-3, -2)


@dataclass(frozen=True)
class FusedBlocks(Some):
    """One part of a fused activation laid out as `[Q | K | V]` blocks, as GPT-2's is."""

    n_heads: int
    n_key_value_heads: int
    d_head: int
    part: Literal["q", "k", "v"]

    def place(self, x: Float[Tensor, "*rows fused"]) -> Float[Tensor, "*rows head d_head"]:
        q, kv = self.n_heads * self.d_head, self.n_key_value_heads * self.d_head
        start, end = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[self.part]
        return x[..., start:end].unflatten(-1, (-1, self.d_head))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ExpandedValues(Some):
    """The values in an expanded latent vector, each after the part of a key of its head."""

    n_heads: int
    d_before: int

    def place(self, x: Float[Tensor, "batch 1 pos flat"]) -> Float[Tensor, "batch pos head d_v"]:
        return x[:, 0].unflatten(-1, (self.n_heads, -1))[..., self.d_before :]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TokenRows:
    """Flat tokens as `(batch, pos)`."""

    batch: int
    pos: int

    def get(self, x: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "batch pos ..."]:
        return x.unflatten(0, (self.batch, self.pos))  # type: ignore[no-any-return]

    def put(self, x: Shaped[Tensor, "rows ..."], value: Shaped[Tensor, "batch pos ..."]) -> Shaped[Tensor, "rows ..."]:
        return value.flatten(0, 1)


@dataclass(frozen=True)
class Groups:
    """Heads as `(kv_group, heads_per_group)`."""

    kv_groups: int

    def get(self, x: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch kv_group heads_per_group d_head"]:
        return x.unflatten(-2, (self.kv_groups, -1))  # type: ignore[no-any-return]

    def put(self, x: Tensor, value: Float[Tensor, "*batch kv_group heads_per_group d_head"]) -> Tensor:
        return value.flatten(-3, -2)


@dataclass(frozen=True)
class Half(Some):
    """One of the two halves of the last axis."""

    which: Literal[0, 1]

    def place(self, x: Shaped[Tensor, "*rows both"]) -> Shaped[Tensor, "*rows half"]:
        size = x.shape[-1] // 2
        return x.narrow(-1, self.which * size, size)


@dataclass(frozen=True)
class EveryOther(Some):
    """Every second entry of the last axis, from the first or the second on."""

    start: Literal[0, 1]

    def place(self, x: Shaped[Tensor, "*rows both"]) -> Shaped[Tensor, "*rows half"]:
        return x[..., self.start :: 2]


@dataclass(frozen=True)
class Moved:
    """A tensor with one axis moved."""

    source: int
    destination: int

    def get(self, x: Tensor) -> Tensor:
        return x.movedim(self.source, self.destination)

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        return value.movedim(self.destination, self.source)


TRANSPOSED = Moved(-1, -2)
"""A weight stored as `[out, in]`, with its last two axes swapped."""


@dataclass(frozen=True)
class Scaled:
    """A tensor times a number.

    >>> Scaled(0.5).get(torch.tensor([4.0])), Scaled(0.5).put(torch.tensor([4.0]), torch.tensor([3.0]))
    (tensor([2.]), tensor([6.]))

    Put and get agree up to one rounding; what was not changed is put back bit for bit.
    """

    scale: float

    def get(self, x: Tensor) -> Tensor:
        return x * self.scale

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        divided = value / self.scale
        off = (x - divided).detach()
        return divided + torch.where((value == self.get(x)) & off.isfinite(), off, 0)


@dataclass(frozen=True)
class Shifted:
    """A tensor plus a number.

    >>> Shifted(1.0).get(torch.tensor([0.5])), Shifted(1.0).put(torch.tensor([0.5]), torch.tensor([3.0]))
    (tensor([1.5000]), tensor([2.]))

    Put and get agree up to one rounding; what was not changed is put back bit for bit.
    """

    by: float

    def get(self, x: Tensor) -> Tensor:
        return x + self.by

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        return torch.where(value == self.get(x), x, value - self.by)


@dataclass(frozen=True)
class Through:
    """What a second view shows of the part that a first one shows."""

    first: View
    second: View

    def get(self, x: Tensor) -> Tensor:
        return self.second.get(self.first.get(x))

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        return self.first.put(x, self.second.put(self.first.get(x), value))


def in_groups(view: View, kv_groups: int) -> View:
    """The query heads of a view as `(kv_group, heads_per_group)`, without copying them."""
    if isinstance(view, FusedQKV) and view.part == "q":
        return replace(view, grouped=True)
    return Through(view, Groups(kv_groups))


def whole(cfg: BridgeConfig) -> View:
    return Whole()


def scaled(scale: float, cfg: BridgeConfig) -> View:
    return Scaled(scale)


def times(scale: float, view: Callable[[BridgeConfig], View], cfg: BridgeConfig) -> View:
    return Through(view(cfg), Scaled(scale))


def half(which: Literal[0, 1], cfg: BridgeConfig) -> View:
    return Half(which)


def heads_first(cfg: BridgeConfig) -> View:
    """Heads whose axis is before positions, moved after them."""
    return Moved(1, 2)


def query_heads(cfg: BridgeConfig) -> View:
    """What each query head has, of whatever width."""
    return Heads(cfg.n_heads, -1)


def beside_gate(part: Literal["k", "v"], cfg: BridgeConfig) -> View:
    """Each head's query ("k") and its gate ("v"), laid out as key and value of a group without queries."""
    return FusedQKV(cfg.n_heads, 0, cfg.d_head, part)


def key_value_heads(cfg: BridgeConfig) -> View:
    """What each group's key or value has, of whatever width."""
    return Heads(cfg.n_key_value_heads, -1)


def expanded_values(cfg: BridgeConfig) -> View:
    """The values in what a latent vector is expanded to."""
    return ExpandedValues(cfg.n_heads, cfg.d_head - (cfg.rotary_dim or 0))


def fused(part: Literal["q", "k", "v"], cfg: BridgeConfig) -> View:
    """The queries, keys or values of a fused, grouped QKV."""
    return FusedQKV(cfg.n_key_value_heads, cfg.n_heads // cfg.n_key_value_heads, cfg.d_head, part)


def block(part: Literal["q", "k", "v"], cfg: BridgeConfig) -> View:
    """The queries, keys or values of a fused `[Q | K | V]`."""
    return FusedBlocks(cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, part)


first_half, second_half = partial(half, 0), partial(half, 1)
gated_q, gate_of_q = partial(beside_gate, "k"), partial(beside_gate, "v")
fused_q, fused_k, fused_v = partial(fused, "q"), partial(fused, "k"), partial(fused, "v")
block_q, block_k, block_v = partial(block, "q"), partial(block, "k"), partial(block, "v")
