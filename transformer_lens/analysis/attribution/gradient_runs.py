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

    clean: Tensor
    corrupted: Tensor
    mask: Tensor | None

    def base(self, at: At) -> Tensor:
        """The input at which gradients are taken."""
        return self.clean if at == "clean" else self.corrupted

    def other(self, at: At) -> Tensor:
        """The input whose values are compared with the base's."""
        return self.corrupted if at == "clean" else self.clean


def prompt_pair(
    bridge: TransformerBridge, clean: SweepInput, corrupted: SweepInput, attention_mask: Tensor | None, at: str
) -> PromptPair:
    """Check two prompts. Raises `ValueError` if they do not match."""
    if not is_one_of(at, ("corrupted", "clean")):
        raise ValueError(f"at: got {at!r}, expected 'corrupted' or 'clean': the run whose gradient is taken")
    (x, seen, mask), (y, seen_too, other) = (
        bridge.input_and_mask(one, attention_mask=attention_mask) for one in (clean, corrupted)
    )
    if x.shape[:2] != y.shape[:2] or not x.numel():
        raise ValueError(
            f"clean and corrupted: got {list(x.shape[:2])} and {list(y.shape[:2])} texts and tokens, expected as many "
            "of each, and at least one; pad them alike"
        )
    if not x.is_floating_point() and not y.is_floating_point() and not torch.equal(seen, seen_too):
        raise ValueError("clean and corrupted: their padding differs, so positions do not correspond")
    return PromptPair(x, y, other if mask is None else mask)


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
    """The metric."""
    tensors: dict[str, Tensor]

    def gradients(self, keep_graph: bool = False) -> dict[str, Tensor]:
        """The gradient of the metric at every kept activation; zero where it does not depend on it."""
        found = torch.autograd.grad(
            self.value, list(self.tensors.values()), retain_graph=keep_graph, materialize_grads=True
        )
        return dict(zip(self.tensors, found, strict=True))

    def activations(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.tensors.items()}


def gradient_run(
    bridge: TransformerBridge, input: Tensor, mask: Tensor | None, metric: Metric, names: Sequence[str], **options: Any
) -> GradientRun:
    """Run the model with the options of `run_with_hooks`, and keep the named activations in the graph; `fwd_hooks` are
    first at their points.
    """
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


def sender_hooks(
    bridge: TransformerBridge, graph: EdgeGraph, receive: Receive, first_layer: int | None = None
) -> list[Any]:
    """Hooks that pass on each sender's output, for layers from `first_layer` on."""
    hooks: list[Any] = []
    for hook in dict.fromkeys(one.hook for one in graph.senders):
        layer = bridge.hook_dict[hook].layer() if hook.startswith("blocks.") else -1
        if first_layer is not None and layer < first_layer:
            continue
        columns = graph.columns(graph.senders, hook)
        if hook.endswith("hook_expert_out"):
            hooks += _expert_hooks(bridge, layer, columns, receive)
        else:
            hooks.append((hook, partial(_hand, columns, receive)))
    return hooks


def _hand(columns: slice, receive: Receive, written: Tensor, hook: HookPoint) -> None:
    receive(columns, written[:, :, None] if written.ndim == 3 else written)


def _expert_hooks(bridge: TransformerBridge, layer: int, columns: slice, receive: Receive) -> list[Any]:
    """An expert writes its weighted output, which fires after the weights and choices."""
    seen: dict[str, Tensor] = {}
    names = {part: f"blocks.{layer}.mlp.hook_{part}" for part in PARTS}

    def note(value: Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)] = value.detach().clone()
        if hook.name == names["expert_out"]:
            receive(columns, expert_contributions(seen, layer, columns.stop - columns.start))
            seen.clear()

    return [(names[part], note) for part in ("expert_indices", "expert_weights", "expert_out")]


class SenderValues(dict[int, Tensor]):
    """Every sender's output in one run, by the number of the first sender of its hook."""

    def __call__(self, columns: slice, written: Vectors) -> None:
        self[columns.start] = wide(written.detach()).clone()

    def all(self) -> Vectors:
        return torch.cat([self[start].to(self[0].device) for start in sorted(self)], dim=2)


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
