"""Evidence for `verify`: the model's own run seen by plain torch hooks, and the bridge's captures.

Nothing here reads the table of ports: a reference is the input or output of the module that a component names, and the
KV cache goes in by the parameter that transformers itself annotates as one.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens.hooks.point import HookFunction, HookPoint
from transformer_lens.hooks.root import Capture, HookSpec
from transformer_lens.model_bridge.access.ports import Inside
from transformer_lens.model_bridge.access.weights import inner_model
from transformer_lens.model_bridge.attaching.remote_blocks import BlockElsewhere
from transformer_lens.model_bridge.calls.inputs import main_output
from transformer_lens.model_bridge.generalized_components import BlockBridge, ComponentBridge
from transformer_lens.model_bridge.upstream import arguments_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge

ROUNDINGS = {torch.float64: 2.0**-20, torch.float32: 2.0**-16, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
"""How far two ways to compute the same value may differ, as a share of the largest value."""

RECORDS = "_output_capturing_hooks_installed"
"""The mark that transformers leaves on a model with its recording hooks."""
SMALL = 10_000_000
"""Parameters below which a forward is too short to share among threads."""


class Looking(Capture):
    """A user hook that changes nothing, and that remote blocks recognise: `what` it sees, by hook name."""

    def __init__(self, what: Callable[[Tensor, HookPoint], Any] = lambda tensor, hook: None) -> None:
        super().__init__({})
        self.what = what
        self.found: dict[str, list[Any]] = defaultdict(list)

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        self.found[str(hook.name)].append(self.what(tensor, hook))


def tensors(output: Any) -> list[Tensor | None]:
    """What a module returned, item by item; `None` for anything but a tensor."""
    items = output if isinstance(output, (tuple, list)) else [output]
    return [item if isinstance(item, Tensor) else None for item in items]


def copied(value: Any) -> Any:
    """A copy whose tensors no later operation changes; other objects become `None`."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(map(copied, value)) if isinstance(value, (tuple, list)) else None


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value expected.

    Entries that are nan in both are equal. The lowest number, which means "masked", does not count as the largest
    value.
    """
    if got.shape != expected.shape:
        return float("inf")
    if torch.equal(got, expected.to(got.device)):
        return 0.0
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

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: Any = None

    @property
    def input(self) -> Tensor | None:
        return next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)), None)


@contextmanager
def plain_hooks(
    modules: Mapping[str, nn.Module], enter: Callable[..., Any] | None = None, leave: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Torch hooks before and after some modules, which are given the module's name first."""
    with ExitStack() as undo:
        for name, module in modules.items():
            if enter is not None:
                undo.callback(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True).remove)
            if leave is not None:
                undo.callback(module.register_forward_hook(partial(leave, name)).remove)
        yield


def watching(modules: Mapping[str, nn.Module], calls: dict[str, ModuleCall]) -> AbstractContextManager[None]:
    """Record the calls of some modules with plain torch hooks."""

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[name] = ModuleCall(copied(args), {key: copied(value) for key, value in kwargs.items()})

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name].output = copied(output)

    return plain_hooks(modules, enter, leave)


@contextmanager
def without_new_hooks(model: nn.Module) -> Iterator[None]:
    """Remove what transformers puts on a model for good when `hidden_states` are first asked for."""
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
    """Evaluation mode without gradients; modes and parameters are restored afterwards.

    Small models run on one thread: on a busy machine two are ten times slower.
    """
    modes = [(module, module.training) for module in model.modules()]
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    threads = torch.get_num_threads()
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    try:
        with torch.inference_mode(False), torch.no_grad():
            model.eval()
            for parameter in required:
                parameter.requires_grad_(False)
            torch.set_num_threads(1 if small else threads)
            yield
    finally:
        torch.set_num_threads(threads)
        for module, mode in modes:
            module.training = mode
        for parameter in required:
            parameter.requires_grad_()


@dataclass
class OwnRun:
    """What the bare model did in one call: its output, its own `hidden_states`, and its modules' calls."""

    output: Tensor
    hidden: Sequence[Tensor] = ()
    calls: dict[str, ModuleCall] = field(default_factory=dict)


