"""`HookPoint`: a named place where a tensor can be read, edited and differentiated.

Every user hook gets its own tensor, so no hook can change what another one, or a cache, has kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from transformer_lens.checks import is_one_of, whole

Direction = Literal["fwd", "bwd"]
HookFunction = Callable[..., Any]


@dataclass(frozen=True)
class GenerationStep:
    """Which part of the text one forward pass of `bridge.generate` reads; hooks find it at `hook.generation`.

    >>> seen = []
    >>> def look(z, hook):
    ...     seen.append((hook.generation.is_prompt, hook.generation.positions.tolist()))
    >>> _ = bridge.generate("Mary and", max_new_tokens=2, fwd_hooks=[("blocks.0.attn.hook_z", look)])
    >>> seen
    [(True, [[0, 1, 2, 3]]), (False, [[4]])]

    No forward pass has read the newest token yet, so two new tokens take two: one reads the prompt, one the first new
    token.
    """

    step: int
    """The index of this forward pass in the generation."""
    columns: range
    """The columns it reads of the returned sequences, padding included."""
    prompt_mask: Int[Tensor, "batch prompt"]
    """1 for a token, 0 for padding."""
    rows: int
    """The batch size of this forward pass: a multiple of the prompts with beams or several sequences per prompt."""

    @property
    def is_prompt(self) -> bool:
        """Whether it reads the prompt, or a chunk of it (without a KV cache, every forward pass does)."""
        return self.columns.start < self.prompt_mask.shape[1]

    @property
    def new_tokens(self) -> int:
        """How many generated tokens have been read after this forward pass: 0 in the prompt, then 1, 2, ..."""
        return max(0, self.columns.stop - self.prompt_mask.shape[1])

    @cached_property
    def positions(self) -> Int[Tensor, "rows pos"]:
        """The position of each token it reads in its own text; padding is -1."""
        mask = self.prompt_mask.long().repeat_interleave(self.rows // len(self.prompt_mask), dim=0)
        counted = mask.cumsum(-1)
        prompt = (counted - 1).masked_fill(mask == 0, -1)
        generated = counted[:, -1:] + torch.arange(self.new_tokens, device=mask.device)
        return torch.cat([prompt, generated], dim=1)[:, self.columns.start : self.columns.stop]


Listener = Callable[[], None]
"""What is called when hooks are added or removed."""


class _ThreadState(threading.local):
    """What this thread is running: the innermost run, the user hooks that it is executing, and where it stands."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.depth = 0
        self.executing: list[HookEntry] = []
        self.recalled: dict[tuple[int, int, str], Any] = {}
        self.pending: dict[Listener, None] | None = None
        self.generation: GenerationStep | None = None
        self.runner: object = None  # whose compiled graph this thread is running
        self.memo: dict[Any, Any] | None = None
        """What layers of one forward pass with hooks share."""
        self.record: Any = None
        """The record of the checkpointed block that it runs."""
        self.first: tuple[int, int] | None = None
        """The first layer of its run, and how many hooks were executing when it was asked for."""
        self.attending: list[tuple[nn.Module, int, Any]] = []
        """The calls of attention modules that it is in and whose attention function is replaced."""


state = _ThreadState()


class Run:
    """One `run_with_hooks` or `run_with_cache`: its hooks fire in it alone.

    Neither another thread's forward pass nor one that a hook starts sees them.
    """

    def __enter__(self) -> Self:
        self._outer = (state.run, state.depth)
        state.run, state.depth = self, 0
        return self

    def __exit__(self, *error: object) -> None:
        state.run, state.depth = self._outer
        del self._outer
        if not state.executing:
            state.recalled.clear()  # what an interrupted forward left


@contextmanager
def changing_together() -> Iterator[None]:
    """Tell each listener once, at the end, while many hooks are added or removed."""
    if state.pending is not None:
        yield
        return
    pending: dict[Listener, None] = {}
    state.pending = pending
    try:
        yield
    finally:
        state.pending = None
        for listener in pending:
            listener()


def tell(listeners: Iterable[Listener]) -> None:
    """Tell listeners now, or at the end of `changing_together`."""
    pending = state.pending
    for listener in listeners:
        if pending is None:
            listener()
        else:
            pending[listener] = None


@contextmanager
def nested_forward() -> Iterator[None]:
    """Silence the outer run's hooks while a user hook runs the model again."""
    if not state.depth:
        yield
        return
    outer = (state.run, state.depth)
    state.run, state.depth = None, 0
    try:
        yield
    finally:
        state.run, state.depth = outer


