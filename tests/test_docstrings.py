"""Every example in a docstring runs and prints what it says, on the shipped models."""

import doctest
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, FalconConfig

import transformer_lens
from transformer_lens import ActivationCache, HookPoint, TransformerBridge
from transformer_lens.data import tiny_model_path
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(transformer_lens.__path__, "transformer_lens.")
    if not found.name.endswith("__main__")
)

ABOUT_EXPERTS = ("analysis.expert", "analysis.patching.expert")
"""Modules whose examples are about a mixture of experts: there `bridge` is tiny-mixtral."""


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """What examples may use without saying where it comes from."""
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    moe = TransformerBridge.boot_transformers("tiny-mixtral")
    _, cache = bridge.run_with_cache("Mary and John")
    return {
        "ActivationCache": ActivationCache,
        "FalconArchitectureAdapter": FalconArchitectureAdapter,
        "FalconConfig": FalconConfig,
        "HookPoint": HookPoint,
        "TransformerBridge": TransformerBridge,
        "bridge": bridge,
        "cache": cache,
        "model": TransformerBridge.boot_transformers("tiny-falcon").detach(),
        "moe": moe,
        "nn": nn,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_model_path("tiny-falcon")),
        "torch": torch,
    }


class Finder(doctest.DocTestFinder):
    """Finds functions behind decorators too: a decorated one has the globals of the decorator's module."""

    def _from_module(self, module: Any, object: Any) -> bool:
        return bool(super()._from_module(module, inspect.unwrap(object) if callable(object) else object))


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name: str, names: dict[str, object]) -> None:
    module = importlib.import_module(name)
    if name.removeprefix("transformer_lens.").startswith(ABOUT_EXPERTS):
        names = {**names, "bridge": names["moe"]}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in Finder(exclude_empty=True).find(module, globs={**names, **vars(module)}):
        torch.manual_seed(0)
        runner.run(example)
    assert runner.failures == 0
