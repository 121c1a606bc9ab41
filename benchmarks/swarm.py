"""`python -m benchmarks.swarm`: what a network of servers costs, on loopback; writes benchmarks/results/swarm.json.

Round trips, bytes per second, steps of a text beside local ones, starting a server, recovering from `kill -9`.
`make bench-swarm` gives it a network of its own, without which it refuses to run.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, amount, environment, installed, show, store
from benchmarks.timing import Figure
from demos.swarm import MODEL, Server, stopped_in_the_end
from transformer_lens import TransformerBridge
from transformer_lens.cli.options import quiet
from transformer_lens.distributed import AutoDistributedModelForCausalLM
from transformer_lens.distributed.protocol.messages import Request, pack_request

PINGS = 200
STEPS = 24
TEXTS = 5
KILLS = 8
"""Servers that are killed, each in a text of its own."""
ROWS, POSITIONS = 128, 256
"""Of a residual stream of 16 MiB."""
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def main() -> int:
    """Measure, show, store."""
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        sys.exit(f"benchmarks.swarm runs in a network of its own and this one has {names}: use `make bench-swarm`")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    figures: dict[str, tuple[Figure, str]] = {}
    with tempfile.TemporaryDirectory() as folder, stopped_in_the_end() as servers, quiet():
        measure(Path(folder), servers, figures)
    rows = [
        (name, amount(each.median, unit), f"{amount(each.low, unit)} to {amount(each.high, unit)}", str(each.samples))
        for name, (each, unit) in figures.items()
    ]
    show("A network of servers on loopback", ("what", "median", "quartiles", "samples"), rows, {})
    where = environment(torch.device("cpu"))
    where["packages"]["hivemind"] = installed("hivemind")
    found = [{"what": name, "unit": unit, **each.to_dict()} for name, (each, unit) in figures.items()]
    store(RESULTS / "swarm.json", {"environment": where, "model": MODEL, "figures": found})
    return 0


def measure(folder: Path, servers: list[Server], figures: dict[str, tuple[Figure, str]]) -> None:
    """All figures, by what they are of."""
    begin = time.perf_counter()
    servers.append(Server("0:4", folder))
    address = servers[0].address()
    starts = [time.perf_counter() - begin]
    for blocks in ("0:2", "2:4"):
        begin = time.perf_counter()
        servers.append(Server(blocks, folder, [address]))
        servers[-1].address()
        starts.append(time.perf_counter() - begin)
    figures["a server starts, until it answers"] = Figure.of(starts), "s"
    whole, *halves = (server.peer() for server in servers)

    local = TransformerBridge.boot_transformers(MODEL)
    with joined(address) as model:
        node = model._swarm.node
        figures["a round trip"] = Figure.of([node.ping(whole, 10)[0] for _ in range(PINGS)]), "s"
        figures["16 MiB to a server and back"] = Figure.of(there_and_back(model, whole)), "MB/s"
    expected = text(local.original_model)
    figures["a step of the model here"] = Figure.of(timed(lambda: text(local.original_model))), "s"
    for name, peers in {"one server": [whole], "two servers": halves}.items():
        with joined(address, allowed_servers=peers) as model:
            assert torch.equal(text(model), expected)
            figures[f"a step over {name}"] = Figure.of(timed(lambda model=model: text(model))), "s"
    seconds, replayed = recoveries(folder, servers, address, expected)
    figures["recovery from kill -9, with all that is sent again"] = Figure.of(seconds), "s"
    figures["the longest of these recoveries"] = Figure.of([max(seconds)]), "s"
    figures["calls that a recovery sends again"] = Figure.of(replayed), "calls"


def joined(address: str, **settings: Any) -> Any:
    """A model over the servers."""
    return AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=[address], **settings)


def text(model: Any, **options: Any) -> torch.Tensor:
    """A text of so many steps that the prompt hardly counts."""
    found: torch.Tensor = model.generate(
        TOKENS, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0, **options
    )
    return found


def timed(work: Callable[[], Any]) -> list[float]:
    """Seconds of a step, averaged over each of some texts."""
    found = []
    for _ in range(TEXTS):
        begin = time.perf_counter()
        work()
        found.append((time.perf_counter() - begin) / STEPS)
    return found


def there_and_back(model: Any, peer: str) -> list[float]:
    """Megabytes per second of a message and its answer, without what its one block computes."""
    span = next(span for span in model._swarm.spans() if span.peer == peer)
    stream = torch.zeros(ROWS, POSITIONS, model.config.hidden_size)
    message = pack_request(Request("forward", 0, 1, tensors={"stream": stream}))
    found = []
    for _ in range(TEXTS):
        begin = time.perf_counter()
        answer = span.send(message)
        took = time.perf_counter() - begin
        model._swarm.refresh()
        computed = model._swarm.facts(span).seconds_per_block
        found.append((len(message) + len(answer)) / 1e6 / max(took - computed, 1e-9))
    return found


def recoveries(
    folder: Path, servers: list[Server], address: str, expected: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Seconds from the failure to the answer, and how many calls were sent again, for a death at many steps."""
    seconds, replayed = [], []
    halves = [server.peer() for server in servers[1:3]]
    victims = [Server("0:4", folder, [address]) for _ in range(KILLS)]
    servers += victims
    for nth, victim in enumerate(victims):
        after = TOKENS.shape[1] + nth * (STEPS - 2) // (KILLS - 1)
        with joined(address, allowed_servers=[victim.peer()]) as model:

            def kill(tokens: torch.Tensor, scores: Any, victim: Server = victim, after: int = after) -> Any:
                if tokens.shape[1] == after:
                    victim.process.kill()
                    victim.process.wait()
                    model.config.allowed_servers = [victim.peer(), *halves]
                return scores

            assert torch.equal(text(model, logits_processor=[kill]), expected)
            (recovery,) = model.route.recoveries
        seconds.append(recovery.seconds)
        replayed.append(float(recovery.replayed))
    return seconds, replayed


if __name__ == "__main__":
    sys.exit(main())
