"""`serve`: run a span of a model's blocks for other machines; `status`: who runs which blocks of a model."""

import ipaddress
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.measure import Measurement
from rich.text import Text
from typer import Option

import transformer_lens.cli.options as options
from transformer_lens.cli.running import FAILED, say


@dataclass(frozen=True)
class Connection:
    """Network"""

    initial_peers: list[str] | None = Option(None, help="Address that a server printed; repeatable. Default: none.")
    identity: Path | None = Option(None, help="File with this peer's key, made when missing. Default: a new key.")
    prefix: str | None = Option(
        None,
        help="Name under which the blocks are announced; a local directory needs one. Default: from the model's name.",
    )


def span_of(text: str) -> range:
    """The blocks of a text such as "0:16". Raises typer's `BadParameter`, exit code 2, for any other form."""
    found = re.fullmatch(r"\s*(\d{1,5})\s*:\s*(\d{1,5})\s*", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise typer.BadParameter(f"got {text!r}, expected a first block and an end, such as 0:16")
    return range(int(found[1]), int(found[2]))


LEAST = 0.001  # the shortest time an option takes, in seconds


@dataclass(frozen=True)
class Network(Connection):
    """Network"""

    host: str = Option("127.0.0.1", help="IP address to listen on. Others than loopback can be called.")
    port: int = Option(0, min=0, max=65535, help="Port to listen on; 0: any that is free.")
    allow: list[str] | None = Option(
        None, help="Peer id that is served, and may announce blocks; repeatable. Default: everybody."
    )
    address_file: Path | None = Option(None, help="File that gets the addresses, too, once calls are answered.")
    update_period: float = Option(60, min=LEAST, help="Seconds between two announcements.")
    drain_seconds: float = Option(30, min=0, help="Seconds that running texts have when a signal comes.")


@dataclass(frozen=True)
class ServerLimits:
    """Limits"""

    session_seconds: float | None = Option(None, min=LEAST, help="A text that nobody goes on with is forgotten.")
    session_bytes: int | None = Option(None, min=1, help="Keys and values of one peer.")
    message_bytes: int | None = Option(None, min=1, help="The largest message.")
    limit: list[str] | None = Option(None, help="Any limit by its name in `Limits`, as memory=64GiB; repeatable.")

    def given(self) -> dict[str, Any]:
        """The limits that were set, by their names in `Limits`."""
        own = {name: getattr(self, name) for name in ("session_seconds", "session_bytes")}
        own["message"] = self.message_bytes
        return {name: most for name, most in own.items() if most is not None} | numbers(self.limit)


UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def numbers(texts: Sequence[str] | None) -> dict[str, float]:
    """Limits such as "memory=64GiB" or "calls=4". Raises typer's `BadParameter`, exit code 2, for any other form."""
    found = {}
    for text in texts or ():
        parts = re.fullmatch(r"(\w+)=(\d{1,18}(?:\.\d+)?)([KMGT]iB|)", text)
        if parts is None:
            raise typer.BadParameter(f"--limit: got {text!r}, expected a name and a number, such as memory=64GiB")
        number = float(parts[2]) * UNITS[parts[3]]
        found[parts[1]] = int(number) if number.is_integer() else number
    return found


@dataclass(frozen=True)
class LoadingServed(options.LoadingPart):
    """Loading the model"""

    threads: int | None = Option(None, min=1, help="CPU threads of torch. Default: its own choice.")


def serve(
    model: options.Model,
    *,
    blocks: range = Option(
        ..., parser=span_of, metavar="FIRST:END", help="Which blocks, such as 0:16; the end is not among them."
    ),
    network: Network,
    limits: ServerLimits,
    loading: LoadingServed,
) -> None:
    """Serve some blocks of a model to other machines until Ctrl-C.

    Addresses go to standard output, one per line, to be used as initial peers by clients and other servers.
    The first signal lets running texts finish, the second stops at once.

    [bold]Examples[/]

    transformer-lens serve tiny-falcon --blocks 0:2

    transformer-lens serve tiiuae/falcon-180B --blocks 0:16 --host 10.0.0.5 --identity server.key --allow 12D3KooW...
    """
    import torch

    from transformer_lens.distributed import SpanServer
    from transformer_lens.distributed.network.node import Node, address_of, need_engine
    from transformer_lens.distributed.protocol.messages import limits_of
    from transformer_lens.distributed.server.serve import ServedSpan, check_options

    options.need_device(loading.device)
    given = limits_of(limits.given())
    address = address_of(network.host, network.port)
    if loading.dtype not in (None, *options.DTYPES):
        raise ValueError(f"--dtype: got {loading.dtype!r}, expected one of {', '.join(options.DTYPES)}")
    check_options(network.update_period, network.drain_seconds, network.allow)
    need_engine()  # before minutes of reading weights
    warn_if_open(network.host, network.allow)
    if loading.threads is not None:
        torch.set_num_threads(loading.threads)
    settings = {**vars(loading), "dht_prefix": network.prefix, "dtype": options.torch_dtype(loading.dtype)}
    del settings["threads"]
    with log_to_stderr() as log, signals() as (stop, now):
        with options.quiet(), options.named(model):
            told = {name: value for name, value in settings.items() if value is not None}
            server = SpanServer(model, blocks, limits=given, **told)
        read = server.read
        log.info("%s, %s: %d tensors, %d bytes", model, blocks, len(read.tensors), read.bytes)
        node = Node(network.initial_peers or (), listen=address, identity=network.identity, allow=network.allow)
        served = ServedSpan(server, node, allow=network.allow, update_period=network.update_period)
        try:
            ended_well = served.run(
                stop, now, network.drain_seconds, lambda: show_addresses(node.addresses, network.address_file)
            )
            if now.is_set():
                node.close()
                os._exit(FAILED)  # a call may still be computed, and Python would wait for it
        finally:
            served.close()
    if not ended_well:
        raise typer.Exit(FAILED)


def show_addresses(addresses: Sequence[str], file: Path | None) -> None:
    """Print addresses, and write them to a file that appears only once it is complete."""
    text = "".join(f"{address}\n" for address in addresses)
    if file is not None:
        begun = file.with_name(f"{file.name}.part")
        begun.write_text(text)
        begun.replace(file)
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def log_to_stderr() -> Iterator[logging.Logger]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
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
    """Warn if anyone who can reach this machine could use the server."""
    if not ipaddress.ip_address(host).is_loopback and not allow:
        say(
            f"{host} can be reached from other machines, and whoever reaches it may use this server; --allow PEER "
            "serves chosen peers alone",
            "warning: ",
            "bold yellow",
        )


@contextmanager
def signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Two events: the first SIGINT or SIGTERM sets one, the next sets the other."""
    stop, now = threading.Event(), threading.Event()

    def received(number: int, frame: Any) -> None:
        (now if stop.is_set() else stop).set()

    before = {number: signal.signal(number, received) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, now
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status(model: options.Model, network: Connection, json: options.AsJson = False) -> None:
    """Show a model's servers: blocks, state, load, latency; exit code 1 if a block has no server.

    [bold]Example[/]

    transformer-lens status tiny-falcon --initial-peers /ip4/127.0.0.1/tcp/31337/p2p/12D3KooW...
    """
    tell(look(model, network.initial_peers or (), identity=network.identity, prefix=network.prefix), json)


def tell(found: dict[str, Any], json: bool) -> None:
    """Print what is known of a model's servers. Exit code 1 if a block has none."""
    (options.write_json if json else show)(found)
    if found["missing"]:
        raise typer.Exit(FAILED)


def look(
    model: str, initial_peers: Sequence[str], *, identity: Path | None = None, prefix: str | None = None
) -> dict[str, Any]:
    """Everything known about a model's servers. Raises `SpanUnreachable` if no peer answers."""
    from transformer_lens.distributed import AutoDistributedConfig
    from transformer_lens.distributed.client.swarm import Swarm
    from transformer_lens.distributed.network.records import overview

    with options.quiet(), options.named(model):
        config = AutoDistributedConfig.from_pretrained(
            model, initial_peers=list(initial_peers), max_pinged=2**15, dht_prefix=prefix
        )
    with closing(Swarm(config, identity=identity)) as swarm:
        rows = [row.describe() for row in swarm.known()]
    return overview(model, config, rows)


WIDE = 1000
COLUMNS = ("blocks", "state", "load", "sessions", "KV bytes", "free", "ms", "ms per block", "version", "peer")


def show(found: dict[str, Any]) -> None:
    from transformer_lens.text_table import TextTable

    rows = [
        (
            "{}:{}".format(*row["blocks"]),
            row["state"],
            *(number(row[name]) for name in ("load", "sessions", "kv_bytes", "kv_bytes_free")),
            *(number(row[name], 1000) for name in ("latency", "seconds_per_block")),
            row["version"],
            row["peer"],
        )
        for row in found["servers"]
    ]
    title = f"{found['model']}: {len(found['servers'])} servers of {found['n_layers']} blocks"
    table = TextTable(title, COLUMNS, rows).__rich__()
    for column in table.columns:
        column.no_wrap = True
    console = options.output()
    # A peer id broken over lines is useless, so a narrow terminal wraps the lines itself.
    console.width = max(console.width, Measurement.get(console, console.options.update(width=WIDE), table).maximum)
    console.print(table)
    if found["missing"]:
        console.print(Text(f"nobody serves the blocks {', '.join(map(str, found['missing']))}"))


def number(value: float | None, scale: float = 1) -> str:
    """A number as a table cell; empty if unknown."""
    return "" if value is None else f"{value * scale:,.4g}" if scale != 1 else f"{value:,.0f}"
