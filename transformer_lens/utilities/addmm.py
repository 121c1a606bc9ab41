"""Products under TransformerLens's import path."""

from transformer_lens.utilities import batch_addmm as batch_addmm
from transformer_lens.utilities import vanilla_addmm as vanilla_addmm
