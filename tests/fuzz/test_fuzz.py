"""Random calls of the public API: right answers (NumPy's, or the bare model's) or sentences of ours, and nothing else.

`make fuzz` runs each for some minutes; the few examples that always run are the same every time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.audit.surface import parameters
from tests.audit.table import KEYWORDS, OF_OTHERS, SWITCHES, WORDS, World
from tests.audit.test_audit import AUDITED, SURFACE, complaint, run
from tests.fuzz.junk import junk
from tests.support import VOCAB, family, torch_hooks
from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.patching import get_act_patch_attn_head_out_by_pos, get_act_patch_resid_pre

FAMILIES = ("7b", "40b", "rw", "mixtral")
IDS = torch.tensor([[7, 9, 11, 30, 4, 8], [3, 12, 40, 5, 6, 22]])
LONG = int(os.environ.get("FUZZ_EXAMPLES", "400"))
FEW = int(os.environ.get("FUZZ_FEW", "12"))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@cache
def bridge_of(name: str) -> TransformerBridge:
    """A small random model in float64, where rounding is far below any fault."""
    torch.manual_seed(0)
    changes = {"experts": "eager"} if name == "mixtral" else {}
    return TransformerBridge(family(name, dtype=torch.float64, num_hidden_layers=3, **changes).requires_grad_(False))


@cache
def everything(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The bare logits, and every activation of that run."""
    bridge = bridge_of(name)
    logits, found = bridge.run_with_cache(IDS, names_filter=list(bridge.hook_dict), return_cache_object=False)
    bare = bridge.original_model(IDS).logits
    assert torch.equal(logits, bare)
    return bare, found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


def refused(call: Callable[[], Any]) -> bool:
    """Whether a call was refused, by a sentence of ours; any other error fails."""
    why = complaint(call)
    assert why in (None, "accepted"), why
    return why is None


# -- what is drawn -----------------------------------------------------------------------------------------


@st.composite
def filters(draw: st.DrawFn, bridge: TransformerBridge) -> tuple[Any, set[str] | None]:
    """A names filter, and what it stands for; `None` for one that means nothing."""
    names = list(bridge.hook_dict)
    some = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))
    spelled = [draw(st.sampled_from(bridge.names_of(name))) for name in some]
    kind = draw(st.sampled_from(["one", "list", "tuple", "predicate", "unknown", "junk"]))
    if kind == "one":
        return spelled[0], {some[0]}
    if kind == "predicate":
        end = some[0].rpartition(".")[2]
        return (lambda name: name.rpartition(".")[2] == end), {
            n for n in names if any(spelling.rpartition(".")[2] == end for spelling in bridge.names_of(n))
        }
    if kind == "unknown":
        return [*spelled, draw(st.sampled_from(["", "blocks.9.hook_q", "q", "hook", "blocks.0.attn.hook_Q"]))], None
    if kind == "junk":
        return draw(junk.filter(lambda value: not callable(value) and value is not None)), None
    return (spelled if kind == "list" else tuple(spelled)), set(some)


@st.composite
def slices(draw: st.DrawFn, size: int) -> tuple[Any, Any]:
    """A slice as somebody writes it, and the same for NumPy."""
    inside = st.integers(-size, size - 1)
    kind = draw(st.sampled_from(["ends", "slice", "numbers", "mask"]))
    if kind in ("ends", "slice"):
        ends = draw(st.tuples(st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9)))
        return (ends if kind == "ends" else slice(*ends)), slice(*ends)
    if kind == "numbers":
        numbers = draw(st.lists(inside, min_size=1, max_size=5))
        made = draw(st.sampled_from([list, np.array, torch.tensor, lambda n: np.array(n, dtype=np.int32)]))
        return made(numbers), numbers
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return draw(st.sampled_from([list, np.array, torch.tensor]))(mask), np.array(mask)


# -- the properties ------------------------------------------------------------------------------------------


def any_argument_of_any_function(data: st.DataObject, world: World) -> None:
    """One argument of a right call is exchanged for anything at all: an answer, or a sentence."""
    entry = data.draw(st.sampled_from(AUDITED))
    left_out = {*KEYWORDS, *OF_OTHERS, *SWITCHES, *WORDS}
    names = [p.name for p in parameters(SURFACE[entry]) if p.name not in left_out]
    if not names or entry.endswith(("add_hook", "add_perma_hook", "process_weights", "enable_compatibility_mode")):
        return
    name, value = data.draw(st.sampled_from(names)), data.draw(junk)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        why = complaint(lambda: run(world, entry, {name: value}))
    assert why in (None, "accepted"), f"{entry}({name}={value!r}): {why}"
    assert torch_hooks(world.falcon.original_model) == 0 and torch_hooks(world.moe.original_model) == 0


def a_names_filter_chooses_what_it_says(data: st.DataObject, world: World) -> None:
    """The logits are the bare model's, and what is cached is what the whole run held, under those names."""
    name = data.draw(st.sampled_from(FAMILIES))
    bridge = bridge_of(name)
    bare, every = everything(name)
    names_filter, meant = data.draw(filters(bridge))
    if meant is None:
        if not refused(lambda: bridge.run_with_cache(IDS, names_filter=names_filter)):
            written = [names_filter] if isinstance(names_filter, str) else names_filter
            assert all(bridge.canonical_name(one) for one in written)  # by chance these are names
        return
    clone = data.draw(st.booleans())
    logits, found = bridge.run_with_cache(IDS, names_filter=names_filter, clone=clone, return_cache_object=False)
    assert torch.equal(logits, bare) and set(map(bridge.canonical_name, found)) == meant
    assert all(torch.equal(value, every[bridge.canonical_name(key)]) for key, value in found.items())


