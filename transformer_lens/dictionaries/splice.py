"""A dictionary in a model: what it reconstructs goes on from a hook, and its features and its error are hooks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import prod
from threading import get_ident
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from transformer_lens.asking import place_name
from transformer_lens.checks import in_words
from transformer_lens.dictionaries.dictionary import Dictionary, a_dictionary, feature_numbers
from transformer_lens.hook_points import HookEntry, HookPoint

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

At = str | int | Sequence[str | int] | None
"""A hook or a layer; two, where a transcoder reads and where it writes; `None` for what the dictionary's file says."""


class Splice:
    """A dictionary in a model until `undo()` or the end of a `with` block; `features` and `error` name its hooks."""

    def __init__(self, bridge: TransformerBridge, dictionary: Dictionary, at: At, error: bool) -> None:
        dictionary = a_dictionary(dictionary)
        said = filter(None, map(dictionary.metadata.get, ("hook_name", "hook_name_out")))
        places: Any = [*said] if at is None else at
        places = list(places) if isinstance(places, (list, tuple)) else [places]
        if len(places) not in ((2,) if dictionary.transcoder else (1, 2)):
            expected = "where it reads and where it writes" if dictionary.transcoder else "a hook or a layer"
            raise ValueError(f"at: got {in_words(at)}, expected {expected} for a {dictionary.extra_repr()}")
        self.bridge, self.dictionary, self.held = bridge, dictionary, dict[int, Tensor]()
        names = [place_name(bridge, place) for place in (places[-1], places[0])]
        self.write, self.read = (bridge.hook_dict[name] for name in names)
        self.features, self.error = (f"{names[0]}.{end}" for end in ("features", "error"))
        if self.features in bridge.hook_dict:
            raise ValueError(f"splice at {names[0]!r}: a dictionary is there; undo() that one first")
        rows, outer = [bridge.hook_table().row(name) for name in names], []
        for row, width in zip(rows, (dictionary.d_out, dictionary.d_in), strict=True):
            # How many last axes make up its width: those of heads may be one or two.
            tail = [size if isinstance(size, int) else 0 for size in row.shape]
            fitting = [count for count in range(1, len(tail) - 1) if prod(tail[-count:]) == width]
            if not fitting:
                raise ValueError(f"dictionary: got a {dictionary.extra_repr()}, and {row.name} has {row.sizes()}")
            outer.append(tail[: -fitting[0]])
        if outer[0] != outer[1]:
            each = " and ".join(f"{row.sizes()} at {name!r}" for row, name in zip(rows, names, strict=True))
            raise ValueError(f"at: got {each}, expected places with the same axes in front of the width")
        self.joined = -fitting[0]
        written, read = (dict(zip(row.axes.split(), row.shape, strict=True)) for row in rows)
        kept = dict([*read.items()][: self.joined], feature=dictionary.d_sae)
        self.tail = [int(size) for size in [*kept.values()][2:]]
        self.shown = {"features": (kept, "the features of a dictionary")}
        self.shown |= {"error": (written, "what a dictionary does not reconstruct")} if error else {}
        reading = HookEntry(self._hold, is_permanent=True, reads_only=True)
        self.entries = [(self.read, reading)] if self.read is not self.write else []
        self.entries.append((self.write, HookEntry(self._replace, is_permanent=True)))
        for point, entry in self.entries:
            point.check(entry, "fwd")
        for end, (axes, meaning) in self.shown.items():
            self.write.add_module(end, HookPoint(axes=" ".join(axes)))
            self.write._modules[end].__dict__ |= {"sizes": axes, "meaning": meaning}
        for point, entry in self.entries:
            point.put(entry, "fwd")
        bridge.setup()

    def undo(self) -> None:
        """Take the dictionary out; the model runs as before."""
        for point, entry in self.entries:
            point.remove(entry)
        for end in self.shown:
            del self.write._modules[end]
        self.shown = {}
        self.bridge.setup()

    def ablate(self, features: int | Sequence[int], **options: Any) -> AbstractContextManager[Any]:
        """Set features to zero while a `with` block runs.

        >>> both = torch.cat([torch.eye(128), -torch.eye(128)])
        >>> weights = {"W_enc": both.T, "b_enc": torch.zeros(256), "W_dec": both, "b_dec": torch.zeros(128)}
        >>> with bridge.splice(Dictionary(weights), at=1, error=True) as spliced, spliced.ablate([3, 131]):
        ...     bridge.run_with_cache("Mary and John")[1]["resid_post", 1][0, :, 3].tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]

        `options` are `positions`, `rows` and `on`, as in `bridge.steer`.
        """
        numbers, inner = feature_numbers(self.dictionary, features), prod(self.tail[:-1])
        directions = torch.kron(torch.eye(inner), torch.eye(self.tail[-1])[numbers]).reshape(-1, *self.tail)
        return self.bridge.project_out(directions, self.features, **options)

    def steer(self, feature: int, scale: float = 1.0, **options: Any) -> AbstractContextManager[Any]:
        """Add `scale` to a feature while a `with` block runs, in plain runs and in `generate`.

        `options` are `positions`, `rows` and `on`, as in `bridge.steer`.
        """
        unit = torch.eye(self.tail[-1])[feature_numbers(self.dictionary, feature)[0]].expand(self.tail)
        return self.bridge.steer(unit, self.features, scale=scale, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _hold(self, value: Tensor, hook: HookPoint) -> None:
        self.held[get_ident()] = value

    def _replace(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        x = value if self.read is self.write else self.held.pop(get_ident(), None)
        if x is None:
            raise ValueError(f"splice at {hook.name!r}: {self.read.name!r}, which it reads, does not fire before that")
        x, points = x.flatten(self.joined), dict[str, Any](self.write._modules)
        features: Any = self.dictionary.encode(x)
        if "error" not in points:
            return self.dictionary.decode(points["features"](features), x).reshape(value.shape).to(value.dtype)
        # Differences, which are zero where nothing is edited: the value goes on bit for bit, and so does its gradient.
        rebuilt = self.dictionary.decode(features, x).reshape(value.shape)
        before: Any = (features, value - rebuilt)
        after: Any = [points[end](part) for end, part in zip(self.shown, before, strict=True)]
        if after[0] is before[0] and after[1] is before[1]:
            return None
        changed: Tensor = self.dictionary.decode(after[0], x).reshape(value.shape) - rebuilt + (after[1] - before[1])
        return (value + changed).to(value.dtype)
