"""Training of sparse autoencoders on a bridge's activations, and what is saved, spliced into the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

from tests.clients.steps import TEXT, plain, run, texts
from transformer_lens.dictionaries import load_dictionary

HOOK = "blocks.1.hook_resid_post"
STEPS = 120


def activations(name: str) -> torch.Tensor:
    bridge = plain(name)
    found = bridge.run_with_cache(texts(60), names_filter=HOOK)[1][HOOK]
    return found[bridge.input_and_mask(texts(60)).mask]


def batches(x: torch.Tensor) -> Iterator[torch.Tensor]:
    while True:
        yield x[torch.randperm(len(x))[:256]]


@cache
def trained(name: str) -> Path:
    shared: dict[str, Any] = {
        **{"activation_dim": 128, "dict_size": 256, "layer": 1, "lm_name": name, "steps": STEPS, "device": "cpu"},
        **{"lr": 1e-3, "warmup_steps": 10, "submodule_name": HOOK},
    }
    standard = {**shared, "trainer": StandardTrainer, "dict_class": AutoEncoder, "l1_penalty": 0.01}
    standard["sparsity_warmup_steps"] = 10
    top_k = {**shared, "trainer": TopKTrainer, "dict_class": AutoEncoderTopK, "k": 16}
    folder = tempfile.mkdtemp()
    trainSAE(batches(activations(name)), [standard, top_k], STEPS, save_dir=folder, device="cpu")
    return Path(folder)


def training(name: str) -> None:
    """its trainers, fed with the bridge's activations, learn to rebuild them"""
    x = activations(name)
    for number, kind in enumerate((AutoEncoder, AutoEncoderTopK)):
        made = kind.from_pretrained(str(trained(name) / f"trainer_{number}" / "ae.pt"), device="cpu")
        share = (made(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert share < 0.5, (kind, share)


def spliced(name: str) -> None:
    """what it saves is spliced under its own features, and the logits are those of its reconstruction"""
    bridge = plain(name)
    tokens = bridge.to_tokens(TEXT)
    stream = bridge.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
    for number, kind in enumerate((AutoEncoder, AutoEncoderTopK)):
        folder = trained(name) / f"trainer_{number}"
        theirs = kind.from_pretrained(str(folder / "ae.pt"), device="cpu")
        with bridge.splice(load_dictionary(folder, allow_pickle=True), at=1) as found:
            logits, cache = bridge.run_with_cache(tokens, names_filter=found.features)
        torch.testing.assert_close(cache[found.features], theirs.encode(stream), atol=1e-4, rtol=1e-4)
        replaced = bridge.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda value, hook, f=theirs: f(value))])
        torch.testing.assert_close(logits, replaced, atol=1e-3, rtol=0)


if __name__ == "__main__":
    run(training, spliced)
