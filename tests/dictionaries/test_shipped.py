"""The transcoders that the package ships: small, for every layer, and good enough to stand in for the MLPs."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.dictionaries.models import model
from transformer_lens.data import tiny_model_path
from transformer_lens.data.generate import training_text
from transformer_lens.dictionaries import load_dictionary, measure


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_transcoders_of_every_layer_stand_in_for_its_mlps(name: str) -> None:
    bridge, texts = model(name), list(training_text(60, seed=5))
    folder = tiny_model_path(name) / "transcoders"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_200_000
    transcoders = [load_dictionary(folder, f"layer_{layer}.safetensors") for layer in range(bridge.cfg.n_layers)]
    for layer, transcoder in enumerate(transcoders):
        hooks = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
        assert transcoder.metadata == hooks and transcoder.d_sae == 512 and transcoder.activation == "jumprelu"
        found = measure(bridge, transcoder, texts)
        assert found.l0 < 14 and found.explained_variance > 0.95 and found.loss_recovered > 0.98
    plain = bridge(texts, return_type="loss")
    with ExitStack() as stack:
        for transcoder in transcoders:
            stack.enter_context(bridge.splice(transcoder))
        together = bridge(texts, return_type="loss")
    assert float((together - plain).detach()) < 0.1
