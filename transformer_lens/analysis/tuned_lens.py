"""The tuned lens under its short import path; the code is in `analysis.lenses`."""

from transformer_lens.analysis.lenses import TunedLens as TunedLens
