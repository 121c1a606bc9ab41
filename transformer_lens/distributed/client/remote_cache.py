"""A text generated over remote blocks: servers hold its keys and values, the client what recreates them."""

import uuid
import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from transformer_lens.distributed.client.route import Leg, Route, Tries
from transformer_lens.distributed.client.spans import Span, SpanSource, part_of
from transformer_lens.distributed.protocol.messages import Reply, Request, SpanError


@dataclass
class _Segment:
    """Blocks of a stretch that one server runs, in one session."""

    leg: Leg
    session: str
    source: SpanSource  # the source of its leg
    streams: list[Tensor] = field(default_factory=list)  # each step's input, as far as known
    done: int = 0  # steps the session holds, as far as its server confirmed


def _end(step: Request) -> int:
    """The number of positions after a step."""
    return step.start + step.tensors["stream"].shape[1]


@dataclass
class _Stretch:
    """Blocks that are called together: every step so far, and the sessions with their keys and values."""

    steps: list[Request] = field(default_factory=list)  # the steps, without what is in `masks`
    masks: list[list[Tensor] | None] = field(default_factory=list)
    """Each step's mask, in a list shared by steps whose masks only add columns: alone, they take quadratic memory."""
    segments: list[_Segment] = field(default_factory=list)

    def add(self, request: Request) -> None:
        self.segments[0].streams.append(request.tensors["stream"])
        new, last = request.tensors.get("mask"), self.masks[-1] if self.masks else None
        if new is None or new.shape[1:] != (_end(request),):  # none, or one that is refused
            self.masks.append(None)
            self.steps.append(request)
            return
        if last is not None and torch.equal(last[0][:, : request.start], new[:, : request.start]):
            last[0] = new
        else:
            last = [new]
        self.masks.append(last)
        self.steps.append(replace(request, tensors={k: v for k, v in request.tensors.items() if k != "mask"}))

    def step(self, nth: int) -> Request:
        step, mask = self.steps[nth], self.masks[nth]
        if mask is None:
            return step
        return replace(step, tensors={**step.tensors, "mask": mask[0][:, : _end(step)]})

    def forget_from(self, length: int) -> None:
        """Forget steps that will be run again after a failure, perhaps with other hooks."""
        self.steps = [step for step in self.steps if step.start < length]
        del self.masks[len(self.steps) :]
        for segment in self.segments:
            del segment.streams[len(self.steps) :]
            segment.done = min(segment.done, len(self.steps))


