"""What a call of the bridge returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_lens.model_bridge.upstream import attribute

RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """The output of `return_type="both"`."""

    logits: Tensor
    loss: Tensor


def main_output(output: Any) -> Tensor:
    """The logits; for question answering start and end logits side by side; or the final residual stream."""
    if "logits" in output:
        logits: Tensor = output.logits
        return logits
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    final: Tensor = attribute(output, "last_hidden_state")
    return final
