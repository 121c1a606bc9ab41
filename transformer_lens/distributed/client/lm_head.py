"""The LM head of a distributed model: one product, or (16-bit weights on a CPU) one for each part of the vocabulary."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CONVERTED = (torch.bfloat16, torch.float16)
FEWEST_POSITIONS = 32  # from here on parts were faster on a CPU without 16-bit instructions: benchmarks/lm_head.py


def converts(weight: Tensor) -> bool:
    """Whether parts of this weight are converted to float32: 16-bit weights on a CPU."""
    return weight.device.type == "cpu" and weight.dtype in CONVERTED


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for this 16-bit dtype on this CPU; otherwise torch falls back to slower loops."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    ops: Any = torch.ops.mkldnn
    asked = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    return bool(asked[dtype]())


def parts_are_faster(weight: Tensor, positions: int) -> bool:
    """The choice of "auto": parts for weights that are converted, on a CPU without kernels for them, for long texts."""
    return converts(weight) and positions >= FEWEST_POSITIONS and not has_instructions(weight.dtype)


class LMHead(nn.Linear):
    """The unembedding, optionally computed in parts of the vocabulary.

    >>> from transformer_lens.distributed import AutoDistributedModelForCausalLM
    >>> options = {"use_chunked_forward": True, "chunked_forward_step": 100}
    >>> model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", **options)
    >>> model.lm_head(torch.ones(1, 1, 128)).shape
    torch.Size([1, 1, 735])

    Without conversion (float32, a GPU) it is the single product, bit for bit. 16-bit weights on a CPU are multiplied in
    float32 and rounded once, within one rounding step of a 16-bit product with float32 sums. A weight is read when
    used, so tied and trained ones work.
    """

    chunked: bool | str
    step: int

    @classmethod
    def put(cls, head: nn.Linear, config: Any) -> None:
        """Replace a model's head by an `LMHead` with the same weights."""
        head.__class__ = cls
        assert isinstance(head, cls)
        head.chunked = config.use_chunked_forward
        head.step = config.chunked_forward_step

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunked={self.chunked!r}, step={self.step}"

    def in_parts(self, x: Tensor) -> bool:
        """Whether these logits are computed in parts."""
        if x.dtype != self.weight.dtype or torch.is_autocast_enabled(x.device.type):  # torch's to refuse, or to cast
            return False
        if self.chunked == "auto":
            return parts_are_faster(self.weight, x.shape[:-1].numel())
        return self.chunked is True and converts(self.weight)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        if not self.in_parts(x):
            return F.linear(x, self.weight, self.bias)
        logits: Tensor = _InParts.apply(x, self.weight, self.bias, self.step)  # type: ignore[no-untyped-call]
        return logits


class _InParts(torch.autograd.Function):
    """A linear map in float32, by parts of its rows, which the backward pass converts again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.step = step
        wide, logits = x.float(), x.new_empty(*x.shape[:-1], len(weight))
        for rows, part in _converted(weight, step):
            logits[..., rows] = F.linear(wide, part, None if bias is None else bias[rows].float())
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        at_x, at_weight, at_bias = ctx.needs_input_grad[:3]
        given = gradient.reshape(-1, len(weight))
        found: list[Tensor | None] = [None, None, None, None]
        if at_x:
            total = x.new_zeros(len(given), x.shape[-1], dtype=torch.float32)
            for rows, part in _converted(weight, ctx.step):
                total.addmm_(given[:, rows].float(), part)
            found[0] = total.to(x.dtype).reshape(x.shape)
        if at_weight:
            found[1] = given.T @ x.reshape(-1, x.shape[-1])
        if at_bias:
            found[2] = given.sum(0)
        return tuple(found)


def _converted(weight: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Successive rows of a weight, all in one buffer of `step` rows."""
    memory = weight.new_empty(min(step, len(weight)), weight.shape[1], dtype=torch.float32)
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        part = weight[rows]
        yield rows, memory[: len(part)].copy_(part)
