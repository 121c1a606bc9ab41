"""Lenses: a layer's stream in words, through a learnt map and the model's own head, or as the model explains it."""

from transformer_lens.analysis.lenses.patchscope import Patchscope, identity_prompt
from transformer_lens.analysis.lenses.tuned_lens import LensScores, TunedLens

__all__ = ["LensScores", "Patchscope", "TunedLens", "identity_prompt"]
