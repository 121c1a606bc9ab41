"""`HookedRootModule`: running a module with hooks, and with a cache.

Names are resolved before anything is attached, so a wrong one changes nothing; a run always removes what it attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from transformer_lens.checks import device_of, in_words, is_one_of, is_several, listed, nearest
from transformer_lens.hooks.point import (
    Direction,
    HookEntry,
    HookFunction,
    HookPoint,
    Run,
    changing_together,
    checked_hook,
    checked_level,
)
from transformer_lens.hooks.slicing import Slice, SliceInput

NamesFilter = str | Callable[[str], bool] | Sequence[str] | None
HookSpec = tuple[str | Callable[[str], bool] | Sequence[str], HookFunction]
Prepared = tuple[HookPoint, HookEntry, Direction, bool]
"""An entry, its hook point and direction, and whether its hook was asked for by name."""
SUFFIXES: dict[Direction, str] = {"fwd": "", "bwd": "_grad"}
"""What is appended to a captured tensor's name."""


class Capture:
    """A hook that keeps what it sees in `store`, under the hook's name."""

    def __init__(
        self,
        store: dict[str, Tensor],
        *,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        pos_slice: Slice | SliceInput = None,
        clone: bool = False,
        suffix: str = "",
    ) -> None:
        self.store = store
        self.device = None if device is None else device_of("device", device)
        self.remove_batch_dim = remove_batch_dim
        self.pos_slice = None if pos_slice is None else Slice([pos_slice] if type(pos_slice) is int else pos_slice)
        self.clone = clone
        self.suffix = suffix

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        name = str(hook.name)
        kept = tensor.detach()
        if self.pos_slice is not None:
            kept = self.pos_slice.apply(kept, dim=hook.position_axis)
        if self.remove_batch_dim:
            if kept.shape[0] != 1:
                raise ValueError(
                    f"remove_batch_dim at {name!r}: got a batch of {kept.shape[0]}, expected 1; "
                    "leave remove_batch_dim off for larger batches"
                )
            kept = kept[0]
        if self.device is not None:
            kept = kept.to(self.device)
        self.store[name + self.suffix] = kept.clone() if self.clone else kept


