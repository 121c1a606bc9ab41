"""Files that the libraries themselves wrote, and what those libraries made of an input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from transformer_lens.dictionaries import Dictionary, load_dictionary

FILES = Path(__file__).parent / "files"
EXACT = {
    *("saelens_standard", "saelens_without_b_dec", "saelens_layer_norm", "saelens_gated", "saelens_topk"),
    *("saelens_topk_rescaled", "saelens_jumprelu", "saelens_bfloat16", "saelens_batchtopk", "saelens_before_6"),
    *("saelens_transcoder", "saelens_skiptranscoder", "saelens_jumprelutranscoder"),
    *("saelens_jumpreluskiptranscoder", "gemma_scope", "llama_scope"),
    *("dictionary_learning_JumpReluAutoEncoder", "dictionary_learning_MatryoshkaBatchTopKSAE"),
}
"""Bit for bit. Elsewhere the library's own order of operations is another one, and 24 products are added in float32."""
OTHERS = {
    *(
        "saelens_constant_norm",
        "saelens_batchtopk_in_training",
        "sparsify_topk",
        "sparsify_transcoder",
        "gemma_scope_2",
    ),
    *(f"dictionary_learning_{name}" for name in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE")),
    "dictionary_learning_GatedAutoEncoder",
}
CROSS_LAYER = {"cross_layer_relu", "cross_layer_jump_relu"}
TOLERANCE = 1e-6


def folders() -> set[str]:
    return {place.name for place in FILES.iterdir()}


def agrees(dictionary: Dictionary, expected: Path, exactly: bool) -> None:
    """Whether features and reconstruction are the library's."""
    kept = load_file(expected / "expected.safetensors")
    features = dictionary.encode(kept["x"])
    for ours, theirs in ((features, kept["features"]), (dictionary(kept["x"]), kept["y"])):
        assert int((theirs != 0).sum()) > 20 and not torch.equal(theirs, torch.zeros_like(theirs))
        if exactly:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(features != 0, kept["features"] != 0)


def test_every_fixture_is_tested() -> None:
    assert folders() == EXACT | OTHERS | CROSS_LAYER | {"circuit_tracer", "refused_groupmax"}


@pytest.mark.parametrize("name", sorted(EXACT | OTHERS))
def test_a_dictionary_computes_what_its_library_computes(name: str) -> None:
    dictionary = load_dictionary(FILES / name, allow_pickle=True)
    agrees(dictionary, FILES / name, name in EXACT)
    assert not any(value.requires_grad for value in dictionary.parameters()) and not dictionary.training


@pytest.mark.parametrize("layer", [0, 1])
def test_one_transcoder_of_a_set(layer: int) -> None:
    place = FILES / "circuit_tracer"
    for found in (
        load_dictionary(place, f"layer_{layer}.safetensors"),
        load_dictionary(place / f"layer_{layer}.safetensors"),
    ):
        agrees(found, place / f"of_layer_{layer}", False)
        hooks = {"hook_name": f"blocks.{layer}.mlp.hook_in", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
        assert found.metadata == hooks and found.transcoder
    with pytest.raises(
        ValueError, match=r"got layer_0.safetensors, layer_1.safetensors, expected one dictionary .*inside"
    ):
        load_dictionary(place)


@pytest.mark.parametrize(
    "name", sorted(n for n in EXACT | OTHERS if n.startswith("saelens") and not n.endswith("training"))
)
def test_what_is_saved_is_what_saelens_wrote(name: str, tmp_path: Path) -> None:
    place = FILES / name
    load_dictionary(place).save(tmp_path)
    ours, theirs = (load_file(folder / "sae_weights.safetensors") for folder in (tmp_path, place))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((folder / "cfg.json").read_text()) for folder in (tmp_path, place))
    if name != "saelens_before_6":
        assert ours == theirs
    agrees(load_dictionary(tmp_path), place, name in EXACT)


@pytest.mark.parametrize(
    "name",
    [
        "sparsify_topk",
        "gemma_scope",
        "gemma_scope_2",
        "llama_scope",
        *sorted(n for n in EXACT | OTHERS if n.startswith("dict")),
    ],
)
def test_other_formats_become_saelens_files(name: str, tmp_path: Path) -> None:
    load_dictionary(FILES / name, allow_pickle=True).save(tmp_path / "deep" / "folder")
    agrees(load_dictionary(tmp_path / "deep" / "folder"), FILES / name, name in EXACT)


def test_what_saelens_lacks_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save: SAELens has no topk transcoder 16 -> 24 -> 16 with a skip"):
        load_dictionary(FILES / "sparsify_transcoder").save(tmp_path)
    assert not [*tmp_path.iterdir()]


def changed(tmp_path: Path, name: str, **fields: object) -> Path:
    """A fixture with other values in its config."""
    place = tmp_path / name
    shutil.copytree(FILES / name, place)
    (file,) = [file for file in place.iterdir() if file.name in ("cfg.json", "config.json", "hyperparams.json")]
    config = json.loads(file.read_text())
    config.get("trainer", config).update(fields)
    file.write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("saelens_standard", "architecture", "temporal"),
        ("saelens_standard", "normalize_activations", "expected_average_only_in"),
        ("saelens_standard", "normalize_activations", "covariance_whitening"),
        ("saelens_standard", "noise_added_at_inference", 0.1),
        ("saelens_before_6", "finetuning_scaling_factor", True),
        ("saelens_before_6", "activation_fn_str", "tanh-relu"),
        ("sparsify_topk", "signed", True),
        ("sparsify_topk", "activation", "groupmax"),
        ("sparsify_topk", "gate", "soft"),
        ("dictionary_learning_AutoEncoder", "dict_class", "IdentityDict"),
        ("gemma_scope_2", "architecture", "topk"),
        ("llama_scope", "act_fn", "topk"),
        ("llama_scope", "norm_activation", "token-wise"),
        ("llama_scope", "use_glu_encoder", True),
    ],
)
def test_what_may_mean_another_function_is_refused_by_name(
    name: str, field: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"got {field}={value!r}, which may mean another function; expected "):
        load_dictionary(changed(tmp_path, name, **{field: value}), allow_pickle=True)


