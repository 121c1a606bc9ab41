"""What the bare models hand over, by torch hooks and functions put in by hand; read from their modeling files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

Split = Callable[[Tensor], Tensor]


def whole(x: Tensor) -> Tensor:
    return x


def heads(count: int) -> Split:
    """The last axis as heads; a view, so that what is written into it is in the tensor."""
    return lambda x: x.unflatten(-1, (count, -1))


def times(scale: float) -> Split:
    return whole if scale == 1.0 else lambda x: x * scale


def half(which: int) -> Split:
    return lambda x: x.chunk(2, -1)[which]


class Place(NamedTuple):
    """A module, the side on which it hands a tensor over, and how that is split."""

    module: nn.Module
    side: str
    split: Split = whole


ATTENTION = ("self_attn", "attention", "attn", "self_attention")
FINAL = ("norm", "final_layer_norm", "final_layernorm", "embedding_norm", "ln_f")
MIXERS = ("conv", "mamba", "linear_attn")
OUTPUT = ("o_proj", "dense", "c_proj", "out_proj")
IN_FRONT_OF_MLP = (
    "pre_mlp_layernorm",
    *("pre_feedforward_layernorm", "feedforward_layernorm", "post_attention_layernorm", "ln_2"),
    *("ffn_norm", "pre_ff_layernorm"),
)
BEHIND = {
    "hyperclovax": ("post_norm1", "post_norm2"),
    "afmoe": ("post_attention_layernorm", "post_mlp_layernorm"),
    **dict.fromkeys(("glm4", "kolibri1"), ("post_self_attn_layernorm", "post_mlp_layernorm")),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "flex_olmo"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
}
"""The norms through which what attention and MLP return goes before it is added."""
NONE_IN_FRONT = ("olmo2", "olmo3", "exaone4", "flex_olmo")
HEADS_FIRST = ("gemma3_text", "apertus", "apertus1p5_text", "exaone4", "exaone_moe", "hy_v3", "kolibri1")
"""Families whose norms of queries and keys are given heads before positions."""


def named(module: Any, names: tuple[str, ...]) -> Any:
    """The part that a family calls by one of these names."""
    return next(getattr(module, name) for name in names if getattr(module, name, None) is not None)


def layers_of(model: Any) -> Any:
    """The Hugging Face blocks."""
    return named(model.base_model, ("h", "layers"))


def attending(model: Any) -> list[int]:
    """The layers with attention."""
    return [i for i, block in enumerate(layers_of(model)) if any(hasattr(block, name) for name in ATTENTION)]


def softmaxed(model: Any, layer: int, scores: Tensor) -> Tensor:
    """The pattern of some scores: a softmax over them, and over the sinks of a family that has these."""
    sinks = getattr(named(layers_of(model)[layer], ATTENTION), "sinks", None)
    if sinks is None:
        return scores.softmax(-1)
    both = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    return (both - both.amax(-1, keepdim=True)).softmax(-1)[..., :-1]


def projections(model: Any, attention: Any) -> dict[str, tuple[nn.Module, Split]]:
    """Where q, k and v come from."""
    n = model.config.num_attention_heads
    if hasattr(attention, "c_attn"):  # [Q | K | V], and in GPT-BigCode one key and value for all heads
        d, shared = model.config.n_embd, model.config.model_type == "gpt_bigcode"
        kv, count = (d // n, 1) if shared else (d, n)
        bounds = {"q": (0, d, n), "k": (d, d + kv, count), "v": (d + kv, d + 2 * kv, count)}
        return {p: (attention.c_attn, lambda x, at=at: heads(at[2])(x[..., at[0] : at[1]])) for p, at in bounds.items()}
    if hasattr(attention, "kv_b_proj"):  # keys and values of all positions, made from latent vectors
        d = attention.v_head_dim
        q = named(attention, ("q_b_proj", "q_proj"))
        return {"q": (q, heads(n)), "v": (attention.kv_b_proj, lambda x: heads(n)(x[:, 0])[..., -d:])}
    if hasattr(attention, "query_key_value"):
        fused, d = attention.query_key_value, model.config.hidden_size // n
        return {p: (fused, lambda x, i=i: heads(n)(x)[..., i * d : (i + 1) * d]) for i, p in enumerate("qkv")}
    kv = getattr(model.config, "num_key_value_heads", n)
    if hasattr(attention, "qkv_proj"):
        d, counts = attention.head_dim, (n, kv, kv)
        return {
            p: (attention.qkv_proj, lambda x, i=i: heads(counts[i])(x.split([c * d for c in counts], -1)[i]))
            for i, p in enumerate("qkv")
        }
    if attention.q_proj.out_features == 2 * n * attention.head_dim:  # each head's query, then its gate
        q = {p: (attention.q_proj, lambda x, i=i: half(i)(heads(n)(x))) for i, p in enumerate(("q", "gate"))}
        return {**q, **{p: (getattr(attention, f"{p}_proj"), heads(kv)) for p in "kv"}}
    scales = {"k": getattr(model.config, "key_multiplier", 1.0)}
    counts = {"q": n, "k": kv, "v": kv}
    gates = {"gate": (attention.gate_proj, heads(n))} if hasattr(attention, "gate_proj") else {}
    return gates | {
        p: (getattr(attention, f"{p}_proj"), lambda x, p=p: times(scales.get(p, 1.0))(heads(counts[p])(x)))
        for p in "qkv"
    }


def normed(model: Any, attention: Any) -> dict[str, Place]:
    """Queries and keys behind their norms."""
    found = {}
    for part in "qk" if hasattr(attention, "q_norm") or hasattr(attention, "q_layernorm") else "":
        norm: Any = named(attention, (f"{part}_norm", f"{part}_layernorm"))
        n = model.config.num_attention_heads
        count = n if part == "q" else getattr(model.config, "num_key_value_heads", n)
        wide = norm.weight.ndim == 1 and len(norm.weight) == count * attention.head_dim
        first = model.config.model_type in HEADS_FIRST
        split: Split = heads(count) if wide else (lambda x: x.transpose(1, 2)) if first else whole
        found[f"attn.hook_{part}_normed"] = Place(norm, "out", split)
    return found


def latents(attention: Any) -> dict[str, nn.Module]:
    """The norms of latent vectors."""
    found = {"kv": getattr(attention, "kv_a_layernorm", None), "q": getattr(attention, "q_a_layernorm", None)}
    return {part: norm for part, norm in found.items() if norm is not None}


def neurons(mlp: Any) -> dict[str, Place]:
    """The hidden layers of a dense MLP."""
    into, out = (
        ("up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in"),
        ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "fc_out"),
    )
    post = {"hook_post": Place(named(mlp, out), "in")}
    if hasattr(mlp, "ffn_sub_norm"):
        post["hook_activated"] = Place(mlp.ffn_sub_norm, "in")
    if hasattr(mlp, "gate_up_proj"):
        fused = mlp.gate_up_proj
        return {"hook_pre": Place(fused, "out", half(0)), "hook_pre_linear": Place(fused, "out", half(1)), **post}
    if hasattr(mlp, "gate_proj") or hasattr(mlp, "w1"):
        gate, up = named(mlp, ("gate_proj", "w1")), named(mlp, ("up_proj", "w3"))
        scaled = times(getattr(mlp, "gate_multiplier", 1.0))
        return {"hook_pre": Place(gate, "out", scaled), "hook_pre_linear": Place(up, "out"), **post}
    return {"hook_pre": Place(named(mlp, into), "out"), **post}


def added(module: nn.Module) -> nn.Module:
    """What hands over what is added to the stream; Bloom's modules add the stream to it themselves."""
    outputs = {"BloomAttention": "dense", "BloomMLP": "dense_4h_to_h"}
    name = outputs.get(type(module).__name__)
    return getattr(module, name) if name else module


