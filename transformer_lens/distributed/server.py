"""`SpanServer`: runs a span of unchanged blocks for whoever sends messages, with the bridge's ports and twins inside.

It keeps nothing between calls but the keys and values of sessions. A bad message gets an answer that says why.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from transformer_lens.distributed.edits import Edit
from transformer_lens.distributed.messages import (
    EDITS,
    FLOATS,
    Action,
    Limits,
    MessageError,
    Reply,
    Request,
    pack_reply,
    unpack_request,
)
from transformer_lens.distributed.sessions import Session, Sessions
from transformer_lens.distributed.span_model import load_span
from transformer_lens.hook_points import HookEntry, HookPoint
from transformer_lens.model_bridge import TransformerBridge

ANSWERABLE = (ValueError, TypeError, KeyError, IndexError, RuntimeError)
"""What a call may raise for its content; a `MessageError` is a `ValueError`."""


class Seen:
    """A hook that keeps a tensor, in the graph or apart from it, and notes that it was its turn."""

    def __init__(self, number: int, turns: list[int], in_graph: bool) -> None:
        self.number = number
        self.turns = turns
        self.in_graph = in_graph
        self.value: Tensor | None = None

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        self.turns.append(self.number)
        self.value = tensor if self.in_graph else tensor.detach().clone()


class SpanServer:
    """Serves the blocks of a span; `handle` is all that a transport needs.

    >>> from transformer_lens.distributed.messages import Request, pack_request, unpack_reply
    >>> server = SpanServer("tiny-falcon", range(1, 3))
    >>> unpack_reply(server.handle(pack_request(Request("info", 0, 0))), Limits()).info["blocks"]
    [1, 3]
    >>> server.close()

    `name` is a hub name or a directory, of which only the tensors of `blocks` are read. `options` as in
    `load_span`. Its blocks run in evaluation mode, one call at a time, in a thread of their own.
    """

    def __init__(self, name: str, blocks: range, *, limits: Limits | None = None, **options: Any) -> None:
        self.model, self.config, self.read = load_span(name, blocks, **options)
        self.blocks = blocks
        self.limits = limits or Limits()
        self.bridge = TransformerBridge(self.model)
        self.shapes = {row.name: row.shape for row in self.bridge.hook_table().present()}
        self.sessions = Sessions(self.limits)
        self._given: dict[str, Any] = {}
        self.model.register_forward_pre_hook(self._call_with, with_kwargs=True)
        # Another thread, so that nothing of a caller's state (gradient mode, hooks, partial runs) reaches the blocks.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="span")

    def close(self) -> None:
        """Answer what was asked, and stop."""
        self._worker.shutdown()

    def handle(self, message: bytes, peer: str = "local") -> bytes:
        """The answer to a message, which is an error's text where there is none."""
        return self._worker.submit(self._answer, message, peer).result()

    def _answer(self, message: bytes, peer: str) -> bytes:
        try:
            request = unpack_request(message, self.limits)
            if request.kind == "info":
                return pack_reply(Reply(info=self.info()))
            if request.kind == "close":
                self.sessions.drop(peer, request.session)
                return pack_reply(Reply(info={"closed": request.session}))
            self._check(request)
            if request.kind == "step":
                return self._step(request, peer, hashlib.sha256(message).digest())
            return pack_reply(self._backward(request) if request.kind == "backward" else self._forward(request))
        except ANSWERABLE as error:
            text = str(error.args[0]) if error.args else type(error).__name__
            return pack_reply(Reply(error=f"{type(error).__name__}: {text[:2000]}"))

    def info(self) -> dict[str, Any]:
        """What a client has to know before it sends anything."""
        return {
            "dht_prefix": self.config.dht_prefix,
            "model_type": self.config.model_type,
            "blocks": [self.blocks.start, self.blocks.stop],
            "n_layers": self.config.num_hidden_layers,
            "d_model": self.config.hidden_size,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attn_implementation": str(self.model.config._attn_implementation),
            "sessions": sum(map(len, self.sessions.of_peer.values())),
        }

    # -- what is checked before anything runs --------------------------------------------------------

    def _check(self, request: Request) -> None:
        if not self.blocks.start <= request.first < request.end <= self.blocks.stop:
            raise MessageError(
                f"blocks {request.first} to {request.end} were asked for, and this server has {self.blocks}"
            )
        stream = request.tensors.get("stream")
        width = self.config.hidden_size
        if stream is None or stream.ndim != 3 or stream.shape[-1] != width or stream.dtype != self.model.dtype:
            raise MessageError(f"stream: expected a tensor [batch, pos, {width}] of {self.model.dtype}")
        rows, new = stream.shape[:2]
        if rows > self.limits.rows or new > self.config.max_position_embeddings:
            raise MessageError(
                f"stream: got {rows} rows of {new} positions, and at most {self.limits.rows} of "
                f"{self.config.max_position_embeddings} are run"
            )
        total = new + (request.start if request.kind == "step" else 0)
        _check_integers(request, "mask", [[rows, total]], most=1)
        _check_integers(request, "position_ids", [[rows, new], [1, new]], most=2**31)
        _check_integers(request, "rows", [[rows]], most=self.limits.rows)
        self._check_actions(request)

    def _check_actions(self, request: Request) -> None:
        sizes = {"batch": request.tensors["stream"].shape[0]}
        new = request.tensors["stream"].shape[1]
        sizes |= {"pos": new, "query_pos": new, "key_pos": new + request.start}
        expected, total = {"stream", "mask", "position_ids"}, 0
        if request.kind == "step":
            expected.add("rows")
        for nth, action in enumerate(request.actions):
            point = self._point(action.name)
            shape = [int(sizes.get(str(axis), axis)) for axis in self.shapes[_general(point)]]
            value = request.tensors.get(f"value.{nth}")
            if action.do in EDITS:
                expected.add(f"value.{nth}")
                self._check_edit(action, point, value)
            else:
                total += math.prod(shape) * 8
            gradient = request.tensors.get(f"grad.{nth}")
            if request.kind == "backward" and action.do == "keep" and gradient is not None:
                expected.add(f"grad.{nth}")
                if list(gradient.shape) != shape or gradient.dtype not in FLOATS:
                    raise MessageError(f"grad.{nth}: expected a gradient of shape {shape}")
        if total > self.limits.answer:
            raise MessageError(f"the answer would have up to {total} bytes, and at most {self.limits.answer} are made")
        if request.kind == "backward":
            expected.add("grad.stream")
            gradient = request.tensors.get("grad.stream")
            if gradient is not None and (gradient.shape, gradient.dtype) != (
                request.tensors["stream"].shape,
                request.tensors["stream"].dtype,
            ):
                raise MessageError("grad.stream: expected the shape and dtype of the stream")
        if set(request.tensors) - expected:
            raise MessageError(f"tensors nobody asked for: {', '.join(sorted(set(request.tensors) - expected))[:256]}")

    def _check_edit(self, action: Action, point: HookPoint, value: Tensor | None) -> None:
        if (value is not None) + (action.number is not None) != (action.do != "zero"):
            raise MessageError(
                f"{action.do} at {action.name!r}: expected {'no' if action.do == 'zero' else 'one'} value"
            )
        if point.integer:
            experts = int(self.bridge.cfg.num_experts or 0)
            if action.do != "set" or value is None or value.min() < 0 or value.max() >= experts:
                raise MessageError(
                    f"{action.name!r} holds the numbers of experts; it can be set, to 0 ... {experts - 1}"
                )

    def _point(self, name: str) -> HookPoint:
        """The hook of a name of the whole model."""
        found = re.fullmatch(r"blocks\.(\d{1,5})\.([\w.]+)", name)
        layer = int(found.group(1)) if found else -1
        if found is None or layer not in self.blocks:
            raise MessageError(f"hook {name!r} is not in the blocks of this server, {self.blocks}")
        here = f"blocks.{layer - self.blocks.start}.{found.group(2)}"
        if here not in self.bridge.hook_dict:
            raise MessageError(f"no hook of these blocks is named {name!r}")
        return self.bridge.hook_dict[here]

    # -- running ---------------------------------------------------------------------------------------

    def _call_with(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **self._given}

    def _run(self, request: Request, stream: Tensor, cache: Any = None) -> Tensor:
        """The blocks of a request on its stream."""
        mask, positions = request.tensors.get("mask"), request.tensors.get("position_ids")
        self._given = {"attention_mask": mask, "position_ids": positions, "use_cache": request.use_cache}
        if cache is not None:
            self._given["past_key_values"] = cache
        first, end = request.first - self.blocks.start, request.end - self.blocks.start
        output: Tensor = self.bridge(stream, start_at_layer=first or None, stop_at_layer=end)
        return output

    @contextmanager
    def _attached(self, request: Request, values: dict[int, Tensor], looking: bool = True) -> Iterator[list[Seen]]:
        """The hooks of a request's actions on the bridge, in their order, while it runs. Gives those that read."""
        turns: list[int] = []
        reading: list[Seen] = []
        entries = []
        try:
            for nth, action in enumerate(request.actions):
                if action.do == "look" and not looking:
                    continue
                if action.do in EDITS:
                    entry = HookEntry(_edit(action, values.get(nth, action.number)))
                else:
                    reading.append(Seen(nth, turns, in_graph=action.do == "keep"))
                    entry = HookEntry(reading[-1], reads_only=action.do != "keep")
                point, direction = self._point(action.name), "bwd" if action.do == "gradient" else "fwd"
                point.attach(entry, direction)  # type: ignore[arg-type]
                entries.append((point, entry, direction, action.name))
            yield reading
            silent = [name for _, entry, direction, name in entries if direction == "fwd" and not entry.fired]
            if silent:
                raise MessageError(f"hooks that did not fire in blocks {request.first} to {request.end}: {silent}")
        finally:
            for point, entry, _, _ in entries:
                point.remove(entry)

    def _values(self, request: Request) -> dict[int, Tensor]:
        named = {nth: request.tensors.get(f"value.{nth}") for nth in range(len(request.actions))}
        return {nth: value for nth, value in named.items() if value is not None}

    def _forward(self, request: Request) -> Reply:
        stream = request.tensors["stream"]
        with torch.set_grad_enabled(request.grad), self._attached(request, self._values(request)) as hooks:
            output = self._run(request, stream.requires_grad_(request.grad))
        return _reply({"stream": output}, hooks)

    def _backward(self, request: Request) -> Reply:
        """The forward pass once more, with its graph, and the gradients that come back through it."""
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
                raise MessageError("backward: no gradient came with the request")
            found = torch.autograd.grad(
                list(ends.values()),
                list(starts.values()),
                [request.tensors[name].to(end.dtype) for name, end in ends.items()],
                allow_unused=True,
            )
            gradients = {name: gradient for name, gradient in zip(starts, found, strict=True) if gradient is not None}
        return _reply(gradients, [hook for hook in hooks if not hook.in_graph])

    def _step(self, request: Request, peer: str, digest: bytes) -> bytes:
        """The next positions of a session; the same request again gets the same answer, and computes nothing."""
        if any(action.do == "gradient" for action in request.actions):
            raise MessageError("a step has no gradients; use forward and backward")
        stream = request.tensors["stream"]
        name = f"{request.session}:{request.first}-{request.end}"
        session = self.sessions.open(peer, name, lambda: self._new_session(request))
        if session.last is not None and session.last[0] == digest:
            return session.last[1]
        if request.start != session.length or stream.shape[0] != session.rows:
            if not session.length:
                self.sessions.drop(peer, name)
            held = f"{session.length} positions of {session.rows} rows"
            told = f"{stream.shape[0]} rows and starts at {request.start}"
            error = f"session {request.session!r} holds {held}, and the step has {told}"
            return pack_reply(Reply(error=error, info={"held": session.length}))
        done = False
        try:
            self.sessions.check_room(peer, session, stream.shape[1])
            self._reorder(session, request.tensors.get("rows"))
            with torch.no_grad(), self._attached(request, self._values(request)) as hooks:
                output = self._run(request, stream, session.cache)
            answer = pack_reply(_reply({"stream": output}, hooks))
            session.length += stream.shape[1]
            session.last = (digest, answer)
            done = True
        finally:
            if not done:  # some layers may hold these positions already, so none of it can be used
                self.sessions.drop(peer, name)
        return answer

    def _reorder(self, session: Session, rows: Tensor | None) -> None:
        """Let each row go on from another one, as beam search does."""
        if rows is None:
            return
        if int(rows.max()) >= session.rows:
            raise MessageError(f"rows: expected numbers 0 ... {session.rows - 1}")
        for layer in dict.fromkeys(session.cache.layers):  # blocks that are not run share the first one's
            layer.reorder_cache(rows)

    def _new_session(self, request: Request) -> Session:
        cfg = self.bridge.cfg
        heads = self.bridge.adapter.cached_heads()
        blocks = request.end - request.first
        each = 2 * blocks * heads * cfg.d_head * self.model.dtype.itemsize
        cache = DynamicCache(config=self.model.config)
        first = request.first - self.blocks.start
        # The model asks its first layer how long the text is, and blocks below the first of these do not run.
        cache.layers[:first] = [cache.layers[first]] * first
        return Session(cache, bytes_per_position=each, rows=request.tensors["stream"].shape[0])


def _general(point: HookPoint) -> str:
    """A hook's name in the hook table."""
    return re.sub(r"^blocks\.\d+\.", "blocks.{i}.", str(point.name))


def _check_integers(request: Request, name: str, shapes: list[list[int]], most: int) -> None:
    tensor = request.tensors.get(name)
    if tensor is None:
        return
    if list(tensor.shape) not in shapes or tensor.dtype != torch.int64 or tensor.min() < 0 or tensor.max() > most:
        raise MessageError(f"{name}: expected whole numbers 0 ... {most} of shape {shapes[0]}")


def _edit(action: Action, value: Any) -> Edit:
    places = {"positions": action.positions, "heads": action.heads, "experts": action.experts}
    return Edit(action.do, value, **places)  # type: ignore[arg-type]


def _reply(tensors: dict[str, Tensor], hooks: list[Seen]) -> Reply:
    """Tensors, and what the hooks saw, in the order in which it was their turn."""
    seen = {f"seen.{hook.number}": hook.value for hook in hooks if hook.value is not None}
    turns = hooks[0].turns if hooks else []
    return Reply({**tensors, **seen}, turns=[turn for turn in turns if f"seen.{turn}" in seen])
