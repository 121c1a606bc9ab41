"""Every attribute of a bridge and of its components: setting it takes effect, or is refused in a sentence of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.audit.table import THING
from tests.audit.test_audit import raised_on_purpose
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.generalized_components import ComponentBridge

CONSTANTS = {"affine", "centres", "neutral", "places"}
"""What a class of norms or of attention says of itself: no part of the public API."""
TORCHS = ("training", *vars(nn.Module()), *vars(nn.Module), "__doc__")
"""What torch keeps in every module; it says itself what may be in it."""


def settable(owner: nn.Module) -> Iterator[str]:
    """What an object has that is no method: its own, and what its classes compute."""
    for name in dir(owner):
        if name.startswith("_") or name in TORCHS or name in CONSTANTS:
            continue
        if name in vars(owner) or name in owner._modules or not callable(getattr(type(owner), name, None)):
            yield name


@pytest.fixture(scope="module", params=["tiny-falcon", "tiny-mixtral"])
def bridge(request: pytest.FixtureRequest) -> TransformerBridge:
    return TransformerBridge.boot_transformers(request.param)


def test_nothing_is_set_and_then_ignored(bridge: TransformerBridge) -> None:
    owners: list[Any] = [bridge, bridge.embed, bridge.unembed, *bridge.blocks[1].modules()]
    owners = [owner for owner in owners if owner is bridge or isinstance(owner, ComponentBridge)]
    tried, wrong = 0, []
    for owner in owners:
        for name in settable(owner):
            tried += 1
            try:
                setattr(owner, name, THING)
            except (AttributeError, TypeError, ValueError) as error:
                ours = raised_on_purpose(error.__traceback__) and len(str(error).split()) > 3
                if ours or "has no setter" in str(error):  # Python's own words for what is computed
                    continue
            wrong.append(f"{type(owner).__name__}.{name}")
    assert not wrong, "these can be set and mean nothing; list them in FIXED (components' base.py):\n" + "\n".join(
        wrong
    )
    assert tried > 100
    tokens = torch.tensor([[1, 5, 6]])
    assert torch.equal(bridge(tokens), bridge.original_model(tokens).logits)


def test_the_same_object_may_be_set_again(bridge: TransformerBridge) -> None:
    part = bridge.blocks[0].attn
    bridge.adapter, bridge.cfg, bridge.root = bridge.adapter, bridge.cfg, bridge.root
    part.name, part.parent = part.name, part.parent
