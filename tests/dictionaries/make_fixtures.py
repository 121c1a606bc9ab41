"""Writes small dictionaries with the libraries that define their files, and what those libraries make of an input.

`make dictionary-fixtures` runs it with each library's own Python: `python make_fixtures.py LIBRARY...`. Beside the
library's files lies `expected.safetensors`: inputs `x`, the library's `features` and its reconstruction `y`.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

FILES = Path(__file__).parent / "files"
OURS = Path("out/dictionaries")
D_IN, D_SAE = 16, 24


def folder(name: str) -> Path:
    place = FILES / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def scramble(module: torch.nn.Module, positive: tuple[str, ...] = ("threshold",)) -> None:
    """Weights start at zeros and transposes of one another, which hides mistakes."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(
                torch.randn_like(value) / value.shape[0] ** 0.5 if value.ndim > 1 else 0.3 * torch.randn_like(value)
            )
            if name.split(".")[-1] in positive:
                value.abs_()


def inputs() -> torch.Tensor:
    return torch.randn(12, D_IN) + 0.2


@torch.no_grad()
def expect(place: Path, x: torch.Tensor, features: torch.Tensor, y: torch.Tensor) -> None:
    kept = {"x": x, "features": features, "y": y}
    save_file(
        {name: value.detach().contiguous().clone() for name, value in kept.items()}, place / "expected.safetensors"
    )


# -- SAELens -------------------------------------------------------------------------------------------------------


