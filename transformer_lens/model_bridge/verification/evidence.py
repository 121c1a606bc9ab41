"""What `verify` judges by: the model's own run seen by plain torch hooks, and the bridge's captures.

Nothing here reads the table of ports: a reference is the input or output of the module that a component names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens.hook_point import HookPoint
from transformer_lens.hooked_root import HookSpec
from transformer_lens.model_bridge.generalized_components import ComponentBridge
from transformer_lens.model_bridge.outputs import main_output

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge

ROUNDINGS = {torch.float64: 2.0**-20, torch.float32: 2.0**-16, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
"""How far two ways of computing the same value may lie apart, as a share of the largest value there."""

RECORDS = "_output_capturing_hooks_installed"
"""What transformers marks a model with that has its recording hooks."""
SMALL = 10_000_000
"""Parameters below which a forward is too short to share among threads."""


def every(name: str) -> bool:
    """The filter that takes every hook, also those on request."""
    return True


def neutral(tensor: Tensor, hook: HookPoint) -> None:
    """A user hook that changes nothing."""


def tensors(output: Any) -> list[Tensor | None]:
    """What a module returned, item by item; `None` for what is no tensor."""
    items = output if isinstance(output, (tuple, list)) else [output]
    return [item if isinstance(item, Tensor) else None for item in items]


def copied(value: Any) -> Any:
    """A copy whose tensors no later operation changes; other objects become `None`."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(map(copied, value)) if isinstance(value, (tuple, list)) else None


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value expected.

    Entries that are not a number in both are equal. The lowest number, which stands for "masked", does
    not count as the largest value.
    """
    if got.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return float((got != expected.to(got.device)).any())
    wide = torch.float64 if expected.dtype == torch.float64 else torch.float32
    a, b = got.to(wide), expected.to(got.device, wide)
    change = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
    usual = b.abs()[b.abs() < torch.finfo(expected.dtype).max / 2]
    scale = float(usual.max()) if usual.numel() else 0.0
    return float(change.max()) / (scale or 1.0) if change.numel() else 0.0


@dataclass
class ModuleCall:
    """What one Hugging Face module received and returned, each copied at once."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None

    @property
    def input(self) -> Tensor | None:
        """Its first tensor."""
        return next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)), None)


@contextmanager
def watching(modules: Mapping[str, nn.Module], calls: dict[str, ModuleCall]) -> Iterator[None]:
    """Note the calls of some modules with plain torch hooks."""
    with ExitStack() as undo:
        for name, module in modules.items():

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                calls[name] = ModuleCall(copied(args), {key: copied(value) for key, value in kwargs.items()})

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                calls[name].output = copied(output)

            undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(leave).remove)
        yield


@contextmanager
def without_new_hooks(model: nn.Module) -> Iterator[None]:
    """Take off again what transformers puts on a model for good when `hidden_states` are first asked for."""
    before = [(module, set(module._forward_hooks), RECORDS in module.__dict__) for module in model.modules()]
    try:
        yield
    finally:
        for module, known, recorded in before:
            for added in set(module._forward_hooks) - known:
                del module._forward_hooks[added]
            if not recorded:
                module.__dict__.pop(RECORDS, None)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is as it was afterwards.

    Small models run on one thread: on a busy machine two are ten times slower.
    """
    modes = [(module, module.training) for module in model.modules()]
    threads = torch.get_num_threads()
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    try:
        with torch.inference_mode(False), torch.no_grad():
            model.eval()
            torch.set_num_threads(1 if small else threads)
            yield
    finally:
        torch.set_num_threads(threads)
        for module, mode in modes:
            module.training = mode


@contextmanager
def gradients_of_activations(model: nn.Module) -> Iterator[None]:
    """Gradients on, those of parameters off, so that none of their `.grad` is touched."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in required:
            parameter.requires_grad_()


