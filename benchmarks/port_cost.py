"""What one port costs each time its block is called, with the block's own work left out.

A block takes hundreds of microseconds and varies by more than a port costs, so for these measurements
its `forward` hands back a kept output; what is left is the call, torch's hook and the port.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Effort, Figure, compare
from transformer_lens import TransformerBridge
from transformer_lens.hooks.point import HookEntry
from transformer_lens.hooks.root import Capture

CALLS = 200


@dataclass(frozen=True)
class PortCost:
    """Microseconds added to one call of a block by a port that captures, or that a user's function watches."""

    capturing: Figure
    looking: Figure
    attaching: Figure
    """Putting the port on and taking it off, once for each run."""


@contextmanager
def emptied_block(
    block: nn.Module, model: nn.Module, tokens: Tensor
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A block whose forward hands back what it once computed; gives the arguments of that call."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args, kwargs, output))

    handle = block.register_forward_hook(keep, with_kwargs=True)
    try:
        model(tokens, use_cache=False)
    finally:
        handle.remove()
    args, kwargs, output = seen[0]
    block.forward = lambda *_, **__: output  # type: ignore[method-assign]
    try:
        yield args, kwargs
    finally:
        del block.__dict__["forward"]


def _per_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for _ in range(CALLS):
        block(*args, **kwargs)


def port_cost(bridge: TransformerBridge, tokens: Tensor, device: torch.device, effort: Effort) -> PortCost:
    """Time a block's calls with and without a port at its output."""
    name = "blocks.0.hook_resid_post"
    point = bridge.hook_dict[name]
    found = bridge.get_submodule("blocks.0")
    block: nn.Module = found.original_component  # type: ignore[assignment]
    with emptied_block(block, bridge.original_model, tokens) as (args, kwargs):

        def empty() -> None:
            _per_call(block, args, kwargs)

        def with_entry(entry: HookEntry) -> None:
            point.attach(entry)
            try:
                _per_call(block, args, kwargs)
            finally:
                point.remove(entry)

        def attach_only() -> None:
            for _ in range(CALLS):
                point.remove(point.attach(HookEntry(_look)))

        captured = compare(empty, lambda: with_entry(HookEntry(Capture({}), reads_only=True)), device, effort)
        looked = compare(empty, lambda: with_entry(HookEntry(_look)), device, effort)
        attached = compare(lambda: None, attach_only, device, effort)
    return PortCost(*(_microseconds(each.difference) for each in (captured, looked, attached)))


def _look(tensor: Tensor, hook: Any) -> None:
    """A user's hook that edits nothing."""


def _microseconds(seconds: Figure) -> Figure:
    scale = 1e6 / CALLS
    return Figure(seconds.median * scale, seconds.low * scale, seconds.high * scale, seconds.samples)
