"""How an unchanged model runs: some of its layers (`start_at_layer` and `stop_at_layer`, in the calling thread alone),
and with hooks.

While hooks are attached, each forward pass first lets them follow replaced modules (as by PEFT), and runs the model
outside `torch.compile`, whose compiled code ignores hooks that came after it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from transformer_lens.hooks.point import state
from transformer_lens.model_bridge.access.checkpointing import recording
from transformer_lens.model_bridge.access.inside_call import ForwardInPlace
from transformer_lens.model_bridge.upstream import UpstreamError, arguments_of


def covered(layer: int) -> bool:
    """Whether a hook of this layer (-1: the embedding) fires in this thread's run."""
    first = state.first
    return first is None or layer >= first[0] or len(state.executing) != first[1]


class Stopped(BaseException):
    """Leaves the model with the tensor at which it was to stop; never seen by users."""

    def __init__(self, value: Tensor, run: object) -> None:
        super().__init__()
        self.value = value
        self.run = run


@contextmanager
def stopping_at(module: nn.Module, run: object) -> Iterator[None]:
    """Stop, in this thread, where `module` would start, with its input."""
    thread, depth = threading.get_ident(), len(state.executing)

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # torch calls it so while another thread is putting it on or taking it off
            return
        if threading.get_ident() == thread and len(state.executing) == depth:
            raise Stopped(arguments_of(type(module)).first_value(args, kwargs), run)

    # First in line, so that no hook of this module fires, as the module is not part of the run.
    handle = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def starting_at(start: int, places: Sequence[nn.Module], stream: Tensor, returns_tuple: bool) -> Iterator[None]:
    """In this thread, let the blocks below `start` return their input, and `places[start]` read `stream`."""
    outer = state.first
    thread, depth = threading.get_ident(), len(state.executing)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None or threading.get_ident() != thread or len(state.executing) != depth:
            return None
        return arguments_of(type(module)).with_first(stream, args, kwargs)

    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Blocks that are skipped must return what this one returns, or the model would misread their output."""
        if isinstance(output, tuple) != returns_tuple and threading.get_ident() == thread:
            expected, got = ("tuple", "tensor")[:: 1 if returns_tuple else -1]
            raise UpstreamError(type(module).__name__, f"{expected} as its output, it returned a {got}", ())

    with ExitStack() as undo:
        if start < len(places) - 1:
            undo.callback(places[start].register_forward_hook(check).remove)
        for layer, block in enumerate(places[:start]):
            stand_in = _HandOn.join(block, layer)
            stand_in.layer, stand_in.returns_tuple = layer, returns_tuple
            undo.callback(stand_in.leave, layer)
        # A model may add positions to the embeddings it is called with, so what arrives here is not the stream.
        handle = places[start].register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        undo.callback(handle.remove)
        state.first = start, len(state.executing)
        try:
            yield
        finally:
            state.first = outer


class _HandOn(ForwardInPlace):
    """Replaces a block's `forward`: returns the input in threads whose run starts above the block."""

    layer = -1
    returns_tuple = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if covered(self.layer):
            return self.original(*args, **kwargs)
        stream = arguments_of(type(self.module)).first_value(args, kwargs)
        return (stream, None) if self.returns_tuple else stream


COMPILED = "_compiled_call_impl"
"""Where torch keeps what `module.compile()` made."""
Follow = Callable[[], None]
"""Moves something to the modules that are in the model now."""


class Watch(ForwardInPlace):
    """Replaces a model's `forward` on behalf of every bridge that has hooks in it."""

    users: list[Follow]

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.__wrapped__ = self.original  # generate() and PEFT read the signature
        # Parts compiled by themselves (`layer.compile()`) would run their compiled code inside an eager model.
        self.compiled: list[tuple[nn.Module, Any]] = []
        every = [model]
        for module in every:  # not `modules()`: it drops repeats, at several times the cost
            compiled = module.__dict__.get(COMPILED)
            if compiled is not None and not isinstance(compiled, MethodType):  # a generation's own calls stay
                self.compiled.append((module, module.__dict__.pop(COMPILED)))
            if module._modules:
                every += [child for child in module._modules.values() if child is not None]

    @torch.compiler.disable(reason="a model runs eagerly while hooks are on it")  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for follow in tuple(self.users):
            follow()
        outer, state.memo = state.memo, {}
        try:
            with recording(self.module):
                return self.original(*args, **kwargs)
        finally:
            state.memo = outer

    def remove(self) -> None:
        for module, compiled in self.compiled:
            module.__dict__.setdefault(COMPILED, compiled)
        super().remove()
