"""A runner: the model compiled through torch hooks that act in the runner's own calls alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from transformer_lens.cache.activation_cache import ActivationCache
from transformer_lens.checks import in_words, listed
from transformer_lens.compiled.declared import GraphEdit, GraphRead, Read
from transformer_lens.compiled.hooks import GraphModule, GraphTap, graph_hook
from transformer_lens.hooks.edits import Edit
from transformer_lens.hooks.point import state
from transformer_lens.hooks.root import HookedRootModule, HookSpec
from transformer_lens.model_bridge.access.seams import asking
from transformer_lens.model_bridge.attaching.partial_run import Watch
from transformer_lens.model_bridge.calls.inputs import ModelInput, main_output
from transformer_lens.model_bridge.generalized_components.attention import FunctionAttentionBridge
from transformer_lens.model_bridge.upstream import CACHE, EMBEDDINGS, TOKENS, attention_functions, output_name

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

EAGERLY = (
    "Python hooks are on this model, so the runner calls it eagerly, with its reads and edits as well; take the hooks "
    "off (bridge.reset_hooks()) to run the compiled graph"
)
CACHE_FIELD = output_name(CausalLMOutputWithPast(), CACHE)


class CompiledRunner(AbstractContextManager[Any]):
    """The model as one compiled graph with declared reads and edits, called like the bridge; see `bridge.compile`.

    One call at a time; other calls of the model are what they are without a runner. `edits` are the `GraphEdit`s.
    `close()`, or leaving a `with` block, takes everything off the model.
    """

    places: tuple[GraphTap | GraphModule, ...] = ()
    """What is on the model."""
    registries: tuple[Any, ...] = ()
    """Where its opened attention looks up its attention function."""
    closed, fired = False, 0

    def __init__(
        self, bridge: TransformerBridge, reads: Any, edits: Any, tokens: ModelInput | None, **options: Any
    ) -> None:
        if Watch.on(bridge.original_model) is not None:
            raise ValueError("bridge.compile: Python hooks are on the model; take them off (bridge.reset_hooks())")
        self.bridge, points, self._ones, self._fits = bridge, bridge.hook_dict, torch.ones(0, 0), False
        every = [read if isinstance(read, Read) else Read(read) for read in listed("reads", reads)]
        kept = [(name, read) for read in every for name in bridge.select_names(read.at)]
        entries: Any = bridge._entries(edits, "fwd", None)
        written = [(point.name, entry.fn) for point, entry, *_ in entries]
        if functions := [in_words(fn) for _, fn in written if not isinstance(fn, Edit)]:
            why = "no Python runs in a compiled graph; put functions on the bridge, which then runs eagerly"
            raise TypeError(f"bridge.compile: got {functions[0]}, expected an Edit: {why}")
        names = dict.fromkeys(name for name, _ in (*kept, *written))
        self.hooks = {name: graph_hook(points[name], bridge.attachment, self) for name in names}
        with ExitStack() as undo:
            undo.callback(self.close)
            bridge.attachment.runners.append(self)
            self._put_on()
            with torch.no_grad(), torch.random.fork_rng():  # one token shows what each port holds
                token, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
                self._run(bridge._call(token, None, attention_mask=mask).kwargs, self._graph)
            self.reads = [GraphRead(read, points[name], self.hooks[name].like) for name, read in kept]
            self.edits = [GraphEdit(edit, points[name], self.hooks[name].like) for name, edit in written]
            self.declared: tuple[GraphRead | GraphEdit, ...] = (*self.reads, *self.edits)
            self._keyed = any("key_pos" in part.point.axes for part in self.declared)
            keys = [key for read in self.reads for key in read.keys]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise ValueError(f"bridge.compile: {', '.join(twice)} would be kept twice; leave one of the reads out")
            for name, hook in self.hooks.items():
                hook.edits = tuple(edit for edit in self.edits if edit.point.name == name)
                hook.reads = tuple(read for read in self.reads if read.point.name == name)
            # torch counts the graphs of all functions with the same code together, so this one gets its own.
            own = FunctionType(CompiledRunner._graph.__code__.replace(), globals())
            self._compiled = torch.compile(MethodType(own, self), fullgraph=True, **options)
            if tokens is not None:
                self(tokens, return_type=None)
            undo.pop_all()

    def _put_on(self) -> None:
        attachment = self.bridge.attachment
        taps = [GraphTap(tap, self.hooks, self) for tap in attachment.taps.values()]
        modules = [GraphModule(opened, self.hooks, self) for opened in attachment.opened.values()]
        self.places = (*(tap for tap in taps if tap.handle is not None), *(one for one in modules if one.in_place))
        attentions = (one.component for one in modules if one.in_place)
        found = [attention_functions(a.computing_module) for a in attentions if isinstance(a, FunctionAttentionBridge)]
        self.registries = tuple({id(registry): registry for registry in found}.values())

    def __call__(
        self, input: ModelInput, return_type: str | None = "logits", loss_per_token: bool = False, **options: Any
    ) -> Any:
        """Run the graph; the arguments are those of `bridge.forward` for a run of all layers."""
        self.bridge._check_call(return_type, None, None)
        if self.closed:
            raise ValueError("this runner was closed; make another with bridge.compile")
        call = self.bridge._call(input, None, **options)
        self._fit(call.kwargs, None if call.columns is None else call.columns.mask)
        return self.bridge._answer(call, return_type, loss_per_token, self._run)

    def _step(self, kwargs: dict[str, Any], mask: Bool[Tensor, "batch total"]) -> CausalLMOutputWithPast:
        """One forward pass of a generation, whose last columns of `mask` it reads."""
        self._fit(kwargs, mask)
        cache = self.bridge.arguments.value(CACHE, (), kwargs)
        return CausalLMOutputWithPast(logits=self._run(kwargs), **{CACHE_FIELD: cache})

    def _fit(self, kwargs: dict[str, Any], mask: Bool[Tensor, "batch total"] | None) -> None:
        """Have buffers, places and values for a call."""
        words = (TOKENS, EMBEDDINGS)
        tokens = next(x for word in words if (x := self.bridge.arguments.value(word, (), kwargs)) is not None)
        batch, pos = tokens.shape[:2]
        if (batch, pos) != self._ones.shape or self._ones.device != tokens.device:
            self._ones, self._fits = torch.ones(batch, pos, dtype=torch.bool, device=tokens.device), False
        self.text = self._ones if mask is None else mask[:, -pos:].contiguous()
        if self._fits and all(edit.settled for edit in self.edits):
            return
        cache = self.bridge.arguments.value(CACHE, (), kwargs)
        sizes = {"batch": batch, "pos": pos, "query_pos": pos, "key_pos": pos}
        for part in self.declared:
            axes = part.point.axes.split()
            if cache is not None and "key_pos" in axes:
                sizes["key_pos"] = cache.get_mask_sizes(pos, part.point.layer())[0]
            part.fit(tuple(sizes.get(axis, size) for axis, size in zip(axes, part.like.shape, strict=True)))
        self._fits = not self._keyed

    def _run(self, kwargs: dict[str, Any], run: Callable[..., tuple[Tensor, int]] | None = None) -> Tensor:
        run = run or self._compiled
        if Watch.on(self.bridge.original_model) is not None:
            run = self._graph
            warnings.warn(EAGERLY, stacklevel=4)  # Python shows it once for each place
        outer, state.runner = state.runner, self
        try:
            with ExitStack() as asked:
                for registry in self.registries:
                    asked.enter_context(asking(registry))
                output, fired = run(kwargs)
        finally:
            state.runner = outer
        if fired != len(self.hooks):
            why = "a module of the model was exchanged since, or is not called; close this runner and make another"
            raise ValueError(f"bridge.compile: {fired} of {len(self.hooks)} declared hooks fired: {why}")
        return output

    def _graph(self, kwargs: dict[str, Any]) -> tuple[Tensor, int]:
        """What is compiled: the model's own forward, and how many ports fired when it was traced."""
        self.fired = 0
        output = main_output(self.bridge.original_model._call_impl(**kwargs))
        fired, self.fired = self.fired, 0
        return output, fired

    def _joined(self, pieces: Mapping[str, Sequence[Tensor]]) -> ActivationCache:
        """What the steps of a generation kept."""
        kept = {key: read.joined(pieces[key]) for read in self.reads for key in read.keys}
        return ActivationCache(kept, self.bridge)

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
        for place in self.places:
            place._take_off()
        self.bridge.attachment.runners[:] = [one for one in self.bridge.attachment.runners if one is not self]
        self.closed, self.places = True, ()

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