class Seen:
    """One call of the bare model and of the bridge, which the checks on values read."""

    bridge: "TransformerBridge"
    tokens: Int[Tensor, "batch pos"]
    own: OwnRun
    """The bare model's run."""
    captured: tuple[Tensor, dict[str, Tensor]]
    """The bridge's output and every hook's value, copied when it was captured."""
    repeats_to: float
    """How much repeating the same call changes: 0, unless a kernel adds in another order."""

    def edge(self, component: str, role: str) -> str:
        """The component, or its part of that role if no module of its own is around its parts."""
        found, around = (self.components.get(name) for name in (component, component.rpartition(".")[0]))
        return f"{component}.{role}" if found and around and found.path == around.path else component

    def received(self, component: str) -> Tensor | None:
        """What a component's module received; `None` if it was not called."""
        call = self.own.calls.get(self.edge(component, "in"))
        return None if call is None else call.input

    def returned(self, component: str, item: int = 0) -> Tensor | None:
        """One item of what a component's module returned."""
        call = self.own.calls.get(self.edge(component, "out"))
        items = tensors(call.output) if call else []
        return items[item] if item < len(items) else None

    @property
    def cache(self) -> dict[str, Tensor]:
        return self.captured[1]

    def wide(self, name: str) -> Float[Tensor, "..."] | None:
        """A hook's value in at least float32."""
        value = self.cache.get(name)
        return None if value is None else value.to(torch.promote_types(value.dtype, torch.float32))

    def attended_values(self, attention: str) -> Float[Tensor, "batch key kv_head d_head"] | None:
        """The values of every key that attention sees in this call."""
        return self.wide(f"{attention}.hook_v")

    @cached_property
    def components(self) -> dict[str, ComponentBridge]:
        return {component.name: component for component in self.bridge.components()}

    @property
    def blocks(self) -> list[str]:
        return [f"blocks.{i}" for i in range(self.bridge.cfg.n_layers)]

    def block(self, name: str) -> BlockBridge:
        found = self.components[name]
        assert isinstance(found, BlockBridge)
        return found

    @cached_property
    def ports(self) -> set[str]:
        declared = [(c.name, hook) for c in self.components.values() for hook in c.declared]
        inside = {f"{component}.{hook.name}" for component, hook in declared if isinstance(hook.port, Inside)}
        return set(self.bridge.hook_dict) - inside

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

    @property
    def projecting(self) -> tuple[float, str]:
        """The tolerance where a projection has another input than in the model's own run."""
        eight_bits = any(parameter.dtype == torch.int8 for parameter in self.bridge.original_model.parameters())
        return (2.0**-5, "8-bit layers round what they read to 127 steps") if eight_bits else self.rounding


