"""What the proof runs over: the runnable Falcon configurations, the Mixtral grid, dtypes, attention kinds.

Which configurations run, and which are one model, is written here from transformers' modeling code, not asked of the
package. `test_spellings.py` proves that configurations of one model are one bridge; so a sweep runs over the models,
each time in another spelling, and over all spellings in `make test-full`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import cycle, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import FalconForCausalLM

from tests.support import FAMILIES, LAYOUTS, falcon, falcon_config, falcon_sweep, mixtral, perturbed
from transformer_lens.model_bridge import TransformerBridge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = 8
EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""The implementations of transformers that run without a kernel package; the rest need a CUDA device."""


def runs(point: dict[str, Any]) -> bool:
    """Whether `modeling_falcon.py` can run a point of the sweep with 8 heads."""
    if point["new_decoder_architecture"]:
        # Without parallel_attn the layer asks for a norm that the constructor did not make.
        return bool(point["parallel_attn"])
    if point["parallel_attn"] and point["num_ln_in_parallel_attn"] == 2:
        return False  # it makes ln_attn and ln_mlp, and forward reads input_layernorm
    # Per head: forward reshapes keys to num_kv_heads, and there is one for each of the 8 heads.
    return bool(point["multi_query"]) or point["num_kv_heads"] == HEADS


def point_id(point: dict[str, Any]) -> str:
    """A short name such as `rope-parallel-new-mq-ln2-kv4`."""
    words = (
        "alibi" if point["alibi"] else "rope",
        "parallel" if point["parallel_attn"] else "sequential",
        "new" if point["new_decoder_architecture"] else "old",
        "mq" if point["multi_query"] else "perhead",
        f"ln{point['num_ln_in_parallel_attn']}",
        f"kv{point['num_kv_heads']}",
    )
    return "-".join(words)


SWEEP = list(falcon_sweep())
RUNNABLE = [point for point in SWEEP if runs(point)]
REFUSED = [point for point in SWEEP if not runs(point)]


class Layout(NamedTuple):
    """What `modeling_falcon.py` makes of a runnable point; it does not read the point's other options."""

    alibi: bool
    parallel: bool
    new: bool
    norms: int
    """In a parallel block: only the new architecture may have two."""
    keys: int


def layout_of(point: dict[str, Any]) -> Layout:
    """The new architecture wins over `multi_query`, and has two norms where it is not told how many."""
    if point["new_decoder_architecture"]:
        norms, keys = point["num_ln_in_parallel_attn"] or 2, point["num_kv_heads"]
    else:
        norms, keys = 1, 1 if point["multi_query"] else HEADS
    return Layout(point["alibi"], point["parallel_attn"], point["new_decoder_architecture"], norms, keys)


SPELLINGS: dict[Layout, list[dict[str, Any]]] = {}
"""The points of each layout."""
for _point in RUNNABLE:
    SPELLINGS.setdefault(layout_of(_point), []).append(_point)


