"""Weights rewritten to be easier to read, with unchanged predictions, and restored."""

from transformer_lens.model_bridge.processing.changes import WeightChanges
from transformer_lens.model_bridge.processing.methods import ProcessingMethods

__all__ = ["ProcessingMethods", "WeightChanges"]
