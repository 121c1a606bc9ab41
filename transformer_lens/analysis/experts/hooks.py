"""Hooks that ablate experts, or steer routing away from them or to them.

Each function returns (name, function) pairs for `run_with_hooks` and `hooks`, which run in the order of the list: put
routing hooks before ablations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge, asking
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Layers, Pairs, Positions, checked_positions, need_experts, position_mask
from transformer_lens.checks import a_list, a_number

Hooks = list[tuple[str, Callable[..., Any]]]


@checked
def ablate_expert(
    bridge: TransformerBridge,
    layer: Layers | Pairs,
    expert: int | Sequence[int] | None = None,
    positions: Positions = None,
    renormalize: bool = False,
) -> Hooks:
    """Zero-ablate the weighted output of one or several experts wherever they were chosen, at all or some positions.
    Routing is unchanged, so the other chosen experts keep their weights, unless `renormalize` rescales those to the
    sum that all had (if the ablated experts had all the weight, nothing is rescaled).

    >>> hooks = ablate_expert(bridge, layer=0, expert=2)
    >>> text = "When Mary and John went to the store"
    >>> bool(bridge.run_with_hooks(text, fwd_hooks=hooks, return_type="loss") > bridge(text, return_type="loss"))
    True
    >>> several = ablate_expert(bridge, ["L0E2", "0.3", (2, 1)])  # a layer and its expert, in three spellings
    >>> everywhere = ablate_expert(bridge, layer=None, expert=[2, 3])  # two experts of every layer

    `layer=None` means all layers, also in a pair `(None, 2)`. Positions as in `bridge.steer`. Raises `ValueError` for a
    dense model, and for a layer, expert or position that does not exist or is named twice.
    """
    need_experts(bridge.cfg, "ablate_expert")
    gone_of = asking.experts_by_layer(bridge.cfg, layer, expert)
    positions = checked_positions(positions)
    if renormalize and bridge.cfg.experts_per_token == 1:
        raise ValueError("renormalize: this model chooses 1 expert for each token, so no weight is left to scale")
    seen: dict[tuple[int, str | None], Tensor] = {}

    def note(tensor: Tensor, hook: HookPoint) -> None:
        seen[threading.get_ident(), hook.name] = tensor

    def noted(hook: HookPoint, name: str) -> Tensor:
        return seen.pop((threading.get_ident(), f"{_mlp(hook.layer())}.{name}"))

    def ablate(out: Float[Tensor, "batch pos chosen d_model"], hook: HookPoint) -> Tensor:
        chosen: Int[Tensor, "batch pos chosen"] = noted(hook, "hook_expert_indices")
        taken = torch.isin(chosen, torch.tensor(gone_of[hook.layer()], device=chosen.device))
        gone = taken & position_mask(positions, out, hook)[..., None]
        left = out.masked_fill(gone[..., None], 0)
        if not renormalize:
            return left
        weights: Float[Tensor, "batch pos chosen"] = noted(hook, "hook_expert_weights")
        rest, total = weights.masked_fill(gone, 0).sum(-1, keepdim=True), weights.sum(-1, keepdim=True)
        scale = (total / rest).where(rest > 0, 1)
        return (left * scale[..., None]).to(out.dtype)

    needed = ("hook_expert_indices", "hook_expert_weights") if renormalize else ("hook_expert_indices",)
    hooks = [*((name, note) for name in needed), ("hook_expert_out", ablate)]
    return [(f"{_mlp(i)}.{name}", hook) for i in gone_of for name, hook in hooks]


@checked
def forbid_experts(
    bridge: TransformerBridge, layer: Layers, experts: int | Sequence[int], positions: Positions = None
) -> Hooks:
    """Route tokens away from some experts: their router logits become the lowest finite number, so the router chooses
    among the others.

    >>> hooks = forbid_experts(bridge, layer=0, experts=[2, 3])
    >>> from transformer_lens.analysis.experts import routing
    >>> with bridge.hooks(hooks):
    ...     found = routing(bridge, "When Mary and John")
    >>> sorted(found.indices[0].unique().tolist())
    [0, 1]

    `layer=None` means all layers. Positions as in `bridge.steer`. Raises `ValueError` for a dense model, a router whose
    choice has a bias, too few experts left, and a layer, expert or position that does not exist.
    """
    n_experts = need_experts(bridge.cfg, "forbid_experts")
    _need_plain_choice(bridge, "forbid_experts")
    forbidden = asking.expert_numbers(bridge.cfg, experts)
    positions = checked_positions(positions)
    left, needed = n_experts - len(forbidden), bridge.cfg.experts_per_token or 1
    if left < needed:
        raise ValueError(
            f"experts: forbidding {forbidden} leaves {left} of {n_experts}, and the model chooses {needed} for each "
            "token; to send tokens to fewer, use force_experts"
        )
    lower, layers = partial(_lower, forbidden, positions), asking.layer_numbers(bridge.cfg, layer)
    return [(f"{_mlp(i)}.hook_router_logits", lower) for i in layers]


@checked
def force_experts(
    bridge: TransformerBridge,
    layer: Layers,
    experts: int | Sequence[int],
    positions: Positions = None,
    weights: Sequence[float] | None = None,
) -> Hooks:
    """Route tokens to these experts. Without `weights`, the router weighs them against each other by its own
    rule; with `weights`, one per expert, they are used as given, in that order.

    >>> hooks = force_experts(bridge, layer=0, experts=[0, 3], weights=[0.25, 0.75])
    >>> from transformer_lens.analysis.experts import routing
    >>> with bridge.hooks(hooks):
    ...     found = routing(bridge, "When Mary and John")
    >>> found.indices[0, 0, -1].tolist(), found.weights[0, 0, -1].tolist()
    ([0, 3], [0.25, 0.75])

    If you force fewer experts than the model chooses, others fill the remaining slots with weight zero; more are
    refused. `layer=None` means all layers. Positions as in `bridge.steer`. Raises `ValueError` for a dense model, and
    for numbers that do not fit.
    """
    n_experts = need_experts(bridge.cfg, "force_experts")
    forced = asking.expert_numbers(bridge.cfg, experts)
    positions = checked_positions(positions)
    places = bridge.cfg.experts_per_token or 1
    if not 0 < len(forced) <= places:
        raise ValueError(
            f"experts: got {len(forced)} to force, expected 1 to {places}, as many as the model chooses for each "
            "token; to let it choose among more, forbid the others"
        )
    others = [expert for expert in range(n_experts) if expert not in forced]
    layers = asking.layer_numbers(bridge.cfg, layer)
    if weights is None:
        _need_plain_choice(bridge, "force_experts without weights")
        return [(f"{_mlp(i)}.hook_router_logits", partial(_lower, others, positions)) for i in layers]
    weights = [a_number("weights", weight) for weight in a_list("weights", weights)]
    if len(weights) != len(forced):
        raise ValueError(f"weights: got {len(weights)}, expected one for each of the {len(forced)} experts")
    spare = places - len(forced)
    put_weights = partial(_put, [*weights, *[0.0] * spare], positions)
    put_indices = partial(_put, [*forced, *others[:spare]], positions)
    hooks = (("hook_expert_weights", put_weights), ("hook_expert_indices", put_indices))
    return [(f"{_mlp(i)}.{name}", put) for i in layers for name, put in hooks]


def _need_plain_choice(bridge: TransformerBridge, what: str) -> None:
    """Raise `ValueError` where the router adds a bias before it chooses: the lowest logit may be chosen."""
    for name, _ in (*bridge.original_model.named_parameters(), *bridge.original_model.named_buffers()):
        if name.endswith(("correction_bias", "expert_bias")):
            raise ValueError(
                f"{what}: it lowers router logits, and {name} of {bridge.cfg.architecture} decides along with them; "
                "use force_experts with weights"
            )


def _mlp(layer: int) -> str:
    return f"blocks.{layer}.mlp"


def _lower(
    experts: Sequence[int], positions: Positions, logits: Float[Tensor, "batch pos expert"], hook: HookPoint
) -> None:
    """Have these experts chosen last."""
    concerned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    concerned[list(experts)] = True
    # Not minus infinity: a row of nothing else would become NaN.
    logits.masked_fill_(position_mask(positions, logits, hook)[..., None] & concerned, torch.finfo(logits.dtype).min)


def _put(values: Sequence[float], positions: Positions, places: Tensor, hook: HookPoint) -> Tensor:
    where = position_mask(positions, places, hook)[..., None]
    return torch.where(where, torch.tensor(values, dtype=places.dtype, device=places.device), places)
