"""A text that is being generated over remote blocks: keys and values are on the servers, the way to make them is here.

Each stretch's inputs are kept, so that a server that lost a session, or another one, replays them in the same parts.
"""

from __future__ import annotations

import uuid
import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from transformer_lens.distributed.messages import Reply, Request
from transformer_lens.distributed.spans import Route, Span, SpanError, ask


@dataclass
class _Part:
    """One stretch of blocks: its session on the server, and every step so far."""

    session: str
    steps: list[Request] = field(default_factory=list)


class RemoteText:
    """How far a text has come, and what made its keys and values on each stretch of blocks."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.length = 0
        self.rows: Tensor | None = None
        """Which of the rows so far each row goes on from, if that changed since the last step."""
        self.parts: dict[tuple[int, int], _Part] = {}
        self._sessions: deque[tuple[Span, str]] = deque()
        weakref.finalize(self, route.closing.extend, self._sessions).atexit = False

    def reorder(self, rows: Tensor) -> None:
        """Go on with other rows, as beam search does."""
        self.rows = rows.long() if self.rows is None else self.rows[rows]

    def step(self, span: Span, request: Request) -> Reply:
        """One more step of a stretch. If the server does not hold what came before, that is replayed first."""
        stretch = (request.first, request.end)
        if stretch not in self.parts:
            if self.length:
                raise ValueError(
                    f"blocks {stretch[0]} to {stretch[1]} were not called by themselves for the first {self.length} "
                    "positions, so no server holds their keys and values; attach a function at the edge of a block "
                    "before the prompt is read (it may return None until it is needed), and leave it until the end"
                )
            self.parts[stretch] = self._part(span)
        part = self.parts[stretch]
        # A step that failed further up is done again, perhaps with other hooks.
        part.steps = [step for step in part.steps if step.start < self.length]
        rows = {} if self.rows is None else {"rows": self.rows}
        request = replace(request, start=self.length, tensors={**request.tensors, **rows})
        try:
            reply = ask(span, replace(request, session=part.session))
        except SpanError as error:
            if "held" not in error.info:
                raise
            part.session = self._part(span).session
            for step in part.steps:
                ask(span, replace(step, session=part.session))
            reply = ask(span, replace(request, session=part.session))
        part.steps.append(request)
        return reply

    def advance(self, positions: int) -> None:
        """All blocks are through."""
        self.length += positions
        self.rows = None

    def _part(self, span: Span) -> _Part:
        part = _Part(uuid.uuid4().hex)
        self._sessions.append((span, part.session))
        return part


class RemoteLayer(CacheLayerMixin):
    """One layer of a transformers cache whose keys and values are on a server."""

    def __init__(self, text: RemoteText, first: bool) -> None:
        super().__init__()
        self.text = text
        self.first = first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is held here."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never called: no attention runs here."""
        raise ValueError(
            "keys and values of this cache are on servers; it serves the distributed model it was made for"
        )

    def get_seq_length(self) -> int:
        """How many positions the servers hold."""
        return self.text.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.text.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with other rows; all layers do so together, the first one tells."""
        if self.first:
            self.text.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: servers only go on."""
        raise ValueError("a cache on servers cannot be cropped, so assisted generation is not available")


def remote_text(cache: Any, route: Route, n_layers: int) -> RemoteText:
    """The text behind a cache; an empty cache becomes one of remote layers.

    Raises `ValueError` for a cache that holds keys and values of its own, or is another model's.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values: got {type(cache).__name__}, expected a transformers Cache, such as DynamicCache()"
        )
    found = cache.layers[0] if cache.layers else None
    if isinstance(found, RemoteLayer):
        if found.text.route is not route:
            raise ValueError("past_key_values: this cache was made by another distributed model")
        return found.text
    if cache.is_compileable or cache.get_seq_length():
        raise ValueError(
            "past_key_values: keys and values are made on the servers, so a cache has to come here empty and without "
            "a fixed size; pass DynamicCache()"
        )
    text = RemoteText(route)
    cache.layers = [RemoteLayer(text, first=not layer) for layer in range(n_layers)]
    return text


def refuse_gradients(tensors: list[Tensor]) -> None:
    """Raise `ValueError` where a gradient would be lost in silence."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "past_key_values: no gradient comes back through keys and values on servers; call inside torch.no_grad(), "
            "or on the whole text without past_key_values"
        )
