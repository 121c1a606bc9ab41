"""Normalisation: LayerNorm or RMSNorm, before a branch or at the end of the model."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens.model_bridge.generalized_components.base import ComponentBridge, Hook
from transformer_lens.model_bridge.generalized_components.weights import NormWeights
from transformer_lens.model_bridge.ports import Inside, Port
from transformer_lens.model_bridge.twin_call import TwinCall

SCALE = Hook(
    "hook_scale",
    "batch pos 1",
    "what the stream is divided by: its standard deviation, or root mean square",
    Inside(),
)
NORMALIZED = Hook(
    "hook_normalized", "batch pos d_model", "the stream divided by its scale, before weight and bias", Inside()
)
FINAL_OUT = Hook("hook_out", "batch pos d_model", "the stream after the final norm, as the head reads it", Port())


class NormalizationBridge(ComponentBridge):
    """A norm before attention or MLP. What it returns is read at `attn.hook_in` and `mlp.hook_in`.

    This class knows the places alone; a subclass with a twin knows the formula too.
    """

    hooks: ClassVar[tuple[Hook, ...]] = (SCALE, NORMALIZED)
    affine: ClassVar[tuple[str, ...]] = ()
    """The parameters that multiply, and are added to, the normalised stream; none where the formula is unknown."""
    centres: ClassVar[bool] = False
    """Whether the mean over d_model is taken off, so that a constant added along d_model changes nothing."""


class FinalNormalizationBridge(NormalizationBridge):
    """The norm after the last block."""

    hooks = (SCALE, NORMALIZED, FINAL_OUT)


class LayerNormBridge(NormWeights, NormalizationBridge):
    """LayerNorm (Ba et al. 2016), as `torch.nn.LayerNorm` computes it: half precision in float32."""

    attributes = affine = ("weight", "bias")
    centres = True

    def twin(self, call: TwinCall) -> Float[Tensor, "*batch d_model"]:
        x: Tensor = call.first
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if not call.writing:
            # One kernel gives both; it has no gradient to its scale, which only a write needs.
            normalized, _, reciprocal = torch.native_layer_norm(wide, (x.shape[-1],), None, None, call.cfg.eps)
            call.fire("hook_scale", reciprocal.reciprocal())
            return call.fire("hook_normalized", normalized.to(x.dtype))
        centred = wide - wide.mean(-1, keepdim=True)
        scale = call.fire("hook_scale", (centred.square().mean(-1, keepdim=True) + call.cfg.eps).sqrt())
        normalized = call.fire("hook_normalized", (centred / scale).to(x.dtype))
        return torch.addcmul(call.weight("", "bias"), normalized, call.weight(""))


class RMSNormBridge(NormWeights, NormalizationBridge):
    """RMSNorm (Zhang and Sennrich 2019), as `MixtralRMSNorm` computes it.

    In float32 whatever the model's dtype, and rounded before the weight.
    """

    attributes = affine = ("weight",)

    def twin(self, call: TwinCall) -> Float[Tensor, "*batch d_model"]:
        x: Tensor = call.first
        wide = x.to(torch.float32)
        mean_square = wide.pow(2).mean(-1, keepdim=True) + call.cfg.eps
        scale = call.fire("hook_scale", found := mean_square.sqrt())
        # The model multiplies by the reciprocal root; only a scale that a hook changed is divided by.
        divided = wide * torch.rsqrt(mean_square) if scale is found else wide / scale
        return call.weight("") * call.fire("hook_normalized", divided.to(x.dtype))


class FinalLayerNormBridge(LayerNormBridge):
    """The LayerNorm after the last block."""

    hooks = (SCALE, NORMALIZED, FINAL_OUT)


class FinalRMSNormBridge(RMSNormBridge):
    """The RMSNorm after the last block."""

    hooks = (SCALE, NORMALIZED, FINAL_OUT)
