"""`GenerationStep`: which part of a text one forward of a generation reads, so that hooks can tell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class GenerationStep:
    """Where one forward of `bridge.generate` stands; hooks find it at `hook.generation`.

    >>> seen = []
    >>> def look(z, hook):
    ...     seen.append((hook.generation.is_prompt, hook.generation.positions.tolist()))
    >>> _ = bridge.generate("Mary and", max_new_tokens=2, fwd_hooks=[("blocks.0.attn.hook_z", look)])
    >>> seen
    [(True, [[0, 1, 2, 3]]), (False, [[4]])]

    The newest token has not been read by any forward yet, so two new tokens are two forwards: one reads
    the prompt, one the first new token.
    """

    step: int
    """The number of this forward in the generation, from 0."""
    columns: range
    """The columns it reads of the sequences that `generate` returns tokens for, padding counted."""
    prompt_mask: Int[Tensor, "batch prompt"]
    """1 where the prompt has a token, 0 where it is padded."""
    rows: int
    """The batch of this forward: a multiple of the prompts with beams or several sequences of each."""

    @property
    def is_prompt(self) -> bool:
        """Whether it reads the prompt, or a chunk of it (without a KV cache every forward does)."""
        return self.columns.start < self.prompt_mask.shape[1]

    @property
    def new_tokens(self) -> int:
        """How many generated tokens have been read when this forward is done: 0 in the prompt, then 1, 2, ..."""
        return max(0, self.columns.stop - self.prompt_mask.shape[1])

    @cached_property
    def positions(self) -> Int[Tensor, "rows pos"]:
        """The place of each token it reads in its own text: 0 is the first that is no padding, and padding is -1."""
        mask = self.prompt_mask.long().repeat_interleave(self.rows // len(self.prompt_mask), dim=0)
        counted = mask.cumsum(-1)
        prompt = (counted - 1).masked_fill(mask == 0, -1)
        generated = counted[:, -1:] + torch.arange(self.new_tokens, device=mask.device)
        return torch.cat([prompt, generated], dim=1)[:, self.columns.start : self.columns.stop]
