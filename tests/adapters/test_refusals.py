"""Configurations that the model class itself cannot run are refused, each with its sentence.

The whole sweep is in tests/equivalence/test_refusals.py; here is one of each kind, and what lies beyond it.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import falcon, falcon_config, family, mixtral, tokens
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.supported_architectures import adapter_for

PREFIX = "FalconConfig cannot be run by its own model class: "


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"new_decoder_architecture": True, "parallel_attn": False},
            "new_decoder_architecture runs attention and MLP in parallel, so parallel_attn must be True",
        ),
        (
            {"num_ln_in_parallel_attn": 2},
            "num_ln_in_parallel_attn=2 in a parallel block needs new_decoder_architecture=True",
        ),
        (
            {"multi_query": False, "num_kv_heads": 2},
            "the per-head layout (multi_query=False) has a key for each of its 8 heads, so num_kv_heads=2 does not fit",
        ),
    ],
)
def test_falcons_of_the_sweep(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as refusal:
        adapter_for(falcon_config(**changes))
    assert str(refusal.value) == PREFIX + told


@pytest.mark.core
@pytest.mark.parametrize(
    "changes, told",
    [
        ({"hidden_size": 36}, "hidden_size 36 is not a multiple of num_attention_heads 8"),
        (
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
            "num_ln_in_parallel_attn is 3, and a new_decoder_architecture block has 1 or 2 norms",
        ),
        (
            {"new_decoder_architecture": True, "num_kv_heads": 3},
            "8 query heads do not fall into 3 equal key-value groups",
        ),
    ],
)
def test_falcons_beyond_the_sweep(changes: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, RuntimeError, AttributeError, UnboundLocalError)):
        falcon(**changes)(tokens())
    with pytest.raises(ValueError) as refusal:
        adapter_for(falcon_config(**changes))
    assert str(refusal.value) == PREFIX + told


@pytest.mark.core
@pytest.mark.parametrize(
    "changes, told",
    [
        ({"num_experts_per_tok": 5}, "it chooses 5 experts for each token and has 4"),
        ({"num_key_value_heads": 3}, "8 query heads do not fall into 3 equal key-value groups"),
    ],
)
def test_mixtrals_that_do_not_run(changes: dict[str, Any], told: str) -> None:
    model = mixtral(**changes)
    with pytest.raises(RuntimeError):
        model(tokens())
    with pytest.raises(ValueError) as refusal:
        TransformerBridge(model)
    assert str(refusal.value) == "MixtralConfig cannot be run by its own model class: " + told


@pytest.mark.parametrize("name", ["7b", "rw", "mixtral"])
def test_a_bridge_gives_the_model_back(name: str) -> None:
    """Whatever was exchanged at boot is there again after the last of two bridges left."""
    model = family(name)
    types = [type(module) for module in model.modules()]
    first, second = TransformerBridge(model), TransformerBridge(model)
    first.detach()
    second.detach()
    assert [type(module) for module in model.modules()] == types


def test_what_a_call_that_asks_for_attentions_gets_wrong() -> None:
    """Only Falcon, where its kernel leaves the pattern out; tests/bridge/test_generation.py shows the numbers."""
    faults = {
        (alibi, attn): adapter_for(falcon_config(attn, multi_query=False, alibi=alibi)).attentions_fault()
        for alibi in (False, True)
        for attn in ("sdpa", "eager")
    }
    assert faults[False, "eager"] is faults[True, "eager"] is None
    assert "attend to later ones" in str(faults[False, "sdpa"])
    assert "ALiBi bias a second time" in str(faults[True, "sdpa"])
    assert adapter_for(mixtral().config).attentions_fault() is None
