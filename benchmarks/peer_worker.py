"""Runs tasks for one package in this process, and prints each answer as a line of JSON.

A task that fails ends the process: the parent takes down why, and starts another for the tasks that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.peer_packages import PACKAGES
from benchmarks.peer_tasks import TIMINGS, Bench, ask
from benchmarks.report import environment
from benchmarks.timing import QUICK, Effort, prepare_device

ANSWER = "ANSWER "


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the tasks in order."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.peer_worker")
    made.add_argument("package", choices=PACKAGES)
    made.add_argument("--family", default="falcon")
    made.add_argument("--size", default="tiny")
    made.add_argument("--long", type=int, default=2048)
    made.add_argument("--quick", action="store_true")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--task", nargs="+", required=True)
    options = made.parse_args(arguments)
    prepare_device(torch.device("cpu"), options.threads)
    package = PACKAGES[options.package]
    effort = QUICK if options.quick else Effort(min_pairs=5, min_seconds=3.0)
    bench: Bench | None = None
    with torch.no_grad():
        for task in options.task:
            if task == "environment":
                answer = environment(torch.device("cpu"))
            elif task in TIMINGS:
                bench = bench or Bench(package, options.family, options.size, effort, options.long)
                answer = TIMINGS[task](bench)
            else:
                answer = ask(package, task)
            print(ANSWER + json.dumps({"task": task, "answer": answer}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
