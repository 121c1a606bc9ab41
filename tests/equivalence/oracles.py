"""Where each named tensor lives in transformers' own modules, written by hand from its modeling code.

Nothing here knows the package: a place is a module, a side and plain indexing, and reading or writing there
is a plain torch hook on the bare model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

Act = Callable[[Tensor], Tensor | None]
"""What to do with a value: return its replacement, or nothing."""


def same(raw: Tensor) -> Tensor:
    return raw


def replaced(raw: Tensor, value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Place:
    """The input or output of one module, and how the named tensor lies in it."""

    module: str
    side: Literal["in", "out"] = "out"
    item: int | None = None
    get: Callable[[Tensor], Tensor] = same
    put: Callable[[Tensor, Tensor], Tensor] = replaced

    def install(self, model: nn.Module, act: Act) -> list[RemovableHandle]:
        """Hooks on a bare model that show the value to `act`, and put what it returns in its place."""

        def change(raw: Tensor) -> Tensor:
            new = act(self.get(raw))
            return raw if new is None else self.put(raw, new)

        return self.raw_hooks(model, change)

    def watch(self, model: nn.Module, keep: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """Hooks on a bare model that hand `keep` the gradient at this place."""

        def change(raw: Tensor) -> Tensor:
            # An input may be read by others too; a view of its own has this reader's gradient alone.
            watched = raw.view_as(raw) if self.side == "in" else raw
            watched.register_hook(lambda gradient: keep(self.get(gradient).clone()))
            return watched

        return self.raw_hooks(model, change)

    def raw_hooks(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
        module = model.get_submodule(self.module)
        if self.side == "in":
            return [module.register_forward_pre_hook(partial(_exchange_input, change), with_kwargs=True)]
        return [module.register_forward_hook(partial(_exchange_output, change, self.item))]


def _exchange_input(change: Callable[[Tensor], Tensor], module: nn.Module, args: Any, kwargs: Any) -> Any:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _exchange_output(
    change: Callable[[Tensor], Tensor], item: int | None, module: nn.Module, args: Any, out: Any
) -> Any:
    if item is None:
        return change(out)
    return (*out[:item], change(out[item]), *out[item + 1 :])


@dataclass(frozen=True)
class Middle:
    """The stream between attention and MLP: the second norm's input, which the block also adds at its end."""

    norm: str
    mlp: str
    block: str
    item: int | None = None

    def install(self, model: nn.Module, act: Act) -> list[RemovableHandle]:
        kept: dict[str, Tensor] = {}

        def at_norm(raw: Tensor) -> Tensor:
            new = act(raw)
            kept["middle"] = raw if new is None else new
            return kept["middle"]

        def at_mlp(raw: Tensor) -> Tensor:
            kept["mlp"] = raw
            return raw

        def at_block(raw: Tensor) -> Tensor:
            return kept["middle"] + kept["mlp"]

        return [
            *Place(self.norm, "in").raw_hooks(model, at_norm),
            *Place(self.mlp).raw_hooks(model, at_mlp),
            *Place(self.block, item=self.item).raw_hooks(model, at_block),
        ]

    def watch(self, model: nn.Module, keep: Callable[[Tensor], None]) -> list[RemovableHandle]:
        def change(raw: Tensor) -> Tensor:
            raw.register_hook(lambda gradient: keep(gradient.clone()))
            return raw

        return Place(self.norm, "in").raw_hooks(model, change)


