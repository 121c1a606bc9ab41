"""`status`: who serves which blocks of a model, how busy each server is, and which blocks nobody serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.measure import Measurement
from rich.text import Text

from transformer_lens.cli.options import AsJson, Model, named, output, quiet, write_json
from transformer_lens.cli.running import FAILED
from transformer_lens.cli.serve import Connection


def status(model: Model, network: Connection, json: AsJson = False) -> None:
    """Show a model's servers: blocks, state, load, latency; exit code 1 if a block has no server.

    [bold]Example[/]

    transformer-lens status tiny-falcon --initial-peers /ip4/127.0.0.1/tcp/31337/p2p/12D3KooW...
    """
    found = look(model, network.initial_peers or (), identity=network.identity, prefix=network.prefix)
    if json:
        write_json(found)
    else:
        show(found)
    if found["missing"]:
        raise typer.Exit(FAILED)


def look(
    model: str, initial_peers: Sequence[str], *, identity: Path | None = None, prefix: str | None = None
) -> dict[str, Any]:
    """Everything known about a model's servers. Raises `SpanUnreachable` if no peer answers."""
    from transformer_lens.distributed import AutoDistributedConfig
    from transformer_lens.distributed.client.swarm import Swarm

    with quiet(), named(model):
        config = AutoDistributedConfig.from_pretrained(
            model, initial_peers=list(initial_peers), max_pinged=2**15, dht_prefix=prefix
        )
    swarm = Swarm(config, identity=identity)
    try:
        rows = [row.describe() for row in swarm.known()]
    finally:
        swarm.close()
    serving = [row["blocks"] for row in rows if row["state"] == "serving"]
    missing = [n for n in range(config.num_hidden_layers) if not any(first <= n < end for first, end in serving)]
    return {
        "model": model,
        "dht_prefix": config.dht_prefix,
        "n_layers": config.num_hidden_layers,
        "servers": rows,
        "missing": missing,
    }


WIDE = 1000
COLUMNS = ("blocks", "state", "load", "sessions", "KV bytes", "free", "ms", "ms per block", "version", "peer")


def show(found: dict[str, Any]) -> None:
    """Show a table of servers, and the blocks that nobody serves."""
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
    console = output()
    # A peer id broken over lines is useless, so a narrow terminal wraps the lines itself.
    console.width = max(console.width, Measurement.get(console, console.options.update(width=WIDE), table).maximum)
    console.print(table)
    if found["missing"]:
        console.print(Text(f"nobody serves the blocks {', '.join(map(str, found['missing']))}"))


def number(value: float | None, scale: float = 1) -> str:
    """A number as a table cell; empty if unknown."""
    return "" if value is None else f"{value * scale:,.4g}" if scale != 1 else f"{value:,.0f}"
