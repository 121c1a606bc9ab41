"""Ports: where a Hugging Face module receives or returns a tensor, and how to read and write it.

The kinds differ in what a write has to do so that the model continues with the written value and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from transformer_lens.model_bridge.access.inside_call import plain_forward
from transformer_lens.model_bridge.access.views import TokenRows, View, whole
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.upstream import Word

Side = Literal["in", "out"]


@dataclass(frozen=True)
class Port:
    """A tensor that a module receives or returns, seen through a view.

    `at` is the role of the module in the component that declares the hook ("": its own module), `item` the index in a
    returned tuple (or the field of an output), `arg` the argument if not the first.
    """

    at: str = ""
    side: Side = "out"
    view: Callable[[BridgeConfig], View] = whole
    item: int | Word = 0
    arg: Word | None = None
    aliased: bool = False
    """Whether the model writes into this tensor afterwards, so that a capture has to be a copy."""
    instead: Port | None = None
    """The tensor's place in calls that skip this port."""

    @property
    def shared(self) -> bool:
        """Whether a write goes into the model's own tensor, so that this port has to come before all others."""
        return isinstance(self.item, Word)

    @property
    def recalls(self) -> str | None:
        """The role whose input this port needs as well."""
        return None

    def remember(self, x: Tensor) -> Any:
        """What to keep of that input."""
        return None

    def read(self, x: Tensor, view: View, known: Any) -> Tensor:
        value = view.get(x)
        return value.clone() if self.aliased else value

    def write(self, x: Tensor, value: Tensor, view: View, known: Any, modules: Callable[[str], nn.Module]) -> Tensor:
        new = view.put(x, value)
        return new.clone() if self.aliased else new


@dataclass(frozen=True)
class Inside:
    """A value inside the module in role `at`: at a seam of its code, or computed by a formula of ours.

    `rows_of` names a role whose input has batch and position, if that module works on flat tokens; `stream_of` one
    whose input is the residual stream that the hook shows.
    """

    at: str = ""
    rows_of: str | None = None
    stream_of: str | None = None
    kind: Literal["seam", "formula"] = "seam"


@dataclass(frozen=True)
class FlatTokensPort(Port):
    """A tensor with flattened batch and position; `rows_of` names a role that has both."""

    rows_of: str = ""

    @property
    def recalls(self) -> str | None:
        return self.rows_of

    def remember(self, x: Tensor) -> Any:
        return TokenRows(*x.shape[:2])

    def read(self, x: Tensor, view: View, known: Any) -> Tensor:
        return known.get(x)  # type: ignore[no-any-return]

    def write(self, x: Tensor, value: Tensor, view: View, known: Any, modules: Callable[[str], nn.Module]) -> Tensor:
        return known.put(x, value)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SharedPort(Port):
    """A tensor that the caller uses again after passing it on, such as the middle residual stream.

    A write goes into that very tensor; so a capture is a copy, and the port comes before any other that could replace
    the tensor.
    """

    @property
    def shared(self) -> bool:
        return True

    def read(self, x: Tensor, view: View, known: Any) -> Tensor:
        return x.clone()

    def write(self, x: Tensor, value: Tensor, view: View, known: Any, modules: Callable[[str], nn.Module]) -> Tensor:
        return x.copy_(value)


@dataclass(frozen=True)
class BranchPort(Port):
    """The residual stream that one branch reads, where one norm feeds several, before that norm.

    `stream` names the role whose input is the stream, `norm` that norm. A write runs the model's own norm on the new
    stream for this branch alone.
    """

    stream: str = ""
    norm: str = "ln1"

    @property
    def recalls(self) -> str | None:
        return self.stream

    def remember(self, x: Tensor) -> Any:
        return x

    def read(self, x: Tensor, view: View, known: Any) -> Tensor:
        return known  # type: ignore[no-any-return]

    def write(self, x: Tensor, value: Tensor, view: View, known: Any, modules: Callable[[str], nn.Module]) -> Tensor:
        # With layers on several devices, the stream was remembered before it came to this one.
        return plain_forward(modules(self.norm))(value.to(x.device))  # type: ignore[no-any-return]
