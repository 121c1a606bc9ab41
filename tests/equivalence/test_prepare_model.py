"""`prepare_model`: Falcon's in-place add is out of every hook's way, bitwise, and back again.

Each fault of the unprepared model is pinned: when transformers mends it, a test here says so.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.equivalence.grid import DTYPES, wrap
from tests.equivalence.test_untouched import snapshot
from tests.support import LAYOUTS, falcon, mixtral, tokens
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter

prepare = FalconArchitectureAdapter.prepare_model
PARALLEL = ["7b", "11b", "40b"]
SEQUENTIAL = ["rw", "rw-rope"]
every_layout = pytest.mark.parametrize("name", LAYOUTS)
parallel_layouts = pytest.mark.parametrize("name", PARALLEL)
pytestmark = pytest.mark.core


@every_layout
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_each_layer_alone_is_the_installed_transformers_own_layer(name: str, dtype: torch.dtype) -> None:
    """Drift of the installed release would show here: layer against layer, on a random stream."""
    model = falcon(dtype=dtype, **LAYOUTS[name])
    stream = torch.randn(2, 7, 32, dtype=dtype)
    positions = torch.arange(7)[None]
    rotation = model.transformer.rotary_emb(stream, position_ids=positions)
    mask = torch.randn(2, 8, 7, 7, dtype=dtype)
    arguments = {"alibi": None, "attention_mask": mask, "position_embeddings": rotation}
    if LAYOUTS[name].get("alibi"):
        arguments["alibi"] = torch.zeros(16, 1, 7, dtype=dtype)
    with torch.no_grad():
        bare = [layer(stream, **arguments)[0] for layer in model.transformer.h]
        prepare(model)
        prepared = [layer(stream, **arguments)[0] for layer in model.transformer.h]
    assert all(torch.equal(a, b) for a, b in zip(bare, prepared, strict=True))


def captured(model: Any, ids: Tensor) -> Tensor:
    """What a plain forward hook that keeps the MLP's output ends up with."""
    kept: list[Tensor] = []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: kept.append(out))
    model(ids)
    handle.remove()
    return kept[0].detach()


def mlp_on_paper(model: Any, ids: Tensor) -> Tensor:
    """The MLP's value, cloned the moment it is there."""
    kept: list[Tensor] = []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda module, args, out: kept.append(out.clone()))
    model(ids)
    handle.remove()
    return kept[0].detach()


@every_layout
def test_plain_forward_hooks_keep_the_mlps_output(name: str) -> None:
    model, ids = falcon(**LAYOUTS[name]), tokens()
    true = mlp_on_paper(model, ids)
    # transformers' fault, while it lasts: what was kept turns into MLP + attention.
    assert torch.equal(captured(model, ids), true) == (name in SEQUENTIAL)
    prepare(model)
    assert torch.equal(captured(model, ids), true)


@parallel_layouts
def test_full_backward_hooks_work(name: str) -> None:
    model, ids = falcon(**LAYOUTS[name]), tokens()
    mlp = model.transformer.h[0].mlp
    found: list[Tensor] = []
    handle = mlp.register_full_backward_hook(lambda module, inner, outer: found.append(outer[0].clone()))
    with pytest.raises(RuntimeError, match="BackwardHookFunction.* is a view and is being modified inplace"):
        model(ids)
    handle.remove()
    tensors: list[Tensor] = []
    handle = mlp.register_forward_hook(
        lambda module, args, out: out.register_hook(lambda gradient: tensors.append(gradient.clone())) and None
    )
    model(ids).logits.square().sum().backward()
    handle.remove()
    prepare(model)
    mlp.register_full_backward_hook(lambda module, inner, outer: found.append(outer[0].clone()))
    model(ids).logits.square().sum().backward()
    assert len(found) == len(tensors) == 1 and torch.equal(found[0], tensors[0])


@every_layout
def test_undo_restores_exactly(name: str) -> None:
    model = falcon(**LAYOUTS[name])
    before = snapshot(model)
    preparation = prepare(model)
    assert (snapshot(model) == before) == (name in SEQUENTIAL)
    preparation.undo()
    assert snapshot(model) == before
    preparation.undo()
    assert snapshot(model) == before


@parallel_layouts
@pytest.mark.parametrize("first", [0, 1])
def test_preparations_nest_in_any_order(name: str, first: int) -> None:
    model, ids = falcon(**LAYOUTS[name]), tokens()
    before, true = snapshot(model), mlp_on_paper(model, ids)
    preparations = [prepare(model), prepare(model)]
    preparations[first].undo()
    preparations[first].undo()
    assert torch.equal(captured(model, ids), true)
    preparations[1 - first].undo()
    assert snapshot(model) == before


@parallel_layouts
def test_bridges_and_preparations_nest(name: str) -> None:
    model, ids = falcon(**LAYOUTS[name]), tokens()
    before, true = snapshot(model), mlp_on_paper(model, ids)
    preparation = prepare(model)
    first, second = wrap(model), wrap(model)
    first.detach()
    preparation.undo()
    assert torch.equal(second.run_with_cache(ids)[1]["mlp_out", 0], true)
    second.detach()
    assert snapshot(model) == before


@parallel_layouts
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_prepared_model_can_be_copied_and_saved(name: str, how: str) -> None:
    model, ids = falcon(**LAYOUTS[name]), tokens()
    bare, true = model(ids).logits, mlp_on_paper(model, ids)
    preparation = prepare(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    preparation.undo()
    assert torch.equal(other(ids).logits, bare)
    assert torch.equal(captured(other, ids), true)
    assert list(other.state_dict()) == list(model.state_dict())


@every_layout
def test_a_prepared_model_compiles_without_a_graph_break(name: str) -> None:
    model, ids = falcon(**LAYOUTS[name], num_hidden_layers=1), tokens()
    prepare(model)
    with torch.no_grad():
        bare = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids, use_cache=False).logits, bare)
    torch.compiler.reset()


def test_a_model_that_adds_nothing_in_place_is_left_alone() -> None:
    model, ids = mixtral(), tokens()
    before: dict[str, Any] = snapshot(model)
    bridge = wrap(model)
    assert snapshot(model) == before
    bridge.detach()
    kept: list[Tensor] = []
    module: nn.Module = model.model.layers[0].mlp
    module.register_forward_hook(lambda module, args, out: kept.extend([out, out.clone()]))
    model(ids)
    assert torch.equal(kept[0], kept[1])


def test_a_subclass_of_the_mlp_is_left_alone() -> None:
    """Only transformers' own class is exchanged; somebody's own MLP keeps its type and its forward."""
    model = falcon(**LAYOUTS["7b"])
    mlp: Any = model.transformer.h[0].mlp

    class Own(type(mlp)):  # type: ignore[misc]
        pass

    mlp.__class__ = Own
    prepare(model).undo()
    assert type(mlp) is Own


@parallel_layouts
def test_a_model_without_a_head_is_prepared_too(name: str) -> None:
    """The base model alone, and only once for each preparation."""
    model, ids = falcon(**LAYOUTS[name]), tokens()
    true = mlp_on_paper(model, ids)
    prepare(model.transformer)
    assert torch.equal(captured(model, ids), true)
