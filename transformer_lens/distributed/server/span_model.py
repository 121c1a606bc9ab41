"""A server's model: a family's own base model with the blocks of one span and almost no other weights."""

from __future__ import annotations

import copy
import re
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from transformer_lens.distributed.protocol.checkpoint import PartOfCheckpoint, block_of, filled, read_part
from transformer_lens.distributed.protocol.configs import AutoDistributedConfig, config_with, one_dtype
from transformer_lens.model_bridge import BlockElsewhere


class SpanOf:
    """A base model whose blocks outside a span are elsewhere; blocks keep their numbers."""

    place: ClassVar[str]  # the base model's attribute for its blocks
    here: ClassVar[range]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the family's own, which allocates nothing yet
        blocks: nn.ModuleList = self.get_submodule(self.place)  # type: ignore[attr-defined]
        for layer in set(range(len(blocks))) - set(self.here):
            blocks[layer] = BlockElsewhere()


def load_span(
    name: str,
    blocks: range,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[PreTrainedModel, Any, PartOfCheckpoint]:
    """Load a base model with a span's blocks; returns it, the whole model's config, and what was read.

    >>> model, config, part = load_span("tiny-falcon", range(1, 3))
    >>> [len(list(block.parameters())) for block in model.h], len(part.tensors)
    ([0, 8, 8, 0], 16)

    `options` are config settings and say where files come from. Weights keep the checkpoint's dtype unless `dtype` is
    given. Raises `ValueError` for blocks the model lacks, or tensors the checkpoint lacks.
    """
    dtype, options = one_dtype(dtype, options)
    config = config_with(AutoDistributedConfig, name, options)
    layers = config.num_hidden_layers
    if not isinstance(blocks, range):
        raise TypeError(f"blocks: got {type(blocks).__name__}, expected a range such as range(0, 16)")
    if not len(blocks) or blocks.step != 1 or blocks.start < 0 or blocks.stop > layers:
        raise ValueError(f"blocks: got {blocks}, expected some of range(0, {layers}), one after the other")
    part = read_part(name, lambda tensor: block_of(tensor, config.block_prefix) in blocks, **options)
    place, base, here = config.block_prefix.rpartition(".")[2], config.base_class, copy.deepcopy(config)
    here.vocab_size, here.pad_token_id = 1, None
    kind: Any = type(base.__name__, (SpanOf, base), {"place": place, "here": blocks, "__module__": base.__module__})
    with torch.device("meta"):
        whole = dict(kind(here).named_parameters())
    # The parts around the blocks never run: a one-row embedding, a final norm.
    tensors = {end: torch.zeros(p.shape) for end, p in whole.items() if not end.startswith(f"{place}.")}
    for tensor, weight in part.tensors.items():  # a checkpoint of the model with its head has a prefix
        tensors[re.sub(rf"^.*?\b(?={re.escape(place)}\.\d)", "", tensor)] = weight
    how = {"dtype": dtype, "attn_implementation": attn_implementation}
    model = filled(kind.from_pretrained, here, tensors, f"{name}: its blocks {blocks}", **how)
    return model.to(device).eval().requires_grad_(False), config, part
