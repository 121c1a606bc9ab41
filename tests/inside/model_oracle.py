"""A whole Falcon or Mixtral in float64, written by hand: every named value, edited by name.

Layouts are read off the config and the modules that are there. Nothing here uses the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.inside.oracles import (
    Edit,
    Steps,
    allowed_keys,
    attention,
    attention_weights,
    base,
    experts,
    layer_of,
    norm,
    per_head,
    positions_of,
)

LOGITS = "unembed.hook_out"


def forward(model: Any, ids: Tensor, mask: Tensor, edits: Mapping[str, Edit] | None = None) -> Steps:
    """Every value by the full name of its hook; the logits are at LOGITS. `mask` is 1 at real tokens."""
    steps, root = Steps(edits), base(model)
    embedding = root.word_embeddings if hasattr(root, "word_embeddings") else root.embed_tokens
    stream = steps.step("hook_embed", weight_of(embedding)[ids].requires_grad_())
    for layer in range(model.config.num_hidden_layers):
        stream = block(steps, model, layer, stream, mask)
    final = normed(steps, "ln_final.", root.ln_f if hasattr(root, "ln_f") else root.norm, stream)
    steps.step(LOGITS, steps.step("ln_final.hook_out", final) @ weight_of(model.lm_head).T)
    return steps


def block(steps: Steps, model: Any, layer: int, stream: Tensor, mask: Tensor) -> Tensor:
    """One block: what it reads, what attention and MLP add to it."""
    at, module = f"blocks.{layer}.", layer_of(model, layer)
    first = module.ln_attn if hasattr(module, "ln_attn") else module.input_layernorm
    stream = steps.step(f"{at}hook_resid_pre", stream)
    x = normed(steps, f"{at}ln1.", first, stream)
    attended = attend(steps, at, model, layer, first, stream, steps.step(f"{at}attn.hook_in", x), mask)
    if getattr(model.config, "parallel_attn", False):
        entering = steps.step(f"{at}hook_mlp_in", stream.clone())
        # With one norm for both, the MLP reads what attention reads.
        x = normed(steps, f"{at}ln2.", module.ln_mlp, entering) if hasattr(module, "ln_mlp") else x.clone()
        stream = stream + attended
    else:
        stream = steps.step(f"{at}hook_resid_mid", stream + attended)
        entering = steps.step(f"{at}hook_mlp_in", stream.clone())
        x = normed(steps, f"{at}ln2.", module.post_attention_layernorm, entering)
    x = steps.step(f"{at}mlp.hook_in", x)
    mixture = model.config.model_type == "mixtral"
    out = mix(steps, at, module.mlp, x) if mixture else dense(steps, at, module.mlp, x)
    return steps.step(f"{at}hook_resid_post", stream + steps.step(f"{at}hook_mlp_out", out))


def attend(
    steps: Steps, at: str, model: Any, layer: int, first: nn.Module, stream: Tensor, x: Tensor, mask: Tensor
) -> Tensor:
    """Attention, with what each query head's branches changed of the stream."""
    weights, heads = attention_weights(model, layer), model.config.num_attention_heads
    shown = steps.step(f"{at}hook_attn_in", stream[:, :, None].expand(-1, -1, heads, -1).clone())
    plain, changes = norm(first, stream)["out"][:, :, None], {}
    for part, matrix in (("q", weights.q_HDM), ("k", weights.k_GDM), ("v", weights.v_GDM)):
        read = steps.step(f"{at}hook_{part}_input", shown.clone())
        changes[part] = per_head(norm(first, read)["out"] - plain, matrix, torch.zeros(matrix.shape[:2]), heads)
    inner = attention(
        weights,
        x,
        positions_of(mask),
        allowed_keys(mask, mask.shape[1], getattr(model.config, "sliding_window", None)),
        below(steps, f"{at}attn.hook_"),
        torch.finfo(model.dtype).min,
        changes=changes,
    )
    out = inner.pop("attn_out")
    keep(steps, f"{at}attn.hook_", inner)
    return steps.step(f"{at}hook_attn_out", out)


def dense(steps: Steps, at: str, mlp: Any, x: Tensor) -> Tensor:
    """Falcon's MLP, with the exact GELU (Hendrycks and Gimpel 2016)."""
    pre = steps.step(f"{at}mlp.hook_pre", linear(mlp.dense_h_to_4h, x))
    post = steps.step(f"{at}mlp.hook_post", pre * (1 + torch.erf(pre / math.sqrt(2))) / 2)
    return linear(mlp.dense_4h_to_h, post)


def mix(steps: Steps, at: str, moe: nn.Module, x: Tensor) -> Tensor:
    inner = experts(moe, x, below(steps, f"{at}mlp.hook_"))
    out = inner.pop("mlp_out")
    keep(steps, f"{at}mlp.hook_", inner)
    return out


def normed(steps: Steps, at: str, module: nn.Module, x: Tensor) -> Tensor:
    inner = norm(module, x, below(steps, at))
    out = inner.pop("out")
    keep(steps, at, inner)
    return out


def linear(module: Any, x: Tensor) -> Tensor:
    out = x @ weight_of(module).T
    return out if module.bias is None else out + module.bias.detach().double()


def weight_of(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight.detach().double()


def below(steps: Steps, prefix: str) -> dict[str, Edit]:
    """The edits of one part, by the names it uses itself."""
    return {name.removeprefix(prefix): edit for name, edit in steps.edits.items() if name.startswith(prefix)}


def keep(steps: Steps, prefix: str, inner: Steps) -> None:
    steps.update({prefix + name: value for name, value in inner.items()})
