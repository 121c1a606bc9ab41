"""The runs behind attribution: one that takes gradients, and one that records every sender's output.

Gradients come from `torch.autograd.grad`, so parameters keep none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.analysis.arguments import metric_number
from transformer_lens.analysis.attribution.edge_graph import EdgeGraph
from transformer_lens.analysis.patching.engine import Metric, SweepInput
from transformer_lens.analysis.patching.experts import PARTS, expert_contributions
from transformer_lens.checks import is_one_of
from transformer_lens.factored_matrix import wide
from transformer_lens.hook_points import Capture

At = Literal["corrupted", "clean"]


class PromptPair(NamedTuple):
    """Two inputs that match token by token, and their common mask."""

    base: Tensor
    """The input at which gradients are taken, or which is patched."""
    other: Tensor
    mask: Tensor | None
    sign: int
    """1 if the base is the corrupted input, else -1: what makes other minus base clean minus corrupted."""


def prompt_pair(
    bridge: TransformerBridge, clean: SweepInput, corrupted: SweepInput, attention_mask: Tensor | None, at: str
) -> PromptPair:
    """Check two prompts. Raises `ValueError` if they do not match."""
    if not is_one_of(at, ("corrupted", "clean")):
        raise ValueError(f"at: got {at!r}, expected 'corrupted' or 'clean': the run whose gradient is taken")
    (x, seen, mask), (y, seen_too, mask_too) = (
        bridge.input_and_mask(one, attention_mask=attention_mask) for one in (clean, corrupted)
    )
    if x.shape[:2] != y.shape[:2] or not x.numel():
        raise ValueError(
            f"clean and corrupted: got {list(x.shape[:2])} and {list(y.shape[:2])} texts and tokens, expected as many "
            "of each, and at least one; pad them alike"
        )
    if not x.is_floating_point() and not y.is_floating_point() and not torch.equal(seen, seen_too):
        raise ValueError("clean and corrupted: their padding differs, so positions do not correspond")
    base, other, sign = (x, y, -1) if at == "clean" else (y, x, 1)
    return PromptPair(base, other, mask_too if mask is None else mask, sign)


def one_number(value: Any) -> Float[Tensor, ""]:
    """A metric's result, as a finite tensor without axes."""
    number = metric_number(value)
    if not bool(number.isfinite()):
        raise ValueError(f"metric: it returned {number.item()}, and what is not finite has no attribution")
    return number


@dataclass(frozen=True, eq=False)
class GradientRun:
    """A forward that keeps its graph."""

    value: Float[Tensor, ""]
    tensors: dict[str, Tensor]

    def gradients(self, keep_graph: bool = False) -> dict[str, Tensor]:
        """The gradient of the metric at every kept activation; zero where it does not depend on it."""
        at = list(self.tensors.values())
        found = torch.autograd.grad(self.value, at, retain_graph=keep_graph, materialize_grads=True)
        return dict(zip(self.tensors, found, strict=True))

    def activations(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.tensors.items()}


def gradient_run(
    bridge: TransformerBridge, input: Tensor, mask: Tensor | None, metric: Metric, names: Sequence[str], **options: Any
) -> GradientRun:
    """Run the model with the options of `run_with_hooks`, whose hooks come first, and keep activations in the graph."""
    if torch.is_inference_mode_enabled():
        raise ValueError("attribution needs gradients, which torch.inference_mode() rules out; leave it")
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        if not tensor.requires_grad:  # all parameters below are frozen
            tensor.requires_grad_()
        kept[str(hook.name)] = tensor

    with torch.enable_grad():
        hooks = [*options.pop("fwd_hooks", ()), (list(names), keep)]
        logits = bridge.run_with_hooks(input, fwd_hooks=hooks, attention_mask=mask, **options)
        value = one_number(metric(logits))
    if not value.requires_grad:
        raise ValueError("metric: its value does not depend on the logits in a way that autograd can follow")
    return GradientRun(value, kept)


def differentiable_names(bridge: TransformerBridge, names: str | Sequence[str]) -> list[str]:
    """Canonical names, in the order of the model. Raises `ValueError` for hooks without a gradient."""
    found = bridge.select_names(names)
    if not found:
        raise ValueError("names: got none, expected the name of at least one hook")
    for name in found:
        point = bridge.hook_dict[name]
        if point.integer:
            raise ValueError(f"hook {name!r} holds integers, which have no gradient")
        if "chosen" in point.axes.split():
            raise ValueError(
                f"hook {name!r} is about the experts that were chosen, and two runs may choose different ones; "
                "expert_attribution_patching compares experts by their number"
            )
    return found


Vectors = Float[Tensor, "batch pos sender d_model"]
Receive = Callable[[slice, Vectors], None]
"""Takes the outputs of some senders, with their numbers."""


def sender_hooks(bridge: TransformerBridge, graph: EdgeGraph, receive: Receive, first_layer: int = -1) -> list[Any]:
    """Hooks that pass on each sender's output, for layers from `first_layer` on; the embedding is layer -1."""
    hooks: list[Any] = []
    for hook in dict.fromkeys(one.hook for one in graph.senders):
        layer = bridge.hook_dict[hook].layer() if hook.startswith("blocks.") else -1
        columns = graph.columns(graph.senders, hook)
        if layer < first_layer:
            continue
        if hook.endswith("hook_expert_out"):
            names = [f"blocks.{layer}.mlp.hook_{part}" for part in PARTS]
            hooks.append((names, partial(_hand_experts, layer, columns, receive, {})))
        else:
            hooks.append((hook, partial(_hand, columns, receive)))
    return hooks


def by_part(vectors: Tensor) -> Vectors:
    """What one part writes or reads, with an axis of parts like that of heads."""
    return vectors[:, :, None] if vectors.ndim == 3 else vectors


def _hand(columns: slice, receive: Receive, written: Tensor, hook: HookPoint) -> None:
    receive(columns, by_part(written))


def _hand_experts(
    layer: int, columns: slice, receive: Receive, seen: dict[str, Tensor], value: Tensor, hook: HookPoint
) -> None:
    """An expert writes its weighted output, which fires after the weights and choices."""
    seen[str(hook.name)] = value.detach().clone()
    if len(seen) == len(PARTS):
        receive(columns, expert_contributions(seen, layer, columns.stop - columns.start))
        seen.clear()


class SenderValues(dict[int, Tensor]):
    """Every sender's output in one run, by the number of the first sender of its hook."""

    def __call__(self, columns: slice, written: Vectors) -> None:
        self[columns.start] = wide(written.detach()).clone()

    def all(self) -> Vectors:
        return torch.cat([self[start].to(self[0].device) for start in sorted(self)], dim=2)


@torch.no_grad()
def read(bridge: TransformerBridge, input: Tensor, mask: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
    """The named activations of one forward."""
    how: dict[str, Any] = {"return_cache_object": False, "return_type": None}
    return bridge.run_with_cache(input, names_filter=names, attention_mask=mask, **how)[1]  # type: ignore[no-any-return]


@torch.no_grad()
def read_senders(
    bridge: TransformerBridge, graph: EdgeGraph, input: Tensor, mask: Tensor | None, names: Iterable[str] = ()
) -> tuple[Tensor, Vectors, dict[str, Tensor]]:
    """One forward: the logits, every sender's output, and other activations by name."""
    written, others = SenderValues(), dict[str, Tensor]()
    keep = [(list(names), Capture(others))] if names else []
    hooks = [*sender_hooks(bridge, graph, written), *keep]
    logits = bridge.run_with_hooks(input, fwd_hooks=hooks, attention_mask=mask)
    return logits, written.all(), others
