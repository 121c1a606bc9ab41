"""The models of these tests, what tolerance their dtype needs, and running them with an edit inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inside.oracles import Edit, groups_of
from tests.support import LAYOUTS, falcon, mixtral
from transformer_lens.model_bridge import TransformerBridge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
FAMILIES = (*LAYOUTS, "mixtral", "mixtral-window")
ROTATED = tuple(name for name in FAMILIES if name != "rw")
ATTENTIONS = ("sdpa", "eager")
WINDOW = 3

TOLERANCE = {
    # Of the largest entry. Sums of at most 48 products, chained four deep.
    torch.float32: 1e-5,
    # transformers computes the angles of RoPE, and Mixtral its softmax, in float32.
    torch.float64: 1e-6,
    # Eight bits of mantissa, rounded after every step; scores up to 10 stand in an exponent.
    torch.bfloat16: 6e-2,
}


def make(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of FAMILIES; Mixtral with eager experts, since grouped_mm has no float64."""
    # A large epsilon, so that leaving it out is far above rounding.
    if name.startswith("mixtral"):
        changes = {"rms_norm_eps": 0.1, **changes}
        window = {"sliding_window": WINDOW} if name == "mixtral-window" else {}
        return mixtral(attn, **{"experts": "eager", "dtype": dtype, **window, **changes})
    return falcon(attn, dtype=dtype, **{**LAYOUTS[name], "layer_norm_epsilon": 0.1, **changes})


def wrap(model: Any) -> TransformerBridge:
    """A bridge; ALiBi under eager attention has to warn."""
    if getattr(model.config, "alibi", False) and model.config._attn_implementation == "eager":
        with pytest.warns(UserWarning, match="adds its bias twice"):
            return TransformerBridge(model)
    return TransformerBridge(model)


def window_of(model: Any) -> int | None:
    return getattr(model.config, "sliding_window", None)


def grouped(model: Any) -> bool:
    """Whether several query heads share a key."""
    return groups_of(model.config) < model.config.num_attention_heads


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Equal up to the dtype's tolerance times the largest expected entry."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(
        got.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale, msg=lambda text: f"{what}: {text}"
    )


def inside(bridge: TransformerBridge, layer: int | None = None) -> list[str]:
    """The names of all hooks inside modules, those on request too, of one layer if given."""
    rows = [row.name for row in bridge.hook_table() if row.kind.startswith(("seam", "formula"))]
    names = [name.replace("{i}", str(i)) for name in rows for i in range(bridge.cfg.n_layers) if "{i}" in name]
    names += [name for name in rows if "{i}" not in name]
    return [n for n in names if layer is None or n.startswith(f"blocks.{layer}.")]


def run_edited(
    bridge: TransformerBridge, ids: Tensor, edits: dict[str, Edit], keep: list[str], **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run with edits at hooks, and capture others in that same run."""
    hooks = [(name, lambda value, hook, edit=edit: edit(value)) for name, edit in edits.items()]
    with bridge.hooks(fwd_hooks=hooks):
        logits, cache = bridge.run_with_cache(ids, names_filter=keep, **kwargs)
    return logits, {name: cache[name] for name in keep}


def ramp(like: Tensor) -> Tensor:
    """A smooth pattern over all axes, the same in every dtype up to rounding."""
    flat = torch.arange(like.numel(), dtype=torch.float64)
    return torch.sin(flat).reshape(like.shape).to(like.dtype)
