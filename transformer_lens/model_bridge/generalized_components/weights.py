"""Weights of components under the field's names: views of the model's own parameters wherever a view exists.

A `Weight` row has axes, meaning, and the parameter and view it is read through; attention's `places` serve activations
and weights alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transformer_lens.checks import in_words, is_tensor
from transformer_lens.factored_matrix import FactoredMatrix
from transformer_lens.model_bridge.access import views
from transformer_lens.model_bridge.access.weights import computing_module, execution_device, read_weight
from transformer_lens.model_bridge.upstream import attribute

if TYPE_CHECKING:
    from transformer_lens.model_bridge.generalized_components.base import ComponentBridge


def has_bias(module: nn.Module) -> bool:
    """Whether a linear map has a bias."""
    return getattr(module, "bias", None) is not None


@dataclass(frozen=True)
class Place:
    """A parameter of a Hugging Face module, and the view of a weight in it.

    `shape` and `fill` describe what is read if the module has no such parameter.
    """

    module: nn.Module
    parameter: str
    view: views.View
    shape: tuple[int, ...] = ()
    fill: float = 0.0

    @property
    def missing(self) -> bool:
        """Whether the module has no such parameter, such as a bias or a norm's weight."""
        return not self.parameter or (self.parameter == "bias" and not has_bias(self.module))

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight; for a missing one read-only zeros, or ones, that take no memory."""
        if self.missing:
            number = torch.full((), self.fill, dtype=dtype, device=execution_device(self.module))
            return self.view.get(number.expand(self.shape))
        return self.view.get(read_weight(self.module, self.parameter))

    def write(self, value: Tensor, name: str) -> None:
        """Write into the model's own parameter. Raises `ValueError` if there is none, or for another shape."""
        stored = self.module._parameters.get(self.parameter)
        kind = type(self.module).__name__
        if self.missing:
            what, number = self.parameter or "such parameter", "ones" if self.fill else "zeros"
            raise ValueError(f"{name} cannot be written: {kind} has no {what} in this model, and is read as {number}")
        if type(stored) is not nn.Parameter or stored.is_meta or not stored.is_floating_point():
            raise ValueError(
                f"{name} cannot be written: the {self.parameter} of {kind} is no ordinary parameter in memory (it is "
                "quantised, offloaded, divided among processes, or lies under an adapter), and is read as a copy"
            )
        seen = self.view.get(stored)
        if not is_tensor(value) or value.shape != seen.shape:
            got = in_words(value) if not is_tensor(value) else list(value.shape)
            raise ValueError(f"{name}: got {got}, expected a tensor of shape {list(seen.shape)}")
        with torch.no_grad():
            # A copy, since the value may be a view of the very parameter it goes into.
            stored.copy_(self.view.put(stored, value.detach().to(stored.device, stored.dtype, copy=True)))


class Weight:
    """A row of the weights table, and the attribute of a component that reads and writes that weight.

    >>> attn = bridge.blocks[0].attn
    >>> attn.W_Q.shape
    torch.Size([4, 128, 32])
    >>> attn.W_Q = attn.W_Q.clone()
    >>> type(attn).W_Q.axes
    'head d_model d_head'

    Assigning writes into the model's parameter in every layout, also where reading copies.
    """

    def __init__(self, axes: str, meaning: str, place: Callable[[Any], Place]) -> None:
        self.axes = axes
        self.meaning = meaning
        self.place = place

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, component: None, owner: type) -> Self: ...
    @overload
    def __get__(self, component: object, owner: type) -> Tensor: ...
    def __get__(self, component: Any, owner: type) -> Any:
        return self if component is None else self.place(component).read(component.cfg.dtype)

    def __set__(self, component: "ComponentBridge", value: Tensor) -> None:
        self.place(component).write(value, f"{component.name}.{self.name}")


def weights_of(kind: type) -> list[Weight]:
    """The rows of a component class."""
    rows = dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base))
    return [row for name in rows if isinstance(row := getattr_static(kind, name), Weight)]


WHOLE = views.Whole()


def matrix(module: nn.Module, view: views.View = WHOLE) -> views.View:
    """A view of a linear map's weight as `[in, out]`, whichever way round the module keeps it."""
    return view if isinstance(module, Conv1D) else views.Through(views.TRANSPOSED, view)


def linear(role: str, parameter: str = "weight", view: views.View = WHOLE) -> Callable[["ComponentBridge"], Place]:
    """The weight `[in, out]` or bias of the linear map in a role; `view` selects from its output."""

    def place(component: "ComponentBridge") -> Place:
        module = component.module_of(role)
        seen = _multiplied(component, role, view)
        return _bias(module, seen) if parameter == "bias" else Place(module, parameter, matrix(module, seen))

    return place


def _multiplied(component: "ComponentBridge", role: str, view: views.View) -> views.View:
    """A view of a part, times the factor by which the module multiplies what the part returns."""
    return views.Through(view, views.Scaled(component.scales[role])) if role in component.scales else view


