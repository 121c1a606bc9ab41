"""Analyses under the import paths of TransformerLens 4."""
