"""`serve`: a span of a model's blocks for other machines, until a signal says to leave."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from transformer_lens.cli.options import (
    LOADING,
    AttnImplementation,
    Device,
    Dtype,
    Model,
    Revision,
    named,
    need_device,
    quiet,
)
from transformer_lens.cli.running import FAILED, Debug, say

NETWORK, LIMITS = "Network", "Limits"
FORMAT = "%(asctime)s %(levelname)s %(message)s"

InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        help="Address of a server to join, as it prints it; repeatable. Default: none.",
        rich_help_panel=NETWORK,
    ),
]
Identity = Annotated[
    Path | None,
    typer.Option(help="File with this peer's key, made when missing. Default: a new key.", rich_help_panel=NETWORK),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        help="Name under which the blocks are announced; a local directory needs one. Default: from the model's name.",
        rich_help_panel=NETWORK,
    ),
]


def span_of(text: str) -> range:
    """
    >>> span_of("0:16")
    range(0, 16)

    The blocks of an option. Raises typer's `BadParameter`, exit code 2, for anything but a first block and an end.
    """
    found = re.fullmatch(r"\s*(\d{1,5})\s*:\s*(\d{1,5})\s*", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise typer.BadParameter(f"got {text!r}, expected a first block and an end, such as 0:16")
    return range(int(found[1]), int(found[2]))


LEAST = 0.001
"""Seconds, where zero would be no time at all."""
Blocks = Annotated[
    range,
    typer.Option(parser=span_of, metavar="FIRST:END", help="Which blocks, such as 0:16; the end is not among them."),
]
Host = Annotated[
    str, typer.Option(help="IP address to listen on. Others than loopback can be called.", rich_help_panel=NETWORK)
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.", rich_help_panel=NETWORK)
]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="Peer id that is served; repeatable. Default: everybody.", rich_help_panel=NETWORK),
]
AddressFile = Annotated[
    Path | None,
    typer.Option(help="File that gets the addresses, too, once calls are answered.", rich_help_panel=NETWORK),
]
UpdatePeriod = Annotated[
    float, typer.Option(min=LEAST, help="Seconds between two announcements.", rich_help_panel=NETWORK)
]
DrainSeconds = Annotated[
    float, typer.Option(min=0, help="Seconds that running texts have when a signal comes.", rich_help_panel=NETWORK)
]
SessionSeconds = Annotated[
    float | None, typer.Option(min=LEAST, help="A text that nobody goes on with is forgotten.", rich_help_panel=LIMITS)
]
SessionBytes = Annotated[int | None, typer.Option(min=1, help="Keys and values of one peer.", rich_help_panel=LIMITS)]
MessageBytes = Annotated[int | None, typer.Option(min=1, help="The largest message.", rich_help_panel=LIMITS)]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of torch. Default: its own choice.", rich_help_panel=LOADING)
]


def serve(
    model: Model,
    blocks: Blocks,
    host: Host = "127.0.0.1",
    port: Port = 0,
    initial_peers: InitialPeers = None,
    identity: Identity = None,
    prefix: Prefix = None,
    allow: Allow = None,
    address_file: AddressFile = None,
    update_period: UpdatePeriod = 60,
    drain_seconds: DrainSeconds = 30,
    session_seconds: SessionSeconds = None,
    session_bytes: SessionBytes = None,
    message_bytes: MessageBytes = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    attn_implementation: AttnImplementation = None,
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """Serve some blocks of a model to other machines, until Ctrl-C.

    Its addresses go to standard output, one on each line; clients and other servers take them as initial peers.
    A first signal lets running texts come to their end, a second one stops at once.

    [bold]Examples[/]

    transformer-lens serve tiny-falcon --blocks 0:2

    transformer-lens serve tiiuae/falcon-180B --blocks 0:16 --host 10.0.0.5 --identity server.key --allow 12D3KooW...
    """
    need_device(device)
    limits = {"session_seconds": session_seconds, "session_bytes": session_bytes, "message": message_bytes}
    options = {
        "device": device,
        "attn_implementation": attn_implementation,
        "revision": revision,
        "dht_prefix": prefix,
    }
    ended_well = run_serve(
        model,
        blocks,
        host=host,
        port=port,
        initial_peers=initial_peers or (),
        identity=identity,
        allow=allow,
        ready=lambda addresses: show_addresses(addresses, address_file),
        update_period=update_period,
        drain_seconds=drain_seconds,
        limits={name: value for name, value in limits.items() if value is not None},
        threads=threads,
        dtype=dtype,
        **{name: value for name, value in options.items() if value is not None},
    )
    if not ended_well:
        raise typer.Exit(FAILED)


def show_addresses(addresses: Sequence[str], file: Path | None) -> None:
    """Addresses on standard output, and in a file that is there only when it is whole."""
    text = "".join(f"{address}\n" for address in addresses)
    if file is not None:
        begun = file.with_name(f"{file.name}.part")
        begun.write_text(text)
        begun.replace(file)
    sys.stdout.write(text)
    sys.stdout.flush()


def run_serve(
    model: str,
    blocks: range,
    *,
    ready: Callable[[Sequence[str]], None],
    host: str = "127.0.0.1",
    port: int = 0,
    initial_peers: Sequence[str] = (),
    identity: Path | None = None,
    allow: Sequence[str] | None = None,
    update_period: float = 60,
    drain_seconds: float = 30,
    limits: dict[str, Any] | None = None,
    threads: int | None = None,
    dtype: str | None = None,
    **options: Any,
) -> bool:
    """Load a span, serve it until a signal, and leave. Returns `False` where it could not go on.

    >>> run_serve("tiny-falcon", range(0, 2), ready=list.append)  # doctest: +SKIP
    """
    from transformer_lens.distributed import Limits, SpanServer
    from transformer_lens.distributed.network.node import Node, address_of, need_engine
    from transformer_lens.distributed.server.serve import ServedSpan, check_options

    address = address_of(host, port)
    check_options(limits or {}, update_period, drain_seconds, allow)
    need_engine()  # before minutes of reading weights
    warn_if_open(host, allow)
    set_threads(threads)
    with log_to_stderr() as log, signals() as (stop, now):
        with quiet(), named(model):
            kind = None if dtype is None else torch_dtype(dtype)
            server = SpanServer(model, blocks, limits=Limits(**(limits or {})), dtype=kind, **options)
        read = server.read
        log.info("%s, %s: %d tensors, %d bytes", model, blocks, len(read.tensors), read.bytes)
        node = Node(initial_peers, listen=address, identity=identity)
        served = ServedSpan(server, node, allow=allow, update_period=update_period)
        try:
            ended_well = served.run(stop, now, drain_seconds, lambda: ready(node.addresses))
            if now.is_set():
                node.close()
                os._exit(FAILED)  # a call may still be computed, and Python would wait for it
            return ended_well
        finally:
            served.close()


def set_threads(number: int | None) -> None:
    """How many CPU threads torch uses, if it was said."""
    import torch

    if number is not None:
        torch.set_num_threads(number)


def torch_dtype(name: str) -> Any:
    """
    >>> from transformer_lens.cli.serve import torch_dtype
    >>> torch_dtype("bfloat16")
    torch.bfloat16

    A dtype by its name. Raises `ValueError` for one that models are not run in.
    """
    import torch

    from transformer_lens.cli.options import DTYPES

    if name not in DTYPES:
        raise ValueError(f"--dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    return vars(torch)[name]


@contextmanager
def log_to_stderr() -> Iterator[logging.Logger]:
    """What the server does, a line each, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    log = logging.getLogger("transformer_lens")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield log
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def warn_if_open(host: str, allow: Sequence[str] | None) -> None:
    """Say so where everybody who reaches this machine could use it."""
    if not ipaddress.ip_address(host).is_loopback and not allow:
        say(
            f"{host} can be reached from other machines, and whoever reaches it may use this server; --allow PEER "
            "serves chosen peers alone",
            "warning: ",
            "bold yellow",
        )


@contextmanager
def signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Two events: the first SIGINT or SIGTERM sets one, the next the other."""
    stop, now = threading.Event(), threading.Event()

    def received(number: int, frame: Any) -> None:
        (now if stop.is_set() else stop).set()

    before = {number: signal.signal(number, received) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, now
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
