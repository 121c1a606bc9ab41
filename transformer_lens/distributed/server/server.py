"""`SpanServer`: runs a span of unchanged blocks on request, with the bridge's ports and seams inside."""

import copy
import hashlib
import itertools
import logging
import re
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transformer_lens import GroupedCache
from transformer_lens.distributed.protocol import messages as wire
from transformer_lens.distributed.protocol.checkpoint import PartOfCheckpoint, block_of, filled, identity_of, read_part
from transformer_lens.distributed.protocol.configs import AutoDistributedConfig, one_dtype
from transformer_lens.distributed.server.checks import Checks
from transformer_lens.distributed.server.sessions import CallQueue, Session, Sessions
from transformer_lens.hook_points import Edit, HookEntry, HookPoint
from transformer_lens.model_bridge import BlockElsewhere, TransformerBridge
from transformer_lens.model_bridge.upstream import CACHE, MASK, POSITIONS, USE_CACHE

TOLD = (ValueError, TypeError)  # errors whose text is sent to the client; a `MessageError` is a `ValueError`
UNTOLD = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, struct.error)
"""Others that a call may raise for its content; their texts may name this machine's files and stay in its log."""
ANSWERABLE = (*TOLD, *UNTOLD)

VERSION = version("transformer-lens-bridge")  # read once, since looking it up opens files

logger = logging.getLogger(__name__)

WEIGHT = 0.2  # the weight of the latest call in moving averages


class SpanOf:
    """A base model whose blocks outside a span are elsewhere; blocks keep their numbers."""

    place: ClassVar[str]  # the base model's attribute for its blocks
    here: ClassVar[range]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # the family's own, which allocates nothing yet
        blocks: nn.ModuleList = self.get_submodule(self.place)  # type: ignore[attr-defined]
        for layer in set(range(len(blocks))) - set(self.here):
            blocks[layer] = BlockElsewhere()


