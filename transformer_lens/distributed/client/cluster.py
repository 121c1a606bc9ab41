"""A Ray cluster as a source of spans. Needs the extra `[cluster]`."""

import uuid
from collections.abc import Sequence
from typing import Any

from transformer_lens.distributed.client.routing import ServerFacts, permitted
from transformer_lens.distributed.network.cluster import NAMESPACE, actors_of, joined, told_by
from transformer_lens.distributed.protocol.messages import SpanUnreachable


class ClusterSpan:
    """Blocks in an actor."""

    def __init__(self, source: "ClusterSpans", peer: str, blocks: range) -> None:
        self.source, self.peer, self.blocks = source, peer, blocks
        self.actor = source.ray.get_actor(peer, namespace=NAMESPACE)

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        """As `Span.send`."""
        ray, seconds = self.source.ray, self.source.config.request_timeout if timeout is None else timeout
        try:
            return bytes(ray.get(self.actor.handle.remote(message, self.source.client, seconds), timeout=seconds))
        except ray.exceptions.RayError as error:
            self.source.known.pop(self.peer, None)  # its name may soon be another actor's
            why = str(error).strip().partition("\n")[0]
            raise SpanUnreachable(f"{self.peer}: {type(error).__name__}: {why}") from error


class ClusterSpans:
    """The spans of a model on a Ray cluster, found by its `dht_prefix`; a `SpanSource`.

    >>> model.connect(ClusterSpans(model.config))  # doctest: +SKIP

    An actor that died is restarted by Ray, on another node if its own is gone, and is used again once it answers.
    """

    def __init__(self, config: Any, address: str = "auto") -> None:
        self.ray = joined(address)
        self.config = config
        self.client = uuid.uuid4().hex  # whose sessions these are
        self.known: dict[str, ClusterSpan] = {}  # whose actors answered the last time they were asked
        self.told: dict[str, dict[str, Any]] = {}  # what they answered
        self.refresh()

    def spans(self) -> Sequence[ClusterSpan]:
        """The spans whose actors answered."""
        return [span for peer, span in list(self.known.items()) if permitted(self.config, peer)]

    def refresh(self) -> None:
        """Look for actors, and ask each what it is, within `ping_timeout`."""
        names = actors_of(self.ray, self.config)
        self.told = told_by(self.ray, names, self.config.ping_timeout)
        self.known = {name: self.known.get(name) or ClusterSpan(self, name, names[name]) for name in self.told}

    def facts(self, span: Any) -> ServerFacts:
        """How fast a span is, as its server says."""
        told = self.told.get(span.peer, {})
        return ServerFacts(span.peer, span.blocks, 0.0, told.get("seconds_per_block", 0.0), told.get("load", 0.0))

    def close(self) -> None:
        """Leaves the actors to others."""