def each_layout(turn: int, turns: int = 1, **changes: Any) -> list[Any]:
    """Every runnable point as a parameter; those that are not this turn's spelling of their layout are slow.

    Four turns in a row see every value of every option that a layout does not read. Every layout has biases in one
    of two spellings, which the sweep does not vary.
    """
    found = []
    for nth, spellings in enumerate(SPELLINGS.values()):
        chosen = {(7 * (turn + other) + nth) % len(spellings) for other in range(turns)}
        for place, point in enumerate(spellings):
            bias = (place + nth // 2) % 2 == 1
            marks = [] if place in chosen else [pytest.mark.slow]
            found.append(pytest.param({**point, "bias": bias, **changes}, id=point_id(point), marks=marks))
    return found


class Case(NamedTuple):
    """One model of the grid: how to make it."""

    family: str
    changes: dict[str, Any]
    attn: str
    dtype: torch.dtype

    def model(self) -> Any:
        """The model, random and small."""
        if self.family == "mixtral":
            return mixtral(self.attn, dtype=self.dtype, **self.changes)
        return falcon(self.attn, dtype=self.dtype, **self.changes)


def falcon_cases(attns: tuple[str, ...] = ("sdpa", "eager"), dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[Any]:
    """Every layout under every attention and dtype, each time in another spelling; the other spellings are slow."""
    cases = []
    for turn, (attn, dtype) in enumerate(product(attns, dtypes)):
        for point in each_layout(turn):
            case = Case("falcon", point.values[0], attn, DTYPES[dtype])
            cases.append(pytest.param(case, id=f"{point.id}-{attn}-{dtype}", marks=point.marks))
    return cases


def mixtral_points() -> Iterator[dict[str, Any]]:
    """Experts × chosen × implementation in full with the attention's axes cycled, and the other way round."""
    attention = list(product((1, 2, 4, 8), (None, 4, 16), (None, 3)))
    shapes, implementations = cycle(attention), cycle(EXPERTS)
    for experts, chosen, how in product(range(1, 9), (1, 2, 3), EXPERTS):
        if chosen <= experts:
            yield mixtral_point(experts, chosen, how, *next(shapes))
    for shape in attention:
        yield mixtral_point(4, 2, next(implementations), *shape)


def mixtral_point(
    experts: int, chosen: int, how: str, kv: int, d_head: int | None, window: int | None
) -> dict[str, Any]:
    """One point of the Mixtral grid as config changes."""
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": chosen,
        "experts": how,
        "num_key_value_heads": kv,
        "head_dim": d_head,
        "sliding_window": window,
    }


def usual(point: dict[str, Any]) -> bool:
    """Whether a point is not only in the full product: one expert, all of them chosen, some, and more than chosen."""
    return point["num_local_experts"] in (1, 2, 3, 4, 8)


def mixtral_id(point: dict[str, Any]) -> str:
    """A short name such as `e4-top2-grouped_mm-kv2-d16-w3`."""
    return (
        f"e{point['num_local_experts']}-top{point['num_experts_per_tok']}-{point['experts']}"
        f"-kv{point['num_key_value_heads']}-d{point['head_dim']}-w{point['sliding_window']}"
    )


def mixtral_cases() -> list[Any]:
    """The Mixtral grid, in turn under each attention and in each dtype; the full product of shapes is slow."""
    cases = []
    for number, point in enumerate(mixtral_points()):
        for other, dtype in enumerate(DTYPES):
            attn = ("sdpa", "eager")[number % 2]
            # Every implementation of the experts meets every attention in every dtype.
            marks = [] if usual(point) and (number // 2) % 2 == other else [pytest.mark.slow]
            case = Case("mixtral", point, attn, DTYPES[dtype])
            cases.append(pytest.param(case, id=f"mixtral-{mixtral_id(point)}-{attn}-{dtype}", marks=marks))
    kinds = cycle(product(("sdpa", "eager"), DTYPES.values()))
    for experts, chosen, how, kv, d_head, window in product(
        range(1, 9), (1, 2, 3), EXPERTS, (1, 2, 4, 8), (None, 4, 16), (None, 3)
    ):
        if chosen <= experts:
            point = mixtral_point(experts, chosen, how, kv, d_head, window)
            case = Case("mixtral", point, *next(kinds))
            cases.append(pytest.param(case, id=f"full-{mixtral_id(point)}", marks=pytest.mark.slow))
    return cases


def family_cases(dtype: torch.dtype = torch.float32, experts: str | None = None) -> list[Any]:
    """The published layouts; those of the core among them."""
    cases = []
    for name in FAMILIES:
        if name == "mixtral":
            case = Case("mixtral", {} if experts is None else {"experts": experts}, "sdpa", dtype)
        else:
            case = Case("falcon", LAYOUTS[name], "sdpa", dtype)
        cases.append(pytest.param(case, id=name, marks=pytest.mark.core))
    return cases


def every_case() -> list[Any]:
    """All of it."""
    return family_cases() + falcon_cases() + mixtral_cases()


PUBLISHED = [case.values[0] for case in family_cases()]


def one_by_one(case: Case, names: list[str]) -> list[str]:
    """The hooks that a case takes one at a time: all on a published layout, else those of one of its two blocks.

    A layout has the other block under the other attention, and under the other dtype; what is in no block always.
    """
    left_out = f"blocks.{int((case.attn == 'sdpa') == (case.dtype == torch.float32))}."
    return [name for name in names if case in PUBLISHED or not name.startswith(left_out)]


def wrap(model: nn.Module) -> TransformerBridge:
    """A bridge; ALiBi under eager attention has to warn, since transformers adds its bias twice there."""
    config: Any = model.config
    twice = config.model_type == "falcon" and config.alibi and config._attn_implementation == "eager"
    with pytest.warns(UserWarning, match="adds its bias twice") if twice else nullcontext():
        return TransformerBridge(model)


def unrunnable(point: dict[str, Any], attn: str) -> FalconForCausalLM:
    """The bare model of a configuration that is to be refused, where it can be built at all."""
    return perturbed(FalconForCausalLM(falcon_config(attn, **point)))
