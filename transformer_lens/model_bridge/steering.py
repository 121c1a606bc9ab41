"""`bridge.steer` and `bridge.project_out`: add a vector to an activation, or remove a direction from it.

Both are ordinary hooks for the length of a `with` block, in plain runs and in `generate`; several of them add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens.asking import Positions, checked_positions, place_name, position_mask
from transformer_lens.checks import in_words, is_tensor, one_of
from transformer_lens.factored_matrix import wide
from transformer_lens.hooks.point import HookPoint
from transformer_lens.hooks.root import HookedRootModule
from transformer_lens.hooks.rows import Rows, on_rows
from transformer_lens.model_bridge.config import BridgeConfig
from transformer_lens.model_bridge.generalized_components import ComponentBridge
from transformer_lens.model_bridge.hook_table import axis_sizes

if TYPE_CHECKING:
    from transformer_lens.collect import ActivationStream
    from transformer_lens.dictionaries import Dictionary
    from transformer_lens.dictionaries.splice import At, Splice

Place = str | int
Places = Place | Sequence[Place] | Callable[[str], bool]
"""A hook, a layer (its `hook_resid_post`; negative ones count from the end), several of both, or a predicate."""
Part = Literal["prompt", "continuation", "all"]
PARTS: tuple[Part, ...] = ("prompt", "continuation", "all")
Where = Callable[[Tensor, HookPoint], Tensor | None]


class SteeringMethods(HookedRootModule):
    cfg: BridgeConfig

    def steer(
        self,
        vector: Float[Tensor, "*tail"],
        at: Places,
        *,
        scale: float | Float[Tensor, " batch"] = 1.0,
        positions: Positions = None,
        rows: Rows | None = None,
        on: Part = "all",
    ) -> AbstractContextManager[Self]:
        """Add `scale * vector` to an activation while a `with` block runs, in plain runs and in `generate`.

        >>> prompt = "When Mary and John went to the store, John gave a drink to"
        >>> toward_alice = bridge.tokens_to_residual_directions(" Alice").detach()
        >>> with bridge.steer(toward_alice, "ln_final.hook_out", scale=20.0):
        ...     bridge.generate(prompt, max_new_tokens=1)
        'When Mary and John went to the store, John gave a drink to Alice'

        `at` is a hook, a layer (its `hook_resid_post`), several of them, or a predicate on names; `vector` has the
        hook's shape without batch and positions, and gets a gradient if it requires one. `scale` is one number, or one
        per batch row.

        `positions` are columns of a plain run. In `generate` they count each text's tokens without padding, negative
        ones from the end of the prompt, and an open slice extends into the generated text; a mask covers the prompt.
        `rows` as in `on_rows`; `on` selects prompt or continuation, and a plain run is a prompt.

        Raises `KeyError` for an unknown hook, `TypeError` and `ValueError` for hooks that cannot be steered and for
        vectors that do not fit or are not finite, and, in the run, for positions out of range.
        """
        names = self._steered("steer", at)
        _check_numbers("vector", vector)
        for name in names:
            expected = self._tail(name)
            if list(vector.shape) != expected:
                raise ValueError(f"vector: got shape {list(vector.shape)}, expected {expected} to steer at {name!r}")
        return self.hooks([(names, partial(_add, vector, _checked_scale(scale), _where(positions, rows, on)))])

    def project_out(
        self,
        direction: Float[Tensor, "*tail"],
        at: Places,
        *,
        positions: Positions = None,
        rows: Rows | None = None,
        on: Part = "all",
    ) -> AbstractContextManager[Self]:
        """Remove a direction, or a subspace, from an activation while a `with` block runs.

        >>> direction = torch.randn(128)
        >>> with bridge.project_out(direction, 2):
        ...     _, cache = bridge.run_with_cache("Mary and John")
        >>> bool((cache["resid_post", 2] @ direction).abs().max() < 1e-3)
        True

        `x` becomes `x - (x . d) d / |d|^2`, computed in float32 at least. `direction` has the hook's shape without
        batch and positions; an axis in front means the span of several. Other arguments and errors as in `steer`.
        Source: directional ablation, Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single
        Direction".
        """
        names = self._steered("project_out", at)
        _check_numbers("direction", direction)
        for name in names:
            expected = self._tail(name)
            if list(direction.shape) != expected and list(direction.shape[1:]) != expected:
                raise ValueError(
                    f"direction: got shape {list(direction.shape)}, expected {expected} or several of them, at {name!r}"
                )
        several = direction.ndim > len(self._tail(names[0]))
        basis = _orthonormal(direction.reshape(len(direction) if several else 1, -1))
        return self.hooks([(names, partial(_remove, basis, _where(positions, rows, on)))])

    def splice(self: Any, dictionary: Dictionary, at: At = None, *, error: bool = False) -> Splice:
        """Put a dictionary in the model until `undo()` or the end of a `with` block: its reconstruction goes on.

        >>> from transformer_lens.dictionaries import Dictionary
        >>> weights = {"W_enc": torch.randn(128, 50), "b_enc": torch.ones(50), "W_dec": torch.randn(50, 128)}
        >>> dictionary = Dictionary(weights | {"b_dec": torch.ones(128)})
        >>> with bridge.splice(dictionary, at=1, error=True) as spliced:
        ...     spliced.features, bridge.run_with_cache("Mary and John")[1][spliced.features].shape
        ('blocks.1.hook_resid_post.features', torch.Size([1, 5, 50]))

        `at` is a hook or a layer, for a transcoder two: where it reads and writes; default: what its file says. With
        `error`, what it leaves out is added, and is a hook too, so that nothing changes until something is edited.
        """
        from transformer_lens.dictionaries.splice import Splice  # loaded only when needed

        return Splice(self, dictionary, at, error)

    def activation_stream(self: Any, texts: Any, at: Place | Sequence[Place], **options: Any) -> ActivationStream:
        """The activations of a data set at one place or several, in mixed batches, for a trainer of dictionaries.

        >>> stream = bridge.activation_stream(["Mary and John", "went to the store"], at=1, buffer=8, batch_size=4)
        >>> [tuple(batch.shape) for batch in stream]
        [(4, 128), (4, 128), (1, 128)]

        Options and errors: `transformer_lens.collect.ActivationStream`.
        """
        from transformer_lens.collect import ActivationStream  # loaded only when needed

        return ActivationStream(self, texts, at, **options)

    def _steered(self, what: str, at: Places) -> list[str]:
        """The selected hooks, each once. Raises for those that do not hold an activation of every position."""
        if callable(at):
            names = self.select_names(at)
        else:
            places: list[Any] = list(at) if isinstance(at, (list, tuple)) else [at]
            names = list(dict.fromkeys(place_name(self, place, what) for place in places))
        if not names:
            raise ValueError(f"{what}: got no hook, expected at least one")
        for name in names:
            point = self.hook_dict[name]
            if point.axes.split()[:2] != ["batch", "pos"] or point.integer or point.read_only:
                why = point.read_only or f"its axes are {point.axes!r}, and it needs floats by batch and position"
                raise ValueError(f"{what} at {name!r}: {why}")
        return names

    def _tail(self, name: str) -> list[int | str]:
        """A hook's shape without batch and positions."""
        owner = self.mod_dict.get(name.rpartition(".")[0])
        sizes = owner.sizes if isinstance(owner, ComponentBridge) else self.hook_dict[name].sizes
        return list(axis_sizes(self.hook_dict[name].axes, self.cfg, sizes)[2:])


