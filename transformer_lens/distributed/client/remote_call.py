"""`RemoteBlock` stands in for a block; one call goes out for each stretch of blocks without local work between them."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_lens.distributed.client.remote_cache import RemoteText
from transformer_lens.distributed.client.route import Route, Tries
from transformer_lens.distributed.client.spans import part_of
from transformer_lens.distributed.protocol.messages import EDITS, Action, Reply, Request, SpanError
from transformer_lens.hook_points import Capture, Edit, HookEntry, HookPoint, Keep
from transformer_lens.model_bridge import BlockElsewhere, HookRequest


def action_of(request: HookRequest) -> Action:
    fn = request.entry.fn
    if isinstance(fn, Edit):
        number = fn.value if isinstance(fn.value, float) else None
        return Action(request.name, fn.operation, number, **fn.chosen)
    if request.direction == "bwd":
        return Action(request.name, "gradient")
    # A hook that is not known to be read-only may write on a local bridge too.
    return Action(request.name, "look" if request.entry.reads_only else "keep")


@dataclass
class StretchCall:
    """Blocks `first` to `end` of one forward, with the hooks in them."""

    route: Route
    request: Request
    waiting: list[HookRequest]
    looked: dict[int, Tensor] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    text: RemoteText | None = None  # the text that this continues, if keys and values are kept

    def values(self) -> dict[int, Tensor]:
        """The tensors of edits, by the number of their action."""
        found = {n: hook.entry.fn.value for n, hook in enumerate(self.waiting) if isinstance(hook.entry.fn, Edit)}
        return {n: value for n, value in found.items() if isinstance(value, Tensor)}

    def run(self, stream: Tensor) -> Tensor:
        """The stream after these blocks; every hook in them gets its activation."""
        values = self.values()
        self.kept = [n for n, action in enumerate(self.request.actions) if action.do == "keep"]
        backward = any(action.do == "gradient" for action in self.request.actions)
        flows = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (stream, *values.values()))
        outputs: tuple[Tensor, ...]
        if self.text is not None and flows:
            raise ValueError(
                "past_key_values: no gradient comes back through keys and values on servers; call inside "
                "torch.no_grad(), or on the whole text without past_key_values"
            )
        if self.text is None and (flows or (backward and torch.is_grad_enabled())):
            # As with local blocks, whose parameters require gradients, a gradient can be taken at any hook.
            begin = stream if stream.requires_grad else stream.detach().requires_grad_(backward)
            outputs = _Through.apply(self, begin, *values.values())  # type: ignore[no-untyped-call]
        else:
            outputs = self.forward(stream, list(values.values()), grad=False)
        kept = dict(zip(self.kept, outputs[1:], strict=True))
        for n, action in enumerate(self.request.actions):
            if action.do in EDITS:
                self.waiting[n].deliver(None)
        for n in self.turns:
            self.waiting[n].deliver(kept[n] if n in kept else self.looked[n])
        self.looked = {}
        return outputs[0]

    def forward(self, stream: Tensor, values: list[Tensor], grad: bool) -> tuple[Tensor, ...]:
        """The stream after these blocks, then the activations kept."""
        request = self._request(stream, values, grad=grad)
        reply = forward(self.route, request) if self.text is None else self.text.step(request)
        self.turns = reply.turns
        self._check_seen(reply, stream)
        seen = {n: reply.tensors[f"seen.{n}"].to(stream.device) for n in reply.turns}
        self.looked = {n: tensor for n, tensor in seen.items() if n not in self.kept}
        return (reply.tensors["stream"].to(stream.device), *(seen[n] for n in self.kept))

    def backward(self, stream: Tensor, values: list[Tensor], gradients: tuple[Tensor | None, ...]) -> list[Any]:
        """Gradients at the stream and the edits' values; hooks get theirs directly."""
        names = ["grad.stream", *(f"grad.{n}" for n in self.kept)]
        given = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
        reply = backward(self.route, self._request(stream, values, grad=True), given)
        self._check_seen(reply, stream)
        for n in reply.turns:
            self.waiting[n].deliver(reply.tensors[f"seen.{n}"].to(stream.device))
        wanted = [("grad.stream", stream), *zip((f"grad.value.{n}" for n in self.values()), values, strict=True)]
        return [reply.tensors[name].to(like.device) if name in reply.tensors else None for name, like in wanted]

    def _check_seen(self, reply: Reply, stream: Tensor) -> None:
        """Raise `SpanError` for an activation that cannot be its hook's, before any hook gets one."""
        rows, new, width = stream.shape
        keys = new + (self.text.length if self.text is not None else 0)
        known = {"batch": rows, "pos": new, "query_pos": new, "key_pos": keys, "d_model": width, "1": 1}
        for n in reply.turns:
            point, found = self.waiting[n].point, reply.tensors[f"seen.{n}"]
            axes = point.axes.split()
            fits = len(axes) == found.ndim and all(
                known.get(a, size) == size for a, size in zip(axes, found.shape, strict=True)
            )
            if not fits or found.is_floating_point() == point.integer:
                expected = [known.get(axis, axis) for axis in axes]
                got = f"{found.dtype} {list(found.shape)}"
                raise SpanError(f"the server answered {self.waiting[n].name!r} as {got}, expected {expected}")

    def _request(self, stream: Tensor, values: list[Tensor], grad: bool) -> Request:
        named = {f"value.{n}": value for n, value in zip(self.values(), values, strict=True)}
        return replace(self.request, grad=grad, tensors={"stream": stream, **named, **self.request.tensors})


