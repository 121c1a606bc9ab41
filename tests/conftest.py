"""Shared by all tests: one thread for each worker, no hub, small models built from configs."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

gc.disable()  # until all tests are imported: none of that is garbage


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


# Where there is no accelerator, `torch.manual_seed` formats a stack for each that might come later: a millisecond.
seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """What is imported and collected by now stays, so no garbage collection needs to look through it again."""
    gc.freeze()
    gc.enable()
