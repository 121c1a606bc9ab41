"""Real servers, as processes that are started by command line, in a network of this test run's own.

`make test-swarm` makes that network; without it nothing here runs, so that no packet can leave the machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import Pair
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM

HERE = Path(__file__).parent
LIMIT = 90.0
"""Seconds for a server to start, and for one to leave: the machines that run this are slow at times."""
CUTS = {"tiny-falcon": ["0:2", "2:4"], "tiny-mixtral": ["0:1", "1:3"]}
"""The blocks of the servers that all tests share."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.swarm)


@pytest.fixture(autouse=True, scope="session")
def private_network() -> None:
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        pytest.exit(f"tests/swarm runs in a network of its own and this one has {names}: use `make test-swarm`", 2)


def wait_until(what: str, true, seconds: float = LIMIT, every: float = 0.02) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"waited {seconds} s: {what}"
        time.sleep(every)


@dataclass
class Server:
    """One process that serves a span. `process` is stopped by its id, and nothing else is."""

    process: subprocess.Popen[str]
    address_file: Path
    log_file: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def address(self) -> str:
        """Its first address, once it serves."""
        wait_until("a server to start", lambda: self.address_file.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {self.log}"
        return self.address_file.read_text().split()[0]

    @property
    def peer(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a machine that loses its power, as far as a process can."""
        self.signal(signal.SIGKILL)
        self.process.wait(LIMIT)

    def stop(self) -> int:
        """A graceful stop; the exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


class Servers:
    """Starts servers, and stops all of them in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Server] = []

    def start(self, model: str, blocks: str, *options: str, peers: Iterable[str] = ()) -> Server:
        """A server that was started, and does not serve yet: `address` waits for that."""
        number = len(self.all)
        address_file, log_file = self.folder / f"address-{number}", self.folder / f"log-{number}"
        joined = [text for peer in peers for text in ("--initial-peers", peer)]
        command = [
            *(sys.executable, "-m", "transformer_lens", "serve", model, "--blocks", blocks, "--threads", "1"),
            *("--address-file", str(address_file), "--update-period", "2", *joined, *options),
        ]
        with log_file.open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, text=True)
        self.all.append(Server(process, address_file, log_file))
        return self.all[-1]

    def close(self) -> None:
        for server in self.all:
            if server.process.poll() is None:
                server.signal(signal.SIGTERM)
                server.signal(signal.SIGTERM)  # the second one: at once
        for server in self.all:
            if server.process.poll() is None:
                server.stop()


def daemons() -> list[int]:
    """The libp2p daemons in this network, by process id."""
    found = []
    mine = os.readlink("/proc/self/ns/net")
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                same = os.readlink(place / "ns" / "net") == mine
                text = (place / "stat").read_text()
            except OSError:
                continue  # it ended while we looked
            name, state = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2]
            if same and name == "p2pd" and state != "Z":
                found.append(int(place.name))
    return sorted(found)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """Servers of one test."""
    with closing(Servers(tmp_path)) as found:
        yield found


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Server]]]:
    """Two servers of each shipped model, for all tests that only call them."""
    with closing(Servers(tmp_path_factory.mktemp("shared"))) as found:
        first = {name: found.start(name, blocks[0]) for name, blocks in CUTS.items()}
        rest = {
            name: [found.start(name, each, peers=[first[name].address]) for each in blocks[1:]]
            for name, blocks in CUTS.items()
        }
        together = {name: [first[name], *rest[name]] for name in CUTS}
        for group in together.values():
            for server in group:
                assert server.address
        yield together


@pytest.fixture(scope="session", params=list(CUTS))
def networked(request: pytest.FixtureRequest, shared: dict[str, list[Server]]) -> Iterator[Pair]:
    """A shipped model over its two servers, and in this process."""
    name = request.param
    local = TransformerBridge.boot_transformers(name)
    model = AutoDistributedModelForCausalLM.from_pretrained(name, initial_peers=[shared[name][0].address])
    torch.manual_seed(0)
    tokens = torch.randint(3, 700, (2, 9))
    with model:
        yield Pair(TransformerBridge(model, local.tokenizer), local, [], tokens)


@pytest.fixture
def pair(networked: Pair) -> Iterator[Pair]:
    yield networked
    for bridge in networked:
        bridge.reset_hooks()
        for parameter in bridge.original_model.parameters():
            parameter.grad = None
