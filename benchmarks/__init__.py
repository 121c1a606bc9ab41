"""Benchmarks: the budgets of the design, the same work in other packages, and both on a GPU."""
