"""Runs a function in two processes that share a model, bounded in time, with a file for their rendezvous."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2
SECONDS = 180


def _process(rank: int, work: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "HF_HUB_OFFLINE": "1"}
    rendezvous = f"file://{folder}/rendezvous"
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=SIZE, timeout=limit)
    torch.save(work(*args), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def in_two_processes(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `work(*args)` returned in each of two processes that form a gloo group."""
    folder.mkdir(parents=True, exist_ok=True)
    # Processes begin as copies of one that has imported the models' code, and nothing of what ran in this one.
    multiprocessing.set_forkserver_preload(["tests.sharded.work"])
    context = mp.start_processes(
        _process, (work, str(folder), args), nprocs=SIZE, join=False, start_method="forkserver"
    )
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=0.2):
            assert time.monotonic() < end, f"two processes did not finish within {SECONDS} seconds"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(SIZE)]
