"""The four ways to rewrite weights without changing the model's predictions.

Branches and components (`reads`, `writes`) say which weights read and write the residual stream; here is only the
algebra. Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from transformer_lens.model_bridge.generalized_components import ComponentBridge, NormalizationBridge
from transformer_lens.model_bridge.processing.draft import Draft

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components.attention import OpenAttentionBridge

HEADS = ("unembed", "head")


def norms(bridge: TransformerBridge) -> Iterator[tuple[NormalizationBridge, list[ComponentBridge]]]:
    """Every norm on the residual stream, and the components that read its output (the final norm: only a head)."""
    for block in bridge.blocks:
        for role, readers in block.feeds.items():
            yield cast("NormalizationBridge", block.role(role)), [block.role(reader) for reader in readers]
    heads = [bridge._component(name) for name in HEADS if name in bridge._modules]
    yield cast("NormalizationBridge", bridge._component("ln_final")), heads


def fold_ln(bridge: TransformerBridge, draft: Draft) -> None:
    """`W (w * x + b) == (W * w) x + W b`: a norm's weight and bias move into every weight that reads its output."""
    for norm, readers in norms(bridge):
        if not readers:
            continue
        if norm.affine is None:
            raise draft.refusal(norm, "weight", f"{type(norm).__name__} does not know the formula of this norm")
        found = {name: draft.optional(norm, name) for name in norm.affine}
        weight, shift = found.get("weight"), found.get("bias")
        scale = None if weight is None else weight + (1.0 - norm.neutral)
        for reader in readers:
            _fold_into(reader, draft, scale, shift)
        if scale is not None:
            draft.write(norm, "", "weight", torch.full_like(scale, norm.neutral))
        if shift is not None:
            draft.write(norm, "", "bias", torch.zeros_like(shift))


def _fold_into(reader: ComponentBridge, draft: Draft, scale: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    if not reader.reads:
        kind = type(reader).__name__
        raise draft.refusal(reader, "weight", f"{kind} does not say which of its weights read the stream")
    for matrix in reader.reads:
        weight = draft.weight(reader, matrix, axis=-1)
        if shift is not None:
            if not matrix.bias:
                raise draft.refusal(
                    reader.role(matrix.role), matrix.weight, "the norm in front has a bias, and this module has none"
                )
            bias, extra = draft.bias(reader, matrix), weight @ shift.to(weight)
            draft.write(reader, matrix.role, matrix.bias, extra if bias is None else bias + extra)
        if scale is not None:
            draft.write(reader, matrix.role, matrix.weight, weight * scale.to(weight))


def center_writing_weights(bridge: TransformerBridge, draft: Draft) -> None:
    """Subtract the mean over d_model from everything added to the stream, as every LayerNorm does anyway."""
    for role in bridge.adapter.outside():
        _center(bridge._component(role), draft)
    for block in bridge.blocks:
        for branch in block.branches:
            writer = block.role(branch.returns)
            if not writer.writes:
                kind = type(writer).__name__
                raise draft.refusal(writer, "weight", f"{kind} does not say which of its weights write to the stream")
            _center(writer, draft)


def _center(writer: ComponentBridge, draft: Draft) -> None:
    for matrix in writer.writes:
        axis = -1 if matrix.rows else -2
        weight, bias = draft.weight(writer, matrix, axis), draft.bias(writer, matrix)
        draft.write(writer, matrix.role, matrix.weight, weight - weight.mean(axis, keepdim=True))
        if bias is not None:
            draft.write(writer, matrix.role, matrix.bias, bias - bias.mean())


def center_unembed(bridge: TransformerBridge, draft: Draft) -> None:
    """Subtract the mean of the logits over the vocabulary, which a softmax ignores."""
    unembed = bridge._component("unembed")
    for matrix in unembed.reads:
        weight, bias = draft.weight(unembed, matrix, axis=-1), draft.bias(unembed, matrix)
        draft.write(unembed, "", matrix.weight, weight - weight.mean(-2, keepdim=True))
        if bias is not None:
            draft.write(unembed, "", matrix.bias, bias - bias.mean())


def fold_value_biases(bridge: TransformerBridge, draft: Draft) -> None:
    """`b_O + sum over heads of W_O b_V`: rows of a pattern sum to one, so a constant value reaches z unchanged."""
    cfg = bridge.cfg
    for block in bridge.blocks:
        if "attn" not in (branch.mixer for branch in block.branches):
            continue
        attention = cast("OpenAttentionBridge", block.role("attn"))
        if "v" not in attention.places:
            raise draft.refusal(attention, "bias", f"{type(attention).__name__} does not say where its values are")
        role, make_view = attention.places["v"]
        view = make_view(cfg)
        reading = next(matrix for matrix in attention.reads if matrix.role == role)
        fused = draft.bias(attention, reading)
        if fused is None:
            continue
        (writing,) = attention.writes
        weight, bias = draft.weight(attention, writing, axis=-2), draft.bias(attention, writing)
        b_V = view.get(fused)
        per_query_head = b_V.repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, dim=0).to(weight)
        extra = torch.einsum("mhd,hd->m", weight.unflatten(-1, (cfg.n_heads, cfg.d_head)), per_query_head)
        draft.write(attention, writing.role, writing.bias, extra if bias is None else bias + extra)
        draft.write(attention, role, reading.bias, view.put(fused, torch.zeros_like(b_V)))


def _needs_layer_norm(bridge: TransformerBridge) -> str | None:
    others = sorted({type(norm).__name__ for norm, _ in norms(bridge) if not norm.centres})
    if not others:
        bare = [(block.name, branch.mixer) for block in bridge.blocks for branch in block.branches if not branch.norm]
        return f"{bare[0][0]}.{bare[0][1]} reads the stream with no norm in front" if bare else None
    return (
        f"the norms of this model ({', '.join(others)}) do not take the mean off the stream, so the mean of what is "
        "written there counts"
    )


def _needs_plain_logits(bridge: TransformerBridge) -> str | None:
    if "unembed" not in bridge._modules:
        return f"{bridge.cfg.architecture} has no unembedding"
    cap = bridge.adapter.logit_cap()
    return None if cap is None else f"the model caps its logits softly at {cap}, so a constant added to them counts"


@dataclass(frozen=True)
class Step:
    """A way to rewrite the weights: why it may not apply to a model, and which steps must not come before."""

    name: str
    run: Callable[[TransformerBridge, Draft], None]
    inapplicable: Callable[[TransformerBridge], str | None] = lambda bridge: None
    not_after: tuple[str, ...] = ()


STEPS = (
    # It gives values a bias again, so it comes before that is folded away.
    Step("fold_ln", fold_ln, not_after=("fold_value_biases",)),
    Step("center_writing_weights", center_writing_weights, _needs_layer_norm),
    Step("center_unembed", center_unembed, _needs_plain_logits),
    Step("fold_value_biases", fold_value_biases),
)
"""In the order in which `process_weights` takes them."""
