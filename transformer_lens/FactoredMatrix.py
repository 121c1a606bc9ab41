"""`FactoredMatrix` under its known import path."""

from transformer_lens.factored_matrix import FactoredMatrix

__all__ = ["FactoredMatrix"]
