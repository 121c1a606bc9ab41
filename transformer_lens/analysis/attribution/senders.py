"""What the senders of a graph write in a run: read from one forward, and put side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.analysis.attribution.edge_graph import EdgeGraph
from transformer_lens.analysis.attribution.gradient_runs import wide
from transformer_lens.analysis.patching.experts import PARTS, expert_contributions

Vectors = Float[Tensor, "batch pos sender d_model"]
Receive = Callable[[slice, Vectors], None]
"""Takes what some senders wrote, and which they are."""


def sender_hooks(
    bridge: TransformerBridge, graph: EdgeGraph, receive: Receive, first_layer: int | None = None
) -> list[Any]:
    """Hooks that hand over what each sender writes, or each sender in the layers from `first_layer` on."""
    hooks: list[Any] = []
    for hook in dict.fromkeys(one.hook for one in graph.senders):
        layer = bridge.hook_dict[hook].layer() if hook.startswith("blocks.") else -1
        if first_layer is not None and layer < first_layer:
            continue
        columns = graph.columns(graph.senders, hook)
        if hook.endswith("hook_expert_out"):
            hooks += _expert_hooks(bridge, layer, columns, receive)
        else:
            hooks.append((hook, _handing(columns, receive)))
    return hooks


def _handing(columns: slice, receive: Receive) -> Callable[..., None]:
    def hand(written: Tensor, hook: HookPoint) -> None:
        receive(columns, written[:, :, None] if written.ndim == 3 else written)

    return hand


def _expert_hooks(bridge: TransformerBridge, layer: int, columns: slice, receive: Receive) -> list[Any]:
    """An expert writes its output times its weight; the output fires after the weights and choices."""
    seen: dict[str, Tensor] = {}
    names = {part: f"blocks.{layer}.mlp.hook_{part}" for part in PARTS}

    def note(value: Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)] = value.detach().clone()
        if hook.name == names["expert_out"]:
            receive(columns, expert_contributions(seen, layer, columns.stop - columns.start))
            seen.clear()

    return [(names[part], note) for part in ("expert_indices", "expert_weights", "expert_out")]


class SenderValues:
    """Keeps what every sender writes in one run."""

    def __init__(self, graph: EdgeGraph) -> None:
        self.parts: dict[int, Tensor] = {}
        self.order = [graph.columns(graph.senders, hook).start for hook in dict.fromkeys(s.hook for s in graph.senders)]

    def __call__(self, columns: slice, written: Vectors) -> None:
        self.parts[columns.start] = wide(written.detach()).clone()

    def all(self) -> Vectors:
        device = self.parts[0].device
        return torch.cat([self.parts[start].to(device) for start in self.order], dim=2)


@torch.no_grad()
def read_senders(
    bridge: TransformerBridge, graph: EdgeGraph, input: Tensor, mask: Tensor | None, names: Iterable[str] = ()
) -> tuple[Tensor, Vectors, dict[str, Tensor]]:
    """One forward: the logits, what every sender writes, and other activations by name."""
    written = SenderValues(graph)
    others: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> None:
        others[str(hook.name)] = value

    asked = [(list(names), keep)] if names else []
    hooks = [*sender_hooks(bridge, graph, written), *asked]
    logits = bridge.run_with_hooks(input, fwd_hooks=hooks, attention_mask=mask)
    return logits, written.all(), others
