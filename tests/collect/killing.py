"""Runs jobs that are killed again and again, in a process of its own: python -m tests.collect.killing FOLDER KILLS SEED

Each attempt is a fork of this warm process, ended by SIGKILL after a random time, or at a random system call that
changes files (before it, after it, or in the middle of a write). Prints one JSON line: how many were killed, and what
differed from the bytes of runs that were left alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from tests.support import VOCAB, falcon
from transformer_lens import TransformerBridge
from transformer_lens.collect import collect
from transformer_lens.data import tiny_model_path

CALLS = ("pwrite", "fsync", "replace", "posix_fallocate", "ftruncate")
HOOKS = ["blocks.0.attn.hook_rot_q", "blocks.1.hook_resid_post"]


def make_jobs(folder: Path) -> dict[str, list[Callable[[Path], Any]]]:
    """Jobs by name: what each of their processes does."""
    torch.manual_seed(0)
    bridge = TransformerBridge(falcon())
    lengths = torch.randint(1, 60, (120,)).tolist()
    documents = [torch.randint(3, VOCAB, (length,)).tolist() for length in lengths]
    options: dict[str, Any] = {"context_size": 16, "batch_size": 4, "shard_tokens": 128, "progress": False}
    trained = TransformerBridge.boot_transformers(tiny_model_path("tiny-falcon"))
    file = folder / "texts.jsonl"
    names = ("Mary", "John", "Noah", "Adam")
    texts = [" and ".join(names[(i * k) % 4] for k in range(1, 2 + i % 9)) for i in range(80)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def packed(out: Path, shard: tuple[int, int] = (0, 1)) -> Any:
        return collect(bridge, documents, HOOKS, out, shard=shard, dtype=torch.bfloat16, **options)

    def padded(out: Path) -> Any:
        filters = {"packing": False, "drop_bos": True, "append_eos": True}
        return collect(trained, file, "blocks.0.hook_mlp_out", out, **filters, **options)

    return {
        "packed": [packed],
        "padded": [padded],
        "shared": [lambda out: packed(out, (0, 2)), lambda out: packed(out, (1, 2))],
    }


def killed_at(number: int, moment: str) -> None:
    """From now on this process kills itself at its `number`-th call that changes files."""
    seen = 0

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == number and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if seen == number and moment == "half" and name == "pwrite":
                original(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args)
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def fork(work: Callable[[], Any]) -> int:
    """Run `work` in a child; its exit status is 0 if it came to its end."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)


def attempt(process: Callable[[Path], Any], out: Path, chance: random.Random, calls: int) -> tuple[int, bool]:
    """Start one process of a job; returns its id, and whether it is to be killed from outside, by time."""
    if chance.random() < 0.5:
        return fork(lambda: process(out)), True
    number, moment = chance.randint(1, calls), chance.choice(("before", "after", "half"))

    def work() -> None:
        killed_at(number, moment)
        process(out)

    return fork(work), False


def bytes_of(folder: Path) -> dict[str, str]:
    """The checksum of every file."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def finished_by(child: int, kill: bool) -> tuple[bool, bool]:
    """Whether a child was killed, and whether it failed."""
    if kill:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0


def usual(processes: list[Callable[[Path], Any]], out: Path) -> tuple[float, int, dict[str, str]]:
    """A run that is left alone: its seconds, its calls, its bytes."""
    begin, counted = time.perf_counter(), 0
    for process in processes:
        counts = out.with_suffix(".calls")

        def work(process: Callable[[Path], Any] = process, counts: Path = counts) -> None:
            seen = [0]
            for name in CALLS:
                original = getattr(os, name)
                setattr(
                    os, name, lambda *args, original=original: (seen.__setitem__(0, seen[0] + 1), original(*args))[1]
                )
            process(out)
            counts.write_text(str(seen[0]))

        assert finished_by(fork(work), kill=False) == (False, False)
        counted = max(counted, int(counts.read_text()))
    return (time.perf_counter() - begin) / len(processes), counted, bytes_of(out)


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill until there were enough, going through the jobs in turn."""
    chance = random.Random(seed)
    jobs = make_jobs(folder)
    expected = {name: usual(processes, folder / f"{name}-alone") for name, processes in jobs.items()}
    killed, failed, runs, at_random_times = 0, 0, 0, 0
    different: list[str] = []
    by_job = dict.fromkeys(jobs, 0)
    while killed < kills:
        name = list(jobs)[runs % len(jobs)]
        out = folder / f"run-{runs}"
        runs += 1
        waiting = list(jobs[name])
        while waiting:
            # All processes of a job run at once.
            seconds, calls, _ = expected[name]
            children = [attempt(process, out, chance, calls) for process in waiting]
            if any(by_time for _, by_time in children):
                time.sleep(chance.uniform(0, seconds))
            ends = [finished_by(child, kill=by_time) for child, by_time in children]
            at_random_times += sum(end[0] and by_time for end, (_, by_time) in zip(ends, children, strict=True))
            failed += sum(end[1] for end in ends)
            killed += sum(end[0] for end in ends)
            by_job[name] += sum(end[0] for end in ends)
            waiting = [p for p, end in zip(waiting, ends, strict=True) if end[0] or end[1]]
        # The processes of a shared job may each end before another one's last shard: the next call completes it.
        if len(jobs[name]) > 1:
            assert finished_by(fork(lambda out=out, name=name: jobs[name][0](out)), kill=False) == (False, False)
        if bytes_of(out) != expected[name][2]:
            different.append(str(out))
    return {
        "killed": killed,
        "at_random_times": at_random_times,
        "by_job": by_job,
        "failed": failed,
        "runs": runs,
        "different": different,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
