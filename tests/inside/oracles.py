"""The inside of attention, norms and experts in float64, written by hand from the papers.

Nothing here uses the package: weights are cut out of the Hugging Face modules by their published layout.
Every step can be edited by name, so an oracle also predicts what a write does.

Axes: B batch, Q query positions, K key positions, H query heads, G key-value heads, D d_head, M d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


class Steps(dict[str, Tensor]):
    """The named values of one computation; each is edited, then kept with its gradient."""

    def __init__(self, edits: Mapping[str, Edit] | None) -> None:
        super().__init__()
        self.edits = edits or {}

    def step(self, name: str, value: Tensor) -> Tensor:
        value = self.edits[name](value) if name in self.edits else value
        if value.requires_grad:
            value.retain_grad()
        self[name] = value
        return value


@dataclass
class AttentionWeights:
    """One layer's projections as heads, biases zero where there are none, and how positions enter."""

    q_HDM: Tensor
    k_GDM: Tensor
    v_GDM: Tensor
    o_MHD: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor
    o_bias: Tensor
    alibi: int
    """How often the ALiBi bias is added: under eager, transformers 5.23 adds it twice."""
    theta: float


def base(model: nn.Module) -> Any:
    return model.get_submodule("transformer" if hasattr(model, "transformer") else "model")


def layer_of(model: nn.Module, layer: int) -> Any:
    root = base(model)
    return (root.h if hasattr(root, "h") else root.layers)[layer]


