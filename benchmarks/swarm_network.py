"""What the network adds: round trips, bytes per second, a remote call of tiny-falcon, the start of a server.

In a network of its own: `unshare -rn sh -c 'ip link set lo up && exec .venv/bin/python -m benchmarks.swarm_network'`
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, LocalSpan
from transformer_lens.distributed.frames import Call, Exchange, Room
from transformer_lens.distributed.node import Node


def timed(work: Callable[[], object], times: int) -> float:
    """The median of some runs, in milliseconds, after one that is not counted."""
    work()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken)


def frames() -> None:
    """Messages and answers of several sizes between two peers in this process, in pieces of several sizes."""
    server = Node(listen="/ip4/127.0.0.1/tcp/0")
    client = Node(server.addresses)
    exchange = Exchange(Room(), about=lambda: b"here")

    async def answer(frame: bytes, peer: str) -> bytes:
        found = exchange.take(peer, frame)
        if isinstance(found, Call):
            exchange.finish(found, found.message)
            found = exchange.part(found, 0)
        return found

    server.serve(answer)
    print(f"ping: {timed(lambda: client.ping(server.peer, 10), 200):.2f} ms")
    for size in (100, 2**16, 2**20, 2**24, 2**26):
        took = timed(lambda size=size: client.call(server.peer, bytes(size), 120), 20 if size < 2**22 else 3)
        print(f"{size:>9} bytes there and back: {took:8.2f} ms, {2 * size / took / 1e3:6.1f} MB/s")
    client.close()
    server.close()


def start(blocks: str, folder: Path, *options: str) -> tuple[subprocess.Popen[bytes], str, float]:
    """A server process, its address, and how many seconds it took to start."""
    place = folder / blocks.replace(":", "-")
    command = [sys.executable, "-m", "transformer_lens", "serve", "tiny-falcon", "--blocks", blocks, "--threads", "1"]
    begin = time.perf_counter()
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--address-file", str(place), *options], stdout=subprocess.DEVNULL, stderr=log
        )
    while not place.exists():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.01)
    return process, place.read_text().split()[0], time.perf_counter() - begin


def calls(folder: Path) -> None:
    """tiny-falcon in this process, over spans in this process, and over two servers."""
    first, address, seconds = start("0:2", folder)
    second, _, again = start("2:4", folder, "--initial-peers", address)
    print(f"a server starts in {seconds:.1f} and {again:.1f} s")
    spans = [LocalSpan("tiny-falcon", range(0, 2)), LocalSpan("tiny-falcon", range(2, 4))]
    models = {
        "here": TransformerBridge.boot_transformers("tiny-falcon"),
        "two spans in this process": TransformerBridge(
            AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=spans)
        ),
        "two servers": TransformerBridge(
            AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", initial_peers=[address])
        ),
    }
    for tokens in (torch.ones(1, 1, dtype=torch.long), torch.ones(1, 200, dtype=torch.long)):
        for name, bridge in models.items():
            with torch.no_grad():
                took = timed(lambda bridge=bridge, tokens=tokens: bridge(tokens), 50)
            print(f"forward of {tokens.shape[1]:>3} tokens, {name}: {took:.2f} ms")
    models["two servers"].original_model.close()
    for process in (first, second):
        process.terminate()
    for process in (first, second):
        process.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    frames()
    with tempfile.TemporaryDirectory() as folder:
        calls(Path(folder))
