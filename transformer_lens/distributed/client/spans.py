"""Spans as a client sees them: some blocks, a way to send messages to their server, and their part of a call."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from torch import Tensor

from transformer_lens.distributed.client.routing import ServerFacts
from transformer_lens.distributed.protocol import messages as wire


class Span(Protocol):
    """Some blocks of a model, wherever they run."""

    blocks: range
    peer: str
    """The server: a libp2p peer id, or a name such as `local-1`."""

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        """Send one message and return the answer. Raises `SpanUnreachable` if none comes within `timeout` seconds."""


class SpanSource(Protocol):
    """A route's source of spans."""

    def spans(self) -> Sequence[Span]:
        """The spans known now, quickly."""

    def refresh(self) -> None:
        """Look for spans again, as after a failure."""

    def facts(self, span: Span) -> ServerFacts:
        """What is known of a span's speed."""

    def close(self) -> None:
        """Stop looking."""


class StaticSpans:
    """A list of spans; where two have a block, the earlier one is asked first."""

    def __init__(self, given: Iterable[Span]) -> None:
        self.given: list[Span] = list(given)
        """May be changed at any time."""

    def spans(self) -> Sequence[Span]:
        return tuple(self.given)

    def refresh(self) -> None:
        """Does nothing: the list is complete."""

    def facts(self, span: Span) -> ServerFacts:
        """Without measurements, a span's place in the list serves as its latency."""
        return ServerFacts(span.peer, span.blocks, latency=float(self.given.index(span)))

    def close(self) -> None:
        """Does nothing: the spans belong to the caller."""


def ask(
    span: Span, request: wire.Request, limits: wire.Limits | None = None, timeout: float | None = None
) -> wire.Reply:
    """A server's reply, within `timeout` seconds. Raises `SpanError` if it refuses, else `SpanUnreachable`."""
    limits = limits or wire.Limits()
    where = f"blocks {span.blocks.start} to {span.blocks.stop} on {span.peer}"
    message = wire.pack_request(request)
    excess = wire.too_much(message, limits)
    if excess:
        raise wire.SpanError(f"{where}: {excess}", {"fewer_blocks": True})
    try:
        reply = wire.unpack_reply(span.send(message, timeout), limits)
    except wire.MessageError as error:
        raise wire.SpanUnreachable(f"{where}: the answer cannot be read: {error}") from error
    if reply.error:
        raise wire.SpanError(f"{where}: {wire.printable(reply.error)}", reply.info)
    return reply


def check_answer(request: wire.Request, reply: wire.Reply) -> None:
    """Raise `SpanUnreachable` unless a reply contains what was requested, so that nonsense counts as no answer."""
    back, stream = request.kind == "backward", request.tensors["stream"]
    wanted = ("gradient",) if back else ("look", "keep")
    reads = [n for n, action in enumerate(request.actions) if action.do in wanted]
    like = {"grad.stream" if back else "stream": stream}
    if back:  # a gradient comes back where there is one
        like |= {f"grad.{name}": tensor for name, tensor in request.tensors.items() if name.startswith("value.")}
        reads = [n for n in reads if f"seen.{n}" in reply.tensors]
    known, names = {*like, *(f"seen.{n}" for n in reads)}, set(reply.tensors)
    if names - known or not (back or known <= names):
        told = wire.printable(str(sorted(names)), 500)
        raise wire.SpanUnreachable(f"the server answered with the tensors {told}, expected {sorted(known)}")
    if sorted(reply.turns) != reads:
        told = wire.printable(str(reply.turns), 500)
        raise wire.SpanUnreachable(f"the server answered for the hooks {told}, expected {reads}")
    for name, tensor in like.items():
        found = reply.tensors.get(name, tensor)
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise wire.SpanUnreachable(
                f"the server answered {name} as {found.dtype} {list(found.shape)}, expected {tensor.dtype} "
                f"{list(tensor.shape)}"
            )


class RequestPart(NamedTuple):
    """Some blocks of a call: the request, and its actions' numbers in the whole call."""

    request: wire.Request
    numbers: list[int]

    def add_to(self, whole: wire.Reply, reply: wire.Reply) -> None:
        """Append a server's answer to the whole reply, with the whole call's numbers."""
        back = dict(enumerate(self.numbers))
        whole.tensors.update(_renumbered(reply.tensors, back))
        whole.turns.extend(back[turn] for turn in reply.turns)


def part_of(request: wire.Request, first: int, end: int, changed: Mapping[str, Tensor]) -> RequestPart:
    """The part of a call on blocks `first` to `end`, where `changed` replaces tensors of the whole.

    An action goes with the block in its name, so the end of one block and the start of the next, which are the same
    tensor, go to different parts if the cut is between them.
    """
    numbers = [n for n, action in enumerate(request.actions) if first <= int(action.name.split(".")[1]) < end]
    tensors = _renumbered(request.tensors, {old: new for new, old in enumerate(numbers)})
    actions = [request.actions[n] for n in numbers]
    request = replace(request, first=first, end=end, actions=actions, tensors={**tensors, **changed})
    return RequestPart(request, numbers)


def _renumbered(tensors: Mapping[str, Tensor], numbers: Mapping[int, int]) -> dict[str, Tensor]:
    """The tensors of these actions under their new numbers, such as `value.3`."""
    found = {}
    for name, tensor in tensors.items():
        what, _, number = name.rpartition(".")
        if not number.isdecimal():
            found[name] = tensor
        elif int(number) in numbers:
            found[f"{what}.{numbers[int(number)]}"] = tensor
    return found
