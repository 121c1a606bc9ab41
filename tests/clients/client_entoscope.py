"""A logit lens over layers and positions, and patching of the residual stream, with their result tables."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from entoscope import (
    Lens,
    LensConfig,
    LensInput,
    LensMethodConfig,
    ModelAxis,
    ModelLayerLocation,
    ModelLocatorConfig,
)

from tests.clients.steps import TEXT, run
from transformer_lens import TransformerBridge


def lens(name: str) -> None:
    """a logit lens over layers and positions, whose last row is the model's own prediction"""
    model = TransformerBridge.boot_transformers(name)
    where = ModelLocatorConfig(
        activation=ModelLayerLocation.RESIDUAL_POST, location=[ModelAxis.LAYER, ModelAxis.POSITION]
    )
    config = LensConfig(method=LensMethodConfig(type="logit_lens"), top_k=3, source=where)
    with tempfile.TemporaryDirectory() as folder:
        collector: Any = Lens(model).apply(LensInput(config, TEXT), save_dir=folder, return_collector=True)
    result = collector.result
    assert len(result) == model.cfg.n_layers * model.to_tokens(TEXT).shape[1]
    best = model.to_string(torch.tensor([int(model(TEXT)[0, -1].argmax())]))
    assert best.strip() in result.iloc[-1].to_string()


if __name__ == "__main__":
    run(lens)