def block_places(model: Any, layer: int) -> dict[str, Place]:
    """Hook -> where a block hands its tensor over."""
    block, config = layers_of(model)[layer], model.config
    mlp = named(block, ("mlp", "block_sparse_moe", "feed_forward"))
    behind = [getattr(block, name) for name in BEHIND.get(config.model_type, ()) if hasattr(block, name)]
    scale = getattr(config, "residual_multiplier", 1.0)
    multiplied = times(scale)
    found = {
        "hook_resid_pre": Place(block, "in"),
        "hook_resid_post": Place(block, "out"),
        "hook_mlp_out": Place(behind[1] if behind else added(mlp), "out", multiplied),
        "mlp.hook_in": Place(mlp, "in"),
    }
    for mixer in (getattr(block, name) for name in MIXERS if hasattr(block, name)):
        out = times(getattr(config, "ssm_out_multiplier", 1.0))
        found |= {"hook_mixer_out": Place(mixer, "out", out), "mixer.hook_in": Place(mixer, "in")}
    for attention in (getattr(block, name) for name in ATTENTION if hasattr(block, name)):
        attention = getattr(attention, "attention", attention)  # GPT-Neo has it one deeper
        found |= {
            "hook_attn_out": Place(
                behind[0] if behind else added(attention),
                "out",
                times(getattr(config, "attention_out_multiplier", scale)),
            ),
            "attn.hook_in": Place(attention, "in"),
            "attn.hook_z": Place(named(attention, OUTPUT), "in", heads(config.num_attention_heads)),
            **{f"attn.hook_{p}": Place(at, "out", split) for p, (at, split) in projections(model, attention).items()},
            **normed(model, attention),
            **{f"attn.hook_{p}_latent": Place(at, "out") for p, at in latents(attention).items()},
        }
    if any(getattr(block, name, None) is not None for name in IN_FRONT_OF_MLP):  # else one norm is for both branches
        read = mlp if config.model_type in NONE_IN_FRONT else named(block, IN_FRONT_OF_MLP)
        found["hook_mlp_in"] = Place(read, "in")
    if not hasattr(mlp, "experts"):
        found |= {f"mlp.{name}": place for name, place in neurons(mlp).items()}
    return found