class HookedRootModule(nn.Module):
    """Base class of a module whose `HookPoint`s are read and edited by name.

    >>> class Doubler(HookedRootModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.hook_out = HookPoint()
    ...         self.setup()
    ...
    ...     def forward(self, x):
    ...         return self.hook_out(2 * x)
    >>> output, cache = Doubler().run_with_cache(torch.ones(1))
    >>> cache["hook_out"]
    tensor([2.])

    Call `setup()` at the end of `__init__`: it gives every hook point its name.
    """

    _points: dict[str, HookPoint] | None = None

    def setup(self) -> None:
        """Name every hook point by its place in the module tree."""
        self._points = {}
        for name, module in self.named_modules():
            if isinstance(module, HookPoint):
                module.name = name
                self._points[name] = module

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        if self._points is None:
            self.setup()
        assert self._points is not None
        return self._points

    @hook_dict.setter
    def hook_dict(self, points: dict[str, HookPoint]) -> None:
        """For a subclass whose own `setup` lists its hook points."""
        self._points = points

    @property
    def mod_dict(self) -> dict[str, nn.Module]:
        return self.__dict__.get("_listed", dict(self.named_modules()))  # type: ignore[no-any-return]

    @mod_dict.setter
    def mod_dict(self, modules: dict[str, nn.Module]) -> None:
        self._listed = modules

    def hook_points(self) -> Iterable[HookPoint]:
        return self.hook_dict.values()

    def unknown_hook(self, name: str) -> KeyError:
        """The `KeyError` for an unknown name, with the nearest ones."""
        return KeyError(f"no hook is named {name!r}; the nearest names are {nearest(name, self.hook_dict)}")

    def canonical_name(self, name: str) -> str:
        """The name under which this hook is listed. Raises `KeyError` with the nearest names."""
        if not isinstance(name, str):
            raise TypeError(f"hook name: got {type(name).__name__}, expected a str")
        if name not in self.hook_dict:
            raise self.unknown_hook(name)
        return name

    def names_of(self, name: str) -> tuple[str, ...]:
        """Every spelling of a canonical name, starting with itself."""
        return (name,)

    def default_names(self) -> list[str]:
        """What a cache holds by default."""
        return list(self.hook_dict)

    def select_names(self, names_filter: NamesFilter, *, may_be_none: bool = False) -> list[str]:
        """The canonical names that a filter selects, in the order of the model.

        A string or a list of strings names hooks, a predicate is asked for every spelling of every hook, and `None`
        selects all but those taken on request. Raises `KeyError` for an unknown name and, unless `may_be_none`,
        `ValueError` for a predicate that fits nothing.
        """
        if names_filter is None:
            return self.default_names()
        if isinstance(names_filter, str):
            return [self.canonical_name(names_filter)]
        if callable(names_filter):
            points = self.hook_dict
            fits = {name for name in points for spelling in self.names_of(name) if names_filter(spelling)}
            chosen = [name for name in points if name in fits]
            if not chosen and not may_be_none:
                raise ValueError(
                    f"the names filter {names_filter!r} fits none of the {len(points)} hooks; "
                    "print the model's hook_dict to see their names"
                )
            return chosen
        if not is_several(names_filter) or isinstance(names_filter, (Mapping, Tensor)):
            raise TypeError(
                f"names filter: got {type(names_filter).__name__}, "
                "expected a name, a list of names, a predicate or None"
            )
        named = {self.canonical_name(name) for name in names_filter}
        return [name for name in self.hook_dict if name in named]

    def _names_for(self, where: NamesFilter, dir: Direction) -> list[str]:
        """The names a hook is attached to; for a gradient, a predicate selects those that can have one."""
        names = self.select_names(where)
        if callable(where) and is_one_of(dir, ("bwd",)):
            return [name for name in names if not self.hook_dict[name].integer]
        return names

    def add_hook(
        self,
        name: str | Callable[[str], bool] | Sequence[str],
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Attach a hook to each named point until `reset_hooks` (or, if permanent, for good)."""
        names = self._names_for(name, dir)
        level = checked_level(level)
        entries = [(self.hook_dict[chosen], HookEntry(hook, is_permanent, level)) for chosen in names]
        for point, entry in entries:
            point.check(entry, dir)
        for point, entry in entries:
            point.put(entry, dir, prepend)

    def add_perma_hook(self, name: str | Callable[[str], bool], hook: HookFunction, dir: Direction = "fwd") -> None:
        """Attach a hook that `reset_hooks` leaves alone."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def remove_all_hook_fns(
        self,
        direction: Direction | Literal["both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove the hooks of every point."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty the `ctx` of every hook point."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Direction | Literal["both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove the hooks of every point and, by default, empty their contexts."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level)

    def _entries(self, hooks: Sequence[HookSpec], dir: Direction, run: Run | None) -> list[Prepared]:
        """Resolve names to points, before anything is attached."""
        prepared: list[Prepared] = []
        for spec in listed(f"{dir}_hooks, (name, function) pairs", hooks):
            if not isinstance(spec, (tuple, list)) or len(spec) != 2:
                raise TypeError(f"{dir}_hooks: got {spec!r}, expected a list of (name, function) pairs")
            where, fn = spec
            checked_hook(f"{dir}_hooks at {where!r}", fn)
            for name in self._names_for(where, dir):
                entry = HookEntry(fn, run=run)
                self.hook_dict[name].check(entry, dir)
                prepared.append((self.hook_dict[name], entry, dir, not callable(where)))
        return prepared

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[HookSpec] = (),
        bwd_hooks: Sequence[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Attach hooks for the length of a `with` block, however and in whichever thread the model runs.

        Hooks are `(name | predicate | list of names, fn)`. `reset_hooks_end=False` leaves them attached.
        """
        entries = self._entries(fwd_hooks, "fwd", None) + self._entries(bwd_hooks, "bwd", None)
        try:
            _attach(entries)
            yield self
        finally:
            if reset_hooks_end:
                _detach(entries)
            if clear_contexts:
                self.clear_contexts()

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[HookSpec] = (),
        bwd_hooks: Sequence[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Run the model with hooks that fire in this run alone, and return its output.

        A backward hook fires in the backward pass of this run's output, also after the call. Raises `ValueError` if a
        hook asked for by name did not fire.
        """
        if not reset_hooks_end:
            with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end=False, clear_contexts=clear_contexts):
                return self(*model_args, **model_kwargs)
        run = Run()
        entries = self._entries(fwd_hooks, "fwd", run) + self._entries(bwd_hooks, "bwd", run)
        return self._run(run, entries, clear_contexts, model_args, model_kwargs)

    def _run(
        self, run: Run, entries: Sequence[Prepared], clear_contexts: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        completed = False
        try:
            _attach(entries)
            with run:
                output = self(*args, **kwargs)
            completed = True
        finally:
            _detach(entries, silence=not completed)
            if clear_contexts:
                self.clear_contexts()
        waiting = [(point, named) for point, entry, dir, named in entries if dir == "fwd" and not entry.fired]
        given = dict(zip(inspect.signature(self.forward).parameters, args, strict=False)) | kwargs if waiting else {}
        silent = [point.name for point, named in waiting if named or self.fires_in(point, given)]
        if silent:
            raise ValueError(
                f"these hooks were asked for and never fired: {', '.join(map(repr, silent))}; "
                "a run with start_at_layer or stop_at_layer has no hooks outside those layers, and a module "
                "put in a hook's place has to call its own hook points"
            )
        return output

    def fires_in(self, point: HookPoint, model_kwargs: Mapping[str, Any]) -> bool:
        """Whether a point has to fire in a call with these keywords; a hook there that did not is then an error."""
        return False

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput = None,
    ) -> tuple[dict[str, Tensor], list[HookSpec], list[HookSpec]]:
        """A dictionary, and the forward and backward hooks that fill it."""
        store: dict[str, Tensor] = {} if cache is None else cache
        if not isinstance(store, dict):
            raise TypeError(f"cache: got {in_words(cache)}, expected a dict to fill, or None for a new one")
        options: dict[str, Any] = {"device": device, "remove_batch_dim": remove_batch_dim, "pos_slice": pos_slice}
        names = self.select_names(names_filter, may_be_none=True)
        forward: list[HookSpec] = [(name, Capture(store, **options)) for name in names]
        real = [name for name in names if not self.hook_dict[name].integer]
        backward: list[HookSpec] = [(name, Capture(store, suffix="_grad", **options)) for name in real]
        return store, forward, backward if incl_bwd else []

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: Slice | SliceInput = None,
        clone: bool = False,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep activations: returns `(output, cache)`.

        `names_filter` selects hooks (as in `select_names`; a predicate that fits none gives an empty cache), `device`
        moves them, `remove_batch_dim` drops a batch of one, `pos_slice` keeps some positions (an int keeps the axis,
        `Slice(-1)` drops it), and `clone` copies each captured tensor (a q captured without it keeps the whole fused
        QKV alive). `incl_bwd` calls `backward()` on the output, which has to be a scalar, and keeps gradients under
        `name + "_grad"`.
        """
        store: dict[str, Tensor] = {}
        run = Run()
        named = names_filter is not None and not callable(names_filter)
        options: dict[str, Any] = {"device": device, "remove_batch_dim": remove_batch_dim, "pos_slice": pos_slice}
        directions: tuple[Direction, ...] = ("fwd", "bwd") if incl_bwd else ("fwd",)
        captures = [(dir, Capture(store, suffix=SUFFIXES[dir], clone=clone, **options)) for dir in directions]
        points = self.hook_dict
        entries: list[Prepared] = []
        for name in self.select_names(names_filter, may_be_none=True):
            point = points[name]
            for dir, capture in captures:
                entry = HookEntry(capture, run=run, reads_only=True)
                if point.admit is not None:
                    point.admit(entry, dir)
                entries.append((point, entry, dir, named))
        output = self._run(run, entries, clear_contexts, model_args, model_kwargs)
        if incl_bwd:
            _backward_from(output)
        return output, store


def keywords_of(*functions: Callable[..., Any]) -> inspect.Signature:
    """The signature of a method that passes its arguments on to these functions."""
    every = [p for function in functions for p in inspect.signature(function).parameters.values()]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {p.name: p for p in every if p.kind not in kinds}
    leading = [p for p in named.values() if p.default is p.empty]
    others = [p.replace(kind=p.KEYWORD_ONLY) for p in named.values() if p.default is not p.empty]
    return inspect.Signature([*leading, *others])


def _attach(entries: Sequence[Prepared]) -> None:
    with changing_together():
        for point, entry, direction, _ in entries:
            point.put(entry, direction)


def _detach(entries: Sequence[Prepared], silence: bool = True) -> None:
    with changing_together():
        for point, entry, _, _ in entries:
            point.remove(entry, silence=silence)


def _backward_from(output: Any) -> None:
    if not isinstance(output, Tensor) or output.numel() != 1:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"incl_bwd: got an output of {shape}, expected one number to differentiate; pass return_type='loss'"
        )
    if not output.requires_grad:
        raise ValueError(
            "incl_bwd: the output does not require a gradient; leave torch.no_grad() and make the parameters, "
            "or the tensor at hook_embed, require one"
        )
    output.backward()
