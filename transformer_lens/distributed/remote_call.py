"""One call of a stretch of remote blocks: what is sent, what its hooks are given, and how gradients go through it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transformer_lens.distributed.edits import Edit, Keep
from transformer_lens.distributed.messages import EDITS, Action, Reply, Request
from transformer_lens.distributed.remote_cache import RemoteText, refuse_gradients
from transformer_lens.distributed.spans import Span, SpanError, ask
from transformer_lens.hook_points import Capture, HookEntry
from transformer_lens.model_bridge import HookRequest


def action_of(request: HookRequest) -> Action:
    """A hook as what a server can do."""
    fn = request.entry.fn
    if isinstance(fn, Edit):
        number = fn.value if isinstance(fn.value, float) else None
        return Action(request.name, fn.operation, number, **fn.chosen)
    if request.direction == "bwd":
        return Action(request.name, "gradient")
    # A hook that is not known to read only goes through the twin's own computation on a local bridge too.
    return Action(request.name, "look" if request.entry.reads_only else "keep")


def refusal(name: str, entry: HookEntry, direction: str) -> Exception | None:
    """Why a hook cannot be sent to a server; `None` if it can."""
    reads = entry.reads_only or isinstance(entry.fn, Capture)
    if reads or (direction == "fwd" and isinstance(entry.fn, (Edit, Keep))):
        return None
    kind = getattr(entry.fn, "__name__", type(entry.fn).__name__)
    if direction == "bwd":
        return ValueError(
            f"backward hook {kind} at {name!r}: its block runs on another machine, where no Python of yours runs; read "
            "gradients with run_with_cache(incl_bwd=True), or put the hook at hook_resid_pre or hook_resid_post"
        )
    return ValueError(
        f"hook {kind} at {name!r}: its block runs on another machine, where no Python of yours runs; use an Edit "
        "(set, add, scale, zero, project_out) or a Keep there, run_with_cache to read, or put the function at "
        "hook_resid_pre or hook_resid_post"
    )


@dataclass
class StretchCall:
    """Blocks `first` to `end` of one forward, on one span, with the hooks that wait in them."""

    span: Span
    request: Request
    waiting: list[HookRequest]
    looked: dict[int, Tensor] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    text: RemoteText | None = None
    """The text that this goes on with, where keys and values are kept."""

    def values(self) -> dict[int, Tensor]:
        """The tensors that edits bring along, by the number of their action."""
        found = {n: hook.entry.fn.value for n, hook in enumerate(self.waiting) if isinstance(hook.entry.fn, Edit)}
        return {n: value for n, value in found.items() if isinstance(value, Tensor)}

    def run(self, stream: Tensor) -> Tensor:
        """The stream after these blocks; every hook in them is given what it asked for."""
        values = self.values()
        self.kept = [n for n, action in enumerate(self.request.actions) if action.do == "keep"]
        backward = any(action.do == "gradient" for action in self.request.actions)
        needed = torch.is_grad_enabled() and (
            backward or any(tensor.requires_grad for tensor in (stream, *values.values()))
        )
        outputs: tuple[Tensor, ...]
        if self.text is not None:
            refuse_gradients([stream, *values.values()])
            outputs = self.forward(stream, list(values.values()), grad=False)
        elif needed:
            # As through local blocks, whose parameters require one, a gradient can be asked for at any hook.
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
        """The stream after these blocks, then what is kept of them."""
        tensors = {"stream": stream, **self._named(values), **self.request.tensors}
        request = replace(self.request, grad=grad, tensors=tensors)
        reply = ask(self.span, request) if self.text is None else self.text.step(self.span, request)
        reads = [n for n, action in enumerate(self.request.actions) if action.do in ("look", "keep")]
        _check(reply, {"stream", *(f"seen.{n}" for n in reads)}, set())
        self.turns = _turns(reply, reads)
        output = _like(reply, "stream", stream)
        seen = {n: reply.tensors[f"seen.{n}"].to(stream.device) for n in reads}
        self.looked = {n: tensor for n, tensor in seen.items() if n not in self.kept}
        return (output, *(seen[n] for n in self.kept))

    def backward(self, stream: Tensor, values: list[Tensor], gradients: tuple[Tensor | None, ...]) -> list[Any]:
        """Gradients at the stream and at the edits' values; those at hooks are handed to them."""
        names = ["grad.stream", *(f"grad.{n}" for n in self.kept)]
        given = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
        tensors = {"stream": stream, **self._named(values), **given, **self.request.tensors}
        reply = ask(self.span, replace(self.request, kind="backward", grad=True, tensors=tensors))
        at_values = [f"grad.value.{n}" for n in self.values()]
        at_hooks = {f"seen.{n}": n for n, action in enumerate(self.request.actions) if action.do == "gradient"}
        _check(reply, set(), {"grad.stream", *at_values, *at_hooks})
        for n in _turns(reply, [n for name, n in at_hooks.items() if name in reply.tensors]):
            self.waiting[n].deliver(reply.tensors[f"seen.{n}"].to(stream.device))
        wanted = [("grad.stream", stream), *zip(at_values, values, strict=True)]
        return [_like(reply, name, tensor) if name in reply.tensors else None for name, tensor in wanted]

    def _named(self, values: list[Tensor]) -> dict[str, Tensor]:
        return {f"value.{n}": value for n, value in zip(self.values(), values, strict=True)}


def _check(reply: Reply, needed: set[str], allowed: set[str]) -> None:
    names = set(reply.tensors)
    if not needed <= names or names - needed - allowed:
        raise SpanError(f"the server answered with the tensors {sorted(names)}, expected {sorted(needed | allowed)}")


def _turns(reply: Reply, expected: list[int]) -> list[int]:
    if sorted(reply.turns) != expected:
        raise SpanError(f"the server answered for the hooks {reply.turns}, expected {expected}")
    return reply.turns


def _like(reply: Reply, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the reply that has to have the shape and dtype of another one."""
    found = reply.tensors[name]
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        raise SpanError(
            f"the server answered {name} as {found.dtype} {list(found.shape)}, expected {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    return found.to(tensor.device)


class _Through(torch.autograd.Function):
    """A stretch of remote blocks in autograd's graph: the server computes the forward again to go back."""

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
