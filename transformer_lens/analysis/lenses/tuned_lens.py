"""Tuned lens: a learnt affine map per layer that improves the logit lens.

Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.steering import batches_of
from transformer_lens.asking import Texts, check_texts, layer_number
from transformer_lens.checks import directory_to_write, in_words, is_tensor, one_of
from transformer_lens.factored_matrix import wide
from transformer_lens.model_bridge import InputAndMask
from transformer_lens.text_table import Tabular, TextTable


@checked
def divergence(
    log_probs: Float[Tensor, "token d_vocab"], logits: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """KL(p || q) of each token in nats, with p given by log-probabilities and q by logits.

    >>> divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log())
    tensor([0.1438])
    """
    if logits.shape != log_probs.shape or not logits.is_floating_point() or not log_probs.is_floating_point():
        raise ValueError(f"logits: got {in_words(logits)}, expected those of log_probs, {in_words(log_probs)}")
    return (log_probs.exp() * (log_probs - logits.log_softmax(-1))).sum(-1)


@checked
def next_token_loss(
    logits: Float[Tensor, "token d_vocab"], following: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """The cross-entropy loss of each token's prediction of the next token, in nats; zero if there is none (-1).

    >>> next_token_loss(torch.zeros(2, 4), torch.tensor([3, -1]))
    tensor([1.3863, 0.0000])
    """
    if following.is_floating_point() or following.shape != logits.shape[:-1]:
        expected = f"the token ids that follow, {list(logits.shape[:-1])}"
        raise ValueError(f"following: got {in_words(following)}, expected {expected}")
    return torch.nn.functional.cross_entropy(logits, following, ignore_index=-1, reduction="none")


@dataclass(frozen=True, eq=False, repr=False)
class LensScores(Tabular):
    """How well each layer predicts under a tuned lens and the logit lens. The last row is the model itself.

    >>> zeros = torch.zeros(2)
    >>> print(LensScores(zeros, zeros + 1, zeros + 2, zeros + 3))
    Nats per token: divergence from the model's prediction, and loss on the next token
    stream  KL    KL, logit lens  loss  loss, logit lens
    0_pre   0.00  1.00            2.00  3.00
    final   0.00  1.00            2.00  3.00
    """

    kl: Float[Tensor, " component"]
    kl_logit_lens: Float[Tensor, " component"]
    cross_entropy: Float[Tensor, " component"]
    cross_entropy_logit_lens: Float[Tensor, " component"]

    def to_dicts(self) -> list[dict[str, Any]]:
        labels = [*(f"{i}_pre" for i in range(len(self.kl) - 1)), "final"]
        return [{"stream": one} | {key: float(of[i]) for key, of in vars(self).items()} for i, one in enumerate(labels)]

    def table(self) -> TextTable:
        """The scores as a table."""
        rows = [[label, *(f"{value:z.2f}" for value in values)] for label, *values in map(dict.values, self.to_dicts())]
        title = "Nats per token: divergence from the model's prediction, and loss on the next token"
        return TextTable(title, ["stream", "KL", "KL, logit lens", "loss", "loss, logit lens"], rows)

    def __repr__(self) -> str:
        return f"LensScores of {len(self.kl) - 1} layers; print it for a table"


Stream = Float[Tensor, "*batch_and_pos d_model"]
FORMAT = "tuned-lens-1"
WEIGHTS, ABOUT = "lens.safetensors", "lens.json"
SIZES = ("n_layers", "d_model", "d_vocab_out")
SAMPLE = 64
RATES = {"adamw": 1e-3, "muon": 2e-2}


class TunedLens:
    """One affine map for the stream that enters each layer: `x + W x + b`, then the final norm and the unembedding. `W`
    and `b` start at zero, which is the logit lens; `fit` trains them to match the model's prediction. The model is
    unchanged. Parameters are float32, `n_layers * d_model * (d_model + 1)` of them.

    >>> lens = TunedLens(bridge)
    >>> _, cache = bridge.run_with_cache("When Mary and John went to the store, John gave a drink to")
    >>> torch.equal(lens.logits(cache), cache.logit_lens())
    True

    Logits are those before any cap or multiplier. Raises `ValueError` for a model without an unembedding; `fit` and
    `evaluate` also do where the model caps or multiplies its logits.
    """

    @checked
    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge = bridge
        size, layers = bridge.cfg.d_model, bridge.cfg.n_layers
        self.translators = nn.ModuleList(nn.Linear(size, size, device=bridge.W_U.device) for _ in range(layers))
        for parameter in self.translators.parameters():
            nn.init.zeros_(parameter)

    def translate(self, stream: Stream, layer: int) -> Stream:
        """Map the stream that enters `layer` to an estimate of the final stream; `n_layers` returns it unchanged.

        >>> lens = TunedLens(bridge)
        >>> torch.equal(lens.translate(cache["resid_pre", 2], 2), cache["resid_pre", 2])
        True
        """
        layer = layer_number(self.bridge.cfg, layer, beyond=True)
        if not is_tensor(stream) or stream.shape[-1:] != (self.bridge.cfg.d_model,):
            raise ValueError(f"stream: got {in_words(stream)}, expected a tensor [..., {self.bridge.cfg.d_model}]")
        if layer == len(self.translators):
            return stream
        x = wide(stream)
        return (x + self.translators[layer](x.float()).to(x)).to(stream.dtype)  # type: ignore[no-any-return]

    def logits(
        self, source: ActivationCache | Stream, layer: int | None = None, *, pos_slice: Any = None
    ) -> Float[Tensor, "*component_batch_and_pos d_vocab"]:
        """Each layer's logits under the lens, [component, batch, pos, d_vocab], in the rows of
        `cache.accumulated_resid` (the last is the model's own); or those of one stream [..., d_model] that enters
        `layer`. Gradients flow to streams and lens unless `torch.no_grad()` is on.

        >>> lens = TunedLens(bridge)
        >>> lens.logits(cache, pos_slice=-1).shape, lens.logits(cache["resid_pre", 1], layer=1).shape
        (torch.Size([5, 1, 735]), torch.Size([1, 5, 735]))
        """
        if isinstance(source, ActivationCache):
            if layer is not None:
                raise ValueError("layer: a cache gives every layer; index the result, or pass one stream and its layer")
            stack = source.accumulated_resid(pos_slice=pos_slice)
            assert isinstance(stack, Tensor)
            return self._unembed(torch.stack([self.translate(stream, i) for i, stream in enumerate(stack)]))
        if layer is None or pos_slice is not None:
            raise ValueError("logits of one stream: expected its layer, and no pos_slice")
        return self._unembed(self.translate(source, layer)[None])[0]

    def _check(self, what: str, texts: Texts) -> None:
        if self.bridge.adapter.changes_logits():
            name = self.bridge.cfg.architecture
            raise ValueError(f"tuned lens: {name} caps or multiplies what the unembedding gives")
        check_texts(texts)
        if not len(texts):
            raise ValueError(f"{what}: got 0 texts, expected one or more")

    def _unembed(self, stack: Float[Tensor, "component *batch_and_pos d_model"]) -> Tensor:
        return ActivationCache({}, self.bridge)._unembedded(stack)

    @checked
    def fit(
        self,
        texts: Texts,
        *,
        epochs: int = 1,
        batch_size: int = 8,
        lr: float | None = None,
        weight_decay: float = 1e-3,
        optimizer: Literal["adamw", "muon"] = "adamw",
        tokens_at_once: int = 2048,
        seed: int = 0,
        verbose: bool = False,
    ) -> Float[Tensor, "step layer"]:
        """Train every layer's map to predict the model's own distribution, and return the loss of each step: KL(model
        || lens) in nats, averaged over tokens without padding.

        >>> from transformer_lens.data.generate import training_text
        >>> texts = list(training_text(16, seed=3))
        >>> losses = TunedLens(bridge).fit(texts, epochs=4)
        >>> losses.shape, bool((losses[-1] < losses[0]).all())
        (torch.Size([8, 4]), True)

        `texts` are texts or token ids, shuffled by `seed` in every epoch. "adamw" starts at `lr` 1e-3, "muon" (for the
        matrices; AdamW for the biases) at 2e-2; both decay linearly to zero. `weight_decay` pulls towards the logit
        lens. Memory holds the logits of one layer and `tokens_at_once` tokens, and the model's own for a batch.
        `verbose` shows a progress bar. After an exception, an interrupt or a non-finite loss (`ValueError`), the lens
        is unchanged.
        """
        self._check("fit", texts)
        one_of("optimizer", optimizer, tuple(RATES))
        before = {name: value.clone() for name, value in self.translators.state_dict().items()}
        steps = epochs * math.ceil(len(texts) / batch_size)
        optimizers = self._optimizers(optimizer, RATES[optimizer] if lr is None else lr, weight_decay)
        schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 - step / steps) for each in optimizers]
        losses: list[Tensor] = []
        done = False
        try:
            batch_of, rng, every = batches_of(self.bridge, texts), Random(seed), range(len(texts))
            orders = (rng.sample(every, len(every)) for _ in range(epochs))
            order = (some[start : start + batch_size] for some in orders for start in every[::batch_size])
            for batch in tqdm(map(batch_of, order), total=steps, disable=not verbose, desc="tuned lens", leave=False):
                losses.append(self._step(batch, optimizers, tokens_at_once))
                for schedule in schedules:
                    schedule.step()
            done = True
        finally:
            self.translators.zero_grad()
            if not done:
                self.translators.load_state_dict(before)
        return torch.stack(losses)

    def _optimizers(self, name: str, rate: float, decay: float) -> list[torch.optim.Optimizer]:
        matrices, biases = ([one for one in self.translators.parameters() if one.ndim == axes] for axes in (2, 1))
        if name == "adamw":
            return [torch.optim.AdamW([*matrices, *biases], lr=rate, weight_decay=decay)]
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay)
        return [muon, torch.optim.AdamW(biases, lr=min(rate, 1e-3), weight_decay=decay)]

    def _step(self, batch: InputAndMask, optimizers: list[torch.optim.Optimizer], tokens_at_once: int) -> Tensor:
        """One optimiser step on one batch. Returns each layer's loss."""
        streams, logits, _ = self._run(batch)
        wanted = logits.log_softmax(-1)
        losses = torch.zeros(len(self.translators))
        with torch.enable_grad():
            for layer, stream in enumerate(streams[:-1]):
                for x, target in zip(stream.split(tokens_at_once), wanted.split(tokens_at_once), strict=True):
                    loss = divergence(target, self.logits(x, layer).float()).sum() / len(stream)
                    loss.backward()
                    losses[layer] += loss.detach().cpu()
        if not bool(losses.isfinite().all()):
            raise ValueError(
                f"fit: the loss is {losses.tolist()}; the lens is as it was before. Use a smaller lr, or look for "
                "activations that are not finite"
            )
        for each in optimizers:
            each.step()
            each.zero_grad()
        return losses

    @torch.no_grad()
    def _run(self, batch: InputAndMask) -> tuple[list[Tensor], Tensor, Int[Tensor, " token"]]:
        """The streams, the last also, the logits and the next tokens (-1 if there is none), of all but padding."""
        tokens, mask, attention_mask = batch
        layers = self.bridge.cfg.n_layers
        names = [f"blocks.{i}.hook_resid_pre" for i in range(layers)] + [f"blocks.{layers - 1}.hook_resid_post"]
        logits, cache = self.bridge.run_with_cache(tokens, names_filter=names, attention_mask=attention_mask)
        followed = torch.nn.functional.pad(mask[:, 1:], (0, 1))
        following = torch.nn.functional.pad(tokens[:, 1:], (0, 1)).masked_fill(~followed, -1)
        # Clones, since inference tensors cannot enter a graph.
        streams = [cache[name][mask.to(cache[name].device)].to(self.bridge.W_U.device).clone() for name in names]
        return streams, logits[mask.to(logits.device)].float(), following[mask].to(logits.device)

    @checked
    @torch.no_grad()
    def evaluate(self, texts: Texts, *, batch_size: int = 8, tokens_at_once: int = 2048) -> LensScores:
        """How far each layer's prediction is from the model's, under this lens and the logit lens: mean KL(model ||
        lens) and cross-entropy loss on the next token, in nats. The last row is the model itself.

        >>> scores = TunedLens(bridge).evaluate(["When Mary and John went to the store"])
        >>> torch.equal(scores.kl, scores.kl_logit_lens), scores.kl.shape
        (True, torch.Size([5]))
        """
        self._check("evaluate", texts)
        plain = TunedLens(self.bridge)
        sums = torch.zeros(4, len(self.translators) + 1, dtype=torch.float64)
        tokens = predicted = 0
        batch_of = batches_of(self.bridge, texts)
        for start in range(0, len(texts), batch_size):
            streams, logits, following = self._run(batch_of(range(len(texts))[start : start + batch_size]))
            tokens, predicted = tokens + len(logits), predicted + int((following >= 0).sum())
            target = logits.log_softmax(-1)
            for layer, stream in enumerate(streams):
                for place in range(0, len(stream), tokens_at_once):
                    some = slice(place, place + tokens_at_once)
                    for row, lens in enumerate((self, plain)):
                        found = lens.logits(stream[some], layer).float()
                        sums[row, layer] += float(divergence(target[some], found).double().sum())
                        sums[2 + row, layer] += float(next_token_loss(found, following[some]).double().sum())
        if not predicted:
            raise ValueError("evaluate: no text has two tokens, so nothing is predicted")
        return LensScores(*(sums / torch.tensor([tokens, tokens, predicted, predicted])[:, None]).float())

    @checked
    def save(self, directory: str | Path) -> None:
        """Write `lens.safetensors` and `lens.json` (sizes, the model's name, a sample of its unembedding).

        >>> TunedLens(bridge).save("lens")  # doctest: +SKIP
        """
        folder, cfg = directory_to_write("directory", directory), self.bridge.cfg
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "model_name": cfg.model_name, "architecture": cfg.architecture}
        about |= {name: getattr(cfg, name) for name in SIZES}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.translators.state_dict().items()}
        save_file({**tensors, "sample": _sample(self.bridge)}, folder / WEIGHTS)
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    @checked
    def load(cls, directory: str | Path, bridge: TransformerBridge) -> TunedLens:
        """Load a lens that `save` wrote. Raises `FileNotFoundError` if there is none, and `ValueError` for another
        model's lens, judged by sizes, final norm and unembedding; the model's name may differ.

        >>> lens = TunedLens.load("lens", bridge)  # doctest: +SKIP
        """
        lens = cls(bridge)
        lens.translators.load_state_dict(_read_lens(Path(directory), bridge, lens.translators.state_dict()))
        return lens


