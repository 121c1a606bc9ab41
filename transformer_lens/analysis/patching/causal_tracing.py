"""Causal tracing: corrupt a subject's token embeddings with noise, then patch clean activations back in.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.checks import in_words, whole_numbers


@checked
@torch.no_grad()
def noised_embeddings(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "1 pos"] | str,
    positions: Sequence[int],
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
) -> Float[Tensor, "sample pos d_model"]:
    """The embeddings of one prompt, with Gaussian noise at some positions, several times over: the corrupted input of a
    causal trace. Give it to a sweep as `corrupted_tokens`; the metric then takes the mean over the batch, which is the
    mean over the noise.

    >>> tokens = bridge.to_tokens("When Mary and John went to the store")
    >>> noised = noised_embeddings(bridge, tokens, positions=[1, 2], samples=3)
    >>> clean = bridge.run_with_cache(tokens)[1]["hook_embed"]
    >>> noised.shape, (noised != clean).any(-1)[0].nonzero().flatten().tolist()
    (torch.Size([3, 9, 128]), [1, 2])

    `noise` is in standard deviations of the model's token embeddings (Meng et al. take three). Raises `ValueError` for
    a batch of several prompts and for positions that are not there.
    """
    ids, _, _ = bridge.input_and_mask(tokens)
    if ids.is_floating_point():
        raise TypeError(f"tokens: got {in_words(tokens)}, expected one prompt's text or token ids")
    pos = ids.shape[1]
    if len(ids) != 1 or samples < 1:
        raise ValueError(
            f"noised_embeddings: got {len(ids)} prompts and {samples} samples, expected 1 prompt, 1 sample up"
        )
    positions = whole_numbers("positions", positions, -pos, pos - 1, f" in a prompt of {pos} tokens")
    if not positions:
        raise ValueError(f"positions: got none, expected {-pos} to {pos - 1}, one or more")
    _, cache = bridge.run_with_cache(ids, names_filter="hook_embed", stop_at_layer=0)
    embedding = cache["hook_embed"]
    model: Any = bridge.original_model
    spread = noise * float(model.get_input_embeddings().weight.float().std())
    drawn = torch.randn(samples, len(positions), embedding.shape[-1], generator=torch.Generator().manual_seed(seed))
    noised: Tensor = embedding.repeat(samples, 1, 1)
    noised[:, positions] += (drawn * spread).to(noised)
    return noised