@pytest.mark.parametrize("name", ["gemma_scope_2", "dictionary_learning_AutoEncoder"])
def test_a_kind_has_to_be_named(name: str, tmp_path: Path) -> None:
    field = "architecture" if name == "gemma_scope_2" else "dict_class"
    with pytest.raises(ValueError, match=rf"got {field}=None, which may mean another function; expected '"):
        load_dictionary(changed(tmp_path, name, **{field: None}), allow_pickle=True)


def test_an_autoencoder_that_writes_nothing_else_is_none(tmp_path: Path) -> None:
    """Some files name a second hook and leave it empty."""
    metadata = {"hook_name": "blocks.1.hook_resid_post", "hook_name_out": None, "prepend_bos": True}
    found = load_dictionary(changed(tmp_path, "saelens_standard", metadata=metadata))
    assert not found.transcoder and found.apply_b_dec_to_input and found.metadata["prepend_bos"]


def test_a_file_of_groupmax_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got activation='groupmax', which may mean another function; expected 'topk'"
    ):
        load_dictionary(FILES / "refused_groupmax")


def test_unknown_weights_are_refused_by_name(tmp_path: Path) -> None:
    place = changed(tmp_path, "saelens_standard")
    save_file(
        load_file(place / "sae_weights.safetensors") | {"scale": torch.ones(2)}, place / "sae_weights.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"got the weights scale, which may mean another function and are not known here"
    ):
        load_dictionary(place)


def test_a_pickle_is_read_when_asked_for_and_for_tensors_alone(tmp_path: Path) -> None:
    place = FILES / "dictionary_learning_AutoEncoder"
    with pytest.raises(
        ValueError, match=r"ae.pt: its weights are pickled; if you trust its source pass allow_pickle=True"
    ):
        load_dictionary(place)
    shutil.copytree(place, tmp_path / "bad")
    torch.save({"encoder.weight": Path("code")}, tmp_path / "bad" / "ae.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_dictionary(tmp_path / "bad", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "inside"), [("saelens_topk", ""), ("gemma_scope", "layer_3/width_24"), ("circuit_tracer", "")]
)
def test_a_hub_name(name: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The layout of the hub's cache; HF_HUB_OFFLINE keeps the tests off the network.
    place = tmp_path / "models--someone--dictionaries"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(FILES / name, place / "snapshots" / ("0" * 40) / inside)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    within = "layer_1.safetensors" if name == "circuit_tracer" else inside
    here = FILES / name / ("layer_1.safetensors" if name == "circuit_tracer" else "")
    found, expected = load_dictionary("someone/dictionaries", within), load_dictionary(here)
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), expected.parameters(), strict=True))
    with pytest.raises(OSError, match="someone/else: it is no folder here, and the hub says: "):
        load_dictionary("someone/else")


def test_places_without_a_dictionary(tmp_path: Path) -> None:
    with pytest.raises(
        OSError, match=r"there is no such file or folder, and 'nothing' is no hub name \('owner/name'\)"
    ):
        load_dictionary("nothing")
    with pytest.raises(
        ValueError, match=r"got none, expected one dictionary \(SAELens: sae_weights.safetensors cfg.json; "
    ):
        load_dictionary(tmp_path)


def test_another_dtype() -> None:
    found = load_dictionary(FILES / "saelens_jumprelu").to(torch.bfloat16)
    assert found.encode(torch.ones(3, 16)).dtype == found(torch.ones(3, 16)).dtype == torch.bfloat16