def saelens() -> None:
    import sae_lens
    from sae_lens.loading import pretrained_sae_loaders as loaders

    of_sae = sae_lens.saes.sae.SAEMetadata(model_name="tiny-falcon", hook_name="blocks.1.hook_resid_post")
    of_transcoder = sae_lens.saes.sae.SAEMetadata(
        model_name="tiny-falcon", hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out"
    )
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    kinds = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "without_b_dec": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {"apply_b_dec_to_input": False}),
        "layer_norm": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {"normalize_activations": "layer_norm"}),
        "constant_norm": (
            sae_lens.StandardSAE,
            sae_lens.StandardSAEConfig,
            {"normalize_activations": "constant_norm_rescale"},
        ),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 4}),
        "topk_rescaled": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 4, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
        "bfloat16": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {"dtype": "bfloat16"}),
    }
    for name, (made, config, more) in kinds.items():
        sae = made(config(**sizes, **more, metadata=of_sae))
        scramble(sae)
        sae.save_model(place := folder(f"saelens_{name}"))
        x = inputs()
        expect(place, x, sae.encode(x), sae(x))
    for name in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        config = getattr(sae_lens, f"{name}Config")
        options = {"apply_b_dec_to_input": False, "d_out": D_IN if "Skip" in name else 20, "metadata": of_transcoder}
        transcoder = getattr(sae_lens, name)(config(**sizes, **options))
        scramble(transcoder)
        transcoder.save_model(place := folder(f"saelens_{name.lower()}"))
        x = inputs()
        expect(place, x, transcoder.encode(x), transcoder(x))
    # A BatchTopK autoencoder as it trains, and as it is written for use.
    config = sae_lens.BatchTopKTrainingSAEConfig(**sizes, k=4, metadata=of_sae)
    trained = sae_lens.BatchTopKTrainingSAE(config)
    scramble(trained)
    trained.topk_threshold.fill_(0.4)
    trained.save_inference_model(place := folder("saelens_batchtopk"))
    sae, x = sae_lens.SAE.load_from_disk(place), inputs()
    expect(place, x, sae.encode(x), sae(x))
    trained.save_model(place := folder("saelens_batchtopk_in_training"))
    expect(place, x, sae.encode(x), sae(x))
    # As versions before 6.0 wrote it, by hand, read by SAELens.
    scramble(sae := sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**sizes, k=3, metadata=of_sae)))
    sae.save_model(place := folder("saelens_before_6"))
    old = {**sizes, "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    old |= {"dtype": "torch.float32", "device": "cpu", "hook_name": "blocks.1.hook_resid_post", "l1_coefficient": 5}
    old |= {"normalize_activations": "none", "finetuning_scaling_factor": False, "sae_lens_training_version": "3.0.0"}
    (place / "cfg.json").write_text(json.dumps(old))
    sae, x = sae_lens.SAE.load_from_disk(place), inputs()
    expect(place, x, sae.encode(x), sae(x))
    # Gemma Scope's arrays, read by SAELens's loader for them.
    arrays = {"W_enc": np.random.randn(D_IN, D_SAE) / 4, "W_dec": np.random.randn(D_SAE, D_IN) / 5}
    arrays |= {"b_enc": np.random.randn(D_SAE) / 3, "b_dec": np.random.randn(D_IN) / 3}
    arrays["threshold"] = np.abs(np.random.randn(D_SAE)) / 3
    place = folder("gemma_scope")
    np.savez(place / "params.npz", **{name: value.astype(np.float32) for name, value in arrays.items()})
    loaders.hf_hub_download = lambda **of: str(place / "params.npz")
    config, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", cfg_overrides=sizes
    )
    sae, x = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(config)), inputs()
    sae.load_state_dict(state)
    expect(place, x, sae.encode(x), sae(x))
    # Llama Scope's, likewise; SAELens folds the mean norm into the weights.
    place = folder("llama_scope")
    (place / "checkpoints").mkdir()
    decoder = torch.nn.functional.normalize(torch.randn(D_IN, D_SAE), dim=0)
    kept = {"encoder.weight": torch.randn(D_SAE, D_IN) / 4, "encoder.bias": torch.randn(D_SAE) / 3}
    save_file(
        kept | {"decoder.weight": decoder, "decoder.bias": torch.randn(D_IN) / 3},
        place / "checkpoints/final.safetensors",
    )
    told = {"act_fn": "jumprelu", "jump_relu_threshold": 0.4, "norm_activation": "dataset-wise", "top_k": 50}
    told |= {
        "dataset_average_activation_norm": {"in": 6.5, "out": 6.5},
        "use_decoder_bias": True,
        "use_glu_encoder": False,
    }
    told |= {
        "apply_decoder_bias_to_pre_encoder": False,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "sparsity_include_decoder_norm": True,
    }
    told |= dict.fromkeys(("hook_point_in", "hook_point_out"), "blocks.1.hook_resid_post")
    (place / "hyperparams.json").write_text(json.dumps(told))
    loaders.hf_hub_download = lambda repo_id, filename, subfolder="", **of: str(
        place / ("checkpoints" if subfolder else "") / filename.split("/")[-1]
    )
    config, state, _ = loaders.llama_scope_sae_huggingface_loader(
        "fnlp/Llama", "folder", cfg_overrides={"dtype": "float32"}
    )
    sae, x = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(config)), inputs()
    sae.load_state_dict(state)
    sae.fold_activation_norm_scaling_factor(D_IN**0.5 / 6.5)
    expect(place, x, sae.encode(x), sae(x))


# -- sparsify ------------------------------------------------------------------------------------------------------


def dense(acts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(acts), D_SAE).scatter(-1, indices, acts)


def sparsify() -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    for name, more in {"topk": {}, "transcoder": {"transcode": True, "skip_connection": True}}.items():
        coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=4, **more))
        scramble(coder)
        coder.save_to_disk(place := folder(f"sparsify_{name}"))
        x = inputs()
        found = coder(x)
        expect(place, x, dense(found.latent_acts, found.latent_indices), found.sae_out)
    grouped = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=4, activation="groupmax"))
    grouped.save_to_disk(folder("refused_groupmax"))


# -- dictionary_learning -------------------------------------------------------------------------------------------


