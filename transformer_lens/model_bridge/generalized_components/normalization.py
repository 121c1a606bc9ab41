"""Normalisation: LayerNorm or RMSNorm, before a branch or at the end of the model."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens.model_bridge.access.inside_call import InsideCall
from transformer_lens.model_bridge.access.ports import Inside, Port
from transformer_lens.model_bridge.access.views import Shifted
from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook, Part
from transformer_lens.model_bridge.generalized_components.weights import NormWeights, Weight, constant, own

SCALE = Hook(
    "hook_scale",
    "batch pos 1",
    "the norm's divisor: the standard deviation (LayerNorm) or root mean square (RMSNorm)",
    Inside(kind="formula"),
)
NORMALIZED = Hook(
    "hook_normalized",
    "batch pos d_model",
    "what the norm reads, divided by its scale, before weight and bias",
    Inside(kind="formula"),
)
FINAL_OUT = Hook("hook_out", "batch pos d_model", "the residual stream after the final norm", Port())


class NormalizationBridge(ComponentBridge):
    """A norm whose formula need not be known; its output is at `attn.hook_in` or `mlp.hook_in`."""

    hooks: ClassVar[tuple[Hook, ...]] = (SCALE, NORMALIZED)
    affine: ClassVar[tuple[str, ...] | None] = None
    """The parameters that multiply, and are added to, the normalised stream; `None` if the formula is unknown."""
    neutral: ClassVar[float] = 1.0
    """The weight that multiplies by one."""
    centres: ClassVar[bool] = False
    """Whether the mean over d_model is subtracted."""

    def table(self, part: Part) -> tuple[tuple[Hook, ...], Mapping[str, str]]:
        """After the last block nothing else shows the output."""
        return (*self.hooks, FINAL_OUT) if self.name == "ln_final" else self.hooks, self.absent


class OpenNormalizationBridge(NormWeights, NormalizationBridge):
    """A norm whose formula is known, since a module computes it in one step and has no seam."""

    def inside(self, call: InsideCall) -> Any:
        """The module's call; where a hook writes, the formula in its place."""
        if any(map(call.writes, (SCALE.name, NORMALIZED.name))):
            return self.formula(call)
        output = call.run()
        with torch.no_grad():
            self.look(call)
        return output

    def look(self, call: InsideCall) -> None:
        raise NotImplementedError(f"{type(self).__name__} has to say what its module computes")

    def formula(self, call: InsideCall) -> Float[Tensor, "*batch d_model"]:
        """The module's output, from its scale and its normalised stream."""
        raise NotImplementedError(f"{type(self).__name__} has to say what its module computes")


class LayerNormBridge(OpenNormalizationBridge):
    """LayerNorm (Ba et al. 2016), as `torch.nn.LayerNorm` computes it: half precision in float32."""

    attributes: ClassVar[tuple[str, ...]] = ("weight", "bias")
    affine: ClassVar[tuple[str, ...] | None] = ("weight", "bias")
    centres = True

    def look(self, call: InsideCall) -> None:
        """One kernel gives both; its scale has no gradient, which only a write needs."""
        x: Tensor = call.first
        normalized, _, reciprocal = torch.native_layer_norm(
            at_least_float32(x), (x.shape[-1],), None, None, call.cfg.eps
        )
        call.fire(SCALE.name, reciprocal.reciprocal())
        call.fire(NORMALIZED.name, normalized.to(x.dtype))

    def formula(self, call: InsideCall) -> Float[Tensor, "*batch d_model"]:
        x: Tensor = call.first
        wide = at_least_float32(x)
        centred = wide - wide.mean(-1, keepdim=True)
        scale = call.fire(SCALE.name, (centred.square().mean(-1, keepdim=True) + call.cfg.eps).sqrt())
        normalized = call.fire(NORMALIZED.name, (centred / scale).to(x.dtype))
        return self.weighted(call, normalized)

    def weighted(self, call: InsideCall, normalized: Tensor) -> Float[Tensor, "*batch d_model"]:
        return torch.addcmul(call.weight("", "bias"), normalized, call.weight(""))


class OffsetLayerNormBridge(LayerNormBridge):
    """LayerNorm as in `NemotronLayerNorm1P`: times one plus the weight."""

    neutral = 0.0
    w = Weight("d_model", "multiplies the normalised stream: one plus the weight", own("weight", Shifted(1.0)))

    def weighted(self, call: InsideCall, normalized: Tensor) -> Float[Tensor, "*batch d_model"]:
        return torch.addcmul(call.weight("", "bias"), normalized, call.weight("") + 1.0)


class BiaslessLayerNormBridge(LayerNormBridge):
    """LayerNorm as in `CohereLayerNorm`: no bias, and rounded after the weight."""

    attributes = affine = ("weight",)

    def weighted(self, call: InsideCall, normalized: Tensor) -> Float[Tensor, "*batch d_model"]:
        return (call.weight("").float() * normalized.float()).to(normalized.dtype)


class BareLayerNormBridge(LayerNormBridge):
    """LayerNorm as in `OlmoLayerNorm`: no weight and no bias."""

    attributes = affine = ()
    w = Weight("d_model", "multiplies the normalised stream: ones", constant(1.0))
    b = Weight("d_model", "added after that: zeros", constant(0.0))

    def weighted(self, call: InsideCall, normalized: Tensor) -> Float[Tensor, "*batch d_model"]:
        return normalized


class RMSNormBridge(OpenNormalizationBridge):
    """RMSNorm (Zhang and Sennrich 2019), as in `LlamaRMSNorm`: in float32, and rounded before the weight."""

    attributes = affine = ("weight",)

    def look(self, call: InsideCall) -> None:
        call.fire(NORMALIZED.name, self.divided(call).to(call.first.dtype))

    def formula(self, call: InsideCall) -> Float[Tensor, "*batch d_model"]:
        return self.weighted(call, self.divided(call), call.first.dtype)

    def divided(self, call: InsideCall) -> Float[Tensor, "*batch d_model"]:
        wide: Tensor = call.first.to(torch.float32)
        mean_square = wide.pow(2).mean(-1, keepdim=True) + call.cfg.eps
        if not call.wants(SCALE.name):
            return wide * torch.rsqrt(mean_square)
        scale = call.fire(SCALE.name, found := mean_square.sqrt())
        # The model multiplies by the reciprocal root; only a scale that a hook changed is divided by.
        return wide * torch.rsqrt(mean_square) if scale is found else wide / scale

    def weighted(self, call: InsideCall, divided: Tensor, dtype: torch.dtype) -> Float[Tensor, "*batch d_model"]:
        return call.weight("") * call.fire(NORMALIZED.name, divided.to(dtype))


class OffsetRMSNormBridge(RMSNormBridge):
    """RMSNorm as in `GemmaRMSNorm`: times one plus the weight, and rounded after that."""

    neutral = 0.0
    w = Weight("d_model", "multiplies the normalised stream: one plus the weight", own("weight", Shifted(1.0)))

    def weighted(self, call: InsideCall, divided: Tensor, dtype: torch.dtype) -> Float[Tensor, "*batch d_model"]:
        shown = divided.to(dtype)
        new = call.fire(NORMALIZED.name, shown)
        wide = divided if new is shown else new.to(divided.dtype)
        return (wide * (1.0 + call.weight("").float())).to(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
