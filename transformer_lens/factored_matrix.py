"""`FactoredMatrix`: a product of two thin matrices that is never multiplied out.

A head's QK and OV circuits are `[d_model, d_model]` matrices of rank `d_head`; products, norms and decompositions come
from the factors (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from transformer_lens.checks import a_tensor, in_words, whole
from transformer_lens.hooks.slicing import AxisIndex, axis_index, check_within

Index = int | slice | EllipsisType | Sequence[Any] | np.ndarray | Tensor | None
Entry = AxisIndex | EllipsisType | None
EXPECTED = "a number, a slice, a list or array of numbers, a mask, None or '...'"


class FactoredMatrix:
    """The matrix `A @ B`, kept as `A` and `B`; leading axes are a batch of matrices.

    >>> matrix = FactoredMatrix(torch.randn(7, 50, 3), torch.randn(7, 3, 40))
    >>> matrix.shape, matrix.mdim
    (torch.Size([7, 50, 40]), 3)
    >>> (matrix @ torch.randn(40, 2)).shape
    torch.Size([7, 50, 2])
    >>> matrix.norm().shape
    torch.Size([7])

    `A` is `[..., ldim, mdim]` and `B` is `[..., mdim, rdim]`; leading axes broadcast. Factors are kept, not copied.
    `svd`, `eigenvalues` and `norm` compute half precision in float32. Raises `ValueError` for factors that do not fit.
    """

    def __init__(self, A: Float[Tensor, "*#leading ldim mdim"], B: Float[Tensor, "*#leading mdim rdim"]) -> None:
        for name, factor in (("A", A), ("B", B)):
            a_tensor(f"FactoredMatrix: {name}", factor)
            if factor.ndim < 2:
                raise ValueError(f"FactoredMatrix: {name} has shape {list(factor.shape)}, expected two axes or more")
        if A.shape[-1] != B.shape[-2]:
            raise ValueError(
                f"FactoredMatrix: A has shape {list(A.shape)} and B {list(B.shape)}; the last axis of A and the second "
                "to last of B are the inner one, and have to be equal"
            )
        if A.dtype != B.dtype or A.device != B.device:
            raise ValueError(
                f"FactoredMatrix: A is {A.dtype} on {A.device} and B {B.dtype} on {B.device}, expected one dtype and "
                "device"
            )
        leading = _broadcast(A.shape[:-2], B.shape[:-2])
        if leading is None:
            raise ValueError(
                f"FactoredMatrix: the leading axes {list(A.shape[:-2])} of A and {list(B.shape[:-2])} of B do not fit"
            )
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])

    @property
    def ldim(self) -> int:
        """The number of rows."""
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """The length of the inner axis, which bounds the rank."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """The number of columns."""
        return self.B.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The shape of `AB`."""
        return torch.Size((*self.A.shape[:-1], self.rdim))

    @property
    def ndim(self) -> int:
        """The number of axes of `AB`."""
        return self.A.ndim

    @property
    def has_leading_dims(self) -> bool:
        """Whether there are leading axes, that is, a batch of matrices."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """`(A, B)`."""
        return self.A, self.B

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={list(self.shape)}, mdim={self.mdim})"

    @property
    def AB(self) -> Float[Tensor, "*leading ldim rdim"]:
        """The matrix, multiplied out.

        >>> FactoredMatrix(torch.ones(2, 3), torch.ones(3, 2)).AB
        tensor([[3., 3.],
                [3., 3.]])
        """
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*leading mdim mdim"]:
        """The product of the factors in reverse; its nonzero eigenvalues are those of `AB`."""
        self._square("BA")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose of every matrix; leading axes stay."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @overload
    def __matmul__(self, other: FactoredMatrix) -> FactoredMatrix: ...
    @overload
    def __matmul__(self, other: Tensor) -> Any: ...
    def __matmul__(self, other: Any) -> Any:
        """Times a matrix or `FactoredMatrix`: a `FactoredMatrix`; times a vector `[rdim]`: a tensor `[..., ldim]`."""
        if isinstance(other, FactoredMatrix):
            _check_fit(self.B, other.A, self.shape, other.shape)
            return (self @ other.A) @ other.B
        if not isinstance(other, Tensor):
            return NotImplemented
        a_tensor("FactoredMatrix @", other)
        _check_fit(self.B, other, self.shape, other.shape)
        if other.ndim == 1:
            return (self.A @ (self.B @ other)[..., None]).squeeze(-1)
        if self.mdim <= self.rdim:
            return FactoredMatrix(self.A, self.B @ other)
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Tensor) -> Any:
        """A matrix or a vector times this one."""
        if not isinstance(other, Tensor):
            return NotImplemented
        a_tensor("@ FactoredMatrix", other)
        _check_fit(other, self.A, other.shape, self.shape)
        if other.ndim == 1:
            return ((other @ self.A)[..., None, :] @ self.B).squeeze(-2)
        return (self.T @ other.mT).T

    def __mul__(self, scalar: float | Tensor) -> FactoredMatrix:
        """Times a number, or a tensor that holds one number."""
        if isinstance(scalar, Tensor):
            a_tensor("FactoredMatrix *", scalar)
            if scalar.numel() != 1:
                raise ValueError(
                    f"FactoredMatrix: got a tensor of shape {list(scalar.shape)} to multiply with, expected one number "
                    "(@ multiplies with matrices)"
                )
            scalar = scalar.reshape(())
        elif not isinstance(scalar, (int, float)):
            return NotImplemented
        else:
            scalar = float(scalar)
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition, computed from the factors: `(U, S, V)` with `AB == U @ diag(S) @ V.mT`.

        >>> U, S, V = FactoredMatrix(torch.randn(50, 3), torch.randn(3, 40)).svd()
        >>> U.shape, S.shape, V.shape
        (torch.Size([50, 3]), torch.Size([3]), torch.Size([40, 3]))

        `k = min(ldim, mdim, rdim)` singular values, largest first; `U` is `[..., ldim, k]` and `V` is `[..., rdim, k]`,
        with orthonormal columns. `V` is as in TransformerLens; `torch.linalg.svd` returns `V.mT` (`Vh` here).
        """
        left, inner, right = self._reduced()
        U, S, Vh = torch.linalg.svd(inner, full_matrices=False)
        return left @ U, S, right @ Vh.mT

    @property
    def U(self) -> Float[Tensor, "*leading ldim k"]:
        """The left singular vectors, as columns. For several of U, S and V, call `svd()` once."""
        return self.svd()[0]

    @property
    def S(self) -> Float[Tensor, "*leading k"]:
        """The singular values, largest first."""
        return torch.linalg.svdvals(self._reduced()[1])  # type: ignore[no-any-return]

    @property
    def Vh(self) -> Float[Tensor, "*leading k rdim"]:
        """The right singular vectors, as rows: `V.mT`."""
        return self.V.mT

    @property
    def V(self) -> Float[Tensor, "*leading rdim k"]:
        """The right singular vectors, as columns: the third item of `svd()`."""
        return self.svd()[2]

    @property
    def eigenvalues(self) -> Inexact[Tensor, "*leading k"]:
        """The complex eigenvalues of a square `AB` that may be nonzero, in no order. Raises `ValueError` if not square.

        >>> FactoredMatrix(torch.ones(4, 1), torch.ones(1, 4)).eigenvalues
        tensor([4.+0.j])

        These are the `k = min(ldim, mdim)` eigenvalues of `BA`; the other `ldim - k` are zero.
        """
        self._square("eigenvalues")
        smaller = self.BA if self.mdim <= self.ldim else self.AB
        return torch.linalg.eigvals(wide(smaller))  # type: ignore[no-any-return]

    def norm(self) -> Float[Tensor, "*leading"]:
        """The Frobenius norm of each matrix: the square root of the sum of its squared entries.

        >>> FactoredMatrix(3 * torch.eye(4)[:, :1], 2 * torch.eye(4)[:1]).norm()
        tensor(6.)
        """
        return torch.linalg.matrix_norm(self._reduced()[1])  # type: ignore[no-any-return]

    def collapse_l(self) -> Float[Tensor, "*leading k rdim"]:
        """`diag(S) @ Vh`: the matrix without its left rotation, which keeps the norm of every `matrix @ x`."""
        _, S, V = self.svd()
        return S[..., :, None] * V.mT

    def collapse_r(self) -> Float[Tensor, "*leading ldim k"]:
        """`U @ diag(S)`: the matrix without its right rotation, which keeps the norm of every `x @ matrix`."""
        U, S, _ = self.svd()
        return U * S[..., None, :]

    def make_even(self) -> FactoredMatrix:
        """The same matrix with its singular values split evenly between the factors: `(U sqrt(S)) @ (sqrt(S) Vh)`.

        >>> even = FactoredMatrix(100 * torch.ones(3, 2), torch.ones(2, 3)).make_even()
        >>> torch.allclose(even.A.norm(), even.B.norm())
        True
        """
        U, S, V = self.svd()
        root = S.sqrt()
        return FactoredMatrix(U * root[..., None, :], root[..., :, None] * V.mT)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> FactoredMatrix:
        """Index as `AB` would be, keeping the factors: leading axes first, then rows, then columns.

        >>> matrix = FactoredMatrix(torch.ones(2, 3, 4, 1), torch.ones(2, 3, 1, 5))
        >>> matrix[0].shape, matrix[np.eye(2, 3) > 0, :, 1].shape
        (torch.Size([3, 4, 5]), torch.Size([2, 4, 1]))

        An integer drops a leading axis but keeps a matrix axis with length one, since the result is still factored.
        Lists, arrays and tensors for rows and columns choose independently; a mask covers as many axes as it has.
        Raises `IndexError` out of range.
        """
        leading, rows, columns = self._parts_of(index if isinstance(index, tuple) else (index,))
        A = self.A[(*leading, ...)][..., rows, :]
        B = self.B[(*leading, ...)][..., :, columns]
        return FactoredMatrix(A, B)

    def unsqueeze(self, dim: int) -> FactoredMatrix:
        """Insert a leading axis of length one. Raises `IndexError` for a place after the rows or columns.

        >>> FactoredMatrix(torch.ones(7, 3, 2), torch.ones(7, 2, 3)).unsqueeze(0).shape
        torch.Size([1, 7, 3, 3])
        """
        dim = whole("unsqueeze: dim", dim)
        place = dim + self.ndim + 1 if dim < 0 else dim
        if not 0 <= place <= self.ndim - 2:
            raise IndexError(f"unsqueeze: got dim {dim}, expected a leading axis: 0 to {self.ndim - 2}")
        return FactoredMatrix(self.A.unsqueeze(place), self.B.unsqueeze(place))

    def get_corner(self, k: int = 3) -> Float[Tensor, "*leading rows columns"]:
        """The first `k` rows and columns (and entries of leading axes), multiplied out, to look at."""
        k = whole("get_corner: k", k, 0)
        leading = (slice(k),) * (self.ndim - 2)
        return self.A[leading][..., :k, :] @ self.B[leading][..., :, :k]

    def _reduced(self) -> tuple[Tensor, Tensor, Tensor]:
        """`AB == left @ inner @ right.mT`, where left and right have orthonormal columns and inner is small."""
        left, left_inner = torch.linalg.qr(wide(self.A))
        right, right_inner = torch.linalg.qr(wide(self.B).mT)
        return left, left_inner @ right_inner.mT, right

    def _parts_of(self, index: tuple[Index, ...]) -> tuple[list[Entry], AxisIndex, AxisIndex]:
        """Split an index into its entries for the leading axes, the rows and the columns."""
        entries: list[Entry] = [
            entry if entry is None or entry is Ellipsis else axis_index("FactoredMatrix", entry, EXPECTED)
            for entry in index
        ]
        if sum(entry is Ellipsis for entry in entries) > 1:
            raise IndexError("FactoredMatrix: an index can have one ellipsis ('...')")
        used = sum(map(_axes_of, entries))
        if used > self.ndim:
            raise IndexError(f"FactoredMatrix: {used} indices for shape {list(self.shape)}")
        at = next((place for place, entry in enumerate(entries) if entry is Ellipsis), len(entries))
        full = [*entries[:at], *[slice(None)] * (self.ndim - used), *entries[at + 1 :]]
        axis = 0
        for entry in full:
            if entry is not None and entry is not Ellipsis:
                check_within(f"FactoredMatrix, axis {axis}", entry, self.shape[axis : axis + _axes_of(entry)])
            axis += _axes_of(entry)
        _check_together(full[:-2])
        rows, columns = map(_kept, full[-2:])
        return full[:-2], rows, columns

    def _square(self, what: str) -> None:
        if self.ldim != self.rdim:
            raise ValueError(f"{what}: got a matrix of shape {list(self.shape)}, expected as many rows as columns")


