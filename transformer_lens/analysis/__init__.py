"""Experiments on a bridge's activations, built on the public API alone."""
