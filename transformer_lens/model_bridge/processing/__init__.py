"""Weights rewritten so that they are easier to read, and put back: the model computes the same distribution."""

from transformer_lens.model_bridge.processing.changes import WeightChanges
from transformer_lens.model_bridge.processing.methods import ProcessingMethods

__all__ = ["ProcessingMethods", "WeightChanges"]
