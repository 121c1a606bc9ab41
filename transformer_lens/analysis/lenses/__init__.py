"""Lenses: decode a layer's residual stream through a learnt map and the unembedding, or by asking the model itself."""

from transformer_lens.analysis.lenses.patchscope import Patchscope, identity_prompt
from transformer_lens.analysis.lenses.tuned_lens import LensScores, TunedLens

__all__ = ["LensScores", "Patchscope", "TunedLens", "identity_prompt"]
