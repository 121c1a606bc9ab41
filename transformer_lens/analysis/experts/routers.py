"""Routing: which experts each token is sent to and with what weight, for one input or counted over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import log
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Input, Pair, layers_with, need_experts, one_expert, refuse_embeddings
from transformer_lens.checks import is_several, whole
from transformer_lens.text_table import Tabular, TextTable

HOOKS = ("hook_router_logits", "hook_expert_weights", "hook_expert_indices")


class RoutedToken(NamedTuple):
    """One token at one of its chosen experts."""

    batch: int
    position: int
    token: int
    text: str
    """The token's text, or its id if the bridge has no tokenizer."""
    place: int
    """0 if the expert was the first choice."""
    weight: float
    probability: float
    """The softmax of the router's logits, at this expert."""


def _row_of(layers: Sequence[int], layer: int) -> int:
    """A layer's row in a table of those with experts."""
    if layer not in layers:
        raise ValueError(f"layer {layer} has a dense MLP; the layers with experts are {', '.join(map(str, layers))}")
    return layers.index(layer)


@dataclass(frozen=True, eq=False, repr=False)
class Routing(Tabular):
    """Every router's choices for every token. Prints as a table; tensors are on the CPU."""

    bridge: TransformerBridge
    layers: tuple[int, ...]
    """The layers with experts, whose rows these are."""
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """False at padding tokens."""
    indices: Int[Tensor, "layer batch pos chosen"]
    """The experts chosen, in the router's order: for most, highest weight first."""
    weights: Float[Tensor, "layer batch pos chosen"]
    """What the outputs of the chosen experts are multiplied by."""
    probabilities: Float[Tensor, "layer batch pos expert"]
    """The softmax of the router's logits over all experts; some routers weigh them in another way."""

    @cached_property
    def str_tokens(self) -> list[list[str]]:
        """The text of each token, padding included."""
        if self.bridge.tokenizer is None:
            return [[str(token) for token in row] for row in self.tokens.tolist()]
        return [list(map(str, self.bridge.to_str_tokens(row))) for row in self.tokens]

    def tokens_of(self, layer: int | Pair, expert: int | None = None) -> list[RoutedToken]:
        """The tokens sent to one expert, in reading order, without padding. Raises `ValueError` for an unknown expert.

        >>> found = routing(bridge, "When Mary and John went to the store")
        >>> [(token.position, token.text, round(token.weight, 2)) for token in found.tokens_of(0, expert=2)]
        [(0, '<|bos|>', 0.72), (2, ' Mary', 0.6)]
        """
        layer, expert = one_expert((self.bridge.cfg.n_layers, self.probabilities.shape[-1]), layer, expert)
        row, texts = _row_of(self.layers, layer), self.str_tokens
        found = []
        for batch, position, place in ((self.indices[row] == expert) & self.mask[..., None]).nonzero().tolist():
            token, text = int(self.tokens[batch, position]), texts[batch][position]
            weight = float(self.weights[row, batch, position, place])
            probability = float(self.probabilities[row, batch, position, expert])
            found.append(RoutedToken(batch, position, token, text, place, weight, probability))
        return found

    def to_dicts(self) -> list[dict[str, Any]]:
        """One row for each choice of an expert, without padding."""
        places = [(layer, expert) for layer in self.layers for expert in range(self.probabilities.shape[-1])]
        each = [(layer, expert, one) for layer, expert in places for one in self.tokens_of(layer, expert)]
        return [{"layer": layer, "expert": expert, **one._asdict()} for layer, expert, one in each]

    def table(self) -> TextTable:
        """A table with one row per token, without padding, and one column per layer.

        >>> print(routing(bridge, "Mary and").table())
        Experts chosen for each token: expert (weight)
        token      layer 0            layer 1            layer 2
        '<|bos|>'  2 (0.72) 0 (0.28)  3 (0.81) 2 (0.19)  0 (0.88) 1 (0.12)
        'M'        3 (0.76) 2 (0.24)  3 (0.79) 2 (0.21)  0 (0.64) 1 (0.36)
        'ary'      3 (0.67) 1 (0.33)  0 (0.62) 3 (0.38)  3 (0.66) 1 (0.34)
        ' and'     3 (0.70) 0 (0.30)  0 (0.61) 3 (0.39)  1 (0.62) 3 (0.38)
        """
        columns = ["token", *(f"layer {layer}" for layer in self.layers)]
        texts = self.str_tokens
        rows = []
        for batch, position in self.mask.nonzero().tolist():
            cells = map(_cell, self.indices[:, batch, position], self.weights[:, batch, position])
            rows.append([repr(texts[batch][position]), *cells])
        return TextTable("Experts chosen for each token: expert (weight)", columns, rows)

    def __repr__(self) -> str:
        layers, batch, pos, chosen = self.indices.shape
        return f"Routing of {batch} x {pos} tokens: {chosen} experts chosen in each of {layers} layers"


