"""`FactoredMatrix` against the matrix it stands for, multiplied out in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_lens import FactoredMatrix
from transformer_lens.factored_matrix import composition_scores

quickly = settings(deadline=None, max_examples=60, derandomize=True)
sizes = st.integers(1, 6)
leading_axes = st.lists(st.integers(1, 3), max_size=3).map(tuple)

# Float64 sums of at most a few hundred terms of size one.
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **CLOSE)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def factored(leading: tuple[int, ...], ldim: int, mdim: int, rdim: int) -> FactoredMatrix:
    return FactoredMatrix(normal(*leading, ldim, mdim), normal(*leading, mdim, rdim))


class Case(NamedTuple):
    matrix: FactoredMatrix
    plain: Tensor


@st.composite
def cases(draw: st.DrawFn, square: bool = False) -> Case:
    """Any sizes: inner axis shorter or longer than the outer ones, with or without leading axes."""
    ldim = draw(sizes)
    matrix = factored(draw(leading_axes), ldim, draw(sizes), ldim if square else draw(sizes))
    return Case(matrix, torch.matmul(matrix.A, matrix.B))


# -- shape ---------------------------------------------------------------------------------------------


@quickly
@given(cases())
def test_the_shape_is_that_of_the_matrix(case: Case) -> None:
    matrix, plain = case
    assert (matrix.shape, matrix.ndim) == (plain.shape, plain.ndim)
    assert (matrix.ldim, matrix.rdim) == plain.shape[-2:]
    assert matrix.mdim == matrix.A.shape[-1] == matrix.B.shape[-2]
    assert matrix.has_leading_dims is (plain.ndim > 2)
    assert matrix.pair[0] is matrix.A and matrix.pair[1] is matrix.B
    close(matrix.AB, plain)
    close(matrix.T.AB, plain.mT)


def test_factors_are_those_given_and_leading_axes_broadcast_without_memory() -> None:
    A, B = normal(5, 1, 4, 2), normal(3, 2, 6)
    matrix = FactoredMatrix(A, B)
    assert matrix.shape == (5, 3, 4, 6)
    assert matrix.A.data_ptr() == A.data_ptr() and matrix.B.data_ptr() == B.data_ptr()
    close(matrix.AB, A @ B)
    assert matrix.T.B.data_ptr() == A.data_ptr() and matrix.T.A.data_ptr() == B.data_ptr()
    A[:] = 0
    assert not matrix.AB.any()


def test_its_name_says_its_shape() -> None:
    assert repr(factored((7,), 5, 2, 4)) == "FactoredMatrix(shape=[7, 5, 4], mdim=2)"


# -- products ------------------------------------------------------------------------------------------


@quickly
@given(cases(), sizes, leading_axes.filter(lambda axes: len(axes) < 2))
def test_products_with_matrices_from_both_sides(case: Case, width: int, leading: tuple[int, ...]) -> None:
    matrix, plain = case
    # Leading axes that broadcast with those of the matrix: as many ones.
    lead = tuple(1 for _ in leading)
    right, left = normal(*lead, matrix.rdim, width), normal(*lead, width, matrix.ldim)
    for product, expected in ((matrix @ right, plain @ right), (left @ matrix, left @ plain)):
        assert isinstance(product, FactoredMatrix)
        assert product.shape == expected.shape
        close(product.AB, expected)
    assert (matrix @ right).mdim == min(matrix.mdim, matrix.rdim)
    assert (left @ matrix).mdim == min(matrix.mdim, matrix.ldim)


@quickly
@given(cases())
def test_products_with_vectors_are_tensors(case: Case) -> None:
    matrix, plain = case
    right, left = normal(matrix.rdim), normal(matrix.ldim)
    close(matrix @ right, plain @ right)
    close(left @ matrix, left @ plain)


@quickly
@given(cases(), sizes, sizes)
def test_products_of_two_keep_the_shorter_inner_axis(case: Case, mdim: int, rdim: int) -> None:
    matrix, plain = case
    other = factored((), matrix.rdim, mdim, rdim)
    product = matrix @ other
    close(product.AB, plain @ other.A @ other.B)
    assert product.mdim == min(matrix.mdim, matrix.rdim, mdim)
    batch = factored((3,), matrix.rdim, mdim, rdim)
    expected = plain[..., None, :, :] @ (batch.A @ batch.B)
    close((matrix.unsqueeze(-3) @ batch).AB, expected)


def test_a_product_never_makes_the_matrix_where_the_factors_are_smaller() -> None:
    """With a million rows and columns `AB` would take eight terabytes."""
    matrix = factored((), 1_000_000, 2, 1_000_000)
    vector = torch.ones(1_000_000, dtype=torch.float64)
    assert (matrix @ vector).shape == (1_000_000,)
    assert (matrix @ matrix).mdim == 2
    A, B = matrix.pair
    close(matrix.norm(), torch.trace((A.T @ A) @ (B @ B.T)).sqrt())
    assert matrix.S.shape == (2,) and matrix.eigenvalues.shape == (2,)
    assert matrix[-1, -1].shape == (1, 1)
    assert matrix.get_corner(3).shape == (3, 3)


@quickly
@given(cases(), st.floats(-3, 3))
def test_times_a_number(case: Case, number: float) -> None:
    matrix, plain = case
    for scaled in (
        matrix * number,
        number * matrix,
        matrix * torch.tensor(number),
        torch.full((1,) * 6, number) * matrix,
    ):
        torch.testing.assert_close(scaled.AB, plain * number, rtol=1e-6, atol=1e-6)


# -- decompositions --------------------------------------------------------------------------------------


@quickly
@given(cases())
def test_singular_values(case: Case) -> None:
    matrix, plain = case
    U, S, V = matrix.svd()
    k = min(matrix.ldim, matrix.mdim, matrix.rdim)
    assert S.shape == (*plain.shape[:-2], k)
    close(U @ torch.diag_embed(S) @ V.mT, plain)
    close(S, torch.linalg.svdvals(plain)[..., :k])
    eye = torch.eye(k, dtype=torch.float64).expand(*plain.shape[:-2], k, k)
    close(U.mT @ U, eye)
    close(V.mT @ V, eye)
    close(matrix.S, S)
    close(matrix.U @ torch.diag_embed(S) @ matrix.V.mT, plain)
    close(matrix.Vh, matrix.V.mT)


@quickly
@given(cases())
def test_collapsed_sides_keep_what_is_on_the_other(case: Case) -> None:
    matrix, plain = case
    left, right, even = matrix.collapse_l(), matrix.collapse_r(), matrix.make_even()
    close(left.mT @ left, plain.mT @ plain)
    close(right @ right.mT, plain @ plain.mT)
    assert left.shape[-1] == matrix.rdim and right.shape[-2] == matrix.ldim
    close(even.AB, plain)
    close(torch.linalg.matrix_norm(even.A), torch.linalg.matrix_norm(even.B))
    close(even.A.mT @ even.A, torch.diag_embed(even.S))


@quickly
@given(cases())
def test_the_norm_is_the_root_of_the_squares(case: Case) -> None:
    close(case.matrix.norm(), case.plain.square().sum((-2, -1)).sqrt())


def test_the_norm_of_a_product_that_nearly_cancels_is_still_right() -> None:
    """Through squares of the factors half of the digits would be lost."""
    A = torch.tensor([[1.0, 1.0], [0.0, 1e-9]], dtype=torch.float64)
    B = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(FactoredMatrix(A, B).norm(), torch.tensor(1e-9, dtype=torch.float64), rtol=1e-6, atol=0)


@quickly
@given(cases(square=True))
def test_eigenvalues_are_those_of_the_matrix(case: Case) -> None:
    """Power sums determine eigenvalues whatever their order; the ones left out are zero."""
    matrix, plain = case
    values = matrix.eigenvalues
    assert values.shape == (*plain.shape[:-2], min(matrix.ldim, matrix.mdim))
    power = plain
    for exponent in range(1, 5):
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(values.pow(exponent).sum(-1), trace.to(values.dtype), rtol=1e-8, atol=1e-8)
        power = power @ plain
    close(matrix.BA, matrix.B @ matrix.A)


def test_half_precision_is_decomposed_in_float32() -> None:
    matrix = FactoredMatrix(torch.randn(5, 2).bfloat16(), torch.randn(2, 5).bfloat16())
    plain = matrix.A.float() @ matrix.B.float()
    assert torch.allclose(matrix.norm(), plain.norm(), rtol=1e-5)
    assert torch.allclose(matrix.S, torch.linalg.svdvals(plain)[:2], rtol=1e-5)
    assert matrix.eigenvalues.dtype == torch.complex64
    assert (matrix @ torch.ones(5).bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_the_factors() -> None:
    A, B = normal(4, 2).requires_grad_(), normal(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda A, B: FactoredMatrix(A, B).norm(), (A, B))
    assert torch.autograd.gradcheck(lambda A, B: FactoredMatrix(A, B).S, (A, B))


# -- parts -----------------------------------------------------------------------------------------------

INDICES: list[tuple[Any, Any]] = [
    # the index, and the one that gives the same of a tensor
    (0, 0),
    (-1, -1),
    (slice(1, 3), slice(1, 3)),
    ((0, 1), (0, 1)),
    ((slice(None), 1), (slice(None), 1)),
    ((None, 0), (None, 0)),
    ((0, None, 1), (0, None, 1)),
    ([0, 2], [0, 2]),
    (torch.tensor([2, 0]), torch.tensor([2, 0])),
    (torch.tensor([True, False, True]), torch.tensor([True, False, True])),
    (torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)),
    (..., ...),
    ((..., 2), (..., slice(2, 3))),
    ((..., -1), (..., slice(-1, None))),
    ((..., -2, slice(None)), (..., slice(-2, -1), slice(None))),
    ((0, 1, 2), (0, 1, slice(2, 3))),
    ((0, ..., 1, 2), (0, ..., slice(1, 2), slice(2, 3))),
    ((0, 1, slice(0, 2), slice(None, None, 2)), (0, 1, slice(0, 2), slice(None, None, 2))),
    ((0, slice(None), slice(None), [0, 3]), (0, slice(None), slice(None), [0, 3])),
    ((..., torch.tensor([1, 1]), slice(None)), (..., torch.tensor([1, 1]), slice(None))),
    ((slice(0, 0),), (slice(0, 0),)),
]


@pytest.mark.parametrize("index, of_a_tensor", INDICES, ids=[str(index) for index, _ in INDICES])
def test_an_index_is_that_of_the_matrix(index: Any, of_a_tensor: Any) -> None:
    matrix = factored((3, 2), 4, 2, 5)
    part = matrix[index]
    assert isinstance(part, FactoredMatrix) and part.mdim == 2
    expected = matrix.AB[of_a_tensor]
    assert part.shape == expected.shape
    close(part.AB, expected)


KINDS: dict[str, Any] = {
    "numpy": np.asarray,
    "torch": torch.as_tensor,
    "list": lambda values: np.asarray(values).tolist(),
    "tuple": lambda values: _as_tuple(np.asarray(values).tolist()),
}


def _as_tuple(values: Any) -> Any:
    return tuple(map(_as_tuple, values)) if isinstance(values, list) else values


@st.composite
def entries(draw: st.DrawFn, sizes: list[int], matrix_axis: bool) -> tuple[Any, Any, int]:
    """An entry as somebody writes it, the same for NumPy with a matrix axis kept, and how many axes it takes."""
    size, kind = sizes[0], KINDS[draw(st.sampled_from(sorted(KINDS)))]
    written = draw(st.sampled_from(["number", "slice", "numbers", "mask", *([] if matrix_axis else ["wide mask"])]))
    if written == "number":
        number = draw(st.integers(-size, size - 1))
        made = draw(st.sampled_from([int, np.int64, np.uint8 if number >= 0 else np.int8, torch.tensor, np.asarray]))
        return made(number), slice(number, number + 1 or None) if matrix_axis else number, 1
    if written == "slice":
        ends = draw(st.tuples(st.none() | st.integers(-4, 4), st.none() | st.integers(-4, 4)))
        as_numpy = [None if end is None else np.int64(end) for end in ends]
        return slice(*as_numpy), slice(*ends), 1
    if written == "numbers":
        numbers = draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=4))
        return kind(numbers), numbers, 1
    along = sizes[: 2 if written == "wide mask" else 1]
    count = int(np.prod(along))
    mask = np.reshape(draw(st.lists(st.booleans(), min_size=count, max_size=count)), along)
    return kind(mask), mask, len(along)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.data())
def test_every_kind_of_index_is_numpys_of_the_matrix(data: st.DataObject) -> None:
    """One entry along leading axes (several are read in step, rows and columns are not), and any along the matrix."""
    leading = data.draw(st.lists(st.integers(1, 3), max_size=3))
    matrix = factored(tuple(leading), 4, 2, 5)
    first = data.draw(st.none() | entries(leading, False)) if leading else None
    if first is not None and first[2] > len(leading):
        first = None
    used = 0 if first is None else first[2]
    rest: list[Any] = [slice(None)] * (len(leading) - used)
    middle: list[Any] = [...] if data.draw(st.booleans()) else rest
    new = [None] if data.draw(st.booleans()) else []
    rows, columns = data.draw(entries([4], True)), data.draw(entries([5], True))
    start = [*new, *([] if first is None else [first[0]])]
    expected = matrix.AB.numpy()[(*new, *([] if first is None else [first[1]]))]
    expected = expected[..., rows[1], :][..., columns[1]]
    close(matrix[(*start, *middle, rows[0], columns[0])].AB, torch.from_numpy(np.ascontiguousarray(expected)))


def test_a_mask_over_two_axes_is_one_whatever_it_is_made_of() -> None:
    matrix = factored((3, 2), 4, 2, 5)
    mask = np.array([[True, False], [False, True], [True, True]])
    expected = matrix.AB[torch.from_numpy(mask)][:, :, 1:2]
    for kind in KINDS.values():
        close(matrix[kind(mask), :, 1].AB, expected)


def test_lists_of_rows_and_of_columns_choose_each_on_their_own() -> None:
    matrix = factored((), 4, 2, 5)
    close(matrix[[0, 3], [1, 4, 2]].AB, matrix.AB[[0, 3]][:, [1, 4, 2]])


def test_parts_are_views_of_the_factors() -> None:
    matrix = factored((3,), 4, 2, 5)
    part = matrix[1, 1:3]
    matrix.A[1, 1] = 0
    assert not part.AB[0].any() and part.AB[1].any()


@quickly
@given(cases())
def test_new_leading_axes(case: Case) -> None:
    matrix, plain = case
    for dim in range(matrix.ndim - 1):
        close(matrix.unsqueeze(dim).AB, plain.unsqueeze(dim))
        close(matrix.unsqueeze(dim - matrix.ndim - 1).AB, plain.unsqueeze(dim))


def test_a_corner() -> None:
    matrix = factored((5,), 4, 2, 6)
    close(matrix.get_corner(), matrix.AB[:3, :3, :3])
    close(matrix.get_corner(2), matrix.AB[:2, :2, :2])


# -- composition -------------------------------------------------------------------------------------------


@quickly
@given(sizes, sizes, sizes, sizes, leading_axes, leading_axes)
def test_composition_scores_of_every_pair(
    ldim: int, inner: int, shared: int, rdim: int, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    left, right = factored(first, ldim, inner, shared), factored(second, shared, inner, rdim)
    scores = composition_scores(left, right)
    assert scores.shape == (*first, *second)
    lefts, rights = left.AB.reshape(-1, ldim, shared), right.AB.reshape(-1, shared, rdim)
    by_hand = [torch.stack([(a @ b).norm() / (a.norm() * b.norm()) for b in rights]) for a in lefts]
    close(scores.reshape(len(lefts), len(rights)), torch.stack(by_hand))


def test_a_matrix_of_zeros_scores_zero() -> None:
    left, right = factored((3,), 4, 2, 5), factored((2,), 5, 2, 4)
    left.A[1] = 0
    right.B[0] = 0
    scores = composition_scores(left, right)
    assert (scores == 0).tolist() == [[True, False], [True, True], [True, False]]


# -- errors --------------------------------------------------------------------------------------------------

MATRIX = factored((3,), 4, 2, 5)
MISTAKES: list[tuple[Any, type[Exception], str]] = [
    (lambda: FactoredMatrix(torch.ones(2), torch.ones(2, 3)), ValueError, "A has shape [2], expected two axes or more"),
    (lambda: FactoredMatrix(torch.ones(2, 2), [[1.0]]), TypeError, "B: got [[1.0]], expected a tensor"),
    (lambda: FactoredMatrix(torch.ones(2, 2), torch.ones(3, 2)), ValueError, "A has shape [2, 2] and B [3, 2]"),
    (
        lambda: FactoredMatrix(torch.ones(2, 4, 2), torch.ones(3, 2, 4)),
        ValueError,
        "leading axes [2] of A and [3] of B do not fit",
    ),
    (lambda: MATRIX @ torch.ones(4), ValueError, "[3, 4, 5] @ [4]: 5 columns and 4 rows"),
    (lambda: torch.ones(5) @ MATRIX, ValueError, "[5] @ [3, 4, 5]: 5 columns and 4 rows"),
    (lambda: MATRIX @ torch.ones(4, 2), ValueError, "[3, 4, 5] @ [4, 2]: 5 columns and 4 rows"),
    (lambda: MATRIX @ torch.ones(()), ValueError, "[3, 4, 5] @ []: 5 columns and 0 rows"),
    (lambda: torch.ones(()) @ MATRIX, ValueError, "[] @ [3, 4, 5]: 0 columns and 4 rows"),
    (lambda: MATRIX @ MATRIX, ValueError, "[3, 4, 5] @ [3, 4, 5]: 5 columns and 4 rows"),
    (lambda: MATRIX @ "x", TypeError, "unsupported operand"),
    (lambda: "x" @ MATRIX, TypeError, "unsupported operand"),
    (lambda: MATRIX * "x", TypeError, "multiply"),
    (lambda: MATRIX * torch.ones(3), ValueError, "got a tensor of shape [3] to multiply with, expected one number"),
    (lambda: MATRIX.BA, ValueError, "BA: got a matrix of shape [3, 4, 5], expected as many rows as columns"),
    (lambda: MATRIX.eigenvalues, ValueError, "eigenvalues: got a matrix of shape [3, 4, 5]"),
    (lambda: MATRIX.unsqueeze(2), IndexError, "got dim 2, expected a leading axis: 0 to 1"),
    (lambda: MATRIX.unsqueeze(-5), IndexError, "got dim -5"),
    (lambda: MATRIX[3], IndexError, "axis 0: got 3, expected -3 to 2"),
    (lambda: MATRIX[0, 4], IndexError, "axis 1: got 4, expected -4 to 3"),
    (lambda: MATRIX[0, 0, -6], IndexError, "axis 2: got -6, expected -5 to 4"),
    (lambda: MATRIX[0, 0, 0, 0], IndexError, "4 indices for shape [3, 4, 5]"),
    (lambda: MATRIX[..., 0, ...], IndexError, "one ellipsis"),
    (lambda: MATRIX[[0, 1, 3]], IndexError, "axis 0: got 3, expected -3 to 2"),
    (lambda: MATRIX[[True, False]], IndexError, "axis 0: got a mask of shape [2], expected [3]"),
    (lambda: MATRIX[True], TypeError, "got True, expected a number, a slice, a list or array of numbers, a mask"),
    (lambda: MATRIX[0, 1.5], TypeError, "got 1.5, expected a number"),
    (lambda: MATRIX[0, ["a"]], TypeError, "got ['a'], expected a number"),
    (lambda: MATRIX[::-1], ValueError, "expected a step of one or more"),
    (lambda: MATRIX[0, [[0, 1]]], IndexError, "rows and columns take"),
    (lambda: factored((3, 2), 4, 2, 5)[[0, 1], [0, 1, 0]], IndexError, "read in step, expected shapes that fit"),
    (lambda: MATRIX @ torch.ones(5), ValueError, "torch.float64 on cpu @ torch.float32 on cpu, expected one dtype"),
    (lambda: MATRIX @ torch.ones(2, 5, 1), ValueError, "[3, 4, 5] @ [2, 5, 1]: the leading axes do not fit"),
    (lambda: FactoredMatrix(torch.ones(2, 2), torch.ones(2, 2).double()), ValueError, "expected one dtype and device"),
    (lambda: MATRIX.get_corner(-1), ValueError, "get_corner: k: got -1, expected 0 or more"),
    (lambda: MATRIX.unsqueeze(0.5), TypeError, "unsqueeze: dim: got 0.5, expected a whole number"),
    (lambda: composition_scores(MATRIX, torch.ones(5)), TypeError, "right is a torch.float32 tensor of shape [5]"),
    (lambda: MATRIX[0, :, None, :], IndexError, "rows and columns take"),
    (lambda: composition_scores(MATRIX, MATRIX), ValueError, "expected as many columns as the second has rows"),
]


@pytest.mark.parametrize("mistake, kind, text", MISTAKES, ids=[text for _, _, text in MISTAKES])
def test_mistakes_say_what_was_expected(mistake: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        mistake()
    assert text in str(caught.value)