def forward(route: Route, request: Request) -> Reply:
    """Run blocks forward on one or several servers; if a later one fails, another continues from its input."""
    tries = Tries(route, "forward", request.first, request.end)
    whole, at = Reply(), request.first
    stream = request.tensors["stream"]
    while at < request.end:
        leg = tries.legs(at, request.end)[0]
        part = part_of(request, leg.first, leg.end, {"stream": stream})
        reply = tries.ask(leg.span, part.request)
        if reply is not None:
            part.add_to(whole, reply)
            stream, at = reply.tensors["stream"], leg.end
    tries.done()
    return whole


def backward(route: Route, request: Request, gradients: dict[str, Tensor]) -> Reply:
    """Run gradients, `grad.stream` at the end and `grad.n` at kept activations, back through a forward's blocks."""
    tries = Tries(route, "backward", request.first, request.end)
    whole, end = Reply(), request.end
    streams = {request.first: request.tensors["stream"]}
    gradients = dict(gradients)
    while end > request.first:
        legs = tries.legs(request.first, end)
        unknown = next((leg for leg in legs[:-1] if leg.end not in streams), None)
        if unknown is not None:
            part = part_of(request, unknown.first, unknown.end, {"stream": streams[unknown.first]})
            reply = tries.ask(unknown.span, part.request)
            if reply is not None:
                streams[unknown.end] = reply.tensors["stream"]
            continue
        leg = legs[-1]
        back = replace(request, kind="backward", tensors={**request.tensors, **gradients})
        part = part_of(back, leg.first, end, {"stream": streams[leg.first]})
        if any(name.startswith("grad.") for name in part.request.tensors):
            reply = tries.ask(leg.span, part.request)
            if reply is None:
                continue
            part.add_to(whole, reply)
            # The gradient that came in is consumed; the one that comes back enters the blocks before.
            gradients.pop("grad.stream", None)
            gradients |= {name: found for name, found in reply.tensors.items() if name == "grad.stream"}
        end = leg.first
    tries.done()
    whole.tensors.pop("grad.stream", None)
    whole.tensors |= {name: gradient for name, gradient in gradients.items() if name == "grad.stream"}
    return whole


class _Through(torch.autograd.Function):
    """A stretch of remote blocks in autograd's graph, whose server recomputes the forward in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: StretchCall, stream: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        outputs = call.forward(stream, list(values), grad=True)
        ctx.call = call
        ctx.save_for_backward(stream, *values)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        stream, *values = ctx.saved_tensors
        return (None, *ctx.call.backward(stream, values, gradients))


@dataclass
class Pass:
    """One forward of a model: what the servers need of it, and how many blocks are done."""

    route: Route
    tensors: dict[str, Tensor]
    use_cache: bool
    text: RemoteText | None
    edits: Sequence[Edit] = ()  # what trained prompts add to each block's input
    done: int = 0

    def prompts_at(self, layer: int) -> list[HookRequest]:
        """The same as hook requests at a block's input."""
        name = f"blocks.{layer}.hook_resid_pre"
        return [HookRequest(name, HookPoint(name), HookEntry(edit), "fwd") for edit in self.edits[layer : layer + 1]]