class RemoteText:
    """The length of a text, and the inputs behind its keys and values on each stretch of blocks."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.length = 0  # positions that the servers hold, including trained prompts
        self.ahead = 0  # the number of prompt positions among them
        self.rows: Tensor | None = None  # the earlier row that each row continues, if that changed since the last step
        self.stretches: dict[tuple[int, int], _Stretch] = {}
        self._sessions: deque[tuple[Span, str]] = deque()
        weakref.finalize(self, route.closing.extend, self._sessions).atexit = False

    def reorder(self, rows: Tensor) -> None:
        self.rows = rows.long() if self.rows is None else self.rows[rows]

    def end_of_leg(self, layer: int) -> int:
        """The end of a call that begins with this block; a text keeps its stretches."""
        known = [end for first, end in self.stretches if first == layer and self.length]
        return known[0] if known else self.route.end_of_leg(layer)

    def step(self, request: Request) -> Reply:
        """One more step of a stretch, replaying earlier ones to a server that lacks them."""
        stretch = self._stretch(request.first, request.end)
        stretch.forget_from(self.length)
        rows = {} if self.rows is None else {"rows": self.rows}
        request = replace(request, start=self.length, tensors={**request.tensors, **rows})
        tries = Tries(self.route, "step", request.first, request.end)
        if not stretch.segments:
            stretch.segments = self._segments(tries.legs(request.first, request.end), [])
        stretch.add(request)
        whole, nth = Reply(), 0
        while nth < len(stretch.segments):
            # A text stays on its servers, unless one failed in another call or the model was reconnected.
            segment, source = stretch.segments[nth], self.route.connected()
            leg, moved = segment.leg, segment.source is not source
            self._exchange(stretch, nth, tries.legs(leg.first, leg.end) if moved else tries.instead_of(leg))
            segment.source = source
            if self._catch_up(stretch, nth, whole, tries):
                nth += 1
            else:
                leg = stretch.segments[nth].leg
                self._exchange(stretch, nth, tries.legs(leg.first, leg.end))
        tries.done()
        return whole

    def advance(self, positions: int, ahead: int = 0) -> None:
        """Count positions that passed all blocks, `ahead` of them prompts."""
        self.length += positions
        self.ahead += ahead
        self.rows = None

    def _stretch(self, first: int, end: int) -> _Stretch:
        if (first, end) in self.stretches:
            return self.stretches[first, end]
        if self.length:
            raise ValueError(
                f"blocks {first} to {end} were not called by themselves for the first {self.length} positions, so no "
                "server holds their keys and values; attach a function at the edge of a block before the prompt is "
                "read (it may return None until it is needed), and leave it until the end"
            )
        # From a failed prompt, whose blocks are now called in other stretches.
        for old in [old for old in self.stretches if old[0] < end and first < old[1]]:
            for segment in self.stretches.pop(old).segments:
                self._close(segment)
        return self.stretches.setdefault((first, end), _Stretch())

    def _catch_up(self, stretch: _Stretch, nth: int, whole: Reply, tries: Tries) -> bool:
        """Replay the steps that a segment's session lacks, in the same chunks. `False` if its server is lost."""
        segment, last = stretch.segments[nth], len(stretch.steps) - 1
        following = stretch.segments[nth + 1] if nth + 1 < len(stretch.segments) else None
        while segment.done <= last:
            step = replace(stretch.step(segment.done), session=segment.session)
            part = part_of(step, segment.leg.first, segment.leg.end, {"stream": segment.streams[segment.done]})
            try:
                reply = tries.ask(segment.leg.span, part.request)
            except SpanError as error:
                if "held" not in error.info:
                    raise
                tries.lost(segment.leg.span, error)
                self._close(segment)
                self.route.close_sessions()  # what the old one may hold still would count beside the new one
                segment.session, segment.done = self._session(segment.leg.span), 0
                continue
            if reply is None:
                return False
            if following is not None and len(following.streams) == segment.done:
                following.streams.append(reply.tensors["stream"])
            if segment.done == last:
                part.add_to(whole, reply)
            else:
                tries.replayed += 1
            segment.done += 1
        return True

    def _exchange(self, stretch: _Stretch, nth: int, legs: list[Leg]) -> None:
        """Move a segment's blocks to other servers, from the first step on."""
        old = stretch.segments[nth]
        if legs and legs != [old.leg]:  # if nobody else is there, the session may be there still
            stretch.segments[nth : nth + 1] = self._segments(legs, old.streams)
            self._close(old)

    def _segments(self, legs: list[Leg], streams: list[Tensor]) -> list[_Segment]:
        found = [_Segment(leg, self._session(leg.span), self.route.connected()) for leg in legs]
        found[0].streams = list(streams)
        return found

    def _session(self, span: Span) -> str:
        session = uuid.uuid4().hex
        self._sessions.append((span, session))
        return session

    def _close(self, segment: _Segment) -> None:
        known = (segment.leg.span, segment.session)
        self._sessions.remove(known)
        self.route.closing.append(known)


class RemoteLayer(CacheLayerMixin):
    """A layer of a transformers cache whose keys and values are on a server."""

    def __init__(self, text: RemoteText, first: bool) -> None:
        super().__init__()
        self.text = text
        self.first = first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: no keys or values are held here."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Never called, since no attention runs here."""
        raise ValueError(
            "keys and values of this cache are on servers; it serves the distributed model it was made for"
        )

    def get_seq_length(self) -> int:
        """The number of the text's positions that the servers hold."""
        return self.text.length - self.text.ahead

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows; all layers do so together, and the first one tells the text."""
        if self.first:
            self.text.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: servers cannot go back."""
        raise ValueError("a cache on servers cannot be cropped, so assisted generation is not available")


def remote_text(cache: Any, route: Route, n_layers: int) -> RemoteText:
    """The text behind a cache; an empty cache gets remote layers. Raises `ValueError` for any other cache."""
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