def groups_of(config: Any) -> int:
    if config.model_type == "mixtral":
        return int(config.num_key_value_heads)
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def attention_weights(model: nn.Module, layer: int = 0) -> AttentionWeights:
    config: Any = model.config
    heads, groups = config.num_attention_heads, groups_of(config)
    theta = config.rope_parameters["rope_theta"]
    if config.model_type == "mixtral":
        attention = layer_of(model, layer).self_attn
        q, k, v = (
            getattr(attention, f"{part}_proj").weight.detach().double().unflatten(0, (number, -1))
            for part, number in (("q", heads), ("k", groups), ("v", groups))
        )
        o = attention.o_proj.weight.detach().double().unflatten(1, (heads, -1))
        zeros = [torch.zeros(t.shape[:2], dtype=torch.float64) for t in (q, k, v)]
        return AttentionWeights(q, k, v, o, *zeros, torch.zeros(len(o), dtype=torch.float64), 0, theta)
    attention = layer_of(model, layer).self_attention
    d_head = config.hidden_size // heads

    def cut(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = fused.detach().double().reshape(groups, heads // groups + 2, d_head, *fused.shape[1:])
        return rows[:, :-2].flatten(0, 1), rows[:, -2], rows[:, -1]

    qkv, dense = attention.query_key_value, attention.dense
    nothing = torch.zeros(len(qkv.weight), dtype=torch.float64)
    biases = cut(qkv.bias if qkv.bias is not None else nothing)
    o_bias = dense.bias if dense.bias is not None else torch.zeros(len(dense.weight))
    times = (2 if config._attn_implementation == "eager" else 1) if config.alibi else 0
    o = dense.weight.detach().double().unflatten(1, (heads, d_head))
    return AttentionWeights(*cut(qkv.weight), o, *biases, o_bias.detach().double(), times, theta)


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoFormer, as a multiplication of complex numbers; dimension i is paired with i + D/2."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions[:, :, None, None].double() * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def alibi_bias(heads: int, key_positions: Tensor) -> Tensor:
    """ALiBi with slopes 2^(-8i/n), n a power of two. Up to a constant per row, slope times key position."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    return slopes[None, :, None, None] * key_positions[:, None, None, :].double()


def allowed_keys(mask_BK: Tensor, queries: int, window: int | None = None) -> Tensor:
    """Which key each of the last `queries` positions may see: earlier ones, real ones, those in the window."""
    keys = mask_BK.shape[1]
    q, k = torch.arange(keys)[-queries:, None], torch.arange(keys)[None, :]
    near = (k <= q) & (q - k < (window or keys + 1))
    return near[None, None] & mask_BK[:, None, None, :].bool()


def positions_of(mask_BK: Tensor) -> Tensor:
    """Counted from the first real token of each row, as `generate` does; padding is at zero."""
    return (mask_BK.long().cumsum(-1) - 1) * mask_BK.long()


def attention(
    w: AttentionWeights,
    x: Tensor | Mapping[str, Tensor],
    positions: Tensor,
    allowed: Tensor,
    edits: Mapping[str, Edit] | None = None,
    lowest: float = torch.finfo(torch.float32).min,
    key_positions: Tensor | None = None,
    changes: Mapping[str, Tensor] | None = None,
) -> Steps:
    """Explicit attention. `x` is the normed stream, or one for each of q, k, v and each query head.

    `changes` are added to single query heads' q, k and v, [B Q H D], before any rotation.
    """
    steps = Steps(edits)
    heads, d_head = w.q_HDM.shape[:2]
    if isinstance(x, Tensor):
        x = x.double()
        q, k, v = (
            torch.einsum("bpm,hdm->bphd", x, weight) + bias
            for weight, bias in ((w.q_HDM, w.q_bias), (w.k_GDM, w.k_bias), (w.v_GDM, w.v_bias))
        )
    else:
        q, k, v = (per_head(x[part].double(), *getattr_pair(w, part), heads) for part in "qkv")
    changes = changes or {}
    q, k, v = steps.step("q", q + changes.get("q", 0)), steps.step("k", k), steps.step("v", v)
    if not w.alibi:
        q, k = steps.step("rot_q", rope(q, positions, w.theta)), steps.step("rot_k", rope(k, positions, w.theta))
    k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
    if changes:
        k = k + (changes["k"] if w.alibi else rope(changes["k"], positions, w.theta))
        v = v + changes["v"]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d_head)
    if w.alibi:
        # Falcon scales the bias by 1/sqrt(d_head) too, unlike the paper.
        where = positions if key_positions is None else key_positions
        scores = scores + w.alibi * alibi_bias(heads, where) / math.sqrt(d_head)
    scores = steps.step("attn_scores", scores.masked_fill(~allowed, lowest))
    exponents = torch.exp(scores - scores.max(-1, keepdim=True).values)
    pattern = steps.step("pattern", exponents / exponents.sum(-1, keepdim=True))
    z = steps.step("z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
    result = steps.step("result", torch.einsum("bqhd,mhd->bqhm", z, w.o_MHD))
    steps.step("attn_out", result.sum(2) + w.o_bias)
    return steps


def getattr_pair(w: AttentionWeights, part: str) -> tuple[Tensor, Tensor]:
    return {"q": (w.q_HDM, w.q_bias), "k": (w.k_GDM, w.k_bias), "v": (w.v_GDM, w.v_bias)}[part]


def per_head(x_BPHM: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Each query head's own stream through that head's, or its group's, weight."""
    repeats = heads // len(weight)
    weight, bias = weight.repeat_interleave(repeats, dim=0), bias.repeat_interleave(repeats, dim=0)
    return torch.einsum("bphm,hdm->bphd", x_BPHM, weight) + bias


def norm(module: Any, x: Tensor, edits: Mapping[str, Edit] | None = None) -> Steps:
    """LayerNorm, or RMSNorm where there is no bias."""
    steps, x = Steps(edits), x.double()
    weight = module.weight.detach().double()
    if isinstance(module, nn.LayerNorm):
        middle, eps, bias = x - x.mean(-1, keepdim=True), module.eps, module.bias.detach().double()
    else:
        middle, eps, bias = x, module.variance_epsilon, torch.zeros_like(weight)
    scale = steps.step("hook_scale", torch.sqrt((middle * middle).sum(-1, keepdim=True) / x.shape[-1] + eps))
    steps.step("out", steps.step("hook_normalized", middle / scale) * weight + bias)
    return steps


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def experts(moe: Any, x: Tensor, edits: Mapping[str, Edit] | None = None) -> Steps:
    """Mixtral's mixture: each token has a copy of the matrices of every expert it chose."""
    steps, x = Steps(edits), x.double()
    router = moe.gate.weight.detach().double()
    gate_up, down = (getattr(moe.experts, n).detach().double() for n in ("gate_up_proj", "down_proj"))
    d_mlp = down.shape[-1]
    logits = steps.step("router_logits", torch.einsum("bpm,em->bpe", x, router))
    exponents = torch.exp(logits - logits.max(-1, keepdim=True).values)
    probabilities = exponents / exponents.sum(-1, keepdim=True)
    order = probabilities.argsort(-1, descending=True)[..., : moe.top_k]
    best = probabilities.gather(-1, order)
    weights = steps.step("expert_weights", best / best.sum(-1, keepdim=True))
    indices = steps.step("expert_indices", order)

    def each(values: Tensor, matrices: Tensor) -> Tensor:
        return torch.einsum("bpcoi,bpci->bpco", matrices[indices], values)

    chosen = x[:, :, None].expand(-1, -1, indices.shape[-1], -1)
    pre = steps.step("pre", each(chosen, gate_up[:, :d_mlp]))
    linear = steps.step("pre_linear", each(chosen, gate_up[:, d_mlp:]))
    post = steps.step("post", silu(pre) * linear)
    out = steps.step("expert_out", each(post, down))
    steps.step("mlp_out", (out * weights[..., None]).sum(2))
    return steps
