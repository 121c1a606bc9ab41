"""What the bare models hand over, by torch hooks and functions put in by hand; read from their modeling files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from torch import Tensor, nn

Split = Callable[[Tensor], Tensor]


def whole(x: Tensor) -> Tensor:
    return x


def heads(count: int) -> Split:
    """The last axis as heads; a view, so that what is written into it is in the tensor."""
    return lambda x: x.unflatten(-1, (count, -1))


class Place(NamedTuple):
    """A module, the side on which it hands a tensor over, and how that is split."""

    module: nn.Module
    side: str
    split: Split = whole


def layers_of(model: Any) -> Any:
    """The Hugging Face blocks."""
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def projections(model: Any, attention: Any) -> dict[str, tuple[nn.Module, Split]]:
    """Where q, k and v come from."""
    n = model.config.num_attention_heads
    if hasattr(attention, "c_attn"):
        d = model.config.n_embd
        return {
            p: (attention.c_attn, lambda x, i=i: heads(n)(x[..., i * d : (i + 1) * d])) for i, p in enumerate("qkv")
        }
    if hasattr(attention, "query_key_value"):
        fused, d = attention.query_key_value, attention.head_size
        return {p: (fused, lambda x, i=i: heads(n)(x)[..., i * d : (i + 1) * d]) for i, p in enumerate("qkv")}
    kv = model.config.num_key_value_heads
    return {p: (getattr(attention, f"{p}_proj"), heads(n if p == "q" else kv)) for p in "qkv"}


def block_places(model: Any, layer: int) -> dict[str, Place]:
    """Hook -> where a block hands its tensor over."""
    block, n = layers_of(model)[layer], model.config.num_attention_heads
    parts = dict(block.named_children())
    attention = next(parts[name] for name in ("self_attn", "attention", "attn") if name in parts)
    output = next(getattr(attention, name) for name in ("o_proj", "dense", "c_proj") if hasattr(attention, name))
    four = "pre_feedforward_layernorm" in parts
    ln2 = next(parts[n] for n in ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2") if n in parts)
    found = {
        "hook_resid_pre": Place(block, "in"),
        "hook_resid_post": Place(block, "out"),
        "hook_attn_out": Place(parts["post_attention_layernorm"] if four else attention, "out"),
        "hook_mlp_in": Place(ln2, "in"),
        "hook_mlp_out": Place(parts["post_feedforward_layernorm"] if four else block.mlp, "out"),
        "attn.hook_in": Place(attention, "in"),
        "attn.hook_z": Place(output, "in", heads(n)),
        "mlp.hook_in": Place(block.mlp, "in"),
        **{f"attn.hook_{p}": Place(at, "out", split) for p, (at, split) in projections(model, attention).items()},
        **{f"attn.hook_{p}_normed": Place(attention.get_submodule(f"{p}_norm"), "out") for p in "qk"
           if hasattr(attention, f"{p}_norm")},
    }  # fmt: skip
    mlp = block.mlp
    if hasattr(mlp, "gate_proj"):
        found |= {"mlp.hook_pre": Place(mlp.gate_proj, "out"), "mlp.hook_pre_linear": Place(mlp.up_proj, "out")}
        found["mlp.hook_post"] = Place(mlp.down_proj, "in")
    elif not hasattr(mlp, "experts"):
        into, out = (getattr(mlp, a, None) or getattr(mlp, b) for a, b in (("c_fc", "dense_h_to_4h"), ("c_proj", "dense_4h_to_h")))  # fmt: skip  # noqa: E501
        found |= {"mlp.hook_pre": Place(into, "out"), "mlp.hook_post": Place(out, "in")}
    return found


def places(model: Any) -> dict[str, Place]:
    """Hook -> where the model hands its tensor over."""
    base = model.base_model
    norm = next(getattr(base, name) for name in ("norm", "final_layer_norm", "ln_f") if hasattr(base, name))
    found = {
        "hook_embed": Place(base.get_input_embeddings(), "out"),
        "ln_final.hook_out": Place(norm, "out"),
        "unembed.hook_out": Place(model.get_output_embeddings(), "out"),
    }
    for layer in range(model.config.num_hidden_layers):
        found |= {f"blocks.{layer}.{name}": place for name, place in block_places(model, layer).items()}
    return found


See = Callable[[str, Tensor], Tensor | None]


@contextmanager
def torch_hooked(wanted: Mapping[str, Place], see: See) -> Iterator[None]:
    """A plain torch hook at each place: what it is handed, whole, and what it gives goes on."""
    handles = []
    for hook, (module, side, _) in wanted.items():

        def enter(module: Any, args: Any, kwargs: Any, hook: str = hook) -> Any:
            by_name = not args
            new = see(hook, kwargs["hidden_states"] if by_name else args[0])
            if new is None:
                return None
            return (args, {**kwargs, "hidden_states": new}) if by_name else ((new, *args[1:]), kwargs)

        def leave(module: Any, args: Any, output: Any, hook: str = hook) -> Any:
            several = isinstance(output, tuple)
            new = see(hook, output[0] if several else output)
            return None if new is None else (new, *output[1:]) if several else new

        handles.append(
            module.register_forward_pre_hook(enter, with_kwargs=True)
            if side == "in"
            else module.register_forward_hook(leave)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recorded(model: Any, *args: Any, **call: Any) -> dict[str, Tensor]:
    """What every place hands over in one call of the bare model, copied at once."""
    wanted, seen = places(model), {}

    def see(hook: str, tensor: Tensor) -> None:
        seen[hook] = wanted[hook].split(tensor.detach().clone())

    with torch_hooked(wanted, see):
        model(*args, **call)
    return seen


def written(model: Any, hook: str, change: Callable[[Tensor], Tensor], *args: Any, **call: Any) -> Tensor:
    """The bare model's logits where a plain torch hook writes at one place."""
    place = places(model)[hook]

    def see(_: str, tensor: Tensor) -> Tensor:
        new = tensor.clone()
        part = place.split(new)
        part.copy_(change(part.clone()))
        return new

    with torch_hooked({hook: place}, see):
        logits: Tensor = model(*args, **call).logits
    return logits


def into_attention(model: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **call: Any) -> list[dict[str, Tensor]]:
    """Queries and keys that each layer of an eager model hands to its family's own attention function."""
    attention = next(part for part in layers_of(model)[0].modules() if type(part).__name__.endswith("Attention"))
    family: Any = sys.modules[type(attention).__module__]
    eager, seen = family.eager_attention_forward, []

    def spy(module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append({"q": query.transpose(1, 2).clone(), "k": key.transpose(1, 2).clone()})
        return eager(module, query, key, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(family, "eager_attention_forward", spy)
        model(*args, **call)
    return seen
