"""`cluster up`, `status`, `down`: a model's blocks on the nodes of a Ray cluster."""

from dataclasses import dataclass

from typer import Option

import transformer_lens.cli.options as options
from transformer_lens.cli.running import Commands, say
from transformer_lens.cli.serve import numbers, show, tell

HELP = """Run all blocks of a model on the nodes of a Ray cluster.

[bold]Example[/]

transformer-lens cluster up tiny-mixtral --nodes 3
"""
cluster = Commands(no_args_is_help=True, rich_markup_mode="rich", help=HELP)


@dataclass(frozen=True)
class Address:
    """Cluster"""

    address: str = Option("auto", help="Address of the Ray cluster. Default: the one that this machine is part of.")
    prefix: str | None = Option(None, help="Name of the blocks; a local directory needs one.")


@dataclass(frozen=True)
class Placement(Address):
    """Cluster"""

    nodes: int | None = Option(
        None, min=1, help="How many nodes hold blocks, those with the most memory. Default: all."
    )
    spans_per_node: int = Option(1, min=1, help="Spans on each node, as one for each of its GPUs.")
    replicas: int = Option(1, min=1, help="How many times each block is held.")
    limit: list[str] | None = Option(None, help="Any limit by its name in `Limits`, as memory=64GiB; repeatable.")


@cluster.command()
def up(model: options.Model, *, placement: Placement, loading: options.LoadingPart) -> None:
    """Start servers of all blocks of a model on the nodes, each with what it needs, and leave them running.

    [bold]Example[/]

    transformer-lens cluster up tiny-mixtral --nodes 3
    """
    from transformer_lens.distributed.cluster import up as start

    told = {**vars(loading), "dtype": options.torch_dtype(loading.dtype), "dht_prefix": placement.prefix}
    told = {name: value for name, value in told.items() if value is not None}
    places = {name: getattr(placement, name) for name in ("address", "nodes", "spans_per_node", "replicas")}
    with options.quiet(), options.named(model):
        show(start(model, limits=numbers(placement.limit), **places, **told))


@cluster.command()
def status(model: options.Model, *, where: Address, json: options.AsJson = False) -> None:
    """Show a model's servers on the cluster; exit code 1 if a block has no server.

    [bold]Example[/]

    transformer-lens cluster status tiny-mixtral
    """
    from transformer_lens.distributed.cluster import status as look

    with options.quiet(), options.named(model):
        found = look(model, address=where.address, dht_prefix=where.prefix)
    tell(found, json)


@cluster.command()
def down(model: options.Model, *, where: Address) -> None:
    """Stop a model's servers on the cluster.

    [bold]Example[/]

    transformer-lens cluster down tiny-mixtral
    """
    from transformer_lens.distributed.cluster import down as stop

    with options.quiet(), options.named(model):
        say(f"{stop(model, address=where.address, dht_prefix=where.prefix)} servers stopped")
