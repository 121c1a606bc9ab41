"""A runner: the model compiled through torch hooks that act in the runner's own calls alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from transformer_lens.cache.activation_cache import ActivationCache
from transformer_lens.checks import in_words, listed
from transformer_lens.compiled.declared import GraphEdit, GraphRead, Read
from transformer_lens.hooks.edits import Edit
from transformer_lens.hooks.point import state
from transformer_lens.hooks.root import HookedRootModule, HookSpec
from transformer_lens.model_bridge.attaching.attachment import BoundPort, Tap
from transformer_lens.model_bridge.attaching.partial_run import Watch
from transformer_lens.model_bridge.calls.inputs import ModelInput, main_output

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

EAGERLY = (
    "Python hooks are on this model, so the runner calls it eagerly, with its reads and edits as well; take the hooks "
    "off (bridge.reset_hooks()) to run the compiled graph"
)
INSTEAD = {
    **dict.fromkeys(("hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k"), "attn.hook_q, hook_k or hook_z"),
    **dict.fromkeys(("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"), "hook_resid_pre or attn.hook_q"),
    **dict.fromkeys(("hook_scale", "hook_normalized"), "attn.hook_in, mlp.hook_in or ln_final.hook_out"),
    "hook_router_logits": "mlp.hook_expert_weights and mlp.hook_expert_indices",
    "hook_result": "attn.hook_z",
}


class GraphPort:
    """A port inside the graph: reads and edits the value that the eager hooks see there."""

    edits: tuple[GraphEdit, ...] = ()
    reads: tuple[GraphRead, ...] = ()
    like: Any = None
    known: Any = None

    def __init__(self, bound: BoundPort, runner: CompiledRunner) -> None:
        self.bound, self.port, self.runner = bound, bound.port, runner

    def remember(self, x: Tensor) -> None:
        self.known = self.port.remember(x)

    def fire(self, x: Tensor) -> Tensor:
        known, self.known = self.known, None
        new = value = self.port.read(x, self.bound.view, known)
        if not torch.compiler.is_compiling():
            self.like = value.new_empty(1, 1, *value.shape[2:])
        for edit in self.edits:
            new = edit.apply(new)
        for read in self.reads:
            for buffer, part in zip(read.buffers, read.of(new.detach(), self.runner.text), strict=True):
                buffer.copy_(part)
        self.runner.fired += 1
        return x if new is value else self.port.write(x, new, self.bound.view, known, self.bound.modules)


class GraphTap(Tap):
    """The torch hook of the ports at one place, which acts in its runner's calls alone."""

    runner: CompiledRunner

    def __init__(self, tap: Tap, ports: dict[str, GraphPort], runner: CompiledRunner) -> None:
        vars(self).update(vars(tap), handle=None, module=None, runner=runner)
        self.live: Any = tuple(ports[port.name] for port in tap.ports if port.name in ports)
        self.live_recalls: Any = tuple(ports[port.name] for port in tap.recall_for if port.name in ports)
        if self.live or self.live_recalls:
            self._put_on()

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        return super().on_input(module, args, kwargs) if state.runner is self.runner else None

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return super().on_output(module, args, output) if state.runner is self.runner else None


