"""A pytest plugin: the suite as it stands, with every tensor and model made on another device.

Loaded by `make gpu` with `-p benchmarks.on_device`; `TRANSFORMER_LENS_TEST_DEVICE` names the device.
"""

from __future__ import annotations

import os

import torch


def pytest_configure() -> None:
    """Make the device the default one."""
    torch.set_default_device(os.environ.get("TRANSFORMER_LENS_TEST_DEVICE", "cuda"))
