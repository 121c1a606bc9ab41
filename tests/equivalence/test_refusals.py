"""Law 6: what the model class cannot run is refused at boot, each with its sentence, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.equivalence.grid import REFUSED, RUNNABLE, point_id, unrunnable
from tests.support import falcon, falcon_config, tokens, torch_hooks
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.supported_architectures import adapter_for

PREFIX = "FalconConfig cannot be run by its own model class: "


def sentence(point: dict[str, Any]) -> str:
    """What a refused point is told, by what is wrong with it."""
    if point["new_decoder_architecture"]:
        return "new_decoder_architecture runs attention and MLP in parallel, so parallel_attn must be True"
    if point["parallel_attn"] and point["num_ln_in_parallel_attn"] == 2:
        return "num_ln_in_parallel_attn=2 in a parallel block needs new_decoder_architecture=True"
    return (
        "the per-head layout (multi_query=False) has a key for each of its 8 heads, "
        f"so num_kv_heads={point['num_kv_heads']} does not fit"
    )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("point", [pytest.param(point, id=point_id(point)) for point in REFUSED])
def test_a_configuration_that_crashes_in_transformers_is_refused(point: dict[str, Any], attn: str) -> None:
    """The bare model raises in its forward; the bridge says why before it touches the model."""
    model = unrunnable(point, attn)
    with torch.no_grad(), pytest.raises((AttributeError, RuntimeError, UnboundLocalError)):
        model(tokens())
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as refusal:
        TransformerBridge(model)
    assert str(refusal.value) == PREFIX + sentence(point)
    assert torch_hooks(model) == 0 and [type(module) for module in model.modules()] == types


@pytest.mark.parametrize("point", [pytest.param(point, id=point_id(point)) for point in RUNNABLE])
def test_a_configuration_that_runs_is_accepted(point: dict[str, Any]) -> None:
    config = falcon_config(**point)
    assert adapter_for(config).cfg.n_layers == 2
    with torch.no_grad():
        assert falcon(**point)(tokens()).logits.isfinite().all()
