"""Activation patching for mixtures of experts: expert outputs and routing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import transformer_lens.analysis.patching.sweeps as sweeps
from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.patching.engine import Metric, SweepInput, run_interventions
from transformer_lens.analysis.patching.sweeps import Cache
from transformer_lens.asking import need_whole_mlps
from transformer_lens.checks import whole

PARTS = ("expert_out", "expert_weights", "expert_indices")

get_act_patch_router_logits = sweeps.PatchSweep("router_logits", sweeps.layer_pos_patch_setter)
get_act_patch_router_logits_by_expert = sweeps.PatchSweep("router_logits", sweeps.layer_expert_patch_setter)


@checked
def expert_contributions(cache: Cache, layer: int, n_experts: int) -> Float[Tensor, "batch pos expert d_model"]:
    """What each chosen expert of a layer adds: its weighted output, zero if not chosen. They sum to `hook_mlp_out`
    where no shared expert, norm or multiplier follows.

    >>> _, cache = bridge.run_with_cache("Mary and John")
    >>> parts = expert_contributions(cache, layer=0, n_experts=4)
    >>> torch.allclose(parts.sum(2), cache["mlp_out", 0], atol=1e-5)
    True
    """
    names = [f"blocks.{whole('layer', layer, 0)}.mlp.hook_{part}" for part in PARTS]
    for name in names:
        if name not in cache:
            raise KeyError(f"cache: it holds no {name!r}; cache that activation as well")
    out, weights, indices = (cache[name] for name in names)
    n_experts = whole("n_experts", n_experts, 1 + int(indices.max()))
    weighted = (out * weights[..., None]).to(out.dtype)
    empty = out.new_zeros(*out.shape[:2], n_experts, out.shape[-1])
    return empty.scatter_add(2, indices[..., None].expand_as(weighted), weighted)


@dataclass(frozen=True)
class ExpertSweep:
    """Patch each expert's clean contribution into the corrupted run, at every position or (`by_pos`) one at a time.

    >>> _, clean_cache = bridge.run_with_cache("Mary and John")
    >>> metric = lambda logits: logits[0, -1].max()
    >>> get_act_patch_expert_out_by_pos(bridge, "Mary and Mary", clean_cache, metric, verbose=False).shape
    torch.Size([3, 5, 4])

    A contribution is zero where an expert is not chosen, so a patch removes an expert that only the corrupted run chose
    and inserts one that only the clean run chose. Other experts and the routing stay corrupted. The clean cache has to
    hold `mlp.hook_expert_out`, `hook_expert_weights` and `hook_expert_indices`, as a default cache does. Keywords as in
    `run_interventions`. Raises `ValueError` for a dense model.
    """

    by_pos: bool

    @checked
    def __call__(
        self,
        model: TransformerBridge,
        corrupted_tokens: SweepInput,
        clean_cache: Cache,
        metric: Metric,
        *,
        attention_mask: Tensor | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> Float[Tensor, "layer *pos expert"]:
        n_experts = need_whole_mlps(model, "patching an expert")
        input, _, mask = model.input_and_mask(corrupted_tokens, attention_mask=attention_mask)
        layers = range(model.cfg.n_layers)
        names = [f"blocks.{layer}.mlp.hook_{part}" for layer in layers for part in PARTS]
        with torch.no_grad():
            _, corrupted = model.run_with_cache(input, names_filter=names, attention_mask=mask)
        positions = [slice(p, p + 1) for p in range(input.shape[1])] if self.by_pos else [slice(None)]
        interventions = []
        for layer in layers:
            clean, dirty = (expert_contributions(cache, layer, n_experts) for cache in (clean_cache, corrupted))
            if clean.shape[1:] != dirty.shape[1:] or len(clean) not in (1, len(dirty)):
                got = f"experts' outputs of {list(clean.shape[:2])} rows and positions"
                expected = f"{list(dirty.shape[:2])} as in the corrupted run (or a batch of one)"
                raise ValueError(f"clean_cache: got {got}, expected {expected}")
            add = partial(_add, clean - dirty)
            places = product(positions, range(n_experts))
            interventions += [(f"blocks.{layer}.hook_mlp_out", partial(add, *place)) for place in places]
        found = run_interventions(model, input, interventions, metric, attention_mask=mask, verbose=verbose, **options)
        return found.reshape(len(layers), *([len(positions)] if self.by_pos else []), n_experts)


def _add(change: Float[Tensor, "batch pos expert d_model"], at: slice, expert: int, mlp_out: Tensor, hook: Any) -> None:
    mlp_out[:, at] += change[:, at, expert]


get_act_patch_expert_out = ExpertSweep(by_pos=False)
get_act_patch_expert_out_by_pos = ExpertSweep(by_pos=True)