@dataclass
class Evidence:
    """The runs that the checks share; each is made when first asked for."""

    bridge: TransformerBridge
    tokens: Int[Tensor, "batch pos"]
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    # -- the model by itself -------------------------------------------------------------------------

    @cached_property
    def components(self) -> dict[str, ComponentBridge]:
        """Every component by name."""
        return {component.name: component for component in self.bridge.components()}

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What the bridge calls the model with."""
        calls: dict[str, Any] = {}
        model = self.bridge.original_model
        handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.update(kwargs), with_kwargs=True)
        try:
            self.bridge(self.tokens, return_type=None)
        finally:
            handle.remove()
        return calls

    @cached_property
    def own(self) -> tuple[Tensor, Sequence[Tensor], dict[str, ModuleCall]]:
        """The bare model's output, its own `hidden_states`, and what its modules did.

        What `prepare_model` did is undone for this run.
        """
        model, calls = self.bridge.original_model, dict[str, ModuleCall]()
        modules = {name: component.original_component for name, component in self.components.items()}
        arguments = self.arguments
        self.bridge._preparation.undo()
        try:
            output = main_output(model(**arguments))
            with without_new_hooks(model), watching(modules, calls):
                hidden = model(**arguments, output_hidden_states=True).hidden_states
        finally:
            self.bridge._preparation = self.bridge.adapter.prepare_model(model)
        return output, hidden or (), calls

    def received(self, component: str) -> Tensor | None:
        """What a component's module received; `None` if it was not called."""
        call = self.own[2].get(component)
        return None if call is None else call.input

    def returned(self, component: str, item: int = 0) -> Tensor | None:
        """One item of what a component's module returned."""
        call = self.own[2].get(component)
        items = tensors(call.output) if call else []
        return items[item] if item < len(items) else None

    # -- the bridge ----------------------------------------------------------------------------------

    @cached_property
    def output(self) -> Tensor:
        """The bridge's output with no hook."""
        output: Tensor = self.bridge(self.tokens)
        return output

    @cached_property
    def repeats_to(self) -> float:
        """How well the same call repeats itself: 0, unless a kernel adds in an order of its own."""
        return max(largest_difference(self.bridge(self.tokens), self.output) for _ in range(2))

    @cached_property
    def captured(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and every hook's value, copied when it was captured."""
        return self.bridge.run_with_cache(self.tokens, names_filter=every, clone=True, return_cache_object=False)

    @property
    def cache(self) -> dict[str, Tensor]:
        """Every hook's value, copied when it was captured."""
        return self.captured[1]

    def value(self, name: str) -> Tensor | None:
        """A hook's value, or `None` where there is no such hook or it did not fire."""
        return self.cache.get(name)

    def wide(self, name: str) -> Float[Tensor, ...] | None:
        """A hook's value in at least float32."""
        value = self.value(name)
        return None if value is None else value.to(torch.promote_types(value.dtype, torch.float32))

    @cached_property
    def inside(self) -> dict[str, list[str]]:
        """The hooks inside each module that has a twin, by the component of that module."""
        twins = self.bridge.attachment.twins.values()
        return {twin.component.name: [hook.name for hook in twin.hooks.values()] for twin in twins}

    @cached_property
    def ports(self) -> set[str]:
        """The hooks that a module hands over."""
        return set(self.bridge.hook_dict) - {name for names in self.inside.values() for name in names}

    def hooked(self, hooks: Sequence[HookSpec], **options: Any) -> Tensor:
        """The output of a run with hooks."""
        output: Tensor = self.bridge.run_with_hooks(self.tokens, fwd_hooks=hooks, **options)
        return output

    # -- tolerances ----------------------------------------------------------------------------------

    @property
    def same(self) -> tuple[float, str]:
        """The tolerance where the very same computation is repeated."""
        if not self.repeats_to:
            return 0.0, "the same computation, bit for bit"
        return 2 * self.repeats_to, "the model itself repeats no better on this device"

    @property
    def rounding(self) -> tuple[float, str]:
        """The tolerance where the same value is computed in another way."""
        dtype = self.bridge.cfg.dtype
        share = ROUNDINGS[dtype]
        if dtype == torch.float64:
            return share, "another order of operations, and norms and routers may compute in float32"
        steps = share / torch.finfo(dtype).eps
        return share, f"another order of operations: {steps:.0f} roundings of {str(dtype).removeprefix('torch.')}"
