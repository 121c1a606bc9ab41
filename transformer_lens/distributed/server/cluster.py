"""Putting a model's blocks on the nodes of a Ray cluster: an actor for each span, placed by memory, restarted by Ray.

For machines that trust one another: whoever reaches a Ray cluster can run Python on it. What the actors are asked is
the same closed format as everywhere. Needs the extra `[cluster]`.
"""

import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from transformer_lens.checks import needed
from transformer_lens.distributed.network.cluster import MISSING, NAMESPACE, actors_of, down, joined, status
from transformer_lens.distributed.protocol.configs import AutoDistributedConfig, one_dtype
from transformer_lens.distributed.protocol.messages import limits_of
from transformer_lens.distributed.server.server import SpanServer

MARGIN = 1.25  # the memory that a span asks of its node, in sizes of its weights


class SpanActor:
    """A `SpanServer` in a process of its own on some node."""

    def __init__(self, name: str, blocks: range, limits: Mapping[str, Any], options: dict[str, Any]) -> None:
        self.server = SpanServer(name, blocks, limits=limits_of(limits), **options)
        self.place = {"node": needed("ray", MISSING).get_runtime_context().get_node_id(), "pid": os.getpid()}

    def handle(self, message: bytes, peer: str, seconds: float) -> bytes:
        return self.server.handle(message, peer, time.monotonic() + seconds)

    def info(self) -> dict[str, Any]:
        return {**self.server.info(), **self.place}


def placed(sizes: Sequence[int], rooms: Sequence[float]) -> list[range]:
    """The blocks that go into each room, as evenly as fits: `sizes` in bytes of blocks, `rooms` in free bytes.

    >>> placed([10] * 6, [100, 19, 100])
    [range(1, 4), range(0, 1), range(4, 6)]

    Raises `ValueError`, saying what is missing, if they do not all fit.
    """
    found, at = [range(0)] * len(rooms), 0
    smallest_first = sorted(range(len(rooms)), key=lambda place: rooms[place])
    for left, place in zip(range(len(rooms), 0, -1), smallest_first, strict=True):
        end = at + math.ceil((len(sizes) - at) / left)
        while sum(sizes[at:end]) * MARGIN > rooms[place]:
            end -= 1
        found[place], at = range(at, end), end
    if at < len(sizes):
        needs = f"the blocks take {sum(sizes) * MARGIN:.3g} bytes"
        raise ValueError(f"{needs}, and there is room for {at} of {len(sizes)}: add nodes")
    return found


def up(
    model: str,
    *,
    address: str = "auto",
    nodes: int | None = None,
    spans_per_node: int = 1,
    replicas: int = 1,
    limits: Mapping[str, Any] | None = None,
    start_timeout: float = 1800,
    **options: Any,
) -> dict[str, Any]:
    """Start actors for all blocks of a model on the nodes of a Ray cluster, and return their `status`.

    >>> up("tiny-mixtral", nodes=3)["missing"]  # doctest: +SKIP
    []

    `nodes` are how many of the nodes, those with the most memory, hold blocks (`None`: all); each holds
    `spans_per_node`, for instance one for each GPU (`device="cuda"` asks Ray for one each). With `replicas`, every
    block is held so many times, on different nodes where there are several. `options` as in `load_span`; a hub name or
    a directory must mean the same on every node. The actors stay until `down`. Raises `ValueError` for blocks that find
    no room, for a span that has not started after `start_timeout` seconds, and for a model that is up already.
    """
    ray = joined(address)
    dtype, options = one_dtype(None, options)
    settings = {name: value for name, value in options.items() if name not in ("device", "attn_implementation")}
    config = AutoDistributedConfig.from_pretrained(model, **settings)
    if actors_of(ray, config):
        raise ValueError(f"{model}: it is up already; `down` stops it")
    with torch.device("meta"):
        blocks = config.base_class(config).get_submodule(config.block_prefix.rpartition(".")[2])
    itemsize = (dtype or config.dtype or torch.float32).itemsize
    sizes = [itemsize * sum(weight.numel() for weight in block.parameters()) for block in blocks]
    rooms = {node["NodeID"]: node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]}
    chosen = sorted(rooms, key=lambda node: -rooms[node])[:nodes] * min(spans_per_node, len(sizes))
    spans = placed(sizes, [rooms[node] / spans_per_node / replicas for node in chosen])
    started = []
    for replica, (number, span) in itertools.product(range(replicas), enumerate(spans)):
        if span:
            made = ray.remote(SpanActor).options(
                name=f"{config.dht_prefix}.{span.start}-{span.stop}.{replica}",
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=limits_of(limits).calls_of_all + 2,
                num_cpus=0,  # Ray's default, one, would keep a node's spans from moving to another one
                num_gpus=int(str(options.get("device")).startswith("cuda")),
                memory=int(sum(sizes[layer] for layer in span) * MARGIN),
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                    chosen[(number + replica) % len(chosen)], soft=True
                ),
            )
            started.append(made.remote(model, span, limits or {}, {**options, "dtype": dtype}))
    try:
        ray.get([actor.info.remote() for actor in started], timeout=start_timeout)
    except ray.exceptions.RayError as error:
        down(model, address=address, **settings)
        raise ValueError(f"{model}: a span did not start: {error}") from error
    return status(model, address=address, **settings)
