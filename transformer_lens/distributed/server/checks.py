"""A server's checks of a request before anything runs: its blocks, tensors and actions, and their cost."""

import math
import re
from typing import Any

from torch import Tensor

from transformer_lens.distributed.protocol.messages import EDITS, FLOATS, INTEGER, Action, Limits, MessageError, Request
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

NUMBER = 8  # the most bytes of a number in an answer
FLOAT = 4  # the fewest bytes of a number while a block runs: norms, softmaxes and routers compute in float32
INSIDE = ("hook_attn_scores", "hook_pattern")  # with these, the scores of every head exist, whatever the attention


class Checks:
    """The checks of one server; each raises `MessageError`, and changes nothing."""

    def __init__(self, bridge: TransformerBridge, config: Any, blocks: range, limits: Limits) -> None:
        self.bridge = bridge
        self.config = config
        self.blocks = blocks
        self.limits = limits
        model: Any = bridge.original_model
        self.attention, self.number = model.config._attn_implementation, max(FLOAT, model.dtype.itemsize)
        self.table = bridge.hook_table()
        of_neurons = [row for row in self.table if row.name == "blocks.{i}.mlp.hook_post"]
        self.neurons = max(math.prod(size for size in row.shape if isinstance(size, int)) for row in of_neurons)

    def check(self, request: Request) -> None:
        first, end = request.first, request.end
        if not self.blocks.start <= first < end <= self.blocks.stop:
            told = f"blocks {first} to {end} were asked for, and this server has {self.blocks}"
            raise MessageError(told, retry="blocks")  # it may have had others before it was started again
        self._check_stream(request)
        self._check_names(request)
        for nth, action in enumerate(request.actions):
            self._check_action(request, nth, action)
        self._check_cost(request)

    def point(self, name: str) -> HookPoint:
        """The hook of a name in the whole model."""
        found = re.fullmatch(r"blocks\.(\d{1,5})\.([\w.]+)", name, re.ASCII)
        if found is None or int(found[1]) not in self.blocks:
            raise MessageError(f"hook {name!r} is not in the blocks of this server, {self.blocks}")
        if name not in self.bridge.hook_dict:
            raise MessageError(f"no hook of these blocks is named {name!r}")
        return self.bridge.hook_dict[name]

    def shape(self, request: Request, action: Action) -> list[int]:
        """The shape of the activation at an action's hook."""
        rows, new = request.tensors["stream"].shape[:2]
        sizes = {"batch": rows, "pos": new, "query_pos": new, "key_pos": new + request.start}
        row = self.table.row(str(self.point(action.name).name))
        return [int(sizes.get(str(axis), axis)) for axis in row.shape]

    def _check_stream(self, request: Request) -> None:
        stream, width = request.tensors.get("stream"), self.config.hidden_size
        dtype = self.bridge.original_model.dtype
        if stream is None or stream.ndim != 3 or stream.shape[-1] != width or stream.dtype != dtype:
            raise MessageError(f"stream: expected a tensor [batch, pos, {width}] of {dtype}")
        rows, new = stream.shape[:2]
        longest = self.config.max_position_embeddings
        if rows > self.limits.rows or request.start + new > longest:
            after = f" after {request.start}" if request.start else ""
            got = f"stream: got {rows} rows of {new} positions{after}"
            raise MessageError(f"{got}, and at most {self.limits.rows} of {longest} are run")
        if request.kind != "step" and request.start:
            raise MessageError(f"start: got {request.start}, and only a step goes on with a text")
        if request.kind == "step" and not request.use_cache:
            raise MessageError("use_cache: a step keeps keys and values")
        _check_integers(request, "mask", [[rows, new + request.start]], most=1)
        # Some kinds of rotary frequencies change with the highest position seen, for every later call.
        _check_integers(request, "position_ids", [[rows, new], [1, new]], most=longest - 1)
        _check_integers(request, "rows", [[rows]], most=rows - 1)

    def _check_names(self, request: Request) -> None:
        expected = {"stream", "mask", "position_ids"} | ({"rows"} if request.kind == "step" else set())
        expected |= {f"value.{nth}" for nth, action in enumerate(request.actions) if action.do in EDITS}
        if request.kind == "backward":
            keeps = (f"grad.{nth}" for nth, action in enumerate(request.actions) if action.do == "keep")
            expected |= {"grad.stream", *keeps}
        more = sorted(set(request.tensors) - expected)
        if more:
            raise MessageError(f"tensors nobody asked for: {', '.join(more)[:256]}")
        stream, gradient = request.tensors["stream"], request.tensors.get("grad.stream")
        if gradient is not None and (gradient.shape, gradient.dtype) != (stream.shape, stream.dtype):
            raise MessageError("grad.stream: expected the shape and dtype of the stream")

    def _check_action(self, request: Request, nth: int, action: Action) -> None:
        point = self.point(action.name)
        if action.do in EDITS:
            self._check_edit(action, point, request.tensors.get(f"value.{nth}"))
        gradient = request.tensors.get(f"grad.{nth}")
        if gradient is not None:
            shape = self.shape(request, action)
            if list(gradient.shape) != shape or gradient.dtype not in FLOATS or point.integer:
                raise MessageError(f"grad.{nth}: expected a gradient of shape {shape}")

    def _check_edit(self, action: Action, point: HookPoint, value: Tensor | None) -> None:
        if (value is not None) + (action.number is not None) != (action.do != "zero"):
            expected = "no" if action.do == "zero" else "one"
            raise MessageError(f"{action.do} at {action.name!r}: expected {expected} value")
        if point.integer:
            experts = int(self.bridge.cfg.num_experts or 0)
            fits = action.do == "set" and value is not None and value.dtype == INTEGER
            if value is None or not fits or value.min() < 0 or value.max() >= experts:
                told = f"it can be set, to 0 ... {experts - 1}"
                raise MessageError(f"{action.name!r} holds the numbers of experts; {told}")

    def _check_cost(self, request: Request) -> None:
        """Bound the answer's size, and estimates of a call's memory and work, all from shapes alone."""
        rows, new = request.tensors["stream"].shape[:2]
        cfg, blocks = self.bridge.cfg, request.end - request.first
        sizes = [math.prod(self.shape(request, action)) for action in request.actions]
        answer = NUMBER * sum(n for n, a in zip(sizes, request.actions, strict=True) if a.do not in EDITS)
        # One block's activations, a few of each width, with every head's scores where they are computed, else one mask.
        every = self.attention == "eager" or any(action.name.endswith(INSIDE) for action in request.actions)
        scores = (cfg.n_heads if every else 1) * (new + request.start)
        block = rows * new * (12 * cfg.d_model + 4 * self.neurons + 3 * scores)
        graph = blocks if request.grad or request.kind == "backward" else 1
        # An edit's activation exists three times while it is made, and as long as the graph.
        edits = [n for n, action in zip(sizes, request.actions, strict=True) if action.do in EDITS]
        edited = 3 * (sum(edits) if graph > 1 else max(edits, default=0))
        memory = answer + (block * graph + edited) * self.number
        passes = 3 if request.kind == "backward" else 1
        work = passes * (rows * new * blocks * cfg.d_model + sum(sizes))
        for cost, most, told in (
            (answer, self.limits.answer, "the answer would have up to {} bytes, and at most {} are made"),
            (memory, self.limits.memory, "the call would take about {} bytes, and at most {} may be used"),
            (work, self.limits.work, "the call would compute {} numbers, and at most {} are computed"),
        ):
            if cost > most:
                raise MessageError(told.format(cost, most), fewer_blocks=True)


def _check_integers(request: Request, name: str, shapes: list[list[int]], most: int) -> None:
    tensor = request.tensors.get(name)
    if tensor is None:
        return
    if list(tensor.shape) not in shapes or tensor.dtype != INTEGER or tensor.min() < 0 or tensor.max() > most:
        raise MessageError(f"{name}: expected whole numbers 0 ... {most} of shape {shapes[0]}")
