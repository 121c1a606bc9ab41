"""New values for a model's weights, collected before anything is changed.

Every weight is checked when it is read, so a model that cannot be processed is left as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transformer_lens.model_bridge.generalized_components import ComponentBridge, StreamMatrix
from transformer_lens.model_bridge.processing.changes import ConfigExchange, Exchange, ParameterExchange, ValueExchange

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge

COMPUTED_IN = {
    torch.float64: torch.float64,
    # In float32 the rounding of sums over d_model would show in the log-probabilities.
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""The dtypes of weights that can be processed, and the dtype of the sums."""
HALF = (torch.bfloat16, torch.float16)

UNTIED = (
    "{unembed} and {embed} were one tied parameter and are two while the weights are processed, "
    "which takes {megabytes:.1f} MB more; undo_processing() ties them again"
)
ROUNDED = (
    "the weights are {dtype}: they are processed in float32 and rounded back, so log-probabilities move by the "
    "rounding of {dtype}; load the model in float32 to keep them"
)


class Draft:
    """The new weights. Reads give a wider dtype (`COMPUTED_IN`), writes round to the weight's own."""

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
        """A weight as `[out, in]`, which has d_model on this axis."""
        component = owner.role(matrix.role)
        found = self.optional(component, matrix.weight)
        module = component.original_component
        if found is None:
            raise self.refusal(component, matrix.weight, f"its {type(module).__name__} holds no parameter there")
        if isinstance(module, Conv1D):
            found = found.mT
        elif matrix.bias and not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise self.refusal(component, matrix.weight, f"it belongs to a {kind}, whose weight is laid out otherwise")
        if found.shape[axis] != self.d_model:
            shape = list(found.shape)
            raise self.refusal(
                component, matrix.weight, f"its shape is {shape}, and axis {axis} should be d_model {self.d_model}"
            )
        return found

    def bias(self, owner: ComponentBridge, matrix: StreamMatrix) -> Tensor | None:
        return self.optional(owner.role(matrix.role), matrix.bias) if matrix.bias else None

    def optional(self, component: ComponentBridge, name: str) -> Tensor | None:
        """A parameter of a component's module, or `None` if the module has none."""
        module, what = component.original_component, f"{component.path}.{name}"
        if what in self.values:
            return _wide(self.values[what][2])
        if "base_layer" in module._modules:
            raise self.refusal(
                component,
                name,
                f"an adapter ({type(module).__name__}) sits on it; merge it first, model = model.merge_and_unload(), "
                "and make a bridge for that",
            )
        if name not in module._parameters:
            raise self.refusal(component, name, f"its {type(module).__name__} has no such parameter of its own")
        parameter = module._parameters[name]
        if parameter is None:
            return None
        self._check(component, name, parameter)
        self.dtypes.add(parameter.dtype)
        return _wide(parameter.detach())

    def write(self, owner: ComponentBridge, role: str, name: str, value: Tensor) -> None:
        """Set a new value for a parameter that was read, or for a missing bias."""
        component = owner.role(role)
        module = component.original_component
        like = module._parameters[name]
        like = module._parameters["weight"] if like is None else like
        assert like is not None
        if name == "weight" and isinstance(module, Conv1D):
            value = value.mT.contiguous()
        self.values[f"{component.path}.{name}"] = module, name, value.to(like.dtype)

    def refusal(self, component: ComponentBridge, name: str, why: str) -> ValueError:
        """The error for weights that cannot be processed."""
        return ValueError(f"weights cannot be processed: {component.path}.{name}: {why}. Nothing was changed")

    def _check(self, component: ComponentBridge, name: str, parameter: nn.Parameter) -> None:
        if type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__
            raise self.refusal(
                component, name, f"it is a {kind}, quantised or sharded; load the model whole, in a float dtype"
            )
        if parameter.is_meta:
            raise self.refusal(
                component, name, "it is offloaded (on the meta device); load the model without offloading"
            )
        if parameter.dtype not in COMPUTED_IN:
            raise self.refusal(component, name, f"it holds {parameter.dtype}, which is quantised; load a float dtype")
        if parameter.is_inference():
            raise self.refusal(component, name, "it was made under torch.inference_mode(); load the model outside it")
        others = [path for path in self.owners[parameter.data_ptr()] if path != f"{component.path}.{name}"]
        if others and not {f"{component.path}.{name}", *others} <= set(self.ends):
            raise self.refusal(component, name, f"it is shared with {', '.join(others)}; give each a weight of its own")

    def exchanges(self) -> tuple[list[Exchange], list[str]]:
        """The exchanges that make this draft the model's weights, and sentences about them. Changes nothing."""
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

    def rounding(self) -> str | None:
        """A sentence if the weights' dtype is too coarse for unchanged log-probabilities."""
        half = sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes if dtype in HALF)
        return ROUNDED.format(dtype=half[0]) if half else None

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
    """The parameters that share each piece of memory, by Hugging Face's names."""
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter) is nn.Parameter:
            owners.setdefault(parameter.data_ptr(), []).append(path)
    return owners
