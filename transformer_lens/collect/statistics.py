"""Mean, variance and norms of activations, computed batch by batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from transformer_lens.checks import in_words, is_tensor


class RunningStatistics:
    """Statistics of vectors that arrive in batches, in float64.

    >>> from transformer_lens.collect import RunningStatistics
    >>> running = RunningStatistics()
    >>> running.update(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> running.mean.tolist(), running.variance.tolist(), running.norm_mean.item()
    ([1.5, 2.0], [2.25, 4.0], 2.5)

    The variance divides by the number of tokens; batches are merged with the formula of Chan, Golub and LeVeque (1979),
    which does not cancel. Norms are Euclidean, over the last axis.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None
        self._norms: Tensor | None = None

    def update(self, values: Shaped[Tensor, "token ..."]) -> None:
        """Add a batch. Raises `ValueError` if its shape differs from earlier ones."""
        if not is_tensor(values) or values.ndim < 1:
            raise TypeError(f"statistics: got {in_words(values)}, expected a tensor [token, ...]")
        if not len(values):
            return
        exact = values.detach().to(torch.float64)
        if self._mean is not None and exact.shape[1:] != self._mean.shape:
            raise ValueError(f"statistics: got {list(exact.shape[1:])} for a token, before {list(self._mean.shape)}")
        count, mean = len(exact), exact.mean(0)
        squares, norms = (exact - mean).square().sum(0), exact.norm(dim=-1).sum(0)
        if self._mean is None or self._squares is None or self._norms is None:
            self.count, self._mean, self._squares, self._norms = count, mean, squares, norms
            return
        shift, total = mean - self._mean, self.count + count
        self._squares += squares + shift.square() * (self.count * count / total)
        self._mean += shift * (count / total)
        self._norms += norms
        self.count = total

    @property
    def mean(self) -> Float[Tensor, " *shape"]:
        """The mean over tokens."""
        return self._seen(self._mean)

    @property
    def variance(self) -> Float[Tensor, " *shape"]:
        """The mean squared distance from the mean, per coordinate."""
        return self._seen(self._squares) / self.count

    @property
    def norm_mean(self) -> Float[Tensor, " *shape"]:
        """The mean length of the vectors along the last axis."""
        return self._seen(self._norms) / self.count

    def _seen(self, value: Tensor | None) -> Tensor:
        if value is None:
            raise ValueError("statistics: no values were seen yet")
        return value

    def __repr__(self) -> str:
        return f"RunningStatistics of {self.count} tokens"
