"""Values of every kind that a user might pass by mistake, for hypothesis."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from transformer_lens.checks import is_tensor

numbers = (
    st.integers(-5, 40)
    | st.floats(-3, 3)
    | st.sampled_from([float("nan"), float("inf"), 10**6, -(10**6), 10**30, True, 1j])
)
texts = st.sampled_from(
    ["", " ", "q", "mean", "all", "blocks.0.hook_resid_pre", "resid_post", "cpu", "left", "é", "\x00", "/dev/null"]
)
shapes = st.lists(st.integers(0, 4), max_size=4)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.complex64]
)

ODD = (
    lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.to_sparse() if tensor.ndim else tensor,
    lambda tensor: torch.quantize_per_tensor(tensor.real.float().nan_to_num(), 0.1, 0, torch.qint8),
    lambda tensor: torch.nested.nested_tensor([tensor, tensor]) if tensor.ndim else tensor,
)
"""What makes a tensor one of those that most of torch does not compute with."""


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype and a small shape, sometimes with a NaN, seldom one that torch hardly computes with."""
    made = torch.full(draw(shapes), draw(st.integers(-2, 9))).to(draw(dtypes))
    if made.is_floating_point() and made.numel() and draw(st.booleans()):
        made.view(-1)[0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of some kinds that they are new, of others that they are old
        return draw(st.sampled_from([torch.Tensor.clone] * 9 + list(ODD)))(made)


arrays = tensors().filter(lambda t: t.dtype != torch.bfloat16 and is_tensor(t)).map(lambda tensor: tensor.numpy())
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
