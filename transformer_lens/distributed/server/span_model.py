"""The model of a server: a family's own base model that holds the blocks of one span and nothing else of weight."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from transformer_lens.distributed.protocol.checkpoint import PartOfCheckpoint, block_of, filled, read_part
from transformer_lens.distributed.protocol.configs import AutoDistributedConfig, config_with, one_dtype
from transformer_lens.model_bridge import adapter_for


def span_config(config: Any, blocks: range) -> Any:
    """The config of a model that has these blocks alone, as its own first ones.

    Raises `ValueError` where a block would not be the same there: what it is depends on its number in the model.
    """
    here = copy.deepcopy(config)
    here.num_hidden_layers = len(blocks)
    here.vocab_size, here.pad_token_id = 1, None
    if "layer_types" in vars(here):
        here.layer_types = here.layer_types[blocks.start : blocks.stop]
    if "mlp_only_layers" in vars(here):
        here.mlp_only_layers = [layer - blocks.start for layer in here.mlp_only_layers if layer in blocks]
    whole, part = adapter_for(config), adapter_for(here)
    for layer in blocks:
        there = layer - blocks.start
        if (whole.block(layer), whole.window(layer)) != (part.block(there), part.window(there)):
            raise ValueError(
                f"blocks: those of this {config.model_type} depend on their number in the model; layer {layer} would "
                f"be another one in {blocks}"
            )
    return here


def load_span(
    name: str,
    blocks: range,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[PreTrainedModel, Any, PartOfCheckpoint]:
    """The blocks of a span in a model of their own, the whole model's config, and what was read for them.

    >>> model, config, part = load_span("tiny-falcon", range(1, 3))
    >>> len(model.h), config.num_hidden_layers, len(part.tensors)
    (2, 4, 16)

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
    place, weights = config.block_prefix.rpartition(".")[2], {}
    for tensor, weight in part.tensors.items():  # in a model that has these blocks alone, and no head
        layer = block_of(tensor, config.block_prefix)
        assert layer is not None
        weights[f"{place}.{layer - blocks.start}.{tensor.partition(f'{place}.{layer}.')[2]}"] = weight
    ends = {end: torch.zeros((1, config.hidden_size)[-n:]) for end, n in config.ends.items()}
    how = {"dtype": dtype, "attn_implementation": attn_implementation}
    here = span_config(config, blocks)
    model = filled(config.base_class.from_pretrained, here, {**weights, **ends}, f"{name}: its blocks {blocks}", **how)
    return model.to(device).eval().requires_grad_(False), config, part
