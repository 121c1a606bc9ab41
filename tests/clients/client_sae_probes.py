"""Sparse probing of an autoencoder's features on one of its data sets."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_probes import run_sae_evals

from tests.clients.steps import plain, run

HOOK = "blocks.1.hook_resid_post"
DATA = "105_click_bait"


def probes(name: str) -> None:
    """probes on features, from activations it collects itself"""
    torch.manual_seed(0)
    width = plain(name).cfg.d_model
    sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=256, device="cpu"))
    torch.nn.init.normal_(sae.W_enc, std=width**-0.5)
    with tempfile.TemporaryDirectory() as folder:
        run_sae_evals(
            *(sae, name, HOOK, "l1", "normal"),
            ks=[1, 16],
            results_path=folder,
            datasets=[DATA],
            device="cpu",
        )
        (file,) = Path(folder).rglob("*.json")
        scores = {row["k"]: row["test_auc"] for row in json.loads(file.read_text())}
    assert 0.5 < scores[16] <= 1 and scores[16] >= scores[1] - 0.02, scores


if __name__ == "__main__":
    run(probes)
