"""`transformer_lens.utilities` under its older name."""

from transformer_lens.utilities import *  # noqa: F403
from transformer_lens.utilities import __all__ as __all__
