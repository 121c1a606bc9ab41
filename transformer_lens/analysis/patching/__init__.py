"""Activation patching: patch activations from another run into every layer, position and head, in few batches."""

from transformer_lens.analysis.patching import experts, sweeps
from transformer_lens.analysis.patching.engine import run_interventions
from transformer_lens.analysis.patching.experts import *  # noqa: F403
from transformer_lens.analysis.patching.sweeps import *  # noqa: F403

__all__ = ["run_interventions"]
__all__ += experts.__all__
__all__ += sweeps.__all__