def composition_scores(left: FactoredMatrix, right: FactoredMatrix) -> Float[Tensor, "*left_leading *right_leading"]:
    """How much of `left`'s output lies in what `right` reads: `|left @ right| / (|left| |right|)`.

    >>> one = FactoredMatrix(torch.eye(4)[:, :2], torch.eye(4)[:2])
    >>> composition_scores(one, one)
    tensor(0.7071)

    Norms are Frobenius norms, for every pair of matrices from the two batches, which act on rows (`x @ W`). A zero
    matrix scores zero. Formula: Elhage et al. 2021.
    """
    for name, matrix in (("left", left), ("right", right)):
        if not isinstance(matrix, FactoredMatrix):
            raise TypeError(f"composition_scores: {name} is {in_words(matrix)}, expected a FactoredMatrix")
    if left.rdim != right.ldim:
        raise ValueError(f"composition_scores: got {left} and {right}, expected as many columns as the second has rows")
    both = torch.einsum("aim,bmj->abij", _batched(left.collapse_l()), _batched(right.collapse_r()))
    norms = left.norm().reshape(-1, 1) * right.norm().reshape(1, -1)
    scores: Tensor = (torch.linalg.matrix_norm(both) / norms).masked_fill(norms == 0, 0)
    return scores.reshape((*left.shape[:-2], *right.shape[:-2]))


