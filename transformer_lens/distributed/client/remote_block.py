"""`RemoteBlock` stands where a block is; one call goes out for each stretch between two places with work to do here."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from transformer_lens.distributed.client.remote_cache import RemoteText
from transformer_lens.distributed.client.remote_call import StretchCall, action_of, refusal
from transformer_lens.distributed.client.route import Route
from transformer_lens.distributed.protocol.edits import Edit
from transformer_lens.distributed.protocol.messages import Request
from transformer_lens.hook_points import HookEntry, HookPoint
from transformer_lens.model_bridge import BlockElsewhere, HookRequest


@dataclass
class Pass:
    """One forward of a model: what the servers have to know of it, and how many blocks are done."""

    route: Route
    tensors: dict[str, Tensor]
    use_cache: bool
    text: RemoteText | None
    edits: Sequence[Edit] = ()
    """What trained prompts add to the input of each block."""
    done: int = 0

    def prompts_at(self, layer: int) -> list[HookRequest]:
        """The same as hooks that wait at a block's input."""
        name = f"blocks.{layer}.hook_resid_pre"
        return [HookRequest(name, HookPoint(name), HookEntry(edit), "fwd") for edit in self.edits[layer : layer + 1]]


_passes = threading.local()
"""`stack`: the forwards that a thread is in, the innermost last."""


@contextmanager
def passing(current: Pass) -> Iterator[None]:
    """The forward of a model that this thread is in, for its blocks to find."""
    stack: list[Pass] = vars(_passes).setdefault("stack", [])
    stack.append(current)
    try:
        yield
    finally:
        stack.pop()


class RemoteBlock(BlockElsewhere):
    """Stands where a block is that a server runs. The first of a stretch sends the call, the others hand on."""

    def __init__(self, layer: int, route: Route, blocks: nn.ModuleList, returns_tuple: bool) -> None:
        super().__init__()
        self.layer = layer
        self.route = route
        self.__dict__["blocks"] = blocks  # not a submodule: it holds this one
        self.returns_tuple = returns_tuple

    def refusal(self, name: str, entry: HookEntry, direction: str) -> Exception | None:
        """Why a hook cannot work inside this block; `None` if it can."""
        return refusal(name, entry, direction)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block on the stream with its prompts: they are there before any torch hook of this module sees it."""
        current = self._current()
        if current is not None and self.layer >= current.done:
            for prompt in current.prompts_at(self.layer):
                hidden_states = prompt.entry.fn(hidden_states, hook=prompt.point)
        return super().__call__(hidden_states, *args, **kwargs)

    def editing(self, operation: Literal["scale", "set"], value: Tensor | float) -> Edit:
        """A hook that multiplies by a value, or sets it, in servers too."""
        return Edit(operation, value)

    def _current(self) -> Pass | None:
        """The forward that this thread is in, if it is one of this model."""
        stack: list[Pass] = vars(_passes).get("stack", [])
        return stack[-1] if stack and stack[-1].route is self.route else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stream after this block, or as it is where an earlier call went through this block."""
        current = self._current()
        if current is None:
            raise ValueError(f"block {self.layer} runs on another machine; call the model, not its block")
        if self.layer >= current.done:
            legs = self.route if current.text is None else current.text
            end = self._end_of_stretch(legs.end_of_leg(self.layer))
            hooks = self.requests()  # what its prompts add is in the stream
            for block in self._between(self.layer + 1, end):
                hooks += [*current.prompts_at(block.layer), *block.requests()]
            request = Request(
                "forward" if current.text is None else "step",
                self.layer,
                end,
                actions=[action_of(hook) for hook in hooks],
                use_cache=current.use_cache,
                tensors=current.tensors,
            )
            hidden_states = StretchCall(self.route, request, hooks, text=current.text).run(hidden_states)
            current.done = end
        return (hidden_states, None) if self.returns_tuple else hidden_states

    def _between(self, first: int, end: int) -> list[RemoteBlock]:
        blocks: Any = self.blocks
        return list(blocks)[first:end]

    def _end_of_stretch(self, end: int) -> int:
        """Where this call ends: with a server's blocks, or where torch hooks, of whoever, wait at a block's edge."""
        for block in self._between(self.layer, end):
            if block.layer > self.layer and (block._forward_pre_hooks or block._backward_hooks):
                return block.layer
            if block._forward_hooks or block._backward_hooks or block._backward_pre_hooks:
                return block.layer + 1
        return end
