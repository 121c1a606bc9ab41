"""Write the activations of a whole data set to disk with `collect`, and read them with `ActivationStore`."""

from transformer_lens.collect.run import collect
from transformer_lens.collect.store import ActivationBatches, ActivationStore, RunningStatistics

__all__ = ["ActivationBatches", "ActivationStore", "RunningStatistics", "collect"]