def _bias(module: Any, view: views.View) -> Place:
    """The bias of a linear map."""
    return Place(module, "bias", view, (module.nf if isinstance(module, Conv1D) else module.out_features,))


def constant(value: float) -> Callable[["ComponentBridge"], Place]:
    """A constant of length d_model for a parameter that the module does not have."""
    return lambda component: Place(component.model, "", WHOLE, (component.cfg.d_model,), value)


def own(parameter: str, view: views.View = WHOLE) -> Callable[["ComponentBridge"], Place]:
    """A parameter of the component's own module; a missing bias is read as d_model zeros."""
    return lambda component: Place(component.original_component, parameter, view, (component.cfg.d_model,))


def _projection(part: str, parameter: str = "weight", grouped: bool = False) -> Callable[[Any], Place]:
    """Where q, k or v is in the weight, or the bias, of its projection."""

    def place(attention: Any) -> Place:
        role, make = attention.places[part]
        module = attention.module_of(role)
        view = _multiplied(attention, part, make(attention.cfg))
        view = views.in_groups(view, attention.cfg.n_key_value_heads) if grouped else view
        if parameter == "bias":
            return _bias(module, view)
        # The view reads [d_model, heads..., d_head].
        return Place(module, parameter, views.Through(matrix(module, view), views.Moved(0, -2)))

    return place


def _output(attention: Any) -> Place:
    module = attention.module_of("o")
    heads = views.Heads(attention.cfg.n_heads, -1)
    kept_as_out_in: views.View = views.Through(views.TRANSPOSED, heads) if isinstance(module, Conv1D) else heads
    return Place(module, "weight", views.Through(kept_as_out_in, views.Moved(0, -1)))


