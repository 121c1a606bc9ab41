"""`ExpertView`: one expert's activations, for only the tokens that were routed to it.

The cache holds them by choice, `[batch pos chosen ...]`; here a row is one token at this expert.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Pair, need_experts, one_expert
from transformer_lens.checks import a_tensor, a_text, in_words

HOOKS = {
    "hook_weight": "hook_expert_weights",
    "hook_pre": "hook_pre",
    "hook_pre_linear": "hook_pre_linear",
    "hook_post": "hook_post",
    "hook_out": "hook_expert_out",
}
"""The names under `blocks.{i}.mlp.experts.{e}`, with the hooks under `blocks.{i}.mlp` they take rows of."""
_NAME = re.compile(rf"blocks\.(-?\d+)\.mlp\.experts\.(\d+)\.({'|'.join(HOOKS)})(_grad)?")


def _rows(hook: str, meaning: str) -> Any:
    """A property that gives an expert's rows of a hook."""
    return property(lambda view: view.rows(hook), doc=meaning)


@dataclass(frozen=True, eq=False, repr=False)
class ExpertView:
    """The rows of one expert in one layer, in reading order; `KeyError` for activations the cache lacks."""

    cache: ActivationCache
    layer: int
    expert: int
    batch: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    place: Int[Tensor, " row"]
    """0 if the expert was the first choice."""

    def __len__(self) -> int:
        return len(self.batch)

    def __repr__(self) -> str:
        return f"ExpertView of {len(self)} tokens at expert {self.expert} of layer {self.layer}"

    def rows(self, hook: str) -> Float[Tensor, "row ..."]:
        """This expert's rows of a hook under `blocks.{i}.mlp` with the axes `batch pos chosen`.

        >>> _, cache = bridge.run_with_cache("When Mary and John")
        >>> expert_view(cache, layer=0, expert=2).rows("hook_pre").shape
        torch.Size([2, 64])
        """
        return _batched(self.cache, self.layer, hook)[self.batch, self.position, self.place]

    weight = _rows("hook_expert_weights", "How much the expert counts for the token.")
    pre = _rows("hook_pre", "The gate before its activation, [row d_mlp].")
    pre_linear = _rows("hook_pre_linear", "The ungated hidden layer, [row d_mlp].")
    post = _rows("hook_post", "The neurons, activated gate times linear: [row d_mlp].")
    out = _rows("hook_expert_out", "The output before its weight, [row d_model].")


@checked
def expert_view(
    cache: ActivationCache, layer: int | Pair, expert: int | None = None, mask: Bool[Tensor, "batch pos"] | None = None
) -> ExpertView:
    """The tokens of a run that were routed to an expert: a layer and a number, or `"L0E2"`. The cache has to hold that
    layer's `mlp.hook_expert_indices` and any hook then read. `mask` excludes tokens such as padding, which a cache does
    not record. Positions are those the cache kept.

    >>> _, cache = bridge.run_with_cache("When Mary and John")
    >>> view = expert_view(cache, layer=0, expert=2)
    >>> view, view.position.tolist(), view.post.shape
    (ExpertView of 2 tokens at expert 2 of layer 0, [0, 2], torch.Size([2, 64]))

    Raises `ValueError` for a dense model, and for a layer or an expert that is not there.
    """
    if not isinstance(cache, ActivationCache):
        raise TypeError(f"cache: got {in_words(cache)}, expected an ActivationCache")
    cfg = cast(TransformerBridge, cache.model).cfg
    layer, expert = one_expert((cfg.n_layers, need_experts(cfg, "expert_view")), layer, expert)
    chosen = _batched(cache, layer, "hook_expert_indices") == expert
    if mask is not None:
        if a_tensor("mask", mask).shape != chosen.shape[:2]:
            raise ValueError(f"mask: got shape {list(mask.shape)}, expected {list(chosen.shape[:2])}")
        chosen = chosen & mask.to(chosen.device).bool()[..., None]
    return ExpertView(cache, layer, expert, *chosen.nonzero(as_tuple=True))


@checked
def expert_activation(cache: ActivationCache, name: str) -> Tensor:
    """One expert's rows under `blocks.{i}.mlp.experts.{e}.`: `hook_weight`, `hook_pre`, `hook_pre_linear`, `hook_post`
    or `hook_out`, or their gradient with `_grad` appended. Raises `KeyError` for anything else.

    >>> _, cache = bridge.run_with_cache("When Mary and John")
    >>> expert_activation(cache, "blocks.0.mlp.experts.2.hook_post").shape
    torch.Size([2, 64])
    """
    parts = _NAME.fullmatch(a_text("name", name))
    if parts is None:
        expected = f"blocks.{{i}}.mlp.experts.{{e}}. and one of {', '.join(HOOKS)}"
        raise KeyError(f"no expert activation is named {name!r}; expected {expected}")
    layer, expert, hook, gradient = parts.groups(default="")
    return expert_view(cache, int(layer), int(expert)).rows(HOOKS[hook] + gradient)


def _batched(cache: ActivationCache, layer: int, hook: str) -> Tensor:
    tensor = cache[f"blocks.{layer}.mlp.{hook}"]
    return tensor if cache.has_batch_dim else tensor[None]
