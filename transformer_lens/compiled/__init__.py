"""Declared reads and edits inside one compiled graph of an unchanged model: `bridge.compile`."""

from transformer_lens.compiled.declared import GraphEdit, Read
from transformer_lens.compiled.runner import CompiledRunner

__all__ = ["CompiledRunner", "GraphEdit", "Read"]
