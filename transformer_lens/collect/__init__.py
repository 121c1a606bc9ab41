"""Activations of a data set: on disk by `collect`, read by `ActivationStore`; or as they come by `ActivationStream`."""

from transformer_lens.collect.run import collect
from transformer_lens.collect.store import ActivationBatches, ActivationStore, RunningStatistics
from transformer_lens.collect.stream import ActivationStream

__all__ = ["ActivationBatches", "ActivationStore", "ActivationStream", "RunningStatistics", "collect"]
