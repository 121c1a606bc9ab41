"""A Ray cluster of three nodes, each a process on this machine, in a network of this test run's own.

`make test-cluster` makes that network; without it nothing here runs, so that no packet can leave the machine.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "memory": 2**30}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.swarm)


@pytest.fixture(autouse=True, scope="session")
def private_network() -> None:
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        pytest.exit(f"tests/cluster runs in a network of its own and this one has {names}: use `make test-cluster`", 2)


class Nodes:
    """The nodes of one cluster; the first one stays, others may be lost and added."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        first = {**NODE, "memory": 2**10, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
        self.cluster = Cluster(initialize_head=True, head_node_args=first)
        self.others: dict[str, Any] = {}
        for _ in range(3):
            self.add()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        node = self.cluster.add_node(**NODE)
        self.others[node.node_id] = node

    def lose(self, node_id: str, server: int) -> None:
        """As a machine that loses its power, with the server on it, as far as processes can."""
        self.cluster.remove_node(self.others.pop(node_id), allow_graceful=False)
        with suppress(ProcessLookupError):  # it ends when it notices
            os.kill(server, signal.SIGKILL)


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    import ray

    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    os.environ.update({"PYTHONPATH": str(HERE.parents[1]), **settings})
    found = Nodes()
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.cluster.shutdown()