def dictionary_learning() -> None:
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = [kind(D_IN, D_SAE) for kind in (AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder)]
    made += [AutoEncoderTopK(D_IN, D_SAE, 4), BatchTopKSAE(D_IN, D_SAE, 4)]
    made += [MatryoshkaBatchTopKSAE(D_IN, D_SAE, 4, [8, 16])]
    for one in made:
        name = type(one).__name__
        scramble(one)
        if "threshold" in dict(one.named_buffers()):
            one.threshold.fill_(0.4)
        place = folder(f"dictionary_learning_{name}")
        # What its `trainSAE` writes: the state, and the trainer's config.
        torch.save(one.state_dict(), place / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "lr": 1e-3, "k": 4, "layer": 1}
        (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        x = inputs()
        expect(place, x, one.encode(x), one(x))


# -- circuit-tracer ------------------------------------------------------------------------------------------------


def circuit_tracer() -> None:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
        load_gemma_scope_2_transcoder,
    )

    relu, jump = torch.nn.functional.relu, JumpReLU(torch.zeros(D_SAE))
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    made = {
        0: SingleLayerTranscoder(D_IN, D_SAE, relu, 0, skip_connection=True, **options),
        1: SingleLayerTranscoder(D_IN, D_SAE, jump, 1, **options),
    }
    together = TranscoderSet(made, feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out")
    scramble(together)
    together.to_safetensors(str(place := folder("circuit_tracer")))
    ends = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    (place / "config.yaml").write_text(f"model_name: tiny-falcon\nmodel_kind: transcoder_set\n{ends}")
    x = inputs()
    for layer, one in made.items():
        part = place / f"of_layer_{layer}"
        part.mkdir()
        expect(part, x, one.encode(x), one(x))
    # Gemma Scope 2's tensors, read by circuit-tracer's loader for them.
    place = folder("gemma_scope_2")
    tensors = {
        "w_enc": torch.randn(D_IN, D_SAE) / 4,
        "w_dec": torch.randn(D_SAE, D_IN) / 5,
        "b_enc": torch.randn(D_SAE) / 3,
    }
    tensors |= {"b_dec": torch.randn(D_IN) / 3, "threshold": torch.rand(D_SAE) / 3}
    tensors |= {"affine_skip_connection": torch.randn(D_IN, D_IN) / 4}
    save_file(tensors, place / "params.safetensors")
    (place / "config.json").write_text(
        json.dumps({"architecture": "jump_relu", "affine_connection": True, "width": D_SAE})
    )
    one = load_gemma_scope_2_transcoder(str(place / "params.safetensors"), 0, device=torch.device("cpu"))
    expect(place, x, one.encode(x), one(x))
    # Cross-layer: what is expected has an axis of layers in front.
    ends = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    for kind in ("relu", "jump_relu"):
        made = CrossLayerTranscoder(3, D_SAE, D_IN, kind, lazy_decoder=False, **options)
        scramble(made)
        made.to_safetensors(str(place := folder(f"cross_layer_{kind}")))
        (place / "config.yaml").write_text(f"model_name: tiny-mixtral\nmodel_kind: cross_layer_transcoder\n{ends}")
        x = torch.stack([inputs() for _ in range(3)])
        expect(place, x, made.encode(x), made(x))


# -- what we save --------------------------------------------------------------------------------------------------


@torch.no_grad()
def saved() -> None:
    """SAELens reads what `save_all.py` has saved, and computes the same."""
    import sae_lens
    from safetensors.torch import load_file

    places = sorted(path.parent for path in OURS.glob("*/cfg.json"))
    assert len(places) > 20
    for place in places:
        kept, sae = load_file(place / "expected.safetensors"), sae_lens.SAE.load_from_disk(place)
        exactly = {"rtol": 0, "atol": 2e-7 if "constant_norm" in place.name else 0}
        torch.testing.assert_close(sae.encode(kept["x"]), kept["features"], **exactly)
        torch.testing.assert_close(sae(kept["x"]), kept["y"], **exactly)
    print(f"SAELens reads {len(places)} dictionaries as we saved them")  # noqa: T201


LIBRARIES = {one.__name__: one for one in (saelens, sparsify, dictionary_learning, circuit_tracer, saved)}

if __name__ == "__main__":
    for library in sys.argv[1:]:
        torch.manual_seed(0)
        np.random.seed(0)
        LIBRARIES[library]()
