"""Imported once in the process that servers are copies of: what is slow the first time, such as loading a model."""

from transformer_lens.distributed.server.server import load_span

for name in ("tiny-falcon", "tiny-mixtral"):
    load_span(name, range(0, 1))
