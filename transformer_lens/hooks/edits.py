"""`Edit` and `Keep`: hook functions that are data, and so work in remote blocks and in compiled graphs too."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens.hooks.point import HookPoint

Operation = Literal["set", "add", "scale", "zero", "project_out"]


def _project_out(x: Tensor, direction: Float[Tensor, "... width"]) -> Tensor:
    """The component of `x` orthogonal to a direction of its last axis."""
    unit = direction / direction.norm(dim=-1, keepdim=True)
    rest: Tensor = x - (x * unit).sum(-1, keepdim=True) * unit
    return rest


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # the chosen part's new value, given the edit's
    "set": lambda x, value: value.expand(x.shape),
    "add": lambda x, value: x + value,
    "scale": lambda x, value: x * value,
    "zero": lambda x, _: torch.zeros_like(x),
    "project_out": _project_out,
}

AXES = {"positions": ("pos", "query_pos"), "heads": ("head", "kv_head"), "experts": ("expert",)}
"""What an edit can choose, with the axes in the hook table."""


class Edit:
    """An edit of an activation: one of a few operations, on chosen positions, heads or experts.

    >>> ablate = Edit("zero", heads=[1], positions=[-1])
    >>> logits = bridge.run_with_hooks("Mary and John", fwd_hooks=[("blocks.0.attn.hook_z", ablate)])

    `set`, `add` and `scale` take a number or a tensor that broadcasts to the chosen part; `project_out` takes a
    direction along the last axis and removes it; `zero` takes nothing. Negative positions count from the end of the
    text. Gradients flow to `value` if it requires them. Raises `ValueError` for an unknown operation, a value that does
    not fit, and a choice along an axis that the hook lacks.
    """

    def __init__(
        self,
        operation: Operation,
        value: Tensor | float | None = None,
        *,
        positions: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        experts: Sequence[int] | None = None,
    ) -> None:
        if operation not in OPERATIONS:
            raise ValueError(f"Edit: got the operation {operation!r}, expected one of {', '.join(OPERATIONS)}")
        if (value is None) != (operation == "zero"):
            raise ValueError(f"Edit({operation!r}): {'needs a value' if value is None else 'takes no value'}")
        if operation == "project_out" and not isinstance(value, Tensor):
            raise TypeError(f"Edit('project_out'): got {type(value).__name__}, expected a direction, a Tensor")
        if value is not None and not isinstance(value, (Tensor, int, float)):
            raise TypeError(f"Edit: got a value of {type(value).__name__}, expected a Tensor or a number")
        self.operation = operation
        self.value = value if value is None or isinstance(value, Tensor) else float(value)
        given = {"positions": positions, "heads": heads, "experts": experts}
        self.chosen = {what: _numbers(what, places) for what, places in given.items()}

    def __repr__(self) -> str:
        where = "".join(f", {what}={places}" for what, places in self.chosen.items() if places is not None)
        return f"Edit({self.operation!r}{where})"

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        value = self._value(tensor, hook)
        axes = hook.axes.split() or ["batch", "pos", *("width" for _ in tensor.shape[2:])]
        for what, chosen in self.chosen.items():
            if chosen is not None and not set(AXES[what]) & set(axes):
                raise ValueError(f"{self!r} at {hook.name!r}: this hook has the axes {' '.join(axes)}, and no {what}")
        places = [self._places(hook, axis, size) for axis, size in zip(axes, tensor.shape, strict=True)]
        change = OPERATIONS[self.operation]
        if all(chosen is None for chosen in places):
            self._check_shape(tensor, value, hook)
            return change(tensor, value)
        taken = [range(size) if some is None else some for some, size in zip(places, tensor.shape, strict=True)]
        index = torch.meshgrid(*(tensor.new_tensor(list(some), dtype=torch.int64) for some in taken), indexing="ij")
        part = tensor[index]
        self._check_shape(part, value, hook)
        return tensor.index_put(index, change(part, value))

    def _places(self, hook: HookPoint, axis: str, size: int) -> list[int] | None:
        """The chosen indices along one axis, from 0; `None` for all."""
        what = next((what for what, axes in AXES.items() if axis in axes), None)
        chosen = None if what is None else self.chosen[what]
        if chosen is None:
            return None
        outside = [place for place in chosen if not -size <= place < size]
        if outside:
            raise ValueError(f"{self!r} at {hook.name!r}: {what} {outside} are outside its {size} places")
        counted = [place % size for place in chosen]
        if len(set(counted)) != len(counted):
            raise ValueError(f"{self!r} at {hook.name!r}: {what} names one of its {size} places twice")
        return counted

    def _value(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        if not isinstance(self.value, Tensor):
            return torch.tensor(0 if self.value is None else self.value, dtype=tensor.dtype, device=tensor.device)
        if self.value.dtype != tensor.dtype:
            raise ValueError(
                f"{self!r} at {hook.name!r}: got a value of {self.value.dtype}, expected {tensor.dtype} like the hook's"
            )
        return self.value.to(tensor.device)

    def _check_shape(self, part: Tensor, value: Tensor, hook: HookPoint) -> None:
        pairs = zip(reversed(value.shape), reversed(part.shape), strict=False)
        if value.ndim > part.ndim or any(one not in (1, other) for one, other in pairs):
            raise ValueError(
                f"{self!r} at {hook.name!r}: got a value of shape {list(value.shape)}, expected one that broadcasts to "
                f"{list(part.shape)}"
            )


class Keep:
    """A hook that keeps the activation with its graph, so that a loss on it has gradients.

    >>> pattern = Keep()
    >>> logits = bridge.run_with_hooks("Mary and John", fwd_hooks=[("blocks.0.attn.hook_pattern", pattern)])
    >>> pattern.value.shape
    torch.Size([1, 4, 5, 5])

    `value` is the last run's. `run_with_cache` keeps activations without their graph.
    """

    value: Tensor | None = None

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        self.value = tensor


def _numbers(what: str, places: Sequence[int] | None) -> list[int] | None:
    if places is None:
        return None
    found = list(places)
    if not found or not all(isinstance(place, int) and not isinstance(place, bool) for place in found):
        raise ValueError(f"Edit: got {what}={places!r}, expected a list of whole numbers, at least one")
    if len(set(found)) != len(found):
        raise ValueError(f"Edit: got {what}={places!r}, which names one twice")
    return found
