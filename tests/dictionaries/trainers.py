"""SAELens's and sparsify's own trainers on `bridge.activation_stream`, in theirs: `make dictionary-trainers`.

Each trains a TopK dictionary on a small model, which has to explain most of what texts that it never saw give; it is
saved by its library, and loaded here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transformer_lens
from transformer_lens import TransformerBridge
from transformer_lens.collect import ActivationStream
from transformer_lens.data.generate import training_text
from transformer_lens.dictionaries import load_dictionary

PLACE = "blocks.1.hook_resid_post"
STEPS, BATCH = 300, 512


def stream(name: str) -> ActivationStream:
    texts = list(training_text(4000, seed=0))
    bridge = TransformerBridge.boot_transformers(name)
    return bridge.activation_stream(texts, PLACE, batch_size=BATCH, buffer=16 * BATCH, epochs=None)


def explained(name: str, folder: Path) -> float:
    """The share of the variance of unseen texts that the saved dictionary explains."""
    bridge = TransformerBridge.boot_transformers(name)
    x = torch.cat(list(bridge.activation_stream(list(training_text(200, seed=1)), PLACE)))
    missed = load_dictionary(folder)(x) - x
    return 1 - float(missed.square().sum() / (x - x.mean(0)).square().sum())


def saelens(name: str, out: Path) -> None:
    """Its trainer takes an iterator of batches, which the stream is; and is resumed with it."""
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=128, d_sae=512, k=16))
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=STEPS * BATCH,
        device="cpu",
        autocast=False,
        lr=2e-3,
        lr_end=2e-3,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trained = SAETrainer(cfg=config, sae=sae, data_provider=stream(name)).fit()
    trained.cfg.metadata.hook_name = PLACE
    trained.save_inference_model(str(out))


class Feed(nn.Module):
    """A model to sparsify's trainer, which trains on what a module gives out: here the next batch of the stream."""

    def __init__(self, source: ActivationStream) -> None:
        super().__init__()
        self.source, self.out = source, nn.Identity()
        self.given = nn.Parameter(torch.zeros(1))  # it asks for the device of its parameters
        self.dummy_inputs = {"input_ids": torch.zeros(1, BATCH, dtype=torch.long)}

    base_model = property(lambda self: self)
    device = property(lambda self: self.given.device)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        found: Tensor = self.out(next(self.source)[None])
        assert found.shape[:2] == input_ids.shape
        return found


def sparsify(name: str, out: Path) -> None:
    """Its trainer counts rows of a data set, and runs a model on them: here one that takes from the stream."""
    from datasets import Dataset
    from sparsify import SaeConfig, TrainConfig, Trainer

    rows = Dataset.from_dict({"input_ids": [[0] * BATCH] * STEPS}).with_format("torch")
    config = TrainConfig(
        SaeConfig(num_latents=512, k=16),
        batch_size=1,
        hookpoints=["out"],
        optimizer="adam",
        lr=2e-3,
        lr_warmup_steps=10,
        save_every=10**9,
        save_dir=str(out.parent),
        run_name="sparsify",
        log_to_wandb=False,
    )
    Trainer(config, rows, Feed(stream(name))).fit()
    (out.parent / "sparsify" / "out").rename(out)


LIBRARIES = {one.__name__: one for one in (saelens, sparsify)}

if __name__ == "__main__":
    here = Path(__file__).resolve().parents[2]
    assert Path(transformer_lens.__file__).is_relative_to(here), "another transformer_lens was imported; set PYTHONPATH"
    for library in sys.argv[1:]:
        for model in ("tiny-falcon", "tiny-mixtral"):
            with tempfile.TemporaryDirectory() as folder:
                LIBRARIES[library](model, Path(folder) / "trained")
                share = explained(model, Path(folder) / "trained")
            print(f"{library} on {model}: {share:.3f} of the variance of unseen texts explained", flush=True)  # noqa: T201
            assert share > 0.7