def _cell(experts: Int[Tensor, " chosen"], weights: Float[Tensor, " chosen"]) -> str:
    pairs = zip(experts.tolist(), weights.tolist(), strict=True)
    return " ".join(f"{expert} ({weight:.2f})" for expert, weight in pairs)


@checked
@torch.no_grad()
def routing(
    bridge: TransformerBridge,
    input: Input,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Routing:
    """Run the model once and record the routers' choices in every layer, including the effect of attached hooks.

    >>> found = routing(bridge, ["When Mary and John", "Mary"])
    >>> found.indices.shape, found.mask.sum(-1).tolist()
    (torch.Size([3, 2, 5, 2]), [5, 3])

    Keywords as in `bridge.forward`. Raises `ValueError` for a model without experts and `TypeError` for embeddings.
    """
    need_experts(bridge.cfg, "routing")
    refuse_embeddings(input)
    layers = layers_with(bridge, f"mlp.{HOOKS[0]}")
    tokens, mask, attention_mask = bridge.input_and_mask(input, prepend_bos, padding_side, attention_mask)
    names = [[f"blocks.{layer}.mlp.{name}" for layer in layers] for name in HOOKS]
    how: dict[str, Any] = {"return_type": None, "device": "cpu", "attention_mask": attention_mask}
    _, cache = bridge.run_with_cache(tokens, names_filter=list(chain(*names)), **how)
    logits, weights, indices = (torch.stack([cache[name] for name in each]) for each in names)
    return Routing(bridge, tuple(layers), tokens, mask, indices, weights.float(), logits.float().softmax(-1))


SUMMED = ("n_tokens", "load", "weight", "entropy_sum", "together", "onward")
"""The counts that simply add up over data sets."""


class ExpertToken(NamedTuple):
    """How often one token was sent to one expert."""

    token: int
    text: str
    times: int
    share: float
    """The fraction of this token's occurrences sent to the expert."""


@dataclass(frozen=True, eq=False, repr=False)
class RoutingStatistics(Tabular):
    """Routing counts over all tokens but padding; `a + b` combines two data sets.

    A token counts once at each expert chosen for it, whatever its weight.
    """

    layers: tuple[int, ...]
    """The layers with experts, whose rows these are."""
    n_tokens: int
    n_chosen: int
    """Experts chosen per token."""
    load: Int[Tensor, "layer expert"]
    """Tokens sent to each expert."""
    weight: Float[Tensor, "layer expert"]
    """The sum of their weights at each expert."""
    entropy_sum: Float[Tensor, " layer"]
    together: Int[Tensor, "layer expert expert"]
    """Tokens sent to both experts of the layer; `load` on the diagonal."""
    onward: Int[Tensor, "layer-1 expert next_expert"]
    """Tokens sent to one expert of a layer and to another of the next layer with experts."""
    tokens: Int[Tensor, " token"]
    """The distinct token ids seen."""
    token_counts: Int[Tensor, " token"]
    """Occurrences of each."""
    token_load: Int[Tensor, "token layer expert"]
    """How often each was sent to each expert."""
    texts: dict[int, str] = field(default_factory=dict)

    @property
    def load_share(self) -> Float[Tensor, "layer expert"]:
        """The fraction of tokens each expert gets; a layer's fractions sum to `n_chosen`."""
        return self.load.double() / self.n_tokens

    @property
    def entropy(self) -> Float[Tensor, " layer"]:
        """Mean entropy of the softmax of the router's logits, in nats; at most ln(experts)."""
        return self.entropy_sum / self.n_tokens

    def cooccurrence(self, d_vocab: int) -> Int[Tensor, "layer d_vocab expert"]:
        """How often each vocabulary token was sent to each expert, as one dense tensor."""
        layers, experts = self.load.shape
        d_vocab = whole("d_vocab", d_vocab, 1 + int(self.tokens.max()))
        dense = torch.zeros(layers, d_vocab, experts, dtype=torch.long)
        dense[:, self.tokens] = self.token_load.transpose(0, 1)
        return dense

    @checked
    def top_tokens(self, layer: int | Pair, expert: int | None = None, n: int = 10) -> list[ExpertToken]:
        """The tokens sent most often to an expert, most frequent first; the expert is a layer and a number, or "L0E2".

        >>> found = routing_statistics(bridge, ["Mary and John went to the store"], progress=False)
        >>> [(token.text, token.times, token.share) for token in found.top_tokens(0, expert=0, n=2)]
        [('<|bos|>', 1, 1.0), (' and', 1, 1.0)]
        """
        layer, expert = one_expert((1 + max(self.layers), self.load.shape[1]), layer, expert)
        counts = self.token_load[:, _row_of(self.layers, layer), expert]
        order = counts.argsort(descending=True, stable=True)[:n]
        columns = (self.tokens[order], counts[order], counts[order] / self.token_counts[order])
        rows = [row for row in zip(*(column.tolist() for column in columns), strict=True) if row[1]]
        return [ExpertToken(token, self.texts.get(token, str(token)), times, share) for token, times, share in rows]

    def mutual_information(self) -> Float[Tensor, " layer"]:
        """The mutual information of token and expert in nats: 0 if routing ignores the token, ln(experts) if the token
        decides it. One of the chosen experts is drawn uniformly (Cover and Thomas, Elements of Information Theory,
        equation 2.28). Tokens with few occurrences bias it upwards.

        >>> found = routing_statistics(bridge, ["Mary and John went to the store"], progress=False)
        >>> bool((found.mutual_information() <= torch.log(torch.tensor(4.0))).all())
        True
        """
        joint = self.token_load.double() / (self.n_tokens * self.n_chosen)
        expected = joint.sum(0, keepdim=True) * joint.sum(-1, keepdim=True)
        shares = joint / expected.where(expected > 0, 1)
        return torch.special.xlogy(joint, shares).sum((0, 2))  # type: ignore[no-any-return]

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        got, here = ([list(found.layers), found.load.shape[1], found.n_chosen] for found in (other, self))
        if got != here:
            what = "those of a model with layers, experts, chosen"
            raise ValueError(f"routing statistics: got {what} = {got}, expected {here}")
        tokens, rows = torch.cat([self.tokens, other.tokens]).unique(return_inverse=True)
        both = [torch.cat([self.token_counts, other.token_counts]), torch.cat([self.token_load, other.token_load])]
        counts, load = (part.new_zeros(len(tokens), *part.shape[1:]).index_add_(0, rows, part) for part in both)
        return RoutingStatistics(
            **{name: getattr(self, name) + getattr(other, name) for name in SUMMED},
            layers=self.layers,
            n_chosen=self.n_chosen,
            tokens=tokens,
            token_counts=counts,
            token_load=load,
            texts=self.texts | other.texts,
        )

    def to_dicts(self) -> list[dict[str, Any]]:
        """One row for each expert of each layer."""
        columns = {"load": self.load.tolist(), "weight": self.weight.tolist(), "load_share": self.load_share.tolist()}
        places = torch.ones_like(self.load).nonzero().tolist()
        at = {(row, expert): {name: columns[name][row][expert] for name in columns} for row, expert in places}
        return [{"layer": self.layers[row], "expert": expert, **values} for (row, expert), values in at.items()]

    def table(self) -> TextTable:
        """A table with one row per layer: the fraction of tokens each expert gets, and the router's entropy.

        >>> print(routing_statistics(bridge, ["Mary and John went to the store"], progress=False).table())
        Share of 9 tokens at each expert, 2 chosen for each token (even: 50.0%; ln 4 = 1.386 nats)
        layer  expert 0  expert 1  expert 2  expert 3  entropy (nats)  told by token (nats)
        0      66.7%     44.4%     22.2%     66.7%     1.133           0.618
        1      55.6%     22.2%     55.6%     66.7%     1.059           0.629
        2      33.3%     66.7%     33.3%     66.7%     1.082           0.637
        """
        experts = self.load.shape[1]
        shares, information = self.load_share, self.mutual_information()
        columns = ["layer", *(f"expert {e}" for e in range(experts)), "entropy (nats)", "told by token (nats)"]
        rows = [
            [str(layer), *(f"{share:.1%}" for share in sent.tolist()), f"{float(spread):.3f}", f"{float(told):.3f}"]
            for layer, sent, spread, told in zip(self.layers, shares, self.entropy, information, strict=True)
        ]
        even = f"even: {self.n_chosen / experts:.1%}; ln {experts} = {log(experts):.3f} nats"
        title = f"Share of {self.n_tokens} tokens at each expert, {self.n_chosen} chosen for each token ({even})"
        return TextTable(title, columns, rows)

    def __repr__(self) -> str:
        layers, experts = self.load.shape
        return f"RoutingStatistics of {self.n_tokens} tokens, {layers} layers of {experts} experts"


def _counted(found: Routing) -> RoutingStatistics:
    experts = found.probabilities.shape[-1]
    chosen: Int[Tensor, "layer row chosen"] = found.indices[:, found.mask]
    weights: Float[Tensor, "layer row chosen"] = found.weights[:, found.mask].double()
    probabilities: Float[Tensor, "layer row expert"] = found.probabilities[:, found.mask].double()
    sent: Int[Tensor, "layer row expert"] = one_hot(chosen, experts).sum(2)
    exact = sent.double()  # whole numbers below 2**53, so these products are exact, and fast
    tokens, rows = found.tokens[found.mask].unique(return_inverse=True)
    token_load = torch.zeros(len(tokens), *sent.shape[::2], dtype=torch.long)
    token_load.index_add_(0, rows, sent.transpose(0, 1))
    return RoutingStatistics(
        layers=found.layers,
        n_tokens=int(found.mask.sum()),
        n_chosen=chosen.shape[-1],
        load=sent.sum(1),
        weight=(one_hot(chosen, experts) * weights[..., None]).sum((1, 2)),
        entropy_sum=torch.special.entr(probabilities).sum((1, 2)),
        together=(exact.mT @ exact).long(),
        onward=(exact[:-1].mT @ exact[1:]).long(),
        tokens=tokens,
        token_counts=rows.bincount(minlength=len(tokens)),
        token_load=token_load,
    )


@checked
def routing_statistics(bridge: TransformerBridge, batches: Iterable[Input], progress: bool = True) -> RoutingStatistics:
    """Run the model over a data set, batch by batch, and count where its routers send tokens. A batch is a text, a list
    of texts, or token ids `[batch, pos]`; padding is ignored. Memory grows only with distinct tokens.

    >>> texts = ["When Mary and John went to the store", "Days: Monday Tuesday Wednesday"]
    >>> found = routing_statistics(bridge, [texts], progress=False)
    >>> found.n_tokens, found.load.sum(-1).tolist()
    (15, [30, 30, 30])

    Raises `ValueError` for a dense model or no batches, `TypeError` for embeddings, and for one text in place of
    batches.
    """
    need_experts(bridge.cfg, "routing_statistics")
    if not is_several(batches):
        got = type(batches).__name__
        raise TypeError(f"batches: got a {got}, expected an iterable of batches; for one text pass [text]")
    total: RoutingStatistics | None = None
    for batch in tqdm(batches, desc="routing statistics", unit="batch", disable=not progress):
        found = _counted(routing(bridge, batch))
        total = found if total is None else total + found
    if total is None:
        raise ValueError("batches: got none, expected at least one text or batch of token ids")
    if bridge.tokenizer is None:
        return total
    texts = map(str, bridge.to_str_tokens(total.tokens))
    return replace(total, texts=dict(zip(total.tokens.tolist(), texts, strict=True)))
