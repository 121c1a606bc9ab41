"""Values of every kind that a user might pass by mistake, for hypothesis."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

numbers = (
    st.integers(-5, 40) | st.floats(-3, 3) | st.sampled_from([float("nan"), float("inf"), 10**6, -(10**6), True, 1j])
)
texts = st.sampled_from(
    ["", " ", "q", "mean", "all", "blocks.0.hook_resid_pre", "resid_post", "cpu", "left", "é", "\x00"]
)
shapes = st.lists(st.integers(0, 4), max_size=4)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.complex64]
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype and a small shape, sometimes with a NaN."""
    made = torch.full(draw(shapes), draw(st.integers(-2, 9))).to(draw(dtypes))
    if made.is_floating_point() and made.numel() and draw(st.booleans()):
        made.view(-1)[0] = float("nan")
    return made


arrays = tensors().filter(lambda t: t.dtype != torch.bfloat16).map(lambda tensor: tensor.numpy())
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    numbers,
    texts,
    st.binary(max_size=3),
    st.sampled_from(
        [np.int64(2), np.float32(0.5), np.bool_(True), object(), len, ..., slice(1, 3), slice(None, None, -1)]
    ),
)
junk: st.SearchStrategy[Any] = st.recursive(
    scalars | tensors() | arrays,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(texts, inner, max_size=2),
    ),
    max_leaves=5,
)
"""Anything."""
