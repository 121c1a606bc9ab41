"""What `import transformer_lens` adds to a process that has torch and transformers' model classes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Figure

REPOSITORY = Path(__file__).resolve().parent.parent

# Before and after in one process: the seconds that importing torch takes vary by more than our whole budget.
PROBE = """
import json, os, sys, time
import torch
import transformers.models.falcon.modeling_falcon
import transformers.models.mixtral.modeling_mixtral

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

memory, modules, start = resident(), set(sys.modules), time.perf_counter()
import transformer_lens
seconds = time.perf_counter() - start
added = sorted(set(sys.modules) - modules)
print(json.dumps({"seconds": seconds, "megabytes": (resident() - memory) / 1e6, "modules": len(added)}))
"""


@dataclass(frozen=True)
class ImportCost:
    """Seconds, megabytes of resident memory and modules that the import added."""

    seconds: Figure
    megabytes: Figure
    modules: int


def import_cost(repeats: int) -> ImportCost:
    """Import the package in fresh processes; the first, which may compile bytecode, does not count."""
    samples = [_probe() for _ in range(repeats + 1)][1:]
    return ImportCost(
        seconds=Figure.of([sample["seconds"] for sample in samples]),
        megabytes=Figure.of([sample["megabytes"] for sample in samples]),
        modules=int(samples[0]["modules"]),
    )


def _probe() -> dict[str, float]:
    command = [sys.executable, "-c", PROBE]
    # The package need not be installed: python -c looks in the working directory first.
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    sample: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return sample
