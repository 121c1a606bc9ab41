"""Cross-layer transcoders: circuit-tracer's files compute what it computes, and each decoder is where it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from tests.dictionaries.models import random_dictionary
from tests.dictionaries.test_files import FILES, TOLERANCE
from transformer_lens.dictionaries import CrossLayerTranscoder, load_cross_layer, load_dictionary


@pytest.mark.parametrize("kind", ["relu", "jump_relu"])
def test_it_computes_what_circuit_tracer_computes(kind: str) -> None:
    found, expected = load_cross_layer(FILES, f"cross_layer_{kind}"), FILES / f"cross_layer_{kind}"
    kept = load_file(expected / "expected.safetensors")
    features = torch.stack(found.encode(kept["x"].unbind()))
    torch.testing.assert_close(features, kept["features"], rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(features != 0, kept["features"] != 0) and int((features != 0).sum()) > 50
    written = torch.stack(found(kept["x"].unbind()))
    torch.testing.assert_close(written, kept["y"], rtol=TOLERANCE, atol=2 * TOLERANCE)
    assert not any(value.requires_grad for value in found.parameters())
    hooks = {"hook_name": "blocks.2.hook_resid_mid", "hook_name_out": "blocks.2.hook_mlp_out"}
    assert found.layers[2].metadata == hooks


def test_a_feature_writes_to_its_own_layer_and_the_later_ones() -> None:
    found, raw = load_cross_layer(FILES / "cross_layer_relu"), load_file(FILES / "cross_layer_relu/W_dec_1.safetensors")
    one = [torch.zeros(24) for _ in range(3)]
    silent = found.decode(one)
    one[1][5] = 2.0
    first, second, third = (now - before for now, before in zip(found.decode(one), silent, strict=True))
    assert torch.equal(first, torch.zeros(16))
    torch.testing.assert_close(second, 2 * raw["W_dec_1"][5, 0])
    torch.testing.assert_close(third, 2 * raw["W_dec_1"][5, 1])
    assert torch.equal(found.decoder(1, 2), raw["W_dec_1"][:, 1]) and torch.equal(
        found.decoder(1, 1), raw["W_dec_1"][:, 0]
    )
    with pytest.raises(ValueError, match=r"target: got 0, expected 1 to 2 \(layers\)"):
        found.decoder(1, 0)


def test_a_skip_needs_what_was_read() -> None:
    layers = [random_dictionary(16, skip=True), random_dictionary(16, skip=True)]
    both = CrossLayerTranscoder(layers, [torch.randn(50, 1, 16)])
    x = [torch.randn(3, 16), torch.randn(3, 16)]
    expected = layers[1](x[1]) + layers[0].encode(x[0]) @ both.later[0][:, 0]
    torch.testing.assert_close(both(x)[1], expected)
    with pytest.raises(ValueError, match=r"x: got None, expected floats \[..., 16\]"):
        both.decode(both.encode(x))


def test_what_does_not_fit() -> None:
    layers = [random_dictionary(16), random_dictionary(16)]
    for later in ([], [torch.ones(50, 2, 16)], [torch.ones(50, 1, 16)] * 2):
        with pytest.raises(
            ValueError, match=r"later: got the shapes .*, expected \[\[50, 1, 16\]\]: \[d_sae, layers after"
        ):
            CrossLayerTranscoder(layers, later)


@pytest.mark.parametrize("inside", ["", "clt/large"])
def test_a_hub_name(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layout of the hub's cache; HF_HUB_OFFLINE keeps the tests off the network.
    place = tmp_path / "models--someone--transcoders"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(FILES / "cross_layer_relu", place / "snapshots" / ("0" * 40) / inside)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found, expected = load_cross_layer("someone/transcoders", inside), load_cross_layer(FILES / "cross_layer_relu")
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), expected.parameters(), strict=True))
    with pytest.raises(OSError, match="someone/else: it is no folder here, and the hub says: .*HF_HUB_OFFLINE"):
        load_cross_layer("someone/else")
    with pytest.raises(OSError, match=r"there is no such file or folder, and 'nothing' is no hub name"):
        load_cross_layer("nothing")


def test_each_loader_names_the_other(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="got model_kind='transcoder_set' in config.yaml, expected 'cross_layer_transcod"
    ):
        load_cross_layer(FILES / "circuit_tracer")
    with pytest.raises(ValueError, match="got model_kind=None in config.yaml"):
        load_cross_layer(tmp_path)
    with pytest.raises(ValueError, match="load_cross_layer"):
        load_dictionary(FILES / "cross_layer_relu")
    shutil.copytree(FILES / "cross_layer_relu", tmp_path / "one")
    (tmp_path / "one/W_dec_1.safetensors").unlink()
    with pytest.raises(OSError, match="W_dec_1"):
        load_cross_layer(tmp_path / "one")
