"""Server processes: what starts one by the program's command line, waits for it, and ends it by its process id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

LIMIT = 90.0
"""Seconds for a server to start, and for one to leave: the machines that run this are slow at times."""


def wait_until(what: str, true: Callable[[], object], seconds: float = LIMIT, every: float = 0.02) -> None:
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

    @cached_property
    def address(self) -> str:
        """Its first address, once it serves; known when it is dead, too."""
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
        arguments = [
            *("serve", model, "--blocks", blocks, "--threads", "1"),
            *("--address-file", str(address_file), "--update-period", "2", *joined, *options),
        ]
        self.all.append(Server(self.launch(arguments, log_file), address_file, log_file))
        return self.all[-1]

    def launch(self, arguments: list[str], log_file: Path) -> subprocess.Popen[str]:
        """The program with these arguments, and its log in a file."""
        command = [sys.executable, "-m", "transformer_lens", *arguments]
        with log_file.open("w") as log:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, text=True)

    def close(self) -> None:
        for server in self.all:
            if server.process.poll() is None:
                server.signal(signal.SIGTERM)
                server.signal(signal.SIGTERM)  # the second one: at once
        for server in self.all:
            if server.process.poll() is None:
                server.stop()


class Running(NamedTuple):
    """A process that is there and not a zombie."""

    pid: int
    name: str
    parent: int
    group: int


def running() -> list[Running]:
    """The processes of this network."""
    found = []
    mine = os.readlink("/proc/self/ns/net")
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                same = os.readlink(place / "ns" / "net") == mine
                text = (place / "stat").read_text()
            except OSError:
                continue  # it ended while we looked
            state, parent, group = text[text.rindex(")") + 2 :].split()[:3]
            if same and state != "Z":
                name = text[text.index("(") + 1 : text.rindex(")")]
                found.append(Running(int(place.name), name, int(parent), int(group)))
    return sorted(found)


def daemons(parent: int | None = None) -> list[int]:
    """The libp2p daemons by process id: those that a process started, or all."""
    return [one.pid for one in running() if one.name == "p2pd" and parent in (None, one.parent)]