class CompiledRunner(AbstractContextManager[Any]):
    """The model as one compiled graph with declared reads and edits, called like the bridge; see `bridge.compile`.

    One call at a time; other calls of the model are what they are without a runner. `edits` are the `GraphEdit`s.
    `close()`, or leaving a `with` block, takes everything off the model.
    """

    taps: tuple[GraphTap, ...] = ()
    closed, fired = False, 0

    def __init__(
        self, bridge: TransformerBridge, reads: Any, edits: Any, tokens: ModelInput | None, **options: Any
    ) -> None:
        if Watch.on(bridge.original_model) is not None:
            raise ValueError("bridge.compile: Python hooks are on the model; take them off (bridge.reset_hooks())")
        self.bridge, points = bridge, bridge.hook_dict
        every = [read if isinstance(read, Read) else Read(read) for read in listed("reads", reads)]
        kept = [(name, read) for read in every for name in bridge.select_names(read.at)]
        entries: Any = bridge._entries(edits, "fwd", None)
        written = [(point.name, entry.fn) for point, entry, *_ in entries]
        if functions := [in_words(fn) for _, fn in written if not isinstance(fn, Edit)]:
            why = "no Python runs in a compiled graph; put functions on the bridge, which then runs eagerly"
            raise TypeError(f"bridge.compile: got {functions[0]}, expected an Edit: {why}")
        bound = {port.name: port for tap in bridge.attachment.taps.values() for port in tap.ports}
        for name in (name for name, _ in (*kept, *written)):
            if type(bound.get(name)) is not BoundPort or points[name].axes.split()[:2] != ["batch", "pos"]:
                instead = INSTEAD.get(name.rpartition(".")[2], "another hook of kind 'port' in bridge.hook_table()")
                raise ValueError(
                    f"bridge.compile: {name!r} is not a tensor by batch and pos that a module of this process receives "
                    f"or returns whole, so no graph can show it; declare {instead}, or use run_with_cache"
                )
        self.ports = {name: GraphPort(bound[name], self) for name, _ in (*kept, *written)}
        with ExitStack() as undo:
            undo.callback(self.close)
            bridge.attachment.runners.append(self)
            taps = [GraphTap(tap, self.ports, self) for tap in bridge.attachment.taps.values()]
            self.taps = tuple(tap for tap in taps if tap.handle is not None)
            with torch.no_grad(), torch.random.fork_rng():  # one token shows what each port holds
                token, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
                self._run(bridge._call(token, None, attention_mask=mask).kwargs, self._graph)
            self.reads = [GraphRead(read, points[name], self.ports[name].like) for name, read in kept]
            self.edits = [GraphEdit(edit, points[name], self.ports[name].like) for name, edit in written]
            self.declared: tuple[GraphRead | GraphEdit, ...] = (*self.reads, *self.edits)
            keys = [key for read in self.reads for key in read.keys]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise ValueError(f"bridge.compile: {', '.join(twice)} would be kept twice; leave one of the reads out")
            for name, port in self.ports.items():
                port.edits = tuple(edit for edit in self.edits if edit.point.name == name)
                port.reads = tuple(read for read in self.reads if read.point.name == name)
            # torch counts the graphs of all functions with the same code together, so this one gets its own.
            own = FunctionType(CompiledRunner._graph.__code__.replace(), globals())
            self._compiled = torch.compile(MethodType(own, self), fullgraph=True, **options)
            if tokens is not None:
                self(tokens, return_type=None)
            undo.pop_all()

    def __call__(
        self, input: ModelInput, return_type: str | None = "logits", loss_per_token: bool = False, **options: Any
    ) -> Any:
        """Run the graph; the arguments are those of `bridge.forward` for a run of all layers."""
        self.bridge._check_call(return_type, None, None)
        if self.closed:
            raise ValueError("this runner was closed; make another with bridge.compile")
        call = self.bridge._call(input, None, **options)
        tokens: Tensor = next(iter(call.kwargs.values()))
        batch, pos = tokens.shape[:2]
        ones = torch.ones(batch, pos, dtype=torch.bool, device=tokens.device)
        self.text = ones if call.columns is None else call.columns.mask[:, -pos:].contiguous()
        for part in self.declared:
            part.fit((batch, pos))
        return self.bridge._answer(call, return_type, loss_per_token, self._run)

    def _run(self, kwargs: dict[str, Any], run: Callable[..., tuple[Tensor, int]] | None = None) -> Tensor:
        run = run or self._compiled
        if Watch.on(self.bridge.original_model) is not None:
            run = self._graph
            warnings.warn(EAGERLY, stacklevel=4)  # Python shows it once for each place
        outer, state.runner = state.runner, self
        try:
            output, fired = run(kwargs)
        finally:
            state.runner = outer
        if fired != len(self.ports):
            why = "a module of the model was exchanged since, or is not called; close this runner and make another"
            raise ValueError(f"bridge.compile: {fired} of {len(self.ports)} declared hooks fired: {why}")
        return output

    def _graph(self, kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        """What is compiled: the model's own forward, and how many ports fired when it was traced."""
        self.fired = 0
        output = main_output(self.bridge.original_model(**kwargs))
        fired, self.fired = self.fired, 0
        return output, fired

    @property
    def cache(self) -> ActivationCache:
        """What the latest call kept, after edits: the buffers themselves, which the next call overwrites."""
        kept = {key: buffer for read in self.reads for key, buffer in zip(read.keys, read.buffers, strict=False)}
        return ActivationCache(kept, self.bridge)

    def run_with_cache(self, *model_args: Any, **model_kwargs: Any) -> tuple[Any, ActivationCache]:
        """Run the graph: `(output, ActivationCache)` with copies of what it kept."""
        output = self(*model_args, **model_kwargs)
        return output, ActivationCache({key: value.clone() for key, value in self.cache.items()}, self.bridge)

    def close(self) -> None:
        """Take everything off the model."""
        for tap in self.taps:
            tap._take_off()
        self.bridge.attachment.runners[:] = [one for one in self.bridge.attachment.runners if one is not self]
        self.closed, self.taps = True, ()

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a compiled runner cannot be copied or saved: close it before its bridge, model or a module is")


class CompileMethods(HookedRootModule):
    def compile(  # type: ignore[override]
        self, reads: Any = (), edits: Sequence[HookSpec] = (), *, tokens: ModelInput | None = None, **options: Any
    ) -> CompiledRunner:
        """Compile the model into one graph with declared reads and edits: returns a runner, called like the bridge.

        >>> ablation = ("blocks.0.attn.hook_z", Edit("zero", heads=[1]))
        >>> with bridge.compile(reads=["blocks.1.hook_resid_post"], edits=[ablation], backend="eager") as runner:
        ...     logits, cache = runner.run_with_cache("Mary and John")
        >>> torch.equal(logits, bridge.run_with_hooks("Mary and John", fwd_hooks=[ablation]))
        True

        Reads are names as in `run_with_cache`, or `Read`s; edits pair a name with an `Edit`. `options` are those of
        `torch.compile`; `tokens` is an input to compile for at once. Raises `KeyError` for an unknown hook, and
        `ValueError` for one that no graph can show and while Python hooks are on the model.
        """
        return CompiledRunner(cast("TransformerBridge", self), reads, edits, tokens, **options)
