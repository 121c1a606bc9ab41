"""What processing changed in a model, and how to undo it.

Every change is an exchange that undoes itself when run again, without copies: parameters stay the same objects and
point to other values. So no error can leave a model half-changed.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from torch import Tensor, nn

RECORD = "weight_processing"
"""The attribute of the base model that marks processed weights."""


class Exchange(ABC):
    """A change that `swap` makes or undoes."""

    what: str

    @abstractmethod
    def swap(self) -> None: ...

    @abstractmethod
    def in_place(self) -> bool:
        """Whether the model still holds what was put there."""

    def altered(self) -> bool:
        """Whether somebody wrote into what was put there."""
        return False

    def bytes_kept(self) -> int:
        """The memory of what is kept for undoing."""
        return 0


class ParameterPlace(Exchange):
    """A parameter of one of the model's modules, and the one last seen there."""

    def __init__(self, what: str, model: nn.Module, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        self.what, self.model, self.module, self.name, self.parameter = what, model, module, name, parameter
        self.note()

    def note(self) -> None:
        self.put = self.module._parameters[self.name]
        self.shape = None if self.put is None else self.put.shape
        self.version = id(self.parameter), self.parameter._version

    def in_place(self) -> bool:
        found = self.module._parameters.get(self.name)
        return found is self.put and (found is None or found.shape == self.shape) and self._in_model()

    def _in_model(self) -> bool:
        """Whether the module is one of the model's: resizing its vocabulary puts another one there."""
        found: nn.Module | None = self.model
        for part in self.what.split(".")[:-1]:
            found = found._modules.get(part) if found is not None else None
        # An adapter that came later wraps the module.
        return found is self.module or any(other is self.module for other in self.model.modules())

    def altered(self) -> bool:
        """Whether it was written to; unknown in a copy of a model, whose version counter restarts."""
        which, written = self.version
        return which == id(self.parameter) and written != self.parameter._version


class ValueExchange(ParameterPlace):
    """Other values in a parameter that stays the same object."""

    def __init__(self, what: str, model: nn.Module, module: nn.Module, name: str, values: Tensor) -> None:
        parameter = module._parameters[name]
        assert parameter is not None
        super().__init__(what, model, module, name, parameter)
        self.values = values

    def swap(self) -> None:
        p = self.parameter
        # The model may have been moved or cast meanwhile.
        p.data, self.values = self.values.to(device=p.device, dtype=p.dtype), p.data
        self.note()

    def bytes_kept(self) -> int:
        return self.values.nbytes


class ParameterExchange(ParameterPlace):
    """A new parameter where there was none, or only one that another module shares."""

    def __init__(self, what: str, model: nn.Module, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        super().__init__(what, model, module, name, parameter)
        self.outside: nn.Parameter | None = parameter

    def swap(self) -> None:
        inside, made = self.module._parameters[self.name], self.parameter
        if self.outside is made:
            like = next(p for p in (inside, *self.module.parameters(recurse=False)) if p is not None)
            made.data = made.data.to(device=like.device, dtype=like.dtype)
        self.module._parameters[self.name], self.outside = self.outside, inside
        self.note()


class ConfigExchange(Exchange):
    """Another value in the model's config."""

    def __init__(self, config: Any, name: str, value: Any) -> None:
        self.what = f"config.{name}"
        self.config, self.name, self.value = config, name, value
        self.put = value

    def swap(self) -> None:
        self.put, self.value = self.value, getattr(self.config, self.name)
        setattr(self.config, self.name, self.put)

    def in_place(self) -> bool:
        return bool(getattr(self.config, self.name) == self.put)


def swap_all(exchanges: Iterable[Exchange]) -> None:
    """Swap every one, or none if one fails."""
    with ExitStack() as way_back:
        for exchange in exchanges:
            exchange.swap()
            way_back.callback(exchange.swap)
        way_back.pop_all()


class WeightChanges:
    """What one call of processing changed; `undo()`, or leaving a `with` block, restores the old weights.

    >>> with bridge.fold_ln() as changes:
    ...     changes.steps, bridge.processed
    (('fold_ln',), ('fold_ln',))
    >>> bridge.processed
    ()

    `notes` are the logged sentences. Later changes have to be undone before earlier ones.
    """

    def __init__(self, steps: Sequence[str], exchanges: Sequence[Exchange], notes: Sequence[str]) -> None:
        self.steps = tuple(steps)
        self.notes = tuple(notes)
        self.exchanges = tuple(exchanges)
        self.record: Record | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """The changed parameters, under Hugging Face's names."""
        return tuple(exchange.what for exchange in self.exchanges)

    @property
    def bytes_kept(self) -> int:
        """The memory in bytes of the original values, which are kept for `undo`."""
        return sum(exchange.bytes_kept() for exchange in self.exchanges)

    def undo(self) -> None:
        """Restore the original tensors, bit for bit. Further calls do nothing.

        >>> changes = bridge.center_unembed()
        >>> changes.undo()

        Raises `ValueError` if later changes stand on these, or if a processed parameter was replaced. Warns if one was
        written into (trained) since, which is lost.
        """
        if self.record is not None:
            self.record.undo(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"WeightChanges(steps={self.steps}, {len(self.exchanges)} changes, {self.bytes_kept} bytes kept)"


class Record:
    """All changes of one model, in order. It is on the base model, so that every bridge sees it."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.changes: list[WeightChanges] = []
        self.suspended = False

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(step for changes in self.changes for step in changes.steps)

    def add(self, changes: WeightChanges) -> None:
        swap_all(changes.exchanges)
        changes.record = self
        self.changes.append(changes)
        self.base.__dict__[RECORD] = self

    def undo(self, changes: WeightChanges) -> None:
        self.refuse_while_suspended("undo")
        later = self.changes[self.changes.index(changes) + 1 :]
        if later:
            names = ", ".join(step for other in later for step in other.steps)
            raise ValueError(f"undo of {', '.join(changes.steps)}: {names} came later and has to be undone first")
        self._take_out([changes])

    def undo_all(self) -> None:
        """Undo every change, the last first."""
        self.refuse_while_suspended("undo_processing")
        self._take_out(self.changes[::-1])

    def refuse_while_suspended(self, what: str) -> None:
        if self.suspended:
            raise ValueError(f"{what}: inside `with bridge.unprocessed()` the weights are lent back; leave it first")

    def _take_out(self, changes: list[WeightChanges]) -> None:
        exchanges = [exchange for change in changes for exchange in reversed(change.exchanges)]
        self._check_in_place(exchanges)
        altered = sorted({exchange.what for exchange in exchanges if exchange.altered()})
        if altered:
            warnings.warn(
                f"{', '.join(altered[:3])}{', ...' if altered[3:] else ''}: written into since processing; "
                "the weights from before it come back, and what was written is lost",
                stacklevel=4,
            )
        swap_all(exchanges)
        self._forget(changes)

    def _check_in_place(self, exchanges: list[Exchange]) -> None:
        for what in _replaced(exchanges):
            raise ValueError(
                f"{what} was replaced by something else since it was processed (as resize_token_embeddings does), so "
                "the original cannot be put back; load the model again, and call undo_processing() before the change"
            )

    @contextmanager
    def lent_back(self) -> Iterator[None]:
        """Restore the original weights for a while."""
        if self.suspended:
            yield
            return
        exchanges = [exchange for changes in self.changes for exchange in changes.exchanges]
        self._check_in_place(exchanges[::-1])
        swap_all(exchanges[::-1])
        self.suspended = True
        try:
            yield
        finally:
            self.suspended = False
            replaced = _replaced(exchanges)
            if not replaced:
                swap_all(exchanges)
            else:  # processed values of before do not fit any more
                self._forget([*self.changes])
                warnings.warn(
                    f"{replaced[0]} was replaced while the model's own weights were lent back, so the model keeps "
                    "these, and is not processed any more; call process_weights() again",
                    stacklevel=3,
                )

    def _forget(self, forgotten: Iterable[WeightChanges]) -> None:
        for changes in forgotten:
            changes.record = None
            self.changes.remove(changes)
        if not self.changes:
            self.base.__dict__.pop(RECORD, None)


def _replaced(exchanges: Iterable[Exchange]) -> list[str]:
    """The replaced parameters; of several changes of a place, the first given counts."""
    latest: dict[str, Exchange] = {}
    for exchange in exchanges:
        latest.setdefault(exchange.what, exchange)
    return [what for what, exchange in latest.items() if not exchange.in_place()]