def _read_lens(directory: Path, bridge: TransformerBridge, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a lens. Raises `ValueError` if it was made for another model."""
    for name in (WEIGHTS, ABOUT):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: no {name} there; a tuned lens is a directory that `save` wrote")
    try:
        about = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = load_file(directory / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{directory}: its files are not those of a tuned lens any more ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{directory / ABOUT}: not of the format {FORMAT!r}")
    for name in SIZES:
        got, wanted = about.get(name), getattr(bridge.cfg, name)
        if got != wanted:
            lens = f"a lens of {about.get('model_name')!r} with {name}={got}"
            raise ValueError(f"{directory}: {lens}, and this model has {name}={wanted}")
    sample = tensors.pop("sample", None)
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    if shapes != {name: list(value.shape) for name, value in expected.items()} or sample is None:
        raise ValueError(f"{directory / WEIGHTS}: got the tensors {shapes}, which are not those of this model's lens")
    here = _sample(bridge)
    # A checkpoint in half precision is the same model.
    if here.shape != sample.shape or not torch.allclose(here, sample, rtol=0.02, atol=0.02 * float(sample.abs().max())):
        raise ValueError(
            f"{directory}: a lens of {about.get('model_name')!r}, whose final norm and unembedding are not this "
            "model's; a lens fits the weights it was trained on, processed or not"
        )
    return tensors


@torch.no_grad()
def _sample(bridge: TransformerBridge) -> Float[Tensor, " sampled"]:
    """Some values of the unembedding and the final norm, always from the same places."""
    norm: Any = bridge.get_submodule("ln_final")
    pieces = []
    for weight in (bridge.W_U, norm.w):
        places = torch.arange(SAMPLE, device=weight.device) * (weight.numel() - 1) // (SAMPLE - 1)
        pieces.append(weight[torch.unravel_index(places, weight.shape)].float().cpu())
    return torch.cat(pieces)
