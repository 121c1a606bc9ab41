"""Activations of whole data sets, to disk and back: `collect`, and the `ActivationStore` that reads them."""

from transformer_lens.collect.batches import ActivationBatches
from transformer_lens.collect.run import collect
from transformer_lens.collect.statistics import RunningStatistics
from transformer_lens.collect.store import ActivationStore

__all__ = ["ActivationBatches", "ActivationStore", "RunningStatistics", "collect"]
