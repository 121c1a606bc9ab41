"""The queue of calls: who leaves, whenever that is, takes nobody else's turn along."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from transformer_lens.distributed import Limits
from transformer_lens.distributed.server.sessions import CallQueue


class Interrupted(Exception):
    """What a signal raises in the thread that waits."""


@pytest.fixture
def interrupting() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, stop)
    yield
    signal.signal(signal.SIGUSR1, before)


def wait_for_load(queue: CallQueue, load: int) -> None:
    until = time.monotonic() + 20
    while queue.load() != load:
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_call_that_breaks_off_gives_its_turn_on() -> None:
    queue = CallQueue(Limits(calls=1))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), queue.turn("one", 5):
            raise KeyboardInterrupt
    assert queue.load() == 0


@pytest.mark.parametrize("before", [True, False])
def test_a_call_that_breaks_off_while_it_waits_leaves_the_others_of_its_peer(interrupting: None, before: bool) -> None:
    """Another call of the same peer waits too, before or after the one that is interrupted, and still gets its turn."""
    queue, gate = CallQueue(Limits()), threading.Event()
    ran: list[str] = []

    def call(peer: str, held: bool) -> None:
        with queue.turn(peer, 1):
            ran.append(peer)
            if held:
                assert gate.wait(20)

    def later(waiting: int) -> None:
        wait_for_load(queue, waiting)
        if not before:
            start(call, "two", False)
            wait_for_load(queue, waiting + 1)
        os.kill(os.getpid(), signal.SIGUSR1)

    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *arguments: object) -> None:
        threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        threads[-1].start()

    start(call, "one", True)
    wait_for_load(queue, 1)
    if before:
        start(call, "two", False)
        wait_for_load(queue, 2)
    start(later, queue.load() + 1)
    with pytest.raises(Interrupted), queue.turn("two", 1):
        pytest.fail("it was not its turn")
    gate.set()
    for thread in threads:
        thread.join(20)
    assert ran == ["one", "two"]
    assert queue.load() == 0
