"""Real servers, as processes that are started by command line, in a network of this test run's own.

`make test-swarm` makes that network; without it nothing here runs, so that no packet can leave the machine.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.distributed.conftest import Pair
from tests.swarm.forked import ForkedServers
from tests.swarm.processes import Server, Servers
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM

HERE = Path(__file__).parent
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


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """Servers of one test."""
    with closing(ForkedServers(tmp_path)) as found:
        yield found


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Server]]]:
    """Two servers of each shipped model, for all tests that only call them."""
    with closing(ForkedServers(tmp_path_factory.mktemp("shared"))) as found:
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
