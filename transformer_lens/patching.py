"""Activation patching under its known import path; `transformer_lens.analysis.patching` has the code."""

from transformer_lens.analysis.patching import *  # noqa: F403
from transformer_lens.analysis.patching import __all__ as __all__
