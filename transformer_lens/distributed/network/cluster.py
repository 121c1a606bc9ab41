"""The actors of a model on a Ray cluster: joining it, and finding, asking and stopping them. Needs `[cluster]`."""

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from transformer_lens.checks import needed
from transformer_lens.distributed.network.records import overview
from transformer_lens.distributed.protocol.configs import AutoDistributedConfig
from transformer_lens.distributed.protocol.messages import SpanUnreachable

logger = logging.getLogger(__name__)

NAMESPACE = "transformer_lens"  # of the actors' names in Ray
MISSING = "servers on a cluster need Ray: pip install 'transformer-lens-bridge[cluster]'"


def joined(address: str = "auto") -> Any:
    """Ray, connected to the cluster at this address unless this process already is to one.

    Raises `ImportError`, saying what to install, if Ray is missing, and `SpanUnreachable` if no cluster is there.
    """
    ray = needed("ray", MISSING)
    for part in ("util.scheduling_strategies", "exceptions"):
        needed(f"ray.{part}", MISSING)
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SpanUnreachable(f"no Ray cluster at {address!r}; `ray start --head` makes one: {error}") from error
    return ray


def actors_of(ray: Any, config: Any) -> dict[str, range]:
    """The actors of a model's spans by name, and their blocks; those that are being restarted are among them."""
    found = {}
    for row in ray.util.list_named_actors(all_namespaces=True):
        prefix, _, rest = row["name"].partition(".")
        if row["namespace"] == NAMESPACE and prefix == config.dht_prefix:
            first, _, end = rest.partition(".")[0].partition("-")
            found[row["name"]] = range(int(first), int(end))
    return dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop, item[0])))


def told_by(ray: Any, names: Iterable[str], seconds: float) -> dict[str, dict[str, Any]]:
    """What the actors say of themselves that answer within these seconds, by name."""
    until, asked, told = time.monotonic() + seconds, {}, {}
    for name in names:
        with suppress(ValueError):  # the actor has just been stopped
            asked[name] = ray.get_actor(name, namespace=NAMESPACE).info.remote()
    for name, answer in asked.items():
        try:
            told[name] = ray.get(answer, timeout=max(0.0, until - time.monotonic()))
        except ray.exceptions.RayError as error:
            logger.info("%s does not answer: %s", name, type(error).__name__)
    return told


def status(model: str, *, address: str = "auto", **options: Any) -> dict[str, Any]:
    """What each span of a model says of itself, and which blocks nobody serves, as plain data.

    `options` are config settings; actors have `ping_timeout` seconds to answer.
    """
    ray, config = joined(address), AutoDistributedConfig.from_pretrained(model, **options)
    names = actors_of(ray, config)
    told = told_by(ray, names, config.ping_timeout)
    unknown = dict.fromkeys(("load", "sessions", "kv_bytes", "kv_bytes_free", "latency", "seconds_per_block"))
    silent = {"state": "no answer", "version": ""}
    spans = {name: {"peer": name, "blocks": [blocks.start, blocks.stop]} for name, blocks in names.items()}
    return overview(model, config, [{**unknown, **told.get(name, silent), **span} for name, span in spans.items()])


def down(model: str, *, address: str = "auto", **options: Any) -> int:
    """Stop the actors of a model; returns how many there were."""
    ray = joined(address)
    names = actors_of(ray, AutoDistributedConfig.from_pretrained(model, **options))
    for name in names:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    return len(names)