def places(model: Any) -> dict[str, Place]:
    """Hook -> where the model hands its tensor over."""
    base = model.base_model
    scale = model.config.hidden_size**0.5 if getattr(model.config, "mup_enabled", False) else 1.0
    scale = getattr(model.config, "embedding_multiplier", scale)
    found = {
        "hook_embed": Place(
            getattr(base, "word_embeddings_layernorm", base.get_input_embeddings()), "out", times(scale)
        ),
        "ln_final.hook_out": Place(
            named(base, ("norm", "final_layer_norm", "final_layernorm", "embedding_norm", "ln_f")), "out"
        ),
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
    """Queries and keys that each layer of an eager model hands to its family's own attention function; its output."""
    attention = named(layers_of(model)[-1], ATTENTION)
    family: Any = sys.modules[type(attention).__module__]
    if hasattr(attention, "_reshape"):  # Bloom writes its attention out, from what this method splits
        return split_by(type(attention), monkeypatch, lambda: model(*args, **call))
    written_out = getattr(attention, "attention", None)  # GPT-Neo's, which has a method for it
    place, name = (type(written_out), "_attn") if written_out is not None else (family, "eager_attention_forward")
    eager, seen = getattr(place, name), []

    def spy(module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        returned = eager(module, query, key, *rest, **options)
        seen.append({"q": query.transpose(1, 2).clone(), "k": key.transpose(1, 2).clone(), "out": returned[0].clone()})
        return returned

    with monkeypatch.context() as patch:
        patch.setattr(place, name, spy)
        model(*args, **call)
    return seen


def split_by(kind: Any, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[dict[str, Tensor]]:
    """The queries and keys into which Bloom's layers split their projections in one call."""
    split, seen = kind._reshape, []

    def spy(module: Any, fused: Tensor) -> Any:
        parts = split(module, fused)
        seen.append({name: part.transpose(1, 2).clone() for name, part in zip("qk", parts, strict=False)})
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_reshape", spy)
        run()
    return seen
