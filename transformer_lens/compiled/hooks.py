"""Hooks inside a compiled graph: at ports, and inside modules, where they act in their runner's calls alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transformer_lens.compiled.declared import GraphEdit, GraphRead
from transformer_lens.hooks.point import HookPoint, state
from transformer_lens.model_bridge.access.views import TokenRows
from transformer_lens.model_bridge.attaching.attachment import Attachment, BoundPort, Tap
from transformer_lens.model_bridge.attaching.inside_hooks import BoundInside, BoundModule
from transformer_lens.model_bridge.generalized_components.experts_run import SORTS
from transformer_lens.model_bridge.generalized_components.moe import ExpertsBridge

if TYPE_CHECKING:
    from transformer_lens.compiled.runner import CompiledRunner

INSTEAD = {
    **dict.fromkeys(("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"), "hook_resid_pre or attn.hook_q"),
    "hook_result": "attn.hook_z",
}
POSITIONS = {"pos", "query_pos", "key_pos"}


class GraphHook:
    """A hook inside the graph: reads and edits the value that the eager hooks see there."""

    edits: tuple[GraphEdit, ...] = ()
    reads: tuple[GraphRead, ...] = ()
    like: Any = None
    """The value for one token."""

    def __init__(self, bound: Any, runner: CompiledRunner) -> None:
        self.bound, self.runner = bound, runner

    def show(self, value: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.like = value.new_empty(value.shape)
        for edit in self.edits:
            value = edit.apply(value)
        for read in self.reads:
            for buffer, part in zip(read.buffers, read.of(value.detach(), self.runner.text), strict=True):
                buffer.copy_(part)
        self.runner.fired += 1
        return value


class GraphPort(GraphHook):
    """A hook at a tensor that a module receives or returns."""

    bound: BoundPort
    known: Any = None

    def __init__(self, bound: BoundPort, runner: CompiledRunner) -> None:
        super().__init__(bound, runner)
        self.port = bound.port

    def remember(self, x: Tensor) -> None:
        self.known = self.port.remember(x)

    def fire(self, x: Tensor) -> Tensor:
        known, self.known = self.known, None
        value = self.port.read(x, self.bound.view, known)
        new = self.show(value)
        return x if new is value else self.port.write(x, new, self.bound.view, known, self.bound.modules)


class GraphInside(GraphHook):
    """A hook at a value inside a module."""

    bound: BoundInside
    rows: TokenRows | None = None

    @property
    def writes(self) -> bool:
        """Whether the module's code runs with this hook in it: at a seam always, so that nothing is computed twice."""
        return bool(self.edits) or self.bound.inside.kind == "seam"

    def remember(self, x: Tensor) -> None:
        self.rows = TokenRows(*x.shape[:2])

    def fire(self, value: Tensor, _: TokenRows | None) -> Tensor:
        rows, self.rows = self.rows, None
        shown = value if rows is None else rows.get(value)
        new = self.show(shown)
        if new is shown:
            return value
        return new if rows is None else rows.put(value, new)


class GraphTap(Tap):
    """The torch hook of the ports at one place."""

    runner: CompiledRunner

    def __init__(self, tap: Tap, hooks: Mapping[str, GraphHook], runner: CompiledRunner) -> None:
        vars(self).update(vars(tap), handle=None, module=None, runner=runner)
        self.live: Any = tuple(hooks[port.name] for port in tap.ports if port.name in hooks)
        self.live_recalls: Any = tuple(hooks[port.name] for port in tap.recall_for if port.name in hooks)
        if self.live or self.live_recalls:
            self._put_on()

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        return super().on_input(module, args, kwargs) if state.runner is self.runner else None

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return super().on_output(module, args, output) if state.runner is self.runner else None


class GraphModule(BoundModule):
    """A module that is open for the hooks inside it."""

    runner: CompiledRunner

    def __init__(self, opened: BoundModule, hooks: Mapping[str, GraphHook], runner: CompiledRunner) -> None:
        vars(self).update(vars(opened), in_place=None, recalls=False, runner=runner)
        self.hooks: Any = {name: hooks[hook.name] for name, hook in opened.hooks.items() if hook.name in hooks}
        if self.hooks:
            self._put_on()

    def wanted(self) -> Any:
        return self.hooks if state.runner is self.runner else {}

    def written(self, wanted: Any) -> list[str]:
        return [name for name, hook in wanted.items() if hook.writes]


def graph_hook(point: HookPoint, attachment: Attachment, runner: CompiledRunner) -> GraphHook:
    """The hook of a point inside the graph. Raises `ValueError` where no graph can show it."""
    ports = {port.name: port for tap in attachment.taps.values() for port in tap.ports}
    insides = {hook.name: hook for module in attachment.opened.values() for hook in module.hooks.values()}
    axes, name, last = point.axes.split(), str(point.name), str(point.name).rpartition(".")[2]
    port, inside = ports.get(name), insides.get(name)
    batched = axes[:1] == ["batch"] and bool(POSITIONS & set(axes))
    if batched and type(port) is BoundPort:
        return GraphPort(port, runner)
    if not batched or inside is None or last in INSTEAD or inside.module.interior.shards.size > 1:
        instead = INSTEAD.get(last, "another hook of kind 'port' in bridge.hook_table()")
        raise ValueError(
            f"bridge.compile: {name!r} is not a tensor by batch and pos that a module of this process computes whole, "
            f"so no graph can show it; declare {instead}, or use run_with_cache"
        )
    experts = inside.module.component
    if isinstance(experts, ExpertsBridge):
        config: Any = experts.computing_module.config
        if config._experts_implementation not in SORTS:
            raise ValueError(
                f"bridge.compile: {name!r} is inside experts that run one after the other, as their tokens require, "
                "and no graph can; call bridge.original_model.set_experts_implementation('grouped_mm'), or use "
                "run_with_cache"
            )
    return GraphInside(inside, runner)