def a_slice_of_positions_is_numpys(data: st.DataObject, world: World) -> None:
    """`pos_slice`, of every kind, on any hook, against NumPy on the whole value."""
    name = data.draw(st.sampled_from(FAMILIES))
    bridge = bridge_of(name)
    hook = data.draw(st.sampled_from(list(bridge.hook_dict)))
    written, index = data.draw(slices(IDS.shape[1]))
    axes = bridge.hook_dict[hook].axes.split()
    axis = axes.index("pos" if "pos" in axes else "query_pos")
    bare, every = everything(name)
    expected = every[hook].numpy()[(slice(None),) * axis + (index,)]
    logits, found = bridge.run_with_cache(IDS, names_filter=hook, pos_slice=written, return_cache_object=False)
    assert torch.equal(logits, bare)
    np.testing.assert_array_equal(found[hook].numpy(), expected)


def an_edit_is_that_of_a_torch_hook(data: st.DataObject, world: World) -> None:
    """Some rows and positions of the stream after some layers, changed by our hooks and by torch's own."""
    name = data.draw(st.sampled_from(FAMILIES))
    bridge = bridge_of(name)
    layers = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=12, max_size=12))).view(2, 6)
    factor = data.draw(st.sampled_from([0.0, 0.5, -1.0, 3.0]))
    in_place = data.draw(st.booleans())

    def edited(x: Tensor) -> Tensor:
        return torch.where(mask[..., None], factor * x, x)

    def torchs(module: Any, args: Any, output: Any) -> Any:
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    model: Any = bridge.original_model
    blocks = model.model.layers if name == "mixtral" else model.transformer.h
    handles = [blocks[layer].register_forward_hook(torchs) for layer in layers]
    try:
        expected = model(IDS).logits
    finally:
        for handle in handles:
            handle.remove()

    def hook(x: Tensor, hook: HookPoint) -> Tensor | None:
        if not in_place:
            return edited(x)
        x[:] = edited(x)
        return None

    logits = bridge.run_with_hooks(IDS, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", hook) for layer in layers])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def padding_changes_nothing(data: st.DataObject, world: World) -> None:
    """Rows of different lengths, padded left or right under a mask: each row's logits are those it has alone."""
    name = data.draw(st.sampled_from(FAMILIES))
    bridge = bridge_of(name)
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    left = data.draw(st.booleans())
    rows = [data.draw(st.lists(st.integers(3, VOCAB - 1), min_size=n, max_size=n)) for n in lengths]
    width = max(lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    logits = bridge(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = bridge.original_model(torch.tensor([row])).logits[0]
        # transformers computes RoPE's angles, and Mixtral its norms and router, in float32.
        torch.testing.assert_close(logits[i][mask[i].bool()], alone, rtol=0, atol=2e-5)


def a_sweep_is_the_loop(data: st.DataObject, world: World) -> None:
    """A sweep over layers and positions, or heads too, against runs with one hook each."""
    name = data.draw(st.sampled_from(("7b", "40b", "rw")))
    bridge = bridge_of(name)
    _, clean = bridge.run_with_cache(IDS[:1])
    start = data.draw(st.integers(0, 5))
    corrupted = IDS[:1].clone()
    corrupted[0, start] = data.draw(st.integers(3, VOCAB - 1))
    weights = torch.tensor(data.draw(st.lists(st.floats(-1, 1), min_size=6, max_size=6)), dtype=torch.float64)

    def metric(logits: Tensor) -> Tensor:
        return (logits[0, :, 5] * weights).sum()

    sweep, short = data.draw(
        st.sampled_from([(get_act_patch_resid_pre, "resid_pre"), (get_act_patch_attn_head_out_by_pos, "z")])
    )
    found = sweep(bridge, corrupted, clean, metric, verbose=False)
    index = tuple(data.draw(st.integers(0, size - 1)) for size in found.shape)
    layer, where = index[0], (slice(None), *index[1:])

    def patch(x: Tensor, hook: HookPoint) -> None:
        x[where] = clean[str(hook.name)][where]

    alone = metric(bridge.run_with_hooks(corrupted, fwd_hooks=[(clean.full_name((short, layer)), patch)]))
    torch.testing.assert_close(found[index], alone, rtol=0, atol=1e-5)


PROPERTIES = [
    any_argument_of_any_function,
    a_names_filter_chooses_what_it_says,
    a_slice_of_positions_is_numpys,
    an_edit_is_that_of_a_torch_hook,
    padding_changes_nothing,
    a_sweep_is_the_loop,
]


def examples(draws: Callable[[st.DataObject, World], None], world: World, profile: settings) -> None:
    profile(given(st.data())(lambda data: draws(data, world)))()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # what is drawn may be a file's name
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with torch.no_grad():
        yield


@pytest.mark.parametrize("draws", PROPERTIES, ids=lambda draws: draws.__name__)
def test_a_few_examples(draws: Callable[[st.DataObject, World], None], world: World) -> None:
    examples(
        draws,
        world,
        settings(derandomize=True, max_examples=FEW, deadline=None, suppress_health_check=SLOW, database=None),
    )


@pytest.mark.fuzz
@pytest.mark.parametrize("draws", PROPERTIES, ids=lambda draws: draws.__name__)
def test_many_examples(draws: Callable[[st.DataObject, World], None], world: World) -> None:
    examples(draws, world, settings(max_examples=LONG, deadline=None, suppress_health_check=SLOW, print_blob=True))