def _broadcast(*shapes: Sequence[int]) -> torch.Size | None:
    """The common broadcast shape, or `None` if there is none."""
    try:
        return torch.broadcast_shapes(*shapes)  # type: ignore[no-any-return]
    except RuntimeError:
        return None


def _check_fit(left: Tensor, right: Tensor, left_shape: torch.Size, right_shape: torch.Size) -> None:
    """Raise `ValueError` unless `left @ right` is possible; the error shows the given shapes."""
    columns = left.shape[-1] if left.ndim else 0
    rows = 0 if not right.ndim else right.shape[-2] if right.ndim > 1 else right.shape[0]
    if columns != rows:
        raise ValueError(f"FactoredMatrix: {list(left_shape)} @ {list(right_shape)}: {columns} columns and {rows} rows")
    if _broadcast(left.shape[:-2], right.shape[:-2]) is None:
        raise ValueError(f"FactoredMatrix: {list(left_shape)} @ {list(right_shape)}: the leading axes do not fit")
    if left.dtype != right.dtype or left.device != right.device:
        raise ValueError(
            f"FactoredMatrix: {left.dtype} on {left.device} @ {right.dtype} on {right.device}, expected one dtype and "
            "device"
        )


def _batched(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def wide(x: Tensor) -> Tensor:
    """A tensor in at least float32: half precision rounds too much, and LAPACK does not support it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _axes_of(entry: Entry) -> int:
    if entry is None or entry is Ellipsis:
        return 0
    return entry.ndim if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


def _check_together(leading: Sequence[Entry]) -> None:
    """Raise `IndexError` for lists on several leading axes, which are read in step, if their lengths differ."""
    lists = [entry for entry in leading if isinstance(entry, Tensor)]
    shapes = [[int(entry.sum())] if entry.dtype == torch.bool else list(entry.shape) for entry in lists]
    if _broadcast(*shapes) is None:
        raise IndexError(
            f"FactoredMatrix: got lists of shapes {', '.join(map(str, shapes))} for leading axes, which are read in "
            "step, expected shapes that fit"
        )


def _kept(entry: Entry) -> AxisIndex:
    """An index of rows or columns that keeps the axis."""
    if isinstance(entry, int):
        return slice(entry, entry + 1 or None)
    if not isinstance(entry, slice) and not (isinstance(entry, Tensor) and entry.ndim == 1):
        raise IndexError("FactoredMatrix: rows and columns take a number, a slice, a list or a tensor of one axis")
    return entry
