"""Processes that begin as copies of one that has imported everything: a server is there in a second, not in ten.

What runs in them is the program itself, by its command line; each is a process of its own that can be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.swarm.processes import Servers

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "transformer_lens.cli.app",
        "transformer_lens.cli.serve",
        "transformer_lens.distributed.server.serve",
        "transformer_lens.distributed.client.swarm",
        "hivemind.dht.node",
        "hivemind.p2p.p2p_daemon",
        "google.protobuf.wrappers_pb2",
        "tests.swarm.forked",
        "tests.swarm.warm",
    ]
)


class Forked:
    """A process, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self.process = CONTEXT.Process(target=work, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def program(arguments: list[str], log: str) -> None:
    """The command line, with its streams in a file."""
    place = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(place, 1)
    os.dup2(place, 2)
    sys.argv = ["transformer-lens", *arguments]
    from transformer_lens_command import main

    sys.exit(main())


class ForkedServers(Servers):
    """Starts servers as copies, and stops all of them in the end."""

    def launch(self, arguments: list[str], log_file: Path) -> Any:
        log_file.touch()
        return Forked(program, arguments, str(log_file))

    def close(self) -> None:
        for server in self.all:
            server.signal(signal.SIGCONT)  # one that a failed test left stopped would not hear the rest
        super().close()
