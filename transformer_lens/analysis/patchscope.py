"""Patchscopes under their TransformerLens-style import path; the code is in `analysis.lenses`."""

from transformer_lens.analysis.lenses import Patchscope as Patchscope
from transformer_lens.analysis.lenses import identity_prompt as identity_prompt
