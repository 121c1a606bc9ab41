"""`GenerationStep`: which part of the text one forward pass of a generation reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class GenerationStep:
    """Which part of the text one forward pass of `bridge.generate` reads; hooks find it at `hook.generation`.

    >>> seen = []
    >>> def look(z, hook):
    ...     seen.append((hook.generation.is_prompt, hook.generation.positions.tolist()))
    >>> _ = bridge.generate("Mary and", max_new_tokens=2, fwd_hooks=[("blocks.0.attn.hook_z", look)])
    >>> seen
    [(True, [[0, 1, 2, 3]]), (False, [[4]])]

    No forward pass has read the newest token yet, so two new tokens take two: one reads the prompt, one the first new
    token.
    """

    step: int
    """The index of this forward pass in the generation."""
    columns: range
    """The columns it reads of the returned sequences, padding included."""
    prompt_mask: Int[Tensor, "batch prompt"]
    """1 for a token, 0 for padding."""
    rows: int
    """The batch size of this forward pass: a multiple of the prompts with beams or several sequences per prompt."""

    @property
    def is_prompt(self) -> bool:
        """Whether it reads the prompt, or a chunk of it (without a KV cache, every forward pass does)."""
        return self.columns.start < self.prompt_mask.shape[1]

    @property
    def new_tokens(self) -> int:
        """How many generated tokens have been read after this forward pass: 0 in the prompt, then 1, 2, ..."""
        return max(0, self.columns.stop - self.prompt_mask.shape[1])

    @cached_property
    def positions(self) -> Int[Tensor, "rows pos"]:
        """The position of each token it reads in its own text; padding is -1."""
        mask = self.prompt_mask.long().repeat_interleave(self.rows // len(self.prompt_mask), dim=0)
        counted = mask.cumsum(-1)
        prompt = (counted - 1).masked_fill(mask == 0, -1)
        generated = counted[:, -1:] + torch.arange(self.new_tokens, device=mask.device)
        return torch.cat([prompt, generated], dim=1)[:, self.columns.start : self.columns.stop]