def load_span(
    name: str,
    blocks: range,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[PreTrainedModel, Any, PartOfCheckpoint]:
    """Load a base model with a span's blocks; returns it, the whole model's config, and what was read.

    >>> model, config, part = load_span("tiny-falcon", range(1, 3))
    >>> [len(list(block.parameters())) for block in model.h], len(part.tensors)
    ([0, 8, 8, 0], 16)

    `options` are config settings and say where files come from. Weights keep the checkpoint's dtype unless `dtype` is
    given. Raises `ValueError` for blocks the model lacks, or tensors the checkpoint lacks.
    """
    dtype, options = one_dtype(dtype, options)
    config = AutoDistributedConfig.from_pretrained(name, **options)
    layers = config.num_hidden_layers
    if not isinstance(blocks, range):
        raise TypeError(f"blocks: got {type(blocks).__name__}, expected a range such as range(0, 16)")
    if not len(blocks) or blocks.step != 1 or blocks.start < 0 or blocks.stop > layers:
        raise ValueError(f"blocks: got {blocks}, expected some of range(0, {layers}), one after the other")
    part = read_part(name, lambda tensor: block_of(tensor, config.block_prefix) in blocks, **options)
    place, base, here = config.block_prefix.rpartition(".")[2], config.base_class, copy.deepcopy(config)
    here.vocab_size, here.pad_token_id = 1, None
    kind: Any = type(base.__name__, (SpanOf, base), {"place": place, "here": blocks, "__module__": base.__module__})
    with torch.device("meta"):
        whole = dict(kind(here).named_parameters())
    # The parts around the blocks never run: a one-row embedding, a final norm.
    tensors = {end: torch.zeros(p.shape) for end, p in whole.items() if not end.startswith(f"{place}.")}
    for tensor, weight in part.tensors.items():  # a checkpoint of the model with its head has a prefix
        tensors[re.sub(rf"^.*?\b(?={re.escape(place)}\.\d)", "", tensor)] = weight
    how = {"dtype": dtype, "attn_implementation": attn_implementation}
    model = filled(kind.from_pretrained, here, tensors, f"{name}: its blocks {blocks}", **how)
    return model.to(device).eval().requires_grad_(False), config, part


@dataclass(eq=False)
class Seen:
    """A hook that keeps a tensor, in the graph or detached, and records the order of hooks."""

    number: int
    turns: list[int]
    in_graph: bool
    value: Tensor | None = None

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        self.turns.append(self.number)
        self.value = tensor if self.in_graph else tensor.detach().clone()


class SpanServer:
    """Serves the blocks of a span; a transport only needs `handle`.

    >>> from transformer_lens.distributed.protocol.messages import Limits, Request, pack_request, unpack_reply
    >>> server = SpanServer("tiny-falcon", range(1, 3))
    >>> unpack_reply(server.handle(pack_request(Request("info", 0, 0))), Limits()).info["blocks"]
    [1, 3]
    >>> server.close()

    `name` is a hub name or a directory, of which only the tensors of `blocks` are read; `options` as in `load_span`.
    The blocks run in evaluation mode, one call at a time, in their own thread.
    """

    def __init__(self, name: str, blocks: range, *, limits: wire.Limits | None = None, **options: Any) -> None:
        self.model, self.config, self.read = load_span(name, blocks, **options)
        self.blocks = blocks
        self.limits = limits or wire.Limits()
        self.bridge = TransformerBridge(self.model)
        self.checks = Checks(self.bridge, self.config, blocks, self.limits)
        self.sessions = Sessions(self.limits)
        self.queue = CallQueue(self.limits)
        self.draining = False
        """Whether it refuses new texts; texts whose keys and values it holds go on."""
        self.seconds_per_block = 0.0
        """The recent time per block in forwards and steps, as a moving average."""
        self._identity = self.config.facts(self.model) | identity_of(name, self.config, options)
        self._told = self._held()
        self._given: dict[str, Any] = {}
        self.model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, **self._given}), with_kwargs=True
        )
        # Its own thread, so that no state of a caller (gradient mode, hooks, partial runs) reaches the blocks.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="span")

    def close(self) -> None:
        """Answer pending calls, and stop."""
        self.queue.finish()
        self._worker.shutdown()

    def tidy(self) -> None:
        """Forget expired sessions, as every call does; for a server that gets no calls."""
        self._worker.submit(self._tidy).result()

    def _tidy(self) -> None:
        self.sessions.expire()
        self._told = self._held()

    def handle(self, message: bytes, peer: str = "local", deadline: float | None = None) -> bytes:
        """Answer a message, by an error's text if need be; nothing runs after `deadline`, by `time.monotonic()`."""
        try:
            with self.queue.turn(peer, len(message)):
                if deadline is not None and time.monotonic() > deadline:
                    raise wire.FullError("this call waited longer for its turn than its time limit")
                return self._worker.submit(self._answer, message, peer).result()
        except wire.FullError as error:
            return _refusal(error, peer)

    def _answer(self, message: bytes, peer: str) -> bytes:
        self._tidy()
        try:
            request = wire.unpack_request(message, self.limits)
            if request.kind == "info":
                return wire.pack_reply(wire.Reply(info=self.info()))
            if request.kind == "close":
                self.sessions.drop(peer, request.session)
                return wire.pack_reply(wire.Reply(info={"closed": request.session}))
            if self.draining and (request.kind != "step" or not request.start):
                raise wire.FullError("this server is leaving and takes nothing new")
            self.checks.check(request)
            request.tensors = {name: tensor.to(self.model.device) for name, tensor in request.tensors.items()}
            begin = time.perf_counter()
            if request.kind == "backward":
                return wire.pack_reply(self._backward(request))
            if request.kind == "step":
                answer = self._step(request, peer, hashlib.sha256(message).digest())
            else:
                answer = wire.pack_reply(self._forward(request))
            took = (time.perf_counter() - begin) / (request.end - request.first)
            self.seconds_per_block += (took - self.seconds_per_block) * (WEIGHT if self.seconds_per_block else 1)
            return answer
        except ANSWERABLE as error:
            return _refusal(error, peer)
        finally:
            self._told = self._held()
            self._given = {}  # nothing of a call stays here: these may be a whole session's keys and values

    def info(self) -> dict[str, Any]:
        """What a client needs to know first, and how busy the server is; callable from any thread."""
        return {
            **self._identity,
            "blocks": [self.blocks.start, self.blocks.stop],
            "state": "draining" if self.draining else "serving",
            "load": self.queue.load(),
            "seconds_per_block": self.seconds_per_block,
            "version": VERSION,
            **self._told,
        }

    def _held(self) -> dict[str, int]:
        """What sessions take; read in the one thread that changes them."""
        held = self.sessions.held()
        return {
            "sessions": sum(map(len, self.sessions.of_peer.values())),
            "kv_bytes": held,
            "kv_bytes_free": max(0, self.limits.session_bytes_of_all - held),
        }

    def _run(self, request: wire.Request, stream: Tensor, cache: Any = None) -> Tensor:
        mask, positions = request.tensors.get("mask"), request.tensors.get("position_ids")
        given = {MASK: mask, POSITIONS: positions, USE_CACHE: request.use_cache}
        if cache is not None:
            given[CACHE] = cache
        self._given = self.bridge.arguments.named(given)
        output: Tensor = self.bridge(stream, start_at_layer=request.first, stop_at_layer=request.end)
        return output

    @contextmanager
    def _attached(self, request: wire.Request, values: dict[int, Tensor], looking: bool = True) -> Iterator[list[Seen]]:
        """Attach the hooks of a request's actions to the bridge, in order, while it runs. Yields those that read."""
        turns: list[int] = []
        reading: list[Seen] = []
        forward = []
        with ExitStack() as undo:
            for nth, action in enumerate(request.actions):
                if action.do == "look" and not looking:
                    continue
                if action.do in wire.EDITS:
                    places = {"positions": action.positions, "heads": action.heads, "experts": action.experts}
                    value = values.get(nth, action.number)
                    entry = HookEntry(Edit(action.do, value, **places))  # type: ignore[arg-type]
                else:
                    reading.append(Seen(nth, turns, in_graph=action.do == "keep"))
                    entry = HookEntry(reading[-1], reads_only=action.do != "keep")
                point, direction = self.checks.point(action.name), "bwd" if action.do == "gradient" else "fwd"
                point.attach(entry, direction)  # type: ignore[arg-type]
                undo.callback(point.remove, entry)
                if direction == "fwd":
                    forward.append((action.name, entry))
            yield reading
            silent = [name for name, entry in forward if not entry.fired]
            if silent:
                raise wire.MessageError(f"hooks that did not fire in blocks {request.first} to {request.end}: {silent}")

    def _values(self, request: wire.Request) -> dict[int, Tensor]:
        named = {nth: f"value.{nth}" for nth in range(len(request.actions))}
        return {nth: request.tensors[name] for nth, name in named.items() if name in request.tensors}

    def _forward(self, request: wire.Request) -> wire.Reply:
        stream = request.tensors["stream"]
        with torch.set_grad_enabled(request.grad), self._attached(request, self._values(request)) as hooks:
            output = self._run(request, stream.requires_grad_(request.grad))
        return _reply({"stream": output}, hooks)

    def _backward(self, request: wire.Request) -> wire.Reply:
        """Run the forward again with its graph, and the gradients back through it."""
        stream = request.tensors["stream"].requires_grad_()
        values = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in self._values(request).items()}
        with torch.enable_grad(), self._attached(request, values, looking=False) as hooks:
            output = self._run(request, stream)
            ends = {"grad.stream": output}
            ends |= {f"grad.{hook.number}": hook.value for hook in hooks if hook.in_graph and hook.value is not None}
            ends = {name: end for name, end in ends.items() if name in request.tensors}
            starts = {"grad.stream": stream}
            starts |= {f"grad.value.{n}": value for n, value in values.items() if value.requires_grad}
            if not ends:
                raise wire.MessageError("backward: no gradient came with the request")
            found = torch.autograd.grad(
                list(ends.values()),
                list(starts.values()),
                [request.tensors[name].to(end.dtype) for name, end in ends.items()],
                allow_unused=True,
            )
            gradients = {name: gradient for name, gradient in zip(starts, found, strict=True) if gradient is not None}
        return _reply(gradients, [hook for hook in hooks if not hook.in_graph])

    def _step(self, request: wire.Request, peer: str, digest: bytes) -> bytes:
        """The next positions of a session; a repeated request gets the same answer without computing."""
        if any(action.do == "gradient" for action in request.actions):
            raise wire.MessageError("a step has no gradients; use forward and backward")
        stream = request.tensors["stream"]
        name = f"{request.session}:{request.first}-{request.end}"
        session = self.sessions.open(peer, name, lambda: self._new_session(request))
        if session.last is not None and session.last[0] == digest:
            return session.last[1]
        with ExitStack() as undo:
            if not session.length:  # nothing is held under its name yet
                undo.callback(self.sessions.drop, peer, name)
            if request.start != session.length or stream.shape[0] != session.rows:
                held = f"{session.length} positions of {session.rows} rows"
                told = f"{stream.shape[0]} rows and starts at {request.start}"
                error = f"session {request.session!r} holds {held}, and the step has {told}"
                return wire.pack_reply(wire.Reply(error=error, info={"held": session.length}))
            self.sessions.check_room(peer, session, stream.shape[1])
            undo.callback(self.sessions.drop, peer, name)  # layers may hold these positions when another one fails
            if "rows" in request.tensors:  # each row goes on from another one, as in beam search
                for layer in dict.fromkeys(session.cache.layers):  # blocks that are not run share the first one's
                    layer.reorder_cache(request.tensors["rows"])
            with torch.no_grad(), self._attached(request, self._values(request)) as hooks:
                output = self._run(request, stream, session.cache)
            answer = wire.pack_reply(_reply({"stream": output}, hooks))
            session.length += stream.shape[1]
            self.sessions.keep(peer, session, digest, answer)
            undo.pop_all()
        return answer

    def _new_session(self, request: wire.Request) -> Session:
        cfg = self.bridge.cfg
        blocks = request.end - request.first
        each = 2 * blocks * cfg.n_key_value_heads * cfg.d_head * self.model.dtype.itemsize
        cache = GroupedCache(self.model.config)  # bitwise transformers' own, and 1/29 of it for Falcon-180B
        # The model asks its first layer for the length of the text, and blocks below the first of these do not run.
        cache.layers = [cache.layers[request.first]] * request.first + cache.layers[request.first : request.end]
        return Session(cache, bytes_per_position=each, rows=request.tensors["stream"].shape[0])


