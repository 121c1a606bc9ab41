"""Patchscopes under their known import path; `analysis.lenses` has the code."""

from transformer_lens.analysis.lenses import Patchscope as Patchscope
from transformer_lens.analysis.lenses import identity_prompt as identity_prompt
