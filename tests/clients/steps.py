"""What each client's program is made of: functions run in order, each of which asserts something."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

from transformer_lens import HookedTransformer
from transformer_lens.data.generate import training_text

TEXT = "When Mary and John went to the store, John gave a drink to"
TINY = ("tiny-falcon", "tiny-mixtral")


def texts(count: int) -> list[str]:
    return list(islice(training_text(count), count))


def plain(name: str) -> HookedTransformer:
    """A bridge whose weights are as they were stored."""
    return HookedTransformer.from_pretrained_no_processing(name)


def run(*steps: Callable[[str], Any], on: tuple[str, ...] = TINY) -> None:
    """Every step on every model; prints a line for each, and ends with the first error."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    for name in on:
        for step in steps:
            step(name)
            print(f"passed: {name}: {(step.__doc__ or step.__name__).splitlines()[0]}")
