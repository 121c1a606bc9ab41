"""Head detection under its known import path; see `transformer_lens.analysis.head_detection`."""

from transformer_lens.analysis.head_detection import *  # noqa: F403
from transformer_lens.analysis.head_detection import __all__ as __all__