_innermost = threading.local()
"""`current`: the forward that this thread is in. No context variable: a node's tasks would keep it, and its text."""


@contextmanager
def passing(current: Pass) -> Iterator[None]:
    """Make a model's forward the current one in this thread, for its blocks to find."""
    before = vars(_innermost).get("current")
    _innermost.current = current
    try:
        yield
    finally:
        _innermost.current = before


class RemoteBlock(BlockElsewhere):
    """Stands in for a block on a server. The first of a stretch sends the call, the others pass the stream on."""

    blocks: Any  # all blocks of the model, including this one

    def __init__(self, layer: int, route: Route, blocks: nn.ModuleList, returns_tuple: bool) -> None:
        super().__init__()
        self.layer = layer
        self.route = route
        self.__dict__["blocks"] = blocks  # not a submodule: it holds this one
        self.returns_tuple = returns_tuple

    def refusal(self, name: str, entry: HookEntry, direction: str) -> Exception | None:
        reads = entry.reads_only or isinstance(entry.fn, Capture)
        if reads or (direction == "fwd" and isinstance(entry.fn, (Edit, Keep))):
            return None
        kind = getattr(getattr(entry.fn, "func", entry.fn), "__name__", type(entry.fn).__name__)
        where = f"{kind} at {name!r}: its block runs on another machine, where no Python of yours runs"
        if direction == "bwd":
            return ValueError(
                f"backward hook {where}; read gradients with run_with_cache(incl_bwd=True), or put the hook at "
                "hook_resid_pre or hook_resid_post"
            )
        return ValueError(
            f"hook {where}; use an Edit ({', '.join(EDITS)}) or a Keep there, run_with_cache to read, or put the "
            "function at hook_resid_pre or hook_resid_post"
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the block on the stream with its prompts, added before any torch hook of this module sees it."""
        current = self._current()
        if current is not None and self.layer >= current.done:
            for prompt in current.prompts_at(self.layer):
                hidden_states = prompt.entry.fn(hidden_states, hook=prompt.point)
        return super().__call__(hidden_states, *args, **kwargs)

    def editing(self, operation: Literal["scale", "set"], value: Tensor | float) -> Edit:
        return Edit(operation, value)

    def _current(self) -> Pass | None:
        """This thread's forward, if it is one of this model."""
        current: Pass | None = vars(_innermost).get("current")
        return current if current is not None and current.route is self.route else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stream after this block, or unchanged if an earlier call included this block."""
        current = self._current()
        if current is None:
            raise ValueError(f"block {self.layer} runs on another machine; call the model, not its block")
        if self.layer >= current.done:
            legs = self.route if current.text is None else current.text
            end = self._end_of_stretch(legs.end_of_leg(self.layer))
            hooks = self.requests()  # what its prompts add is in the stream
            for block in list(self.blocks)[self.layer + 1 : end]:
                hooks += [*current.prompts_at(block.layer), *block.requests()]
            kind, actions = "forward" if current.text is None else "step", [action_of(hook) for hook in hooks]
            request = Request(kind, self.layer, end, actions, current.use_cache, tensors=current.tensors)
            hidden_states = StretchCall(self.route, request, hooks, text=current.text).run(hidden_states)
            current.done = end
        return (hidden_states, None) if self.returns_tuple else hidden_states

    def _end_of_stretch(self, end: int) -> int:
        """The end of this call: that of a server's blocks, or the first block edge with torch hooks."""
        block: RemoteBlock
        for block in list(self.blocks)[self.layer : end]:
            if block.layer > self.layer and (block._forward_pre_hooks or block._backward_hooks):
                return block.layer
            if block._forward_hooks or block._backward_hooks or block._backward_pre_hooks:
                return block.layer + 1
        return end