WEIGHTS = {"W_enc": torch.ones(2, 3), "b_enc": torch.zeros(3), "W_dec": torch.ones(3, 2), "b_dec": torch.zeros(2)}


@pytest.mark.parametrize(
    ("changes", "facets", "message"),
    [
        (
            {"W_dec": torch.ones(2, 2)},
            {},
            r"weights\['W_dec'\]: got .* expected floats \[d_sae, d_out\] where .*'d_sae': 3",
        ),
        ({"b_enc": torch.ones(3, 1)}, {}, r"weights\['b_enc'\]: got .* expected floats \[d_sae\]"),
        ({"b_enc": torch.ones(3).long()}, {}, r"weights\['b_enc'\]: got a torch.int64 tensor"),
        (
            {"bias": torch.ones(3)},
            {},
            "weights: got W_dec, W_enc, b_dec, b_enc, bias, expected W_dec, W_enc, b_dec, b_enc for",
        ),
        ({}, {"activation": "jumprelu"}, "expected W_dec, W_enc, b_dec, b_enc, threshold for activation='jumprelu'"),
        ({}, {"activation": "sigmoid"}, "activation: got 'sigmoid', expected 'relu', 'topk', 'jumprelu' or 'gated'"),
        ({}, {"normalize_activations": "tanh"}, "normalize_activations: got 'tanh', expected 'none', 'layer_norm' or "),
        ({}, {"k": 2}, "dictionary: got k=2, .*; only topk has k, and a transcoder has neither of the others"),
        ({}, {"activation": "topk", "k": 4}, r"k: got 4, expected 1 to 3 \(d_sae\)"),
        ({"W_skip": torch.ones(2, 2)}, {"apply_b_dec_to_input": True}, "got k=None, apply_b_dec_to_input=True"),
    ],
)
def test_weights_and_facets_that_do_not_fit(changes: dict, facets: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Dictionary({**WEIGHTS, **changes}, **facets)


def test_topk_has_no_negative_features() -> None:
    dictionary = Dictionary({**WEIGHTS, "b_enc": torch.tensor([1.0, -1, -2])}, activation="topk", k=2)
    assert dictionary.encode(torch.zeros(2)).tolist() == [1, 0, 0]


def test_what_a_reconstruction_needs() -> None:
    for facets, changes in (({"normalize_activations": "layer_norm"}, {}), ({}, {"W_skip": torch.ones(2, 2)})):
        dictionary = Dictionary({**WEIGHTS, **changes}, **facets)
        with pytest.raises(ValueError, match=r"x: got None, expected floats \[..., 2\]"):
            dictionary.decode(torch.ones(3))
    with pytest.raises(ValueError, match=r"x: got a torch.float32 tensor of shape \[3\], expected floats \[..., 2\]"):
        dictionary.encode(torch.ones(3))


def test_another_device_is_told() -> None:
    with pytest.raises(ValueError, match=r"x: it is on cpu, expected meta; use dictionary.to"):
        Dictionary(WEIGHTS).to("meta").encode(torch.ones(2))


def test_a_transcoder_of_llama_scope(tmp_path: Path) -> None:
    """What it writes has a mean norm of its own, in which the threshold is; the decoder need not have norm 1."""
    norms = {"in": 4.0, "out": 0.5}
    ends = {"hook_point_in": "blocks.1.ln2.hook_normalized", "hook_point_out": "blocks.1.hook_mlp_out"}
    place = changed(tmp_path, "llama_scope", dataset_average_activation_norm=norms, **ends)
    kept = load_file(place / "checkpoints/final.safetensors")
    kept["decoder.weight"] *= torch.linspace(0.5, 3, 24)
    save_file(kept, place / "checkpoints/final.safetensors")
    found, x = load_dictionary(place), torch.randn(50, 16)
    before = x * (16**0.5 / 4.0) @ kept["encoder.weight"].T + kept["encoder.bias"]
    written = before * kept["decoder.weight"].norm(dim=0) * (0.5 / 16**0.5)
    features = before * (written > 0.4)
    assert 50 < int((features > 0).sum()) < 600
    torch.testing.assert_close(found.encode(x), features)
    expected = (features @ kept["decoder.weight"].T + kept["decoder.bias"]) * (0.5 / 16**0.5)
    torch.testing.assert_close(found(x), expected)
    assert found.transcoder and found.metadata == {
        "hook_name": ends["hook_point_in"],
        "hook_name_out": ends["hook_point_out"],
    }


def test_a_dictionary_can_be_trained() -> None:
    dictionary = Dictionary({**WEIGHTS, "threshold": torch.tensor(0.1)}, activation="jumprelu")
    dictionary(torch.ones(4, 2)).sum().backward()
    assert (
        dictionary.threshold.shape == (3,)
        and dictionary.W_enc.grad is not None
        and float(dictionary.W_dec.grad.sum()) > 0
    )
