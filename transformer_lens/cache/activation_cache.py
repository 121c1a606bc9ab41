"""`ActivationCache`: the activations of one run, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor

from transformer_lens.cache.residual_stacks import ResidualStacks
from transformer_lens.checks import device_of, in_words, is_one_of, whole
from transformer_lens.hooks.names import get_act_name
from transformer_lens.hooks.root import HookedRootModule, NamesFilter
from transformer_lens.hooks.slicing import Slice, SliceInput
from transformer_lens.text_table import TextTable

CacheKey = str | tuple[str, int] | tuple[str, int, str] | tuple[str, None, str]


class ActivationCache(ResidualStacks, Mapping[str, Tensor]):
    """A mapping from hook name to tensor, also under short names and aliases.

    >>> _, cache = bridge.run_with_cache("Mary and John")
    >>> cache["q", 0].shape, cache["resid_post", -1] is cache["blocks.3.hook_resid_post"]
    (torch.Size([1, 5, 4, 32]), True)

    Iteration lists each tensor once, under its canonical name, in the order of computation; gradients are under `name +
    "_grad"`. Tensors are detached, and share memory with the run unless `clone=True` was given. Raises `KeyError` for
    an activation that is not in the cache, and says why.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: HookedRootModule, has_batch_dim: bool = True) -> None:
        if not isinstance(cache_dict, Mapping):
            raise TypeError(f"cache_dict: got {in_words(cache_dict)}, expected a mapping of names to tensors")
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim

    def full_name(self, key: CacheKey) -> str:
        """The canonical name of a key. Raises `KeyError` if the model has no such hook."""
        parts: tuple[Any, ...] = key if isinstance(key, tuple) and len(key) > 1 else (key,)
        if len(parts) > 3 or not isinstance(parts[0], str):
            raise TypeError(f"cache key: got {key!r}, expected a name, (name, layer) or (name, layer, component)")
        name, layer, owner = (*parts, None, None)[:3]
        short = name.removesuffix("_grad")
        if isinstance(layer, int):
            layers = self._n_layers()
            if not -layers <= layer < layers:
                raise KeyError(
                    f"cache key {key!r}: got layer {layer}, expected {-layers} to {layers - 1} "
                    f"in a model of {layers} layers"
                )
            layer %= layers
        exact = short in self.cache_dict and layer is None
        full = short if exact else self._resolve(short, layer, None if owner is None else str(owner))
        return f"{full}{name[len(short) :]}"

    def _resolve(self, short: str, layer: str | int | None, owner: str | None) -> str:
        if layer is None and owner is None:
            with suppress(KeyError):
                return self.model.canonical_name(short)
        return self.model.canonical_name(get_act_name(short, layer, owner))

    def _n_layers(self) -> int:
        blocks = [n.split(".")[1] for n in self.model.hook_dict if n.startswith("blocks.")]
        return 1 + max(map(int, blocks))

    def __getitem__(self, key: CacheKey) -> Tensor:
        name = self.full_name(key)
        if name not in self.cache_dict:
            held = list(self.cache_dict)
            some = ", ".join(map(repr, held[:5])) + (", ..." if len(held) > 5 else "")
            raise KeyError(f"{name!r} was not captured; this cache holds {len(held)} tensors: {some}")
        return self.cache_dict[name]

    def __contains__(self, key: object) -> bool:
        try:
            return self.full_name(key) in self.cache_dict  # type: ignore[arg-type]
        except (KeyError, TypeError):
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        some = ", ".join(map(repr, list(self.cache_dict)[:4])) + (", ..." if len(self) > 4 else "")
        return f"ActivationCache with {len(self)} tensors: [{some}]"

    def _repr_html_(self) -> str:
        rows = [[name, str(tuple(tensor.shape)), str(tensor.dtype)] for name, tensor in self.cache_dict.items()]
        return TextTable(f"ActivationCache with {len(self)} tensors", ["name", "shape", "dtype"], rows)._repr_html_()

    def _ipython_key_completions_(self) -> list[str]:
        """What Tab completes inside the brackets."""
        inside = [name.split(".") for name in self.cache_dict if name.startswith("blocks.")]
        shorts = {(parts[-1].removeprefix("hook_"), int(parts[1])) for parts in inside}
        held: Any = self
        return [*self.cache_dict, *sorted({short for short, layer in shorts if (short, layer) in held})]

    def _as_asked(self, asked: NamesFilter) -> dict[str, Tensor]:
        """A plain dictionary, in the spelling in which hooks were asked for."""
        if not isinstance(asked, (str, list, tuple)):
            return self.cache_dict
        every = [name for one in ([asked] if isinstance(asked, str) else asked) for name in (one, f"{one}_grad")]
        return {name: self[name] for name in every if name in self}

    def remove_batch_dim(self) -> Self:
        """Drop the batch axis, in place. Raises `ValueError` unless every tensor has a batch of one."""
        if not self.has_batch_dim:
            return self
        for name, tensor in self.cache_dict.items():
            if tensor.shape[0] != 1:
                raise ValueError(f"remove_batch_dim: {name!r} has a batch of {tensor.shape[0]}, expected 1")
        self.cache_dict = {name: tensor[0] for name, tensor in self.cache_dict.items()}
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> ActivationCache:
        """A cache of some batch items; an int keeps one and drops the batch axis.

        >>> cache.apply_slice_to_batch_dim(0)["q", 0].shape
        torch.Size([5, 4, 32])

        Raises `ValueError` for a cache without a batch axis, and `IndexError` for an index out of range.
        """
        if not self.has_batch_dim:
            raise ValueError("apply_slice_to_batch_dim: this cache has no batch axis")
        keep = Slice(batch_slice)
        kept = {name: keep.apply(tensor, 0) for name, tensor in self.cache_dict.items()}
        return ActivationCache(kept, self.model, has_batch_dim=not isinstance(keep.index, int))

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to a device, in place."""
        device = device_of("device", device)
        self.cache_dict = {name: tensor.to(device) for name, tensor in self.cache_dict.items()}
        return self

    def stack_activation(self, name: str, layer: int = -1, sublayer_type: str | None = None) -> Tensor:
        """One activation of the first `layer` layers, stacked; -1 means all layers.

        >>> cache.stack_activation("resid_post").shape
        torch.Size([4, 1, 5, 128])
        """
        every = self._n_layers()
        if not is_one_of(layer, (-1,)):
            every = whole("layer", layer, 1, every, " (how many), or -1 for all")
        return torch.stack([self[get_act_name(name, i, sublayer_type)] for i in range(every)])