def _reply(tensors: dict[str, Tensor], hooks: list[Seen]) -> wire.Reply:
    """A reply with tensors and what the hooks saw, in the order in which they fired."""
    seen = {f"seen.{hook.number}": hook.value for hook in hooks if hook.value is not None}
    turns = hooks[0].turns if hooks else []
    return wire.Reply({**tensors, **seen}, turns=[turn for turn in turns if f"seen.{turn}" in seen])


def _refusal(error: Exception, peer: str) -> bytes:
    """The reply that says why there is no answer."""
    name = type(error).__name__
    if not isinstance(error, TOLD):
        logger.warning("a call of peer %r failed: %s: %.2000s", peer[:128], name, error)
        text = "the blocks could not compute this; the server's log says more"
        return wire.pack_reply(wire.Reply(error=f"{name}: {text}"))
    text = str(error.args[0]) if error.args else name
    advice = error.advice if isinstance(error, (wire.MessageError, wire.FullError)) else {}
    return wire.pack_reply(wire.Reply(error=wire.printable(f"{name}: {text}"), info=advice))


class LocalSpan:
    """A span whose server is in this process; arguments as for `SpanServer`.

    >>> from transformer_lens.distributed.protocol.messages import Limits, Request, pack_request, unpack_reply
    >>> span = LocalSpan("tiny-falcon", range(0, 2))
    >>> unpack_reply(span.send(pack_request(Request("info", 0, 0))), Limits()).info["n_layers"]
    4
    >>> span.close()
    """

    _numbers = itertools.count(1)

    def __init__(self, name: str, blocks: range, *, limits: wire.Limits | None = None, **options: Any) -> None:
        self.server = SpanServer(name, blocks, limits=limits, **options)
        self.blocks = blocks
        self.peer = f"local-{next(self._numbers)}"
        self.closed = False

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        """Answer one message, without a time limit."""
        if self.closed:
            raise wire.SpanUnreachable(f"{self.peer} was closed")
        return self.server.handle(message)

    def close(self) -> None:
        """Stop the server."""
        self.closed = True
        self.server.close()
