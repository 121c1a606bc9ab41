"""Processes that share one model collect together: all of them compute, the first of them reads and writes files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Together:
    """The processes that share a model, and this one's place among them. One alone does everything itself."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    @property
    def writes(self) -> bool:
        """Whether this process has the files."""
        return self.rank == 0

    def agreed(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises, in the first process: in every process."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.writes:
            try:
                answer[0] = function()
            except (ValueError, OSError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, group_src=0, group=self.group)
        if answer[1] is not None:
            raise answer[1]
        found: T = answer[0]
        return found