def _mask(
    positions: Positions, rows: Rows | None, on: Part, tensor: Tensor, hook: HookPoint
) -> Bool[Tensor, "batch pos"] | None:
    """Where an activation is edited; `None` means everywhere."""
    if positions is None and rows is None and on == "all":
        return None
    batch, pos = tensor.shape[:2]
    chosen = torch.ones(batch, pos, dtype=torch.bool, device=tensor.device)
    if on != "all":
        chosen &= _of_part(on, pos, hook).to(tensor.device)
    if positions is not None:
        chosen &= position_mask(positions, tensor, hook)
    if rows is not None:
        every = torch.zeros(batch, 1, dtype=torch.bool, device=tensor.device)
        chosen &= on_rows(rows, lambda part, hook: torch.ones_like(part))(every, hook=hook)
    return chosen


def _of_part(on: Part, pos: int, hook: HookPoint) -> Bool[Tensor, " pos"]:
    step = hook.generation
    if step is None:
        return torch.full((pos,), on == "prompt")
    of_prompt = torch.tensor([column < step.prompt_mask.shape[1] for column in step.columns])
    of_prompt = of_prompt[-pos:]  # `generate` computes the logits of the last column alone
    return of_prompt if on == "prompt" else ~of_prompt


def _add(vector: Tensor, scale: float | Tensor, where: Where, tensor: Tensor, hook: HookPoint) -> Tensor:
    amount = vector.to(tensor.device)
    if isinstance(scale, Tensor):
        if tensor.shape[0] % len(scale):
            raise ValueError(f"scale: got {len(scale)} numbers for a batch of {tensor.shape[0]} rows")
        each = scale.to(tensor.device).repeat_interleave(tensor.shape[0] // len(scale))
        amount = each.reshape(-1, *[1] * (tensor.ndim - 1)) * amount
    else:
        amount = scale * amount
    return _written(tensor, tensor + amount.to(tensor.dtype), where(tensor, hook))


def _remove(basis: Float[Tensor, "rank d"], where: Where, tensor: Tensor, hook: HookPoint) -> Tensor:
    """Remove the span of orthonormal rows from an activation."""
    x = wide(tensor.flatten(2))
    basis = basis.to(x)
    rest = (x - (x @ basis.mT) @ basis).to(tensor.dtype).reshape(tensor.shape)
    return _written(tensor, rest, where(tensor, hook))


def _written(before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
    """`after` where the mask says so; elsewhere the activation as it was, bit for bit."""
    return after if mask is None else torch.where(mask.reshape(*mask.shape, *[1] * (before.ndim - 2)), after, before)


def _check_numbers(what: str, value: Tensor) -> None:
    if not is_tensor(value) or not value.is_floating_point():
        raise TypeError(f"{what}: got {in_words(value)}, expected a tensor of floats")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{what}: {int((~value.isfinite()).sum())} of its {value.numel()} numbers are not finite")


def _checked_scale(scale: float | Tensor) -> float | Tensor:
    if is_tensor(scale) and scale.ndim == 1 and len(scale):
        _check_numbers("scale", scale)
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {in_words(scale)}, expected a number, or a tensor of one for each row")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    return scale


def _where(positions: Positions, rows: Rows | None, on: Part) -> Where:
    """Positions, rows and part, checked before any model runs."""
    one_of("on", on, PARTS)
    if rows is not None:
        on_rows(rows, torch.zeros_like)
    return partial(_mask, checked_positions(positions), rows, on)


def _orthonormal(directions: Float[Tensor, "several d"]) -> Float[Tensor, "several d"]:
    """An orthonormal basis of the rows' span, in float32 at least."""
    rows = wide(directions.detach())
    norms = rows.norm(dim=-1, keepdim=True)
    if bool((norms == 0).any()):
        raise ValueError("direction: it is zero, which points nowhere")
    _, sizes, basis = torch.linalg.svd(rows / norms, full_matrices=False)
    if len(sizes) < len(rows) or bool(sizes[-1] < 1e-5):
        raise ValueError(f"direction: the {len(rows)} given depend on one another; leave out those that add nothing")
    return basis  # type: ignore[no-any-return]
