"""Which experts a model chooses for the tokens of an input, and how much each counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens import TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.asking import Input, Pair, need_experts, one_expert, refuse_embeddings
from transformer_lens.text_table import Tabular, TextTable

HOOKS = ("hook_router_logits", "hook_expert_weights", "hook_expert_indices")


class RoutedToken(NamedTuple):
    """One token at one of the experts it was sent to."""

    batch: int
    position: int
    token: int
    text: str
    """The token as text; its number where the bridge has no tokenizer."""
    place: int
    """0 where the expert was the first choice."""
    weight: float
    probability: float
    """The router's probability of this expert, before the chosen ones are scaled to sum to one."""


@dataclass(frozen=True, eq=False, repr=False)
class Routing(Tabular):
    """The choices of every router for every token. Prints as a table; tensors are on the CPU."""

    bridge: TransformerBridge
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """False at padding."""
    indices: Int[Tensor, "layer batch pos chosen"]
    """The experts chosen, best first."""
    weights: Float[Tensor, "layer batch pos chosen"]
    """How much each counts: they sum to one."""
    probabilities: Float[Tensor, "layer batch pos expert"]
    """The softmax of the router's logits over all experts."""

    @property
    def str_tokens(self) -> list[list[str]]:
        """The text of each token, padding included."""
        if self.bridge.tokenizer is None:
            return [[str(token) for token in row] for row in self.tokens.tolist()]
        return [list(map(str, self.bridge.to_str_tokens(row))) for row in self.tokens]

    def tokens_of(self, layer: int | Pair, expert: int | None = None) -> list[RoutedToken]:
        """The tokens sent to one expert, in reading order, padding left out. Raises `ValueError` for a layer or an
        expert that is not there.

        >>> found = routing(bridge, "When Mary and John went to the store")
        >>> [(token.position, token.text, round(token.weight, 2)) for token in found.tokens_of(0, expert=2)]
        [(0, '<|bos|>', 0.72), (2, ' Mary', 0.6)]
        >>> found.tokens_of("L0E2") == found.tokens_of(0, 2)
        True
        """
        layer, expert = one_expert((len(self.indices), self.probabilities.shape[-1]), layer, expert)
        sent = (self.indices[layer] == expert) & self.mask[..., None]
        texts = self.str_tokens
        return [
            RoutedToken(
                batch,
                position,
                int(self.tokens[batch, position]),
                texts[batch][position],
                place,
                float(self.weights[layer, batch, position, place]),
                float(self.probabilities[layer, batch, position, expert]),
            )
            for batch, position, place in sent.nonzero().tolist()
        ]

    def table(self) -> TextTable:
        """One row for each token, padding left out, and one column for each layer.

        >>> print(routing(bridge, "Mary and").table())
        Experts chosen for each token: expert (weight)
        token      layer 0            layer 1            layer 2
        '<|bos|>'  2 (0.72) 0 (0.28)  3 (0.81) 2 (0.19)  0 (0.88) 1 (0.12)
        'M'        3 (0.76) 2 (0.24)  3 (0.79) 2 (0.21)  0 (0.64) 1 (0.36)
        'ary'      3 (0.67) 1 (0.33)  0 (0.62) 3 (0.38)  3 (0.66) 1 (0.34)
        ' and'     3 (0.70) 0 (0.30)  0 (0.61) 3 (0.39)  1 (0.62) 3 (0.38)
        """
        columns = ["token", *(f"layer {i}" for i in range(len(self.indices)))]
        texts = self.str_tokens
        rows = [
            [repr(texts[batch][position]), *(self._cell(i, batch, position) for i in range(len(self.indices)))]
            for batch, position in self.mask.nonzero().tolist()
        ]
        return TextTable("Experts chosen for each token: expert (weight)", columns, rows)

    def _cell(self, layer: int, batch: int, position: int) -> str:
        at = (layer, batch, position)
        pairs = zip(self.indices[at].tolist(), self.weights[at].tolist(), strict=True)
        return " ".join(f"{expert} ({weight:.2f})" for expert, weight in pairs)

    def __repr__(self) -> str:
        layers, batch, pos, chosen = self.indices.shape
        return f"Routing of {batch} x {pos} tokens: {chosen} experts chosen in each of {layers} layers"


@checked
def routing(
    bridge: TransformerBridge,
    input: Input,
    *,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Routing:
    """Run the model once and keep what its routers choose, in every layer. Hooks that are attached count: under
    `bridge.hooks(...)` this is the routing they lead to.

    >>> found = routing(bridge, ["When Mary and John", "Mary"])
    >>> found.indices.shape, found.mask.sum(-1).tolist()
    (torch.Size([3, 2, 5, 2]), [5, 3])

    `prepend_bos`, `padding_side` and `attention_mask` as in `bridge.forward`. Raises `ValueError` for a dense model and
    `TypeError` for embeddings.
    """
    need_experts(bridge.cfg, "routing")
    refuse_embeddings(input)
    tokens, mask, attention_mask = bridge.input_and_mask(input, prepend_bos, padding_side, attention_mask)
    names = [f"blocks.{i}.mlp.{name}" for i in range(bridge.cfg.n_layers) for name in HOOKS]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            tokens, return_type=None, names_filter=names, device="cpu", attention_mask=attention_mask
        )
    logits, weights, indices = (cache.stack_activation(name.removeprefix("hook_")) for name in HOOKS)
    return Routing(bridge, tokens, mask, indices, weights.float(), logits.float().softmax(-1))