@dataclass
class Evidence(Seen):
    """The runs that the checks share; each is made when first asked for."""

    bridge: "TransformerBridge"
    tokens: Int[Tensor, "batch pos"]
    thorough: bool = False
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    kept: list[Any] = field(default_factory=list)
    """The steps of decoding, which checks share."""

    @property
    def elsewhere(self) -> bool:
        return bool(self.bridge.attachment.blocks_elsewhere)

    def block_elsewhere(self, name: str) -> BlockElsewhere | None:
        """The remote block that a component or hook is in; `None` for a local one."""
        parts, blocks = name.split("."), self.bridge.attachment.blocks_elsewhere
        inside = len(parts) > 2 and parts[0] == "blocks" and int(parts[1]) in blocks
        return blocks[int(parts[1])][1] if inside else None

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The module of every local component."""
        return {name: c.original_component for name, c in self.components.items() if not self.block_elsewhere(name)}

    @contextmanager
    def bare(self) -> Iterator[Any]:
        """The model as it was before the bridge: what `prepare_model` did is undone for this time."""
        model = self.bridge.original_model
        self.bridge._preparation.undo()
        try:
            yield model
        finally:
            self.bridge._preparation = self.bridge.adapter.prepare_model(model)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        with plain_hooks({"": self.bridge.original_model}, lambda name, module, args, kwargs: given.update(kwargs)):
            self.bridge(self.tokens, return_type=None)
        return given

    @cached_property
    def takes_cache(self) -> str | None:
        """The parameter of the model's forward that transformers annotates as a KV cache; `None` if it has none."""
        return next((p.name for p in self.parameters.values() if "Cache" in str(p.annotation)), None)

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(inner_model(self.bridge.original_model)[1]).forward).parameters

    @cached_property
    def streams(self) -> dict[str, Tensor]:
        """The stream that each stage of the bare model reads."""
        return {stage: stream for stage in self.stages if (stream := self.received(stage)) is not None}

    def watched(self, model: nn.Module, *args: Any, **kwargs: Any) -> OwnRun:
        """One call of the bare model, seen by plain torch hooks."""
        calls: dict[str, ModuleCall] = {}
        more = {} if self.elsewhere else {"output_hidden_states": True}
        with without_new_hooks(model), watching(self.modules, calls):
            output = model(*args, **kwargs, **more)
        return OwnRun(main_output(output), () if self.elsewhere else output.hidden_states or (), calls)

    @cached_property
    def own(self) -> OwnRun:  # type: ignore[override]
        """The bare model's run on the whole text; its output is that of a call without any hook."""
        arguments = self.arguments
        with self.bare() as model:
            output = main_output(model(**arguments))
            return replace(self.watched(model, **arguments), output=output)

    @cached_property
    def output(self) -> Tensor:
        return self.bridge(self.tokens)  # type: ignore[no-any-return]

    @cached_property
    def repeats_to(self) -> float:  # type: ignore[override]
        return max(largest_difference(self.bridge(self.tokens), self.output) for _ in range(2))

    @cached_property
    def captured(self) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        return self.everything(self.tokens)

    def everything(self, tokens: Tensor, clone: bool = True, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The bridge's output and the value of every hook that fires, in one call."""
        names = [name for name in self.bridge.hook_dict if self.shown[name]]
        return self.bridge.run_with_cache(tokens, names_filter=names, clone=clone, return_cache_object=False, **options)

    @cached_property
    def shown(self) -> Mapping[str, Sequence[Any]]:
        """Every hook, as many times as a user hook fires there in one forward pass."""
        look = Looking()
        with self.bridge.hooks([(lambda name: True, look)]):  # here it is no error that one does not fire
            self.bridge(self.tokens, return_type=None)
        return {name: look.found[name] for name in self.bridge.hook_dict}

    @cached_property
    def inside(self) -> dict[str, list[str]]:
        """The hooks inside each module that has any, by the component of that module."""
        opened = self.bridge.attachment.opened.values()
        return {module.component.name: [hook.name for hook in module.hooks.values()] for module in opened}

    def hooked(self, hooks: Sequence[HookSpec], **options: Any) -> Tensor:
        return self.bridge.run_with_hooks(self.tokens, fwd_hooks=hooks, **options)  # type: ignore[no-any-return]

    def rewriting(self, name: str) -> HookFunction:
        """A hook that writes back what is there; for remote expert indices, one that only reads."""
        block = self.block_elsewhere(name)
        if block is None:
            return lambda tensor, hook: tensor
        return Looking() if self.bridge.hook_dict[name].integer else block.editing("scale", 1.0)

    @cached_property
    def stages(self) -> list[str]:
        """The blocks, and the final norm with what follows it."""
        return [*self.blocks, "ln_final"]

    def own_outputs(
        self, components: Iterable[str], calls: Mapping[str, ModuleCall], note: Callable[[str, float], None]
    ) -> AbstractContextManager[None]:
        """Have modules return what they returned in the bare model's call, and note how far they were from it.

        So every module starts from the same input, and one run judges them all.
        """

        def force(component: str, module: nn.Module, args: Any, output: Any) -> Any:
            own = calls[component].output
            pairs = zip(tensors(output), tensors(own), strict=False)
            note(component, max(largest_difference(a, b) for a, b in pairs if a is not None and b is not None))
            return own

        return plain_hooks({component: self.modules[component] for component in components}, leave=force)

    def forced(self, streams: Mapping[str, Tensor], came: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Give every stage the stream of `streams`, and note in `came` the one that arrived."""

        def enter(stage: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
            arguments = arguments_of(type(module))
            came[stage] = arguments.first_value(args, kwargs).detach().clone()
            return arguments.with_first(streams[stage].clone(), args, kwargs)

        return plain_hooks({stage: self.modules[stage] for stage in self.stages}, enter)
