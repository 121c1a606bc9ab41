"""Logits that are computed when they are read are the full logits, whatever reads them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
from torch import Tensor

from transformer_lens.analysis.patching.lazy_logits import LazyLogits

FULL = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
ALL = (0, 1, 2, 3, 4)


def lazy(there: tuple[int, ...] = ()) -> LazyLogits:
    known = torch.zeros(5, dtype=torch.bool)
    known[list(there)] = True
    values = torch.full_like(FULL, torch.nan)
    values[:, known] = FULL[:, known]

    def compute(wanted: Tensor) -> Tensor:
        assert wanted.any() and not (wanted & known).any()
        return FULL[:, wanted]

    return LazyLogits.of(values, known, compute)


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x + 0, file)
    file.seek(0)
    return torch.load(file)


PICKS: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "last": (lambda x: x[:, -1], (4,)),
    "one number": (lambda x: x[0, -1, 3], (4,)),
    "ellipsis": (lambda x: x[..., -2, :], (3,)),
    "pairs": (lambda x: x[torch.arange(2), torch.tensor([1, 3])], (1, 3)),
    "slice": (lambda x: x[:, 1:3], (1, 2)),
    "step": (lambda x: x[1:, ::2], (0, 2, 4)),
    "mask": (lambda x: x[:, torch.tensor([True, False, False, False, True])], (0, 4)),
    "numpy int": (lambda x: x[:, np.int64(2)], (2,)),
    "list": (lambda x: x[:, [0, 2]], ALL),
    "row": (lambda x: x[0], ALL),
    "new axis first": (lambda x: x[None, :, 1], ALL),
    "new axis": (lambda x: x[:, None], ALL),
    "ellipsis and vocabulary": (lambda x: x[..., 2], ALL),
    "mask over two axes": (lambda x: x[torch.eye(2, 5).bool()], ALL),
    "mask over two axes and a number": (lambda x: x[torch.eye(2, 5).bool(), 2], ALL),
    "bool": (lambda x: x[True, 1], ALL),
}
USES: dict[str, Callable[[Tensor], Any]] = {
    "mean": lambda x: x.mean(),
    "softmax": lambda x: torch.softmax(x, -1)[0, 1],
    "keyword": lambda x: torch.sum(input=x),
    "in a list": lambda x: torch.cat([x, x]),
    "arithmetic": lambda x: 1 + 2 * x,
    "iteration": lambda x: torch.stack(list(x)),
    "numpy": lambda x: torch.tensor(x.numpy()),
    "array": lambda x: torch.tensor(np.asarray(x)),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "data": lambda x: x.data,
    "dlpack": torch.from_dlpack,
    "view": lambda x: x.view(-1, 7)[3],
    "einops": lambda x: einops.rearrange(x, "b p v -> p (b v)"),
    "copy": copy.deepcopy,
    "saved": saved,
    "set item": lambda x: (x.__setitem__((0, 0), 3.0), x + 0)[1],
    "select": lambda x: x.select(1, 2),
    "compare": lambda x: x > 0,
}


@pytest.mark.parametrize("there", [(), (4,), (0, 1, 2)])
@pytest.mark.parametrize("name", PICKS)
def test_picking_positions_computes_those(name, there):
    pick, positions = PICKS[name]
    logits = lazy(there)
    got = pick(logits)
    assert type(got) is Tensor and torch.equal(got, pick(FULL))
    assert tuple(logits.read.nonzero().flatten().tolist()) == positions
    assert tuple(logits.there.nonzero().flatten().tolist()) == tuple(sorted({*positions, *there}))


@pytest.mark.parametrize("name", USES)
def test_any_other_use_computes_everything(name):
    use = USES[name]
    logits = lazy((1,))
    got = torch.as_tensor(use(logits))
    assert torch.equal(got, use(FULL.clone())) and logits.there.all()


def test_its_form_is_known_without_values():
    logits = lazy()
    assert isinstance(logits, Tensor) and logits.shape == (2, 5, 7) and logits.size(1) == 5 and len(logits) == 2
    assert (logits.ndim, logits.dim(), logits.dtype, logits.device) == (3, 3, torch.float32, FULL.device)
    assert logits.numel() == 70 and logits.is_floating_point() and not logits.requires_grad
    assert not logits.there.any() and not logits.read.any()


def test_what_was_read_once_is_not_computed_again():
    logits = lazy()
    assert torch.equal(logits[:, 1], FULL[:, 1]) and torch.equal(logits[:, :2], FULL[:, :2])
    assert torch.equal(logits + 0, FULL)


def test_edits_stay():
    logits = lazy()
    logits[:, 2] = 0.0
    assert torch.equal(logits[:, 2], torch.zeros(2, 7)) and torch.equal(logits[:, 3], FULL[:, 3])


def test_a_position_beyond_is_an_index_error():
    with pytest.raises(IndexError):
        lazy()[:, 5]
