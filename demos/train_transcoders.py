"""Train a transcoder for the MLP of every layer, and write them in circuit-tracer's format: seeded, two CPU cores.

    python demos/train_transcoders.py tiny-falcon out/transcoders
    python demos/train_transcoders.py some/model out/transcoders --texts texts.txt --layers 10 --features 16384 --k 50

They are trained with a BatchTopK activation (Bussmann et al. 2024), and written as JumpReLU with the threshold that it
had: a feature counts where it is above. Those shipped beside the small models were made by the first call.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from transformer_lens import TransformerBridge
from transformer_lens.data.generate import training_text
from transformer_lens.dictionaries import load_dictionary, measure

READS, WRITES = "mlp.hook_in", "hook_mlp_out"


class Transcoder(nn.Module):
    """Features in training: `scale` is the size of what it writes, which is learned at size one."""

    def __init__(self, d_in: int, d_out: int, d_sae: int, k: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(d_in, d_sae) / d_in**0.5)
        self.W_dec = nn.Parameter(0.1 * nn.functional.normalize(torch.randn(d_sae, d_out), dim=-1))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_out))
        self.k, self.scale, self.threshold = k, 1.0, 0.0
        self.silent = torch.zeros(d_sae)  # for how many tokens each feature has not fired

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared error over variance; what is missing is also asked of features that have not fired for long."""
        y = y / self.scale
        before = (x @ self.W_enc + self.b_enc).relu()
        least = before.detach().flatten().topk(self.k * len(x)).values[-1]
        features = before * (before >= least)
        self.threshold += 0.01 * (float(least) - self.threshold)
        self.silent = torch.where((features > 0).any(0), 0, self.silent + len(x))
        missing = y - (features @ self.W_dec + self.b_dec)
        loss = missing.square().sum() / (y - y.mean(0)).square().sum()
        dead = self.silent > 20_000
        if dead.any():
            some = (x @ self.W_enc[:, dead] + self.b_enc[dead]).topk(min(2 * self.k, int(dead.sum())), dim=-1)
            helped = torch.zeros(len(x), int(dead.sum())).scatter(-1, some.indices, some.values) @ self.W_dec[dead]
            loss = loss + (missing.detach() - helped).square().sum() / missing.detach().square().sum() / 32
        return loss

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What circuit-tracer's files hold."""
        return {
            "W_enc": self.W_enc.T.contiguous(),
            "b_enc": self.b_enc.clone(),
            "W_dec": self.W_dec * self.scale,
            "b_dec": self.b_dec * self.scale,
            "activation_function.threshold": torch.full_like(self.b_enc, self.threshold),
        }


def train(
    bridge: TransformerBridge, texts: object, layers: Sequence[int], features: int, k: int, steps: int, batch: int
) -> dict[int, Transcoder]:
    """Transcoders of these layers, all trained on one stream."""
    places = [f"blocks.{layer}.{end}" for layer in layers for end in (READS, WRITES)]
    # Text by text, and with BOS: as a prompt is read whose graph is drawn.
    options = {"dtype": torch.float32, "device": "cpu", "contexts": 32, "epochs": None}
    options |= {"packing": False, "drop_bos": False}
    stream = bridge.activation_stream(texts, places, batch_size=batch, buffer=32 * batch, **options)
    first = next(stream)
    sizes = [first[place].shape[-1] for place in places]
    made = {layer: Transcoder(*sizes[2 * i : 2 * i + 2], features, k) for i, layer in enumerate(layers)}
    for layer, one in made.items():
        written = first[f"blocks.{layer}.{WRITES}"]
        one.scale = float((written - written.mean(0)).square().mean().sqrt())
        one.b_dec.data = written.mean(0) / one.scale
    optimizer = torch.optim.Adam([value for one in made.values() for value in one.parameters()], lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        given = next(stream)
        losses = [one.loss(*(given[f"blocks.{layer}.{end}"] for end in (READS, WRITES))) for layer, one in made.items()]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        rate.step()
        if step % 500 == 0 or step == steps - 1:
            print(f"step {step}: variance missed {[round(float(loss.detach()), 3) for loss in losses]}", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", help="a file or a folder; default: the text the small models were trained on")
    parser.add_argument("--layers", type=int, nargs="*", help="default: all")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=512)
    options = parser.parse_args()
    torch.manual_seed(0)
    bridge = TransformerBridge.boot_transformers(options.model)
    layers = range(bridge.cfg.n_layers) if options.layers is None else options.layers
    texts = options.texts or list(training_text(20_000, seed=0))
    made = train(bridge, texts, layers, options.features, options.k, options.steps, options.batch)
    options.out.mkdir(parents=True, exist_ok=True)
    for layer, one in made.items():
        save_file(one.tensors(), options.out / f"layer_{layer}.safetensors")
    hooks = f"feature_input_hook: {READS}\nfeature_output_hook: {WRITES}\n"
    (options.out / "config.yaml").write_text(f"model_name: {options.model}\nmodel_kind: transcoder_set\n{hooks}")
    if options.texts is None:
        unseen = list(training_text(200, seed=1))
        for layer in layers:
            found = measure(bridge, load_dictionary(options.out, f"layer_{layer}.safetensors"), unseen)
            print(
                f"layer {layer}: loss recovered {found.loss_recovered:.3f}, L0 {found.l0:.1f}, "
                f"variance explained {found.explained_variance:.3f}, dead {int((found.fired == 0).sum())}"
            )


if __name__ == "__main__":
    main()