class AttentionWeights:
    """The weights of attention, head by head.

    >>> attn = bridge.blocks[0].attn
    >>> attn.W_Q.shape, attn.W_K.shape, attn.W_O.shape
    (torch.Size([4, 128, 32]), torch.Size([2, 128, 32]), torch.Size([4, 32, 128]))
    >>> attn.W_Q_grouped.shape
    torch.Size([2, 2, 128, 32])

    Query head `h` reads the key and value of head `h // heads_per_group`, so `W_Q_grouped[g, i]` is query head `g *
    heads_per_group + i`. All are views of the model's parameters except `W_Q` and `b_Q` of a fused QKV with several
    groups of several heads, which are copies; `W_Q_grouped` is a view in every layout.
    """

    cfg: Any

    W_Q = Weight("head d_model d_head", "maps the normalised stream to each head's query", _projection("q"))
    W_Q_grouped = Weight(
        "kv_group heads_per_group d_model d_head",
        "W_Q by groups that share a key and value",
        _projection("q", grouped=True),
    )
    W_K = Weight("kv_head d_model d_head", "maps the normalised stream to each key", _projection("k"))
    W_V = Weight("kv_head d_model d_head", "maps the normalised stream to each value", _projection("v"))
    W_O = Weight("head d_head d_model", "maps each head's z to the residual stream", _output)
    b_Q = Weight("head d_head", "added to the queries", _projection("q", "bias"))
    b_Q_grouped = Weight("kv_group heads_per_group d_head", "b_Q by groups", _projection("q", "bias", grouped=True))
    b_K = Weight("kv_head d_head", "added to the keys", _projection("k", "bias"))
    b_V = Weight("kv_head d_head", "added to the values", _projection("v", "bias"))
    b_O = Weight("d_model", "added to the sum of the heads", linear("o", "bias"))

    @property
    def W_K_grouped(self) -> Float[Tensor, "kv_group heads_per_group d_model d_head"]:
        """`W_K` of each query head, aligned with `W_Q_grouped`: an expanded view that cannot be written in place."""
        return self._expanded(self.W_K)

    @property
    def W_V_grouped(self) -> Float[Tensor, "kv_group heads_per_group d_model d_head"]:
        """`W_V` of each query head, aligned with `W_Q_grouped`: an expanded view that cannot be written in place."""
        return self._expanded(self.W_V)

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q @ W_K.T` of each query head with its group's key, `[head d_model d_model]`.

        >>> bridge.blocks[0].attn.QK
        FactoredMatrix(shape=[4, 128, 128], mdim=32)

        `x_query @ QK @ x_key` is the score before scale, biases and position encoding (with RoPE: at distance zero),
        where `x` is the norm's output. Source: Elhage et al. 2021.
        """
        return FactoredMatrix(self.W_Q, self.W_K_grouped.flatten(0, 1).mT)

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V @ W_O` of each query head with its group's value, `[head d_model d_model]`.

        >>> bridge.blocks[0].attn.OV
        FactoredMatrix(shape=[4, 128, 128], mdim=32)

        `x @ OV` is what a head adds to the residual stream, without biases, if it attends fully to a position where the
        norm's output is `x`. Source: Elhage et al. 2021.
        """
        return FactoredMatrix(self.W_V_grouped.flatten(0, 1), self.W_O)

    def _expanded(self, per_group: Tensor) -> Tensor:
        per = self.cfg.n_heads // self.cfg.n_key_value_heads
        return per_group[:, None].expand(-1, per, -1, -1)


def experts(parameter: str, half: Literal[0, 1] | None = None) -> Callable[["ComponentBridge"], Place]:
    """The stacked weights of the experts as `[expert, in, out]`, or their biases.

    `half` is 0 or 1 of two maps, side by side or interleaved as the module says.
    """

    def place(component: "ComponentBridge") -> Place:
        module = component.module_of("experts")
        own = computing_module(module)
        aside, as_stored = attribute(own, "is_concatenated"), attribute(own, "is_transposed")
        view: views.View = WHOLE if half is None else views.Half(half) if aside else views.EveryOther(half)
        if not (as_stored or parameter.endswith("bias")):
            view = views.Through(views.TRANSPOSED, view)
        return Place(module, parameter, view)

    return place


def no_bias(width: str) -> Callable[["ComponentBridge"], Place]:
    """Zeros for a bias that experts do not have; `width` is the config field of its length."""

    def place(component: "ComponentBridge") -> Place:
        shape = (int(component.cfg.num_experts or 1), component.size(width))
        return Place(component.module_of("experts"), "bias", WHOLE, shape)

    return place


class NormWeights:
    """`w` multiplies the normalised stream and `b` is added to it; the missing `b` of an RMSNorm reads as zeros.

    >>> bridge.blocks[0].ln1.w.shape, bridge.ln_final.b.shape
    (torch.Size([128]), torch.Size([128]))
    """

    w = Weight("d_model", "multiplies the normalised stream", own("weight"))
    b = Weight("d_model", "added after that", own("bias"))


class DenseWeights:
    """The weights of a dense MLP without a gate: `W_gate` is `None`.

    >>> bridge.blocks[0].mlp.W_in.shape, bridge.blocks[0].mlp.W_out.shape
    (torch.Size([128, 256]), torch.Size([256, 128]))
    """

    W_in = Weight("d_model d_mlp", "each neuron's input weights", linear("in"))
    W_out = Weight("d_mlp d_model", "each neuron's output weights", linear("out"))
    b_in = Weight("d_mlp", "added before the activation function", linear("in", "bias"))
    b_out = Weight("d_model", "added to the sum over neurons", linear("out", "bias"))
    W_gate: Any = property(lambda self: None)
    b_gate: Any = property(lambda self: None)


class GatedWeights(DenseWeights):
    """The weights of a gated dense MLP: `W_gate` feeds the activation function, `W_in` does not."""

    W_gate = Weight("d_model d_mlp", "each neuron's gate weights", linear("gate"))
    b_gate = Weight("d_mlp", "added to the gate", linear("gate", "bias"))


class FusedGatedWeights(DenseWeights):
    """The weights of a gated MLP with fused gate and hidden layer.

    >>> FusedGatedWeights.W_gate.axes
    'd_model d_mlp'
    """

    W_gate = Weight("d_model d_mlp", "each neuron's gate weights", linear("gate_up", view=views.Half(0)))
    W_in = Weight("d_model d_mlp", "each neuron's input weights", linear("gate_up", view=views.Half(1)))
    b_gate = Weight("d_mlp", "added to the gate", linear("gate_up", "bias", views.Half(0)))
    b_in = Weight("d_mlp", "added before the activation function", linear("gate_up", "bias", views.Half(1)))


class ExpertWeights:
    """The weights of a mixture of experts, `[expert, in, out]`; its experts have no biases, which read as zeros.

    >>> mlp = moe.blocks[0].mlp
    >>> mlp.W_in.shape, mlp.W_out.shape, mlp.W_router.shape
    (torch.Size([4, 128, 64]), torch.Size([4, 64, 128]), torch.Size([128, 4]))

    An expert computes `(act(x @ W_gate) * (x @ W_in)) @ W_out` (source: `MixtralExperts` in transformers).
    """

    W_gate = Weight("expert d_model d_mlp", "each neuron's gate weights", experts("gate_up_proj", 0))
    W_in = Weight("expert d_model d_mlp", "each neuron's input weights", experts("gate_up_proj", 1))
    W_out = Weight("expert d_mlp d_model", "each neuron's output weights", experts("down_proj"))
    b_in = Weight("expert d_mlp", "added before the activation function", no_bias("d_mlp"))
    b_out = Weight("expert d_model", "added to the sum over neurons", no_bias("d_model"))
    W_router = Weight("d_model expert", "maps the normalised stream to router logits", linear("gate"))


class InterleavedExpertWeights(ExpertWeights):
    """The weights of experts with biases, and an interleaved gate and hidden layer, as in GPT-OSS.

    >>> InterleavedExpertWeights.b_gate.axes
    'expert d_mlp'
    """

    b_gate = Weight("expert d_mlp", "added to the gate", experts("gate_up_proj_bias", 0))
    b_in = Weight("expert d_mlp", "added to the hidden layer", experts("gate_up_proj_bias", 1))
    b_out = Weight("expert d_model", "added to the sum over neurons", experts("down_proj_bias"))
