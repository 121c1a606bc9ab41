"""A call cut into parts: each has some of the blocks, the actions in them, and their tensors under new numbers.

A part is checked against what it asked for, so that a server that answers nonsense counts as one that does not answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from transformer_lens.distributed.protocol.messages import Reply, Request, SpanUnreachable, printable


@dataclass(frozen=True)
class RequestPart:
    """Some blocks of a call: what is asked of them, and which numbers its actions have in the whole call."""

    request: Request
    numbers: list[int]

    def add_to(self, whole: Reply, reply: Reply) -> None:
        """Note what a server answered, with the numbers of the whole call, after what is there."""
        back = dict(enumerate(self.numbers))
        whole.tensors.update(_renumbered(reply.tensors, back))
        whole.turns.extend(back[turn] for turn in reply.turns)

    def has_gradients(self) -> bool:
        """Whether any gradient comes into these blocks."""
        names = {"grad.stream", *(f"grad.{n}" for n in range(len(self.numbers)))}
        return not names.isdisjoint(self.request.tensors)


def part_of(request: Request, first: int, end: int, changed: Mapping[str, Tensor]) -> RequestPart:
    """The part of a call on blocks `first` to `end`, where `changed` stands for tensors of the whole.

    >>> from transformer_lens.distributed.protocol.messages import Action
    >>> look = [Action(f"blocks.{layer}.hook_resid_pre", "look") for layer in range(3)]
    >>> part = part_of(Request("forward", 0, 3, actions=look), 1, 3, {"stream": torch.zeros(1, 2, 8)})
    >>> [action.name for action in part.request.actions], part.numbers
    (['blocks.1.hook_resid_pre', 'blocks.2.hook_resid_pre'], [1, 2])

    An action goes with the block that its name has, so the end of one block and the beginning of the next, which are
    the same tensor, go to different parts where the cut is between them.
    """
    numbers = [n for n, action in enumerate(request.actions) if first <= layer_of(action.name) < end]
    tensors = _renumbered(request.tensors, {old: new for new, old in enumerate(numbers)})
    actions = [request.actions[n] for n in numbers]
    request = replace(request, first=first, end=end, actions=actions, tensors={**tensors, **changed})
    return RequestPart(request, numbers)


def layer_of(name: str) -> int:
    """The block of a hook's name.

    >>> layer_of("blocks.12.attn.hook_q")
    12
    """
    return int(name.split(".")[1])


def _renumbered(tensors: Mapping[str, Tensor], numbers: Mapping[int, int]) -> dict[str, Tensor]:
    """Tensors under their new names: `value.3` is of action 3. Those of other actions are left out."""
    found = {}
    for name, tensor in tensors.items():
        what, _, number = name.rpartition(".")
        if not number.isdecimal():
            found[name] = tensor
        elif int(number) in numbers:
            found[f"{what}.{numbers[int(number)]}"] = tensor
    return found


# -- what a server may answer --------------------------------------------------------------------------


def check_forward(request: Request, reply: Reply) -> None:
    """Raise `SpanUnreachable` unless this answers a forward or a step."""
    reads = [n for n, action in enumerate(request.actions) if action.do in ("look", "keep")]
    _check_names(reply, {"stream", *(f"seen.{n}" for n in reads)}, set())
    _check_turns(reply, reads)
    _check_like(reply, "stream", request.tensors["stream"])


def check_backward(request: Request, reply: Reply) -> None:
    """Raise `SpanUnreachable` unless this answers a backward."""
    like = {"grad.stream": request.tensors["stream"]}
    like |= {f"grad.{name}": tensor for name, tensor in request.tensors.items() if name.startswith("value.")}
    hooks = [n for n, action in enumerate(request.actions) if action.do == "gradient"]
    _check_names(reply, set(), {*like, *(f"seen.{n}" for n in hooks)})
    _check_turns(reply, [n for n in hooks if f"seen.{n}" in reply.tensors])
    for name, tensor in like.items():
        if name in reply.tensors:
            _check_like(reply, name, tensor)


def _check_names(reply: Reply, needed: set[str], allowed: set[str]) -> None:
    names = set(reply.tensors)
    if not needed <= names or names - needed - allowed:
        told = printable(str(sorted(names)), 500)
        raise SpanUnreachable(f"the server answered with the tensors {told}, expected {sorted(needed | allowed)}")


def _check_turns(reply: Reply, expected: list[int]) -> None:
    if sorted(reply.turns) != expected:
        told = printable(str(reply.turns), 500)
        raise SpanUnreachable(f"the server answered for the hooks {told}, expected {expected}")


def _check_like(reply: Reply, name: str, tensor: Tensor) -> None:
    """A tensor of the reply has to have the shape and dtype of another one."""
    found = reply.tensors[name]
    if found.shape != tensor.shape or found.dtype != tensor.dtype:
        raise SpanUnreachable(
            f"the server answered {name} as {found.dtype} {list(found.shape)}, expected {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
