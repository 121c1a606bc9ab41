"""Weights of the whole model by name, stacked over layers, and the circuits made of them.

`bridge.blocks[i].attn.W_Q` and the like are views of the model's own parameters; what is stacked here is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens.cache.direct_logits import Tokens
from transformer_lens.checks import is_one_of
from transformer_lens.factored_matrix import FactoredMatrix, composition_scores
from transformer_lens.model_bridge.config import BridgeConfig

if TYPE_CHECKING:
    from transformer_lens.model_bridge.attaching.tree import Layers
    from transformer_lens.model_bridge.bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components import BlockBridge, Branch

READERS: Mapping[str, Callable[[Any], FactoredMatrix]] = {
    "Q": lambda attention: attention.QK,
    "K": lambda attention: attention.QK.T,
    "V": lambda attention: attention.OV,
}
"""The input matrix of a later head for what an earlier one writes."""


ADDED_BIASES: Mapping[str, str] = {"attn": "b_O", "mlp": "b_out"}
"""The bias that a component adds to the residual stream."""


def _added_bias(block: BlockBridge, branch: Branch) -> Tensor:
    """The constant that a branch adds; none for experts, which add biases only where they are chosen."""
    bias: Tensor = getattr(block.get_submodule(branch.mixer), ADDED_BIASES[branch.mixer])
    if bias.ndim > 1:
        return torch.zeros_like(bias[0])
    if branch.post_norm and bool(bias.any()):
        raise ValueError(
            f"{block.name}.{branch.mixer} has a bias, and {branch.post_norm} comes after it, so what the bias adds to "
            "the stream is another vector at every position"
        )
    return bias * branch.scale


def at_end(role: str, name: str) -> Any:
    """An attribute of a bridge: a weight of its embedding or unembedding."""
    return property(lambda bridge: getattr(bridge._part(role), name), doc=f"`{role}.{name}`.")


def stacked(role: str, name: str) -> Any:
    """An attribute of a bridge: a weight of one part of every layer, copied; a bias that is not there is zeros."""
    return property(lambda bridge: bridge._stacked(role, name), doc=f"Every layer's `{role}.{name}`, copied.")


class WeightMethods:
    """The weights of a bridge: `W_E`, `W_U` and `b_U`, and every layer's `W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_gate`,
    `W_out` and their biases, stacked and copied, with a key and a value for each group of query heads.

    >>> bridge.W_E.shape, bridge.W_U.shape, bridge.b_U.shape
    (torch.Size([735, 128]), torch.Size([128, 735]), torch.Size([735]))
    >>> bridge.W_Q.shape, bridge.W_K.shape, bridge.b_O.shape, bridge.W_gate
    (torch.Size([4, 4, 128, 32]), torch.Size([4, 2, 128, 32]), torch.Size([4, 128]), None)
    >>> moe.W_in.shape, moe.W_gate.shape
    (torch.Size([3, 4, 128, 64]), torch.Size([3, 4, 128, 64]))
    """

    cfg: BridgeConfig
    blocks: Layers

    W_E: Float[Tensor, "d_vocab d_model"] = at_end("embed", "W_E")
    """The token embedding: the model's own parameter."""
    W_U: Float[Tensor, "d_model d_vocab"] = at_end("unembed", "W_U")
    """The unembedding: a view of the model's own parameter. Raises `ValueError` for a model class without one."""
    b_U: Float[Tensor, " d_vocab"] = at_end("unembed", "b_U")
    """What is added to the logits; zeros where the model has no such bias."""

    W_Q: Float[Tensor, "layer head d_model d_head"] = stacked("attn", "W_Q")
    W_K: Float[Tensor, "layer kv_head d_model d_head"] = stacked("attn", "W_K")
    W_V: Float[Tensor, "layer kv_head d_model d_head"] = stacked("attn", "W_V")
    W_O: Float[Tensor, "layer head d_head d_model"] = stacked("attn", "W_O")
    b_Q: Float[Tensor, "layer head d_head"] = stacked("attn", "b_Q")
    b_K: Float[Tensor, "layer kv_head d_head"] = stacked("attn", "b_K")
    b_V: Float[Tensor, "layer kv_head d_head"] = stacked("attn", "b_V")
    b_O: Float[Tensor, "layer d_model"] = stacked("attn", "b_O")
    W_in: Float[Tensor, "layer *expert d_model d_mlp"] = stacked("mlp", "W_in")
    W_out: Float[Tensor, "layer *expert d_mlp d_model"] = stacked("mlp", "W_out")
    b_in: Float[Tensor, "layer *expert d_mlp"] = stacked("mlp", "b_in")
    b_out: Float[Tensor, "layer *expert d_model"] = stacked("mlp", "b_out")

    @property
    def W_gate(self) -> Float[Tensor, "layer *expert d_model d_mlp"] | None:
        """Every layer's `mlp.W_gate`, copied, as `W_in`; `None` where the MLP has no gate."""
        return self._stacked("mlp", "W_gate") if self.cfg.gated_mlp else None

    @property
    def QK(self) -> FactoredMatrix:
        """Every head's QK circuit, `[layer head d_model d_model]`, its factors copied; see `blocks[i].attn.QK`.

        >>> bridge.QK
        FactoredMatrix(shape=[4, 4, 128, 128], mdim=32)

        Rotation and norms of queries and keys are not part of it.
        """
        return self._circuits("QK")

    @property
    def OV(self) -> FactoredMatrix:
        """Every head's OV circuit, `[layer head d_model d_model]`, its factors copied; see `blocks[i].attn.OV`.

        A norm or multiplier between attention and the stream is not part of it.
        """
        return self._circuits("OV")

    @property
    def all_head_labels(self) -> list[str]:
        """The names of all heads, in the order of flattened `[layer, head]` axes.

        >>> bridge.all_head_labels[:5]
        ['L0H0', 'L0H1', 'L0H2', 'L0H3', 'L1H0']
        """
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    @torch.no_grad()
    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much each head's query ("Q"), key ("K") or value ("V") reads from each earlier head's output.

        >>> scores = bridge.all_composition_scores("K")
        >>> scores.shape, bool((scores[1, :, 1] == 0).all())
        (torch.Size([4, 4, 4, 4]), True)

        `|OV @ QK|`, `|OV @ QK.T|` or `|OV @ OV|` over the product of the two Frobenius norms, in float32 for half
        precision; zero unless the first head's layer is below the second's. Norms between the heads are left out.
        Formula: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
        """
        if not is_one_of(mode, READERS):
            raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(map(repr, READERS))}")
        attention = [self._layer_part(layer, "attn") for layer in range(self.cfg.n_layers)]
        heads, device = self.cfg.n_heads, attention[0].W_O.device
        rows = []
        for earlier, first in enumerate(attention):
            row = [torch.zeros(heads, heads, device=device)] * (earlier + 1)
            for second in attention[earlier + 1 :]:
                row.append(composition_scores(first.OV, READERS[mode](second)).to(device))
            rows.append(torch.stack(row, dim=1))
        return torch.stack(rows)

    def tokens_to_residual_directions(self, tokens: Tokens) -> Float[Tensor, "*batch_and_pos d_model"]:
        """The direction of the final residual stream that raises each token's logit: its column of `W_U`.

        >>> bridge.tokens_to_residual_directions(" Mary").shape
        torch.Size([128])
        >>> bridge.tokens_to_residual_directions([" Mary", " John"]).shape
        torch.Size([2, 128])

        `tokens` is a token's id or text, several of them, or a tensor of ids; its axes stay, followed by d_model. The
        final norm's weight is not included (`cache.apply_ln_to_stack` applies it). Raises `ValueError` for a text of
        several tokens and for an id outside the vocabulary.
        """
        bridge = cast("TransformerBridge", self)
        W_U = self.W_U
        return W_U.T[bridge.token_ids(tokens, "tokens_to_residual_directions").to(W_U.device)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the biases `b_O` and `b_out` in the residual stream that enters `layer`.

        >>> bool((bridge.accumulated_bias(2) == sum(b.attn.b_O + b.mlp.b_out for b in bridge.blocks[:2])).all())
        True

        `mlp_input=True`: in the stream that this layer's MLP reads, after attention in a sequential block. `layer` is 0
        to `n_layers`, or negative from the end.
        """
        layers = self.cfg.n_layers
        number = layer + layers if isinstance(layer, int) and layer < 0 else layer
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= layers:
            raise ValueError(f"layer: got {layer!r}, expected 0 to {layers}, or -{layers} to -1")
        if mlp_input and number == layers:
            raise ValueError(f"mlp_input: layer {layer} is the stream after the last block, which no MLP reads")
        blocks = [*self.blocks]
        added = [(block, branch) for block in blocks[:number] for branch in block.branches]
        if mlp_input:
            added += [(blocks[number], branch) for branch in blocks[number].before("mlp")]
        total = torch.zeros(self.cfg.d_model, dtype=self.cfg.dtype, device=self.cfg.device)
        for block, branch in added:
            if branch.mixer in ADDED_BIASES and (include_mlp_biases or branch.mixer != "mlp"):
                total = total + _added_bias(block, branch).to(total.device)
        return total

    def _part(self, role: str) -> Any:
        bridge = cast("TransformerBridge", self)
        if role not in bridge._modules:
            raise ValueError(bridge.absent_names[f"{role}.hook_out"])
        return bridge.get_submodule(role)

    def _layer_part(self, layer: int, role: str) -> Any:
        block = cast("BlockBridge", self.blocks[layer])
        block.branch(role)
        return block.get_submodule(role)

    def _stacked(self, role: str, name: str) -> Tensor:
        weights: list[Tensor] = [getattr(self._layer_part(layer, role), name) for layer in range(self.cfg.n_layers)]
        different = next((i for i, weight in enumerate(weights) if weight.shape != weights[0].shape), None)
        if different is not None:
            raise ValueError(
                f"{name}: it is {list(weights[0].shape)} in layer 0 and {list(weights[different].shape)} in layer "
                f"{different}, so layers cannot be stacked; read bridge.blocks[i].{role}.{name}"
            )
        # The blocks of a large model may be on several devices.
        return torch.stack([weight.to(weights[0].device) for weight in weights])

    def _circuits(self, name: str) -> FactoredMatrix:
        pairs = [getattr(self._layer_part(layer, "attn"), name).pair for layer in range(self.cfg.n_layers)]
        device = pairs[0][0].device
        A, B = (torch.stack([factor.to(device) for factor in side]) for side in zip(*pairs, strict=True))
        return FactoredMatrix(A, B)
