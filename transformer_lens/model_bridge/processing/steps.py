"""The four ways to rewrite weights without changing the model's predictions.

Branches and components (`reads`, `writes`) say which weights read and write the residual stream; here is only the
algebra. Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transformer_lens.model_bridge.access.weights import rounds
from transformer_lens.model_bridge.generalized_components import ComponentBridge, NormalizationBridge, StreamMatrix
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionPlace
from transformer_lens.model_bridge.processing.changes import ConfigExchange, Exchange, ParameterExchange, ValueExchange

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components.attention import OpenAttentionBridge

COMPUTED_IN = {
    torch.float64: torch.float64,
    # In float32 the rounding of sums over d_model would show in the log-probabilities.
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""The dtypes of weights that can be processed, and the ones in which the sums are made."""

UNTIED = (
    "{unembed} and {embed} were one tied parameter and are two while the weights are processed, "
    "which takes {megabytes:.1f} MB more; undo_processing() ties them again"
)
ROUNDED = (
    "the weights are {dtype}: they are processed in float32 and rounded back, so log-probabilities move by the "
    "rounding of {dtype}; load the model in float32 to keep them"
)


class Draft:
    """The weights as they will be. Reads give a wider dtype (`COMPUTED_IN`), writes round to the weight's own."""

    def __init__(self, bridge: TransformerBridge) -> None:
        self.d_model = bridge.cfg.d_model
        self.model = bridge.original_model
        self.config: Any = self.model.config
        self.values: dict[str, tuple[nn.Module, str, Tensor]] = {}
        self.owners = _owners(bridge.original_model)
        ends = [bridge._component(end) for end in ("embed", "unembed") if end in bridge._modules]
        self.ends = [f"{end.path}.weight" for end in ends]
        self.unembed = ends[-1]
        self.dtypes: set[torch.dtype] = set()

    def weight(self, owner: ComponentBridge, matrix: StreamMatrix, axis: int) -> Tensor:
        """A weight as `[out, in]`, that has d_model on this axis."""
        component = owner.role(matrix.role)
        refusal, module = partial(self.refusal, component, matrix.weight), component.original_component
        found, kind = self.optional(component, matrix.weight), type(module).__name__
        if found is None:
            raise refusal(f"its {kind} holds no parameter there")
        if isinstance(module, Conv1D):
            found = found.mT
        elif matrix.bias and not isinstance(module, nn.Linear):
            raise refusal(f"it belongs to a {kind}, whose weight is laid out otherwise")
        if found.shape[axis] != self.d_model:
            raise refusal(f"its shape is {list(found.shape)}, and axis {axis} should be d_model {self.d_model}")
        return found

    def bias(self, owner: ComponentBridge, matrix: StreamMatrix) -> Tensor | None:
        """The bias beside a weight, if there is one."""
        return self.optional(owner.role(matrix.role), matrix.bias) if matrix.bias else None

    def optional(self, component: ComponentBridge, name: str) -> Tensor | None:
        """A parameter of a component's module, or `None` where the module does without."""
        module, what = component.original_component, f"{component.path}.{name}"
        if what in self.values:
            return _wide(self.values[what][2])
        refusal, kind = partial(self.refusal, component, name), type(module).__name__
        if "base_layer" in module._modules:
            raise refusal(
                f"an adapter ({kind}) sits on it; merge it first, model = model.merge_and_unload(), "
                "and make a bridge for that"
            )
        if rounds(module):
            raise refusal(f"its {kind} rounds what it multiplies in each call")
        if name not in module._parameters:
            raise refusal(f"its {kind} has no such parameter of its own")
        parameter = module._parameters[name]
        if parameter is None:
            return None
        if type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__
            raise refusal(f"it is a {kind}, quantised or sharded; load the model whole, in a float dtype")
        if parameter.is_meta:
            raise refusal("it is offloaded (on the meta device); load the model without offloading")
        if parameter.dtype not in COMPUTED_IN:
            raise refusal(f"it holds {parameter.dtype}, which is quantised; load a float dtype")
        if parameter.is_inference():
            raise refusal("it was made under torch.inference_mode(); load the model outside it")
        others = [path for path in self.owners[parameter.data_ptr()] if path != what]
        if others and not {what, *others} <= set(self.ends):
            raise refusal(f"it is shared with {', '.join(others)}; give each a weight of its own")
        self.dtypes.add(parameter.dtype)
        return _wide(parameter.detach())

    def write(self, owner: ComponentBridge, role: str, name: str, value: Tensor) -> None:
        """Note a new value, for a parameter that was read, or for a bias that the module does not have yet."""
        component = owner.role(role)
        module = component.original_component
        like = module._parameters[name]
        like = module._parameters["weight"] if like is None else like
        assert like is not None
        if name == "weight" and isinstance(module, Conv1D):
            value = value.mT.contiguous()
        self.values[f"{component.path}.{name}"] = module, name, value.to(like.dtype)

    def refusal(self, component: ComponentBridge, name: str, why: str) -> ValueError:
        """Nothing was changed, and why."""
        return ValueError(f"weights cannot be processed: {component.path}.{name}: {why}. Nothing was changed")

    def exchanges(self) -> tuple[list[Exchange], list[str]]:
        """What has to be exchanged for this draft to be the model, and sentences about it. Changes nothing."""
        exchanges: list[Exchange] = []
        notes: list[str] = []
        values, tied = dict(self.values), self._tied()
        if tied is not None:
            module = self.unembed.original_component
            values.setdefault(self.ends[1], (module, "weight", tied.detach().clone()))
            exchanges.append(ConfigExchange(self.config, "tie_word_embeddings", False))
            megabytes = tied.nbytes / 1e6
            notes.append(UNTIED.format(unembed=self.ends[1], embed=self.ends[0], megabytes=megabytes))
        for what, (module, name, value) in values.items():
            present = module._parameters[name]
            if present is None or (tied is not None and what == self.ends[1]):
                like = module._parameters["weight"]
                new = nn.Parameter(value, requires_grad=like is not None and like.requires_grad)
                exchanges.append(ParameterExchange(what, self.model, module, name, new))
            else:
                exchanges.append(ValueExchange(what, self.model, module, name, value))
        return exchanges, notes

    def rounding(self) -> list[str]:
        """A sentence if the weights are too short for the promise about log-probabilities."""
        half = sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes if dtype.itemsize < 4)
        return [ROUNDED.format(dtype=dtype) for dtype in half[:1]]

    def _tied(self) -> nn.Parameter | None:
        """The parameter that embedding and unembedding share, if this draft changes it."""
        for what in self.ends:
            module, name, _ = self.values.get(what, (None, "", None))
            parameter = None if module is None else module._parameters[name]
            if parameter is not None and len(self.owners[parameter.data_ptr()]) > 1:
                return parameter
        return None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else COMPUTED_IN[x.dtype])  # mps has no float64


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Where each piece of memory is a parameter, by Hugging Face's names."""
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter) is nn.Parameter:
            owners.setdefault(parameter.data_ptr(), []).append(path)
    return owners