@dataclass(frozen=True)
class SharedNormBranch:
    """The stream as the MLP reads it where one LayerNorm feeds both branches: the norm, again, for the MLP alone."""

    block: str
    norm: str
    mlp: str

    def _hooks(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
        stream: dict[str, Tensor] = {}
        norm: Any = model.get_submodule(self.norm)

        def at_block(raw: Tensor) -> Tensor:
            stream["value"] = raw
            return raw

        def at_mlp(raw: Tensor) -> Tensor:
            new = change(stream["value"])
            if new is stream["value"]:
                return raw
            return F.layer_norm(new, new.shape[-1:], norm.weight, norm.bias, norm.eps)

        return [*Place(self.block, "in").raw_hooks(model, at_block), *Place(self.mlp, "in").raw_hooks(model, at_mlp)]

    def install(self, model: nn.Module, act: Act) -> list[RemovableHandle]:
        def change(raw: Tensor) -> Tensor:
            new = act(raw)
            return raw if new is None else new

        return self._hooks(model, change)

    def watch(self, model: nn.Module, keep: Callable[[Tensor], None]) -> list[RemovableHandle]:
        def change(raw: Tensor) -> Tensor:
            watched = raw.view_as(raw)
            watched.register_hook(lambda gradient: keep(gradient.clone()))
            return watched

        return self._hooks(model, change)


AnyPlace = Place | Middle | SharedNormBranch


# -- Falcon ------------------------------------------------------------------------------------------


def fused_columns(config: Any, part: str) -> Tensor:
    """Which outputs of `query_key_value` are q, k or v, head after head, counted out one by one."""
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
    else:
        groups = 1 if config.multi_query else config.num_attention_heads
    heads, size = config.num_attention_heads // groups, config.hidden_size // config.num_attention_heads
    columns: list[int] = []
    for group in range(groups):
        slots = {"q": range(heads), "k": (heads,), "v": (heads + 1,)}[part]
        for slot in slots:
            start = (group * (heads + 2) + slot) * size
            columns += range(start, start + size)
    return torch.tensor(columns)


def fused_place(module: str, config: Any, part: str) -> Place:
    """q, k or v inside the activation of the one fused matmul."""
    columns, size = fused_columns(config, part), config.hidden_size // config.num_attention_heads

    def get(raw: Tensor) -> Tensor:
        return raw[..., columns].unflatten(-1, (-1, size))

    def put(raw: Tensor, value: Tensor) -> Tensor:
        new = raw.clone()
        new[..., columns] = value.flatten(-2)
        return new

    return Place(module, get=get, put=put)


def heads_place(module: str, side: Literal["in", "out"], heads: int) -> Place:
    """The last axis as heads, each a run of neighbours."""
    return Place(
        module,
        side,
        get=lambda raw: raw.reshape(*raw.shape[:-1], heads, raw.shape[-1] // heads),
        put=lambda raw, value: value.reshape(raw.shape),
    )


def falcon_places(config: Any) -> dict[str, AnyPlace]:
    """`FalconForCausalLM`: every named tensor."""
    places: dict[str, AnyPlace] = {
        "hook_embed": Place("transformer.word_embeddings"),
        "ln_final.hook_out": Place("transformer.ln_f"),
        "unembed.hook_out": Place("lm_head"),
    }
    two_norms = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    for i in range(config.num_hidden_layers):
        block, name = f"transformer.h.{i}", f"blocks.{i}"
        attention, mlp = f"{block}.self_attention", f"{block}.mlp"
        places |= {
            f"{name}.hook_resid_pre": Place(block, "in"),
            f"{name}.hook_resid_post": Place(block, item=0),
            f"{name}.hook_attn_out": Place(attention, item=0),
            f"{name}.hook_mlp_out": Place(mlp),
            f"{name}.attn.hook_in": Place(attention, "in"),
            f"{name}.attn.hook_z": heads_place(f"{attention}.dense", "in", config.num_attention_heads),
            f"{name}.mlp.hook_in": Place(mlp, "in"),
            f"{name}.mlp.hook_pre": Place(f"{mlp}.dense_h_to_4h"),
            f"{name}.mlp.hook_post": Place(f"{mlp}.dense_4h_to_h", "in"),
        }
        for part in "qkv":
            places[f"{name}.attn.hook_{part}"] = fused_place(f"{attention}.query_key_value", config, part)
        if not config.parallel_attn:
            places[f"{name}.hook_mlp_in"] = Place(f"{block}.post_attention_layernorm", "in")
            places[f"{name}.hook_resid_mid"] = Middle(f"{block}.post_attention_layernorm", mlp, block, item=0)
        elif two_norms:
            places[f"{name}.hook_mlp_in"] = Place(f"{block}.ln_mlp", "in")
        else:
            places[f"{name}.hook_mlp_in"] = SharedNormBranch(block, f"{block}.input_layernorm", mlp)
    return places


# -- Mixtral -----------------------------------------------------------------------------------------


def tokens_place(module: str, item: int, batch: int) -> Place:
    """One item of the router's output, whose rows are the tokens of the whole batch."""
    return Place(
        module,
        item=item,
        get=lambda raw: raw.reshape(batch, raw.shape[0] // batch, raw.shape[1]),
        put=lambda raw, value: value.reshape(raw.shape),
    )


def mixtral_places(config: Any, batch: int) -> dict[str, AnyPlace]:
    """`MixtralForCausalLM`: every named tensor."""
    places: dict[str, AnyPlace] = {
        "hook_embed": Place("model.embed_tokens"),
        "ln_final.hook_out": Place("model.norm"),
        "unembed.hook_out": Place("lm_head"),
    }
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    for i in range(config.num_hidden_layers):
        block, name = f"model.layers.{i}", f"blocks.{i}"
        norm, mlp = f"{block}.post_attention_layernorm", f"{block}.mlp"
        places |= {
            f"{name}.hook_resid_pre": Place(block, "in"),
            f"{name}.hook_resid_mid": Middle(norm, mlp, block),
            f"{name}.hook_resid_post": Place(block),
            f"{name}.hook_attn_out": Place(f"{block}.self_attn", item=0),
            f"{name}.hook_mlp_in": Place(norm, "in"),
            f"{name}.hook_mlp_out": Place(mlp),
            f"{name}.attn.hook_in": Place(f"{block}.self_attn", "in"),
            f"{name}.attn.hook_z": heads_place(f"{block}.self_attn.o_proj", "in", heads["q"]),
            f"{name}.mlp.hook_in": Place(mlp, "in"),
            f"{name}.mlp.hook_expert_weights": tokens_place(f"{mlp}.gate", 1, batch),
            f"{name}.mlp.hook_expert_indices": tokens_place(f"{mlp}.gate", 2, batch),
        }
        for part, count in heads.items():
            places[f"{name}.attn.hook_{part}"] = heads_place(f"{block}.self_attn.{part}_proj", "out", count)
    return places


def places_of(model: Any, batch: int) -> dict[str, AnyPlace]:
    """Every named tensor of a bare model."""
    if model.config.model_type == "mixtral":
        return mixtral_places(model.config, batch)
    return falcon_places(model.config)


# -- using them --------------------------------------------------------------------------------------


@dataclass
class Handles:
    """Torch hooks that come off together."""

    held: list[RemovableHandle] = field(default_factory=list)

    def remove(self) -> None:
        for handle in self.held:
            handle.remove()


@contextmanager
def edited(model: nn.Module, place: AnyPlace, act: Act) -> Iterator[None]:
    """A bare model with one hand-written edit."""
    handles = Handles(place.install(model, act))
    try:
        yield
    finally:
        handles.remove()


def hand_captures(model: nn.Module, places: Mapping[str, AnyPlace], tokens: Tensor) -> dict[str, Tensor]:
    """Clones, taken on the bare model at the moment each module hands its tensor over."""
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Act:
        def keep(value: Tensor) -> None:
            found[name] = value.detach().clone()

        return keep

    handles = Handles([h for name, place in places.items() for h in place.install(model, keeper(name))])
    model(tokens)
    handles.remove()
    return found


def hand_gradient(model: nn.Module, place: AnyPlace, tokens: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the weighted sum of logits at one place of the bare model."""
    found: list[Tensor] = []
    handles = Handles(place.watch(model, found.append))
    (model(tokens).logits * weights).sum().backward()
    handles.remove()
    (gradient,) = found
    return gradient