@dataclass(eq=False, slots=True)
class HookEntry:
    """One function attached to one hook point; `with entry:` marks the time in which the user's function runs."""

    fn: HookFunction
    is_permanent: bool = False
    level: int | None = None
    run: Run | None = None
    reads_only: bool = False
    fired: bool = False
    removed: bool = False

    def applies(self) -> bool:
        """Whether it fires in what this thread is running."""
        return (self.run is None or self.run is state.run) and self not in state.executing

    def __enter__(self) -> None:
        self.fired = True
        state.depth += 1
        state.executing.append(self)

    def __exit__(self, *error: object) -> None:
        state.executing.pop()
        state.depth -= 1


def checked_level(level: int | None) -> int | None:
    """A level of hooks. Raises `TypeError` unless it is an integer."""
    return None if level is None else whole("level", level)


def checked_hook(where: str, fn: Any) -> HookFunction:
    """A hook's function. Raises `TypeError` for anything that cannot be called."""
    if not callable(fn):
        raise TypeError(f"{where}: got {type(fn).__name__}, expected a function fn(tensor, hook)")
    return fn  # type: ignore[no-any-return]


class HookPoint(nn.Module):
    """A named place in the model: calling it runs its hooks on a tensor and returns the result.

    >>> point = HookPoint("doubled")
    >>> handle = point.add_hook(lambda tensor, hook: tensor * 2)
    >>> point(torch.ones(2))
    tensor([2., 2.])

    A hook is `fn(tensor, hook)`. It may return a replacement, or edit its tensor in place and return `None`; without an
    edit the computation is unchanged, bit for bit. A backward hook gets the gradient and may return another, bare or as
    a 1-tuple.
    """

    name: str | None
    axes: str
    read_only: str
    integer: bool
    ctx: dict[Any, Any]
    fwd_hooks: list[HookEntry]
    bwd_hooks: list[HookEntry]
    on_change: Callable[[], None] | None
    meaning: str = ""
    sizes: Mapping[str, int | str] = {}
    """What a table says of it, and of its axes, where no component declares it."""
    admit: Callable[[HookEntry, Direction], None] | None

    def __init__(self, name: str | None = None, axes: str = "", read_only: str = "", integer: bool = False) -> None:
        super().__init__()
        # Past torch's __setattr__, which looks for parameters in each: a model has thousands of hook points.
        self.__dict__ |= {"name": name, "axes": axes, "read_only": read_only, "integer": integer}
        self.__dict__ |= {"ctx": {}, "fwd_hooks": [], "bwd_hooks": [], "on_change": None, "admit": None}

    def extra_repr(self) -> str:
        return repr(self.name) if self.name else ""

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> HookEntry:
        """Attach `hook`, before those already there if `prepend`; returns the entry for `remove`."""
        return self.attach(HookEntry(hook, is_permanent, checked_level(level)), dir, prepend)

    def attach(self, entry: HookEntry, dir: Direction = "fwd", prepend: bool = False) -> HookEntry:
        self.check(entry, dir)
        return self.put(entry, dir, prepend)

    def put(self, entry: HookEntry, dir: Direction, prepend: bool = False) -> HookEntry:
        hooks = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        hooks.insert(0 if prepend else len(hooks), entry)
        if self.on_change is not None:
            self.on_change()
        return entry

    def check(self, entry: HookEntry, dir: Direction) -> None:
        """Raise for an entry that cannot be attached here."""
        checked_hook(f"hook at {self.name!r}", entry.fn)
        self._entries(dir)
        if dir == "bwd" and self.integer and not entry.reads_only:
            raise ValueError(f"backward hook at {self.name!r}: it holds integers, which have no gradient")
        if self.admit is not None:
            self.admit(entry, dir)

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> HookEntry:
        """Attach a hook that `reset_hooks` leaves alone."""
        return self.add_hook(hook, dir, is_permanent=True)

    def remove(self, entry: HookEntry, *, silence: bool = True) -> None:
        """Remove one entry; `silence` it also in graphs that still wait for their backward pass."""
        entry.removed = silence
        for hooks in (self.fwd_hooks, self.bwd_hooks):
            if entry in hooks:
                hooks.remove(entry)
        if self.on_change is not None:
            self.on_change()

    def remove_hooks(
        self, dir: Direction | Literal["both"] = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove hooks: permanent ones only if asked, and only those of `level` if given."""
        for entry in self._fitting(dir, including_permanent, level):
            self.remove(entry)

    def has_hooks(
        self, dir: Direction | Literal["both"] = "both", including_permanent: bool = True, level: int | None = None
    ) -> bool:
        return bool(self._fitting(dir, including_permanent, level))

    def clear_context(self) -> None:
        """Empty `ctx`, the dictionary in which hooks keep their state."""
        self.ctx.clear()

    @property
    def generation(self) -> GenerationStep | None:
        """In a hook during `bridge.generate`: which part of the text this forward pass reads; otherwise `None`."""
        return state.generation

    @property
    def position_axis(self) -> int:
        """The axis of positions (of queries, if there are two); after the batch where no axes are declared."""
        names = self.axes.split()
        return next((names.index(name) for name in ("pos", "query_pos") if name in names), 1)

    def layer(self) -> int:
        """The layer of this point: `blocks.3.attn.hook_q` -> 3. Raises `ValueError` for a point outside the blocks."""
        parts = (self.name or "").split(".")
        if len(parts) < 2 or not parts[1].isdigit():
            raise ValueError(f"hook point {self.name!r} is not inside a block, so it has no layer number")
        return int(parts[1])

    def _fitting(self, dir: str, including_permanent: bool, level: int | None) -> list[HookEntry]:
        level = checked_level(level)
        directions = ("fwd", "bwd") if is_one_of(dir, ("both",)) else (dir,)
        return [
            entry
            for direction in directions
            for entry in self._entries(direction)
            if (including_permanent or not entry.is_permanent) and level in (None, entry.level)
        ]

    def _entries(self, dir: str) -> list[HookEntry]:
        if not is_one_of(dir, ("fwd", "bwd")):
            raise ValueError(f"hook at {self.name!r}: got direction {dir!r}, expected 'fwd' or 'bwd'")
        return self.fwd_hooks if dir == "fwd" else self.bwd_hooks

    def forward(self, x: Tensor) -> Tensor:
        """Run the hooks on `x`; returns `x` itself if none of them changed anything."""
        value = x
        for entry in tuple(self.fwd_hooks):
            if not entry.applies():
                continue
            if entry.reads_only:
                entry.fired = True
                entry.fn(value, hook=self)
            else:
                value = self._hand_over(entry, value)
        if self.bwd_hooks:
            value = self._watch_gradient(value, x)
        return value

    def _hand_over(self, entry: HookEntry, value: Tensor) -> Tensor:
        """Give a user hook a tensor of its own, and find out whether it edited that."""
        if not isinstance(value, Tensor):
            raise TypeError(f"hook point {self.name!r}: got {type(value).__name__}, expected a Tensor")
        own = value.clone()
        before = None if own.is_inference() else (own._version, own.requires_grad)
        with entry:
            result = entry.fn(own, hook=self)
        if before is not None:
            edited = (own._version, own.requires_grad) != before
        else:  # inference tensors count no versions
            edited = bool(self.read_only) and not torch.allclose(own, value, rtol=0, atol=0, equal_nan=True)
        if self.read_only and (result is not None or edited):
            raise ValueError(f"hook {self.name!r} cannot be written: {self.read_only}")
        if result is not None:
            if not isinstance(result, Tensor):
                raise TypeError(
                    f"hook at {self.name!r}: its function returned {type(result).__name__}, expected a Tensor or None"
                )
            return result
        # The hook's own tensor goes on in the graph, so that retain_grad() and autograd.grad reach it.
        return own if edited or before is None or own.requires_grad else value

    def _watch_gradient(self, value: Tensor, original: Tensor) -> Tensor:
        entries = [entry for entry in self.bwd_hooks if entry.applies()]
        if not entries or not value.requires_grad:
            return value
        if value is original:
            # A tensor of its own in the graph, so that the gradient is of this reading and not of its neighbours.
            value = value.view_as(value)
        for entry in entries:
            value.register_hook(partial(_backward, entry, self))
        return value


def _backward(entry: HookEntry, point: HookPoint, grad: Tensor) -> Tensor | None:
    """A tensor hook that gives the gradient to the user's function, and its answer to autograd."""
    if entry.removed or entry in state.executing:
        return None
    if entry.reads_only:
        entry.fired = True
        entry.fn(grad, hook=point)
        return None
    own = grad.clone()
    version = own._version
    with entry:
        result = entry.fn(own, hook=point)
    if isinstance(result, tuple) and len(result) == 1:
        result = result[0]
    if result is None:
        return own if own._version != version else None
    if not isinstance(result, Tensor):
        raise TypeError(
            f"backward hook at {point.name!r}: its function returned {type(result).__name__}, "
            "expected a gradient Tensor, a 1-tuple of it, or None"
        )
    return result
