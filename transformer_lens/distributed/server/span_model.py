"""The model of a server: a family's own base model that holds the blocks of one span and nothing else of weight."""

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
    """A base model in which other blocks than those of a span are elsewhere; these keep their numbers."""

    place: ClassVar[str]
    """What the base model calls its blocks."""
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
    """A base model that has the blocks of a span, the whole model's config, and what was read for them.

    >>> model, config, part = load_span("tiny-falcon", range(1, 3))
    >>> [len(list(block.parameters())) for block in model.h], len(part.tensors)
    ([0, 8, 8, 0], 16)

    `options` are settings of the config, and say where files come from. Weights keep the checkpoint's dtype unless
    `dtype` is given; `device` is where they run. Raises `ValueError` for blocks the model has not, or tensors the
    checkpoint has not.
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
    # What is around the blocks never runs: an embedding of one row, a final norm.
    tensors = {end: torch.zeros(p.shape) for end, p in whole.items() if not end.startswith(f"{place}.")}
    for tensor, weight in part.tensors.items():  # a checkpoint of the model with its head has a prefix
        tensors[re.sub(rf"^.*?\b(?={re.escape(place)}\.\d)", "", tensor)] = weight
    how = {"dtype": dtype, "attn_implementation": attn_implementation}
    model = filled(kind.from_pretrained, here, tensors, f"{name}: its blocks {blocks}", **how)
    return model.to(device).eval().requires_grad_(False), config, part
