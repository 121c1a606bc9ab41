"""Configurations from which transformers builds one Falcon make one bridge: 98 spellings of 24 layouts.

So the other tests of the sweep run over layouts (`grid.each_layout`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.equivalence.grid import RUNNABLE, SPELLINGS, Layout, point_id, wrap
from tests.support import falcon, tokens
from transformer_lens.model_bridge import TransformerBridge


def structure(bridge: TransformerBridge) -> tuple[object, ...]:
    """All that is said of a model before it runs."""
    adapter = bridge.adapter
    parts = [(part.name, type(part), part.path) for part in bridge.components()]
    names = (adapter.layout_name(), adapter.block_kind(), adapter.cached_heads(), adapter.attentions_fault())
    return bridge.cfg.to_dict(), list(bridge.hook_table()), parts, names


def behaviour(bridge: TransformerBridge) -> dict[str, Tensor]:
    """Every hook's value and gradient, and the logits: each text but the first is written at a hook of its own."""
    torch.manual_seed(1)
    names = list(bridge.hook_dict)
    ids = tokens(len(names) + 1, 4)
    found: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        found[f"{hook.name}, a gradient"] = value

    _, cache = bridge.run_with_cache(ids[:2], names_filter=names)
    bridge.run_with_hooks(ids[:2], bwd_hooks=[(names, keep)]).square().sum().backward()

    def turned(row: int) -> Any:
        def edit(value: Tensor, hook: Any) -> Tensor:
            return torch.cat([value[:row], value[row : row + 1].flip(1), value[row + 1 :]])

        return edit

    with torch.no_grad():
        bare = bridge(ids)
        found["logits"] = bridge.run_with_hooks(ids, fwd_hooks=[(name, turned(n)) for n, name in enumerate(names, 1)])
    # A write inside a module goes by a formula or by eager attention, within rounding of what the model computes.
    moved = (found["logits"] - bare).abs().amax((1, 2)) > 1e-3
    assert moved.tolist() == [False] + [True] * len(names)
    return {**cache, **found}


def test_every_runnable_point_is_a_spelling_of_a_layout() -> None:
    assert len(SPELLINGS) == 24 and sum(map(len, SPELLINGS.values())) == len(RUNNABLE) == 98


def cases() -> list[Any]:
    """The spellings of each layout in two groups, one under each attention."""
    found = []
    for number, (layout, (_, *others)) in enumerate(SPELLINGS.items()):
        for turn, attn in enumerate(("sdpa", "eager")):
            if group := others[(number + turn) % 2 :: 2]:
                found.append(pytest.param(layout, group, attn, id=f"{point_id(SPELLINGS[layout][0])}-{attn}"))
    return found


@pytest.mark.parametrize("layout, others, attn", cases())
def test_spellings_of_a_layout_are_one_model_and_one_bridge(
    layout: Layout, others: list[dict[str, Any]], attn: str
) -> None:
    """Names and shapes of parameters, the structure, and with the same weights everything that hooks see and do."""
    first = SPELLINGS[layout][0]
    model = falcon(attn, bias=True, **first)
    bridge = wrap(model)
    said, expected = structure(bridge), behaviour(bridge)
    assert bridge.cfg.n_key_value_heads == layout.keys and bridge.cfg.parallel_attn_mlp == layout.parallel
    for point in others:
        other = falcon(attn, bias=True, **point)
        other.load_state_dict(model.state_dict())
        again = wrap(other)
        assert structure(again) == said, point
        found = behaviour(again)
        assert list(found) == list(expected), point
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == [], point
