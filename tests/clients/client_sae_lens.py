"""Activation stores, training, evaluation, splicing, editing features, undoing."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

from tests.clients.steps import TEXT, plain, run, texts
from transformer_lens import TransformerBridge

HOOK = "blocks.2.hook_resid_post"
FEATURES = f"{HOOK}.hook_sae_acts_post"


@cache
def data() -> Dataset:
    return Dataset.from_dict({"text": texts(1500)})


def config(name: str, folder: str) -> LanguageModelSAERunnerConfig[Any]:
    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(k=16, d_in=128, d_sae=512, device="cpu"),
        model_name=name,
        hook_name=HOOK,
        context_size=32,
        training_tokens=60_000,
        train_batch_size_tokens=512,
        n_batches_in_buffer=16,
        store_batch_size_prompts=8,
        lr=2e-3,
        device="cpu",
        autocast=False,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=folder,
        output_path=f"{folder}/out",
        n_checkpoints=0,
        disable_concat_sequences=False,
        prepend_bos=False,
    )


@cache
def trained(name: str) -> SAE[Any]:
    with tempfile.TemporaryDirectory() as folder:
        LanguageModelSAETrainingRunner(config(name, folder), override_dataset=data(), override_model=plain(name)).run()
        (weights,) = Path(folder).rglob("sae_weights.safetensors")
        return SAE.load_from_disk(str(weights.parent), device="cpu")


def store(name: str) -> None:
    """an activation store yields what the bridge computes"""
    bridge = plain(name)
    with tempfile.TemporaryDirectory() as folder:
        batches = ActivationsStore.from_config(bridge, config(name, folder), override_dataset=data())
        tokens = batches.get_batch_tokens(4)
        mine = bridge.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
        theirs = batches.get_activations(tokens)
        assert torch.equal(theirs.reshape(mine.shape), mine)
        assert batches.next_batch().shape[-1] == bridge.cfg.d_model


def training(name: str) -> None:
    """training lowers the error of reconstruction below half of the variance"""
    bridge, sae = plain(name), trained(name)
    x = bridge.run_with_cache(texts(20)[0], names_filter=HOOK)[1][HOOK][0, 1:]
    error = (sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert error < 0.5, error
    assert (sae.encode(x) > 0).sum(-1).float().mean() <= 16


def evaluation(name: str) -> None:
    """SAELens's own evaluation runs, and the spliced model predicts better than one without the stream"""
    bridge = plain(name)
    with tempfile.TemporaryDirectory() as folder:
        batches = ActivationsStore.from_config(bridge, config(name, folder), override_dataset=data())
        wanted = EvalConfig(
            batch_size_prompts=8,
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2,
            compute_ce_loss=True,
            compute_kl=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        )
        scores, _ = run_evals(trained(name), batches, bridge, ActivationScaler(), eval_config=wanted)
    assert scores["model_performance_preservation"]["ce_loss_score"] > 0.5
    assert scores["sparsity"]["l0"] <= 16


def spliced(name: str) -> None:
    """with its error term a splice leaves the logits; without it they are those of the reconstruction"""
    model: Any = HookedSAETransformer.from_pretrained_no_processing(name)
    sae = trained(name)
    tokens = model.to_tokens(TEXT)
    bare = model(tokens)
    x = model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
    model.add_sae(sae, use_error_term=True)
    torch.testing.assert_close(model(tokens), bare, atol=1e-4, rtol=0)
    model.reset_saes()
    model.add_sae(sae)
    rebuilt = model.run_with_hooks(tokens, fwd_hooks=[])
    model.reset_saes()
    replaced = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda value, hook: sae(x))])
    torch.testing.assert_close(rebuilt, replaced, atol=1e-5, rtol=0)
    assert torch.equal(model(tokens), bare), "nothing is left"


def features(name: str) -> None:
    """features are cached by name and ablated"""
    model: Any = HookedSAETransformer.from_pretrained_no_processing(name)
    sae = trained(name)
    tokens = model.to_tokens(TEXT)
    bare, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    x = model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
    torch.testing.assert_close(cache[FEATURES], sae.encode(x), atol=1e-5, rtol=0)
    top = int(cache[FEATURES][0, -1].argmax())

    def ablate(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, -1, top] = 0
        return value

    without = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(FEATURES, ablate)])
    assert (without[0, -1] - bare[0, -1]).abs().max() > 1e-2
    assert model.acts_to_saes == {}


def on_the_bridge(name: str) -> None:
    """SAETransformerBridge boots, splices under the alias, and undoes it"""
    model: Any = SAETransformerBridge.boot_transformers(name)
    tokens = model.to_tokens(TEXT)
    bare = model(tokens)
    with model.saes(saes=[trained(name)]):
        assert not torch.equal(model(tokens), bare)
        cache = model.run_with_cache(tokens)[1]
        assert FEATURES in cache
    assert torch.equal(model(tokens), bare) and isinstance(model, TransformerBridge)


if __name__ == "__main__":
    run(store, training, evaluation, spliced, features, on_the_bridge)
