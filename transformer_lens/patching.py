"""Activation patching under its known import path; see `transformer_lens.analysis.patching`."""

from transformer_lens.analysis.patching import *  # noqa: F403
from transformer_lens.analysis.patching import __all__ as __all__