def norms(bridge: TransformerBridge) -> Iterator[tuple[NormalizationBridge, list[ComponentBridge]]]:
    """Every norm on the residual stream, and the components that read its output (the final norm: only a head)."""
    for block in bridge.blocks:
        for role, readers in block.feeds.items():
            yield cast("NormalizationBridge", block.role(role)), [block.role(reader) for reader in readers]
    heads = [bridge._component(name) for name in ("unembed", "head") if name in bridge._modules]
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


def _fold_into(reader: ComponentBridge, draft: Draft, scale: Tensor | None, shift: Tensor | None) -> None:
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
            writer = block.role(branch.post_norm or branch.mixer)
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
        reading = next((matrix for matrix in attention.reads if matrix.role == role), None)
        fused = None if reading is None else draft.bias(attention, reading)
        if reading is None or fused is None:  # the expansion of a latent vector has no bias
            continue
        (writing,) = attention.writes
        weight, bias = draft.weight(attention, writing, axis=-2), draft.bias(attention, writing)
        b_V = view.get(fused)
        per_query_head = b_V.repeat_interleave(cfg.n_heads // cfg.n_key_value_heads, dim=0).to(weight)
        extra = torch.einsum("mhd,hd->m", weight.unflatten(-1, (cfg.n_heads, -1)), per_query_head)
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


def _needs_whole_patterns(bridge: TransformerBridge) -> str | None:
    attentions = [part for part in bridge.components() if isinstance(part, AttentionPlace)]
    if any(part.sinks for part in attentions):
        return "attention sinks take a share of each pattern, so its rows do not sum to one"
    if any("hook_attended" in part.rows for part in attentions):
        return "a norm or a gate stands between the values and W_O"
    return None


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
    Step("fold_value_biases", fold_value_biases, _needs_whole_patterns),
)
"""In the order in which `process_weights` takes them."""
