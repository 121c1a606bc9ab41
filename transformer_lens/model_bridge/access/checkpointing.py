"""Gradient checkpointing: the backward pass recomputes a block, and hooks' edits must be applied again.

The forward pass records what hooks made of each tensor; the recomputation replays it and calls no user function again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from transformer_lens.hooks.point import state
from transformer_lens.model_bridge.access.inside_call import replaced
from transformer_lens.model_bridge.upstream import attribute

FUNCTION = "_gradient_checkpointing_func"
"""The attribute in which transformers keeps the function that checkpoints a block."""


class Replayed(Protocol):
    """A hook's place, as a record sees it."""

    replays: int

    def refresh(self) -> None: ...


@dataclass
class Outcome:
    """What the hooks at one place made of a tensor; `new` is `None` where they changed nothing."""

    new: Tensor | None = None
    leaf: Tensor | None = None
    """Under reentrant checkpointing, the leaf tensor that the hooks were given."""
    renamed: bool = False
    """Whether `new` has the same numbers in another tensor, as a backward hook makes it."""
    random: Tensor | None = None
    """The state of the random generator after hooks that drew from it."""


class Record:
    """What hooks did in one block of one forward."""

    def __init__(self) -> None:
        self.outcomes: dict[Replayed, list[Outcome]] = {}
        self.computed: set[object] = set()
        self.replaying = False
        self.reentrant = False
        self.started = False
        self.at: dict[Replayed, int] = {}
        self.recalled: dict[tuple[int, str], Any] = {}
        self.stream: Any = None

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The block: recorded the first time, and replayed when it is recomputed."""
        self.replaying, self.reentrant = self.started, self.reentrant or not torch.is_grad_enabled()
        self.started, self.at, self.stream = True, {}, args[0] if args else None
        changed = any(outcome.new is not None for outcomes in self.outcomes.values() for outcome in outcomes)
        with _recording(self), self._attached() if self.replaying and (self.computed or changed) else nullcontext():
            return function(*args)

    def recall(self, owner: int, what: str, found: Any) -> Any:
        """The stream that enters the block, remembered for a hook inside, whose place outside does not run again."""
        if not self.replaying:
            self.recalled[owner, what] = found
            return found
        known = self.recalled.get((owner, what)) if found is None else found
        return self.stream if isinstance(known, Tensor) else known

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The places with a record, on the model again."""
        slots = list(self.outcomes)
        try:
            for slot in slots:
                slot.replays += 1
                slot.refresh()
            yield
        finally:
            for slot in slots:
                slot.replays -= 1
                slot.refresh()

    def show(self, slot: Replayed, place: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """Run the hooks of a place on a tensor, or replay them."""
        return self._replay(slot, value) if self.replaying else self._fire(slot, place, value)

    def _fire(self, slot: Replayed, place: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """Run the hooks of a place and record what they made of the tensor."""
        outcome = Outcome()
        self.outcomes.setdefault(slot, []).append(outcome)
        before = torch.get_rng_state()
        with _recording(None):
            new = self._with_graph(outcome, place, value) if self.reentrant else _kept(place, value)
        after = torch.get_rng_state()
        outcome.random = None if torch.equal(before, after) else after
        if new is value:
            return new
        if _same_memory(new, value) and not self.reentrant:
            outcome.renamed = True
            return new
        if self.reentrant:
            outcome.new = new
            return new.detach().clone()
        outcome.new = new.detach().clone().requires_grad_(new.requires_grad)
        return new

    def _with_graph(self, outcome: Outcome, place: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """Give the hooks a small graph of their own, since reentrant checkpointing has none in the forward pass."""
        with torch.enable_grad():
            leaf = value.detach().requires_grad_(value.is_floating_point())
            new = place(leaf)
        outcome.leaf = leaf
        return value if new is leaf else new

    def _replay(self, slot: Replayed, value: Tensor) -> Tensor:
        done = self.outcomes.get(slot, [])
        nth = self.at.get(slot, 0)
        if nth >= len(done):
            return value
        self.at[slot] = nth + 1
        outcome = done[nth]
        if outcome.random is not None:
            torch.set_rng_state(outcome.random)
        if outcome.new is None:
            return value.view_as(value) if outcome.renamed else value
        if self.reentrant and outcome.new.requires_grad:
            anchor = torch.empty(0, requires_grad=True)
            return _Again.apply(value, anchor, outcome)  # type: ignore[no-any-return,no-untyped-call]
        return outcome.new.clone()


class _Again(torch.autograd.Function):
    """The recorded hooks as a step of the recomputed graph: their own graph gives the gradient."""

    @staticmethod
    def forward(ctx: Any, _value: Tensor, _anchor: Tensor, outcome: Outcome) -> Tensor:
        assert outcome.new is not None
        ctx.outcome = outcome
        return outcome.new.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        leaf, new = ctx.outcome.leaf, ctx.outcome.new
        leaf.grad = None
        torch.autograd.backward([new], [grads[0]], retain_graph=True)
        gradient, leaf.grad = leaf.grad, None
        return gradient, None, None


def _kept(place: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Run hooks so that what autograd saves for them is kept, since they are not run again."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return place(value)


def _same_memory(new: Tensor, old: Tensor) -> bool:
    """Whether a tensor shares the memory of another, as one from a backward hook does."""
    return (
        new.data_ptr() == old.data_ptr()
        and (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)
        and new.requires_grad == old.requires_grad
    )


@contextmanager
def _recording(record: Record | None) -> Iterator[None]:
    outer, state.record = state.record, record
    try:
        yield
    finally:
        state.record = outer


def current_record() -> Record | None:
    """The record of the checkpointed block that this thread runs."""
    return state.record  # type: ignore[no-any-return]


def recalled(owner: object, depth: int, what: str) -> Any:
    """Take what was remembered for a hook of this call."""
    found = state.recalled.pop((id(owner), depth, what), None)
    record = current_record()
    return found if record is None else record.recall(id(owner), what, found)


def _checkpoint(block: nn.Module) -> Callable[..., Any]:
    """Replaces the function that checkpoints a block, for the length of a forward pass."""
    original: Callable[..., Any] = block.__dict__[FUNCTION]

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        recorded = partial(Record().run, function) if torch.is_grad_enabled() else function
        return original(recorded, *args, **kwargs)

    return checkpoint


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Record what hooks do in the checkpointed blocks of one forward."""
    blocks: list[Any] = []
    if torch.is_grad_enabled():
        trained = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.training]
        blocks = [block for block in trained if attribute(block, "gradient_checkpointing")]
    with ExitStack() as stack:
        for block in blocks:
            attribute(block, FUNCTION)
            stack.enter_context(replaced(block, FUNCTION, partial(_checkpoint, block)))
        yield
