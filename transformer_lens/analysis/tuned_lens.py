"""The tuned lens under its known import path; `analysis.lenses` has the code."""

from transformer_lens.analysis.lenses import TunedLens as TunedLens
