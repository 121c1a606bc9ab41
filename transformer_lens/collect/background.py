"""One thread that makes calls in the order they were given, with a bounded number of them waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class Background:
    """Calls made in another thread; the first error stops it, and is raised in the thread that gives the calls.

    >>> from transformer_lens.collect.background import Background
    >>> done = []
    >>> with Background(waiting=2) as thread:
    ...     thread.call(lambda: done.append(1))
    >>> done
    [1]

    Leaving the block waits for the calls, also when it is left by an error: what was given is done.
    """

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._given: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collect-writer")
        self._stopped = False

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called; waits while too many are waiting already."""
        while self._given and (len(self._given) >= self._waiting or self._given[0].done()):
            self._given.popleft().result()
        self._given.append(self._thread.submit(self._run, function))

    def _run(self, function: Callable[[], None]) -> None:
        if not self._stopped:
            # Nothing is called after a call that did not return: a shard that misses values must not be finished.
            self._stopped = True
            function()
            self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            for given in self._given:
                given.result()
