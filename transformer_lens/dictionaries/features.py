"""What a dictionary is worth on texts, and what its features are: where they fire, what they write, what they do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.attribution.activations import AttributionScores
from transformer_lens.analysis.attribution.gradient_runs import gradient_run
from transformer_lens.analysis.patching.engine import Metric
from transformer_lens.asking import Input
from transformer_lens.checks import in_words, is_several, is_tensor
from transformer_lens.collect import RunningStatistics
from transformer_lens.collect.run import stop_after
from transformer_lens.dictionaries.dictionary import Dictionary, feature_numbers
from transformer_lens.dictionaries.splice import At, Splice

Texts = Iterable[str] | Int[Tensor, "batch pos"]
Features = int | Sequence[int]


def _batches(bridge: TransformerBridge, texts: Any, size: int) -> Iterator[Any]:
    if not is_several(texts) or (isinstance(texts, Tensor) and texts.ndim != 2):
        raise TypeError(f"texts: got {in_words(texts)}, expected texts, or token ids [batch, pos]")
    source = iter(texts)
    while some := list(islice(source, size)):
        yield bridge.input_and_mask(torch.stack(some) if all(map(is_tensor, some)) else some)


class Measures(NamedTuple):
    """How well a dictionary does on texts: losses in nats for each prediction, of the model, with the reconstruction,
    and with zeros in its place; where the second lies between the last (0) and the first (1); how many features of a
    token are not zero; 1 minus squared error over squared distance from the mean; on how many tokens each fired.
    """

    loss: float
    loss_spliced: float
    loss_ablated: float
    loss_recovered: float
    l0: float
    explained_variance: float
    fired: Int[Tensor, " d_sae"]


@checked
@torch.no_grad()
def measure(
    bridge: TransformerBridge, dictionary: Dictionary, texts: Texts, at: At = None, *, batch_size: int = 8
) -> Measures:
    """Loss recovered, L0, dead features and explained variance on texts, padding left out.

    >>> both = torch.cat([torch.eye(128), -torch.eye(128)])
    >>> weights = {"W_enc": both.T, "b_enc": torch.zeros(256), "W_dec": both, "b_dec": torch.zeros(128)}
    >>> found = measure(bridge, Dictionary(weights), ["Mary and John went to the store"], "blocks.1.hook_resid_post")
    >>> found.l0, found.loss_recovered, found.explained_variance
    (128.0, 1.0, 1.0)
    """
    losses, missed, fired, seen = torch.zeros(4, dtype=torch.float64), 0.0, torch.zeros(1), RunningStatistics()
    with Splice(bridge, dictionary, at, error=True) as spliced:
        write, error, tokens = str(spliced.write.name), spliced.error, 0
        zeros: list[Any] = [[], *([(name, lambda value, hook: torch.zeros_like(value))] for name in (error, write))]
        for ids, mask, attention in _batches(bridge, texts, batch_size):
            options: dict[str, Any] = {"attention_mask": attention, "return_type": "loss"}
            each = [bridge.run_with_hooks(ids, fwd_hooks=hooks, **options).cpu() for hooks in zeros]
            losses += (mask[:, 1:] & mask[:, :-1]).sum() * torch.stack([*each, torch.ones(())])
            kept = bridge.run_with_cache(ids, names_filter=[write, spliced.features, error], **options)[1]
            real = mask.to(kept[write].device)
            active = kept[spliced.features][real].reshape(-1, dictionary.d_sae) != 0
            fired, tokens = fired + active.sum(0).cpu(), tokens + len(active)
            missed += float(kept[error][real].double().square().sum())
            seen.update(kept[write][real])
    variance, (bare, rebuilt, zeroed) = float(seen.variance.sum()) * seen.count, (losses[:3] / losses[3]).tolist()
    l0, recovered = float(fired.sum()) / tokens, (zeroed - rebuilt) / (zeroed - bare)
    return Measures(bare, rebuilt, zeroed, recovered, l0, 1 - missed / variance, fired)


class Contexts(NamedTuple):
    """Where features are strongest, the `k` strongest tokens of each first: values, the number of the text, that of the
    token in it, and token ids and values from 8 tokens before to 8 behind, -1 where the text is at its end. `histogram`
    counts tokens by `BINS`, and `tokens` all of them; `where` is the hook.
    """

    values: Float[Tensor, "k feature"]
    texts: Int[Tensor, "k feature"]
    places: Int[Tensor, "k feature"]
    around: Int[Tensor, "k feature window"]
    strengths: Float[Tensor, "k feature window"]
    histogram: Int[Tensor, "feature bin"]
    tokens: int
    where: str

    def of(self, column: int) -> Iterator[tuple[float, int, int, Tensor, Tensor]]:
        """Those of one feature: value, text and place, then the token ids and the values around it."""
        for row in range(int((self.values[:, column] > 0).sum())):
            value, text, place = (part[row, column].item() for part in (self.values, self.texts, self.places))
            real = self.around[row, column] >= 0
            yield value, int(text), int(place), self.around[row, column][real], self.strengths[row, column][real]


BINS = torch.logspace(-8, 12, 41, base=2)
"""Where the bins of `Contexts.histogram` begin and end: two for each doubling, those at the ends open."""
WINDOW = torch.arange(-8, 9)


@torch.no_grad()
def strongest_contexts(
    bridge: TransformerBridge, dictionary: Dictionary, texts: Texts, wanted: list[int], at: At, k: int
) -> Contexts:
    """One pass over texts, of which a few at a time are held; no layer above the dictionary runs."""
    best: list[Tensor] = []
    histogram, count, first = torch.zeros(len(wanted), len(BINS) - 1, dtype=torch.long), 0, 0
    with Splice(bridge, dictionary, at, error=True) as spliced:
        where, stop = spliced.features, stop_after([spliced.features])
        for ids, mask, attention in _batches(bridge, texts, 8):
            kept = bridge.run_with_cache(ids, names_filter=where, attention_mask=attention, stop_at_layer=stop)[1]
            values = kept[where][..., wanted].cpu().float().reshape(*mask.shape, -1, len(wanted)).amax(2)
            values = values.masked_fill(~mask[..., None], 0)  # padding
            bins = torch.bucketize(values.flatten(0, 1), BINS[1:-1]) + torch.arange(len(wanted)) * histogram.shape[1]
            histogram += bins[values.flatten(0, 1) > 0].bincount(minlength=histogram.numel()).view_as(histogram)
            found, places = values.flatten(0, 1).topk(min(k, mask.numel()), dim=0)
            rows, columns = places // mask.shape[1], places % mask.shape[1]
            near = columns[..., None] + WINDOW
            inside = (near >= 0) & (near < mask.shape[1])
            near = near.clamp(0, mask.shape[1] - 1)
            inside &= mask[rows[..., None], near]
            strengths = values[rows[..., None], near, torch.arange(len(wanted))[:, None]]
            around = ids[rows[..., None], near].masked_fill(~inside, -1)
            these = [found, first + rows, mask.cumsum(1)[rows, columns] - 1, around, strengths * inside]
            both = [torch.cat(pair) for pair in zip(best or [part[:0] for part in these], these, strict=True)]
            order = both[0].topk(min(k, len(both[0])), dim=0).indices
            best = [part[order, torch.arange(len(wanted))] for part in both]
            count, first = count + int(mask.sum()), first + len(ids)
    if not best:
        raise ValueError("texts: got none, expected texts, or token ids [batch, pos]")
    of_all = dict[str, Any](zip(Contexts._fields, best, strict=False))
    return Contexts(**of_all, histogram=histogram, tokens=count, where=where)


@checked
def top_contexts(
    bridge: TransformerBridge, dictionary: Dictionary, texts: Texts, features: Features, at: At = None, *, k: int = 10
) -> dict[int, list[tuple[float, int, int, list[str]]]]:
    """The `k` tokens on which each feature is strongest: its value, the numbers of the text and of the token in it, and
    the tokens from 8 before to 8 behind. A few texts at a time are held, and no layer above the dictionary runs.
    """
    wanted = feature_numbers(dictionary, features)
    found = strongest_contexts(bridge, dictionary, texts, wanted, at, k)
    words: Any = bridge.to_str_tokens
    return {
        number: [(value, text, place, words(ids)) for value, text, place, ids, _ in found.of(column)]
        for column, number in enumerate(wanted)
    }


@checked
def feature_logits(bridge: TransformerBridge, dictionary: Dictionary, features: Features) -> Tensor:
    """What one unit of each feature adds to the logits directly, [feature, d_vocab], times the final norm's scale: by
    that norm, taken as linear, and the unembedding. Raises `ValueError` for what does not write the residual stream.
    """
    if not isinstance(dictionary, Dictionary) or dictionary.d_out != bridge.cfg.d_model:
        expected = f"one that writes {bridge.cfg.d_model} numbers"
        raise ValueError(f"dictionary: got {in_words(dictionary)}, expected {expected}")
    wanted = feature_numbers(dictionary, features)
    written, norm = dictionary.W_dec[wanted].to(bridge.W_U), dict[str, Any](bridge.named_children())["ln_final"]
    centred = written - written.mean(-1, keepdim=True) if bridge.cfg.normalization_type.startswith("LN") else written
    return torch.matmul(centred * norm.w, bridge.W_U).detach()


@checked
def feature_attribution(bridge: TransformerBridge, input: Input, metric: Metric) -> AttributionScores:
    """Activation times gradient of the metric at the features and errors of all spliced dictionaries, by one backward.
    With `error=True` the gradient is the model's own. Raises `ValueError` where no dictionary is spliced.
    """
    axes = {name: tuple(point.axes.split()) for name, point in bridge.hook_dict.items() if point.meaning}
    if not axes:
        raise ValueError("feature_attribution: no dictionary is in the model; put one there with bridge.splice")
    ids, _, mask = bridge.input_and_mask(input)
    run = gradient_run(bridge, ids, mask, metric, list(axes))
    values = run.activations()
    return AttributionScores({name: values[name] * g for name, g in run.gradients().items()}, axes, run.value.detach())
