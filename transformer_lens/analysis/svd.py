"""Singular vectors of a model's weights, read through the unembedding.

Source: Millidge and Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices are Highly
Interpretable".
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens import FactoredMatrix, TransformerBridge
from transformer_lens.analysis.arguments import checked
from transformer_lens.checks import is_one_of
from transformer_lens.factored_matrix import wide
from transformer_lens.text_table import TextTable

VectorType = Literal["OV", "QK", "w_in", "w_gate", "w_out"]
VECTOR_TYPES: tuple[VectorType, ...] = get_args(VectorType)
Side = Literal["right", "left"]


class SingularVectors(NamedTuple):
    """Singular values and their directions in the residual stream."""

    values: Float[Tensor, " vector"]
    """The largest first."""
    directions: Float[Tensor, "vector d_model"]
    """Orthonormal rows; the sign of each, which is arbitrary, makes its largest entry positive."""


class SVDInterpreter:
    """Read the singular vectors of a weight matrix as tokens: each direction times the unembedding.

    >>> svd = SVDInterpreter(bridge)
    >>> svd.get_singular_vectors("OV", layer_index=3, num_vectors=5, head_index=3).shape
    torch.Size([735, 1, 5])

    | type | the matrix | its right vectors | its left vectors (`side="left"`) |
    |---|---|---|---|
    | "OV" | `W_V @ W_O` of a head | what it writes | what it reads |
    | "QK" | `W_Q @ W_K.T` of a head | what the key reads | what the query reads |
    | "w_in", "w_gate" | `W_in.T`, `W_gate.T` | what neurons read | none in the stream |
    | "w_out" | `W_out` | what neurons write | none in the stream |

    `fold_ln` (default) folds the norm's weight into each matrix that reads the stream, and the final norm's into the
    unembedding, as `bridge.fold_ln()` does; norm biases and centring are ignored. Computed in at least float32.
    """

    @checked
    def __init__(self, model: TransformerBridge, fold_ln: bool = True) -> None:
        self.model = model
        self.cfg = model.cfg
        self.fold_ln = fold_ln

    @checked
    def get_singular_vectors(
        self,
        vector_type: VectorType,
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
        *,
        expert_index: int | None = None,
        side: Side = "right",
    ) -> Float[Tensor, "d_vocab 1 num_vectors"]:
        """What each of the first `num_vectors` singular directions adds to each token's logit, per unit length; column
        `i` belongs to the `i`-th largest singular value.

        >>> SVDInterpreter(moe).get_singular_vectors("w_out", 0, num_vectors=3, expert_index=1).shape
        torch.Size([735, 1, 3])

        "OV" and "QK" need `head_index`, an MLP with experts needs `expert_index`. Raises `ValueError` for a type,
        layer, head, expert or number of vectors that does not exist.
        """
        found = self.singular_vectors(
            vector_type, layer_index, num_vectors, head_index, expert_index=expert_index, side=side
        )
        return self._logits(found.directions)[:, None, :]

    @torch.no_grad()
    def _logits(self, directions: Float[Tensor, "vector d_model"]) -> Float[Tensor, "d_vocab vector"]:
        W_U, norm = self.model.W_U.to(directions.dtype), cast(Any, self.model.get_submodule("ln_final"))
        if self.fold_ln:
            W_U = norm.w.to(W_U)[:, None] * W_U
        return W_U.mT @ directions.to(W_U.device).mT

    @checked
    @torch.no_grad()
    def singular_vectors(
        self,
        vector_type: VectorType,
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
        *,
        expert_index: int | None = None,
        side: Side = "right",
    ) -> SingularVectors:
        """The singular values and their directions in the residual stream, for `bridge.steer` and `bridge.project_out`;
        arguments and errors as in `get_singular_vectors`.

        >>> values, directions = SVDInterpreter(bridge).singular_vectors("w_in", layer_index=1, num_vectors=4)
        >>> values.shape, directions.shape
        (torch.Size([4]), torch.Size([4, 128]))
        """
        self._check(vector_type, layer_index, head_index, expert_index, side)
        if vector_type in ("OV", "QK"):
            U, S, V = self._circuit(vector_type, layer_index, int(head_index or 0)).svd()
        else:
            U, S, Vh = torch.linalg.svd(self._neurons(vector_type, layer_index, expert_index), full_matrices=False)
            V = Vh.mT
        if not 1 <= num_vectors <= len(S):
            raise ValueError(f"num_vectors: got {num_vectors}, expected 1 to {len(S)}, the rank of this {vector_type}")
        directions = (V if side == "right" else U).mT[:num_vectors]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return SingularVectors(S[:num_vectors], directions * largest.sign())

    @checked
    def top_tokens(
        self,
        vector_type: VectorType,
        layer_index: int,
        num_vectors: int = 5,
        head_index: int | None = None,
        *,
        k: int = 6,
        expert_index: int | None = None,
        side: Side = "right",
    ) -> TextTable:
        """The tokens whose logits each direction raises and lowers most.

        >>> print(SVDInterpreter(bridge).top_tokens("OV", 3, num_vectors=1, head_index=3, k=3))
        OV of layer 3, head 3: tokens along each singular direction, and against it
        vector  value  along  against
        ...
        """
        values, directions = self.singular_vectors(
            vector_type, layer_index, num_vectors, head_index, expert_index=expert_index, side=side
        )
        columns = self._logits(directions).mT
        if not 1 <= k <= columns.shape[1]:
            raise ValueError(f"k: got {k}, expected 1 to {columns.shape[1]}")
        rows = [
            [str(i), f"{float(value):.2f}", self._texts(column.topk(k).indices), self._texts((-column).topk(k).indices)]
            for i, (value, column) in enumerate(zip(values, columns, strict=True))
        ]
        part = f", head {head_index}" if head_index is not None else ""
        part += f", expert {expert_index}" if expert_index is not None else ""
        title = f"{vector_type} of layer {layer_index}{part}: tokens along each singular direction, and against it"
        return TextTable(title, ["vector", "value", "along", "against"], rows)

    def _circuit(self, kind: str, layer: int, head: int) -> FactoredMatrix:
        attention: Any = self.model.blocks[layer].get_submodule("attn")
        circuit = (attention.OV if kind == "OV" else attention.QK)[head]
        A, B = wide(circuit.A.detach()), wide(circuit.B.detach())
        if self.fold_ln:
            weight = self._norm_before(layer, "attn").to(A)
            A = weight[:, None] * A
            B = B if kind == "OV" else B * weight
        return FactoredMatrix(A, B)

    def _neurons(self, kind: str, layer: int, expert: int | None) -> Float[Tensor, "d_mlp d_model"]:
        mlp: Any = self.model.blocks[layer].get_submodule("mlp")
        weight = getattr(mlp, kind.replace("w_", "W_"))
        matrix = wide(weight if expert is None else weight[expert]).detach()
        if kind == "w_out":
            return matrix
        if self.fold_ln:
            matrix = self._norm_before(layer, "mlp").to(matrix)[:, None] * matrix
        return matrix.mT

    def _norm_before(self, layer: int, mixer: str) -> Float[Tensor, " d_model"]:
        """The weight of the norm before a branch, or ones if there is none."""
        block: Any = self.model.blocks[layer]
        norm = block.branch(mixer).norm
        return block.role(norm).w.detach() if norm else torch.ones(self.cfg.d_model)

    def _texts(self, tokens: Tensor) -> str:
        if self.model.tokenizer is None:
            return " ".join(map(str, tokens.tolist()))
        return " ".join(map(repr, self.model.to_str_tokens(tokens)))

    def _check(self, kind: str, layer: int, head: int | None, expert: int | None, side: str) -> None:
        cfg = self.cfg
        if not is_one_of(kind, VECTOR_TYPES):
            raise ValueError(f"vector_type: got {kind!r}, expected one of {', '.join(map(repr, VECTOR_TYPES))}")
        if kind == "w_gate" and not cfg.gated_mlp:
            raise ValueError("vector_type: this model's MLPs have no gate, expected 'w_in' or 'w_out'")
        circuit = kind in ("OV", "QK")
        heads, experts = (cfg.n_heads, 0) if circuit else (0, cfg.num_experts or 0)
        _check_index("layer_index", layer, cfg.n_layers)
        block: Any = self.model.blocks[layer]
        block.branch("attn" if circuit else "mlp")
        for name, index, size in (("head_index", head, heads), ("expert_index", expert, experts)):
            if size:
                _check_index(name, index, size)
            elif index is not None:
                raise ValueError(f"{name}: got {index}, and {kind} of this model has none; leave it out")
        if not is_one_of(side, ("right", "left")) or (side == "left" and not circuit):
            expected = "'right' or 'left'" if circuit else f"'right': the left vectors of {kind} are over neurons"
            raise ValueError(f"side: got {side!r}, expected {expected}")


def _check_index(name: str, index: int | None, size: int) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
        raise ValueError(f"{name}: got {index!r}, expected 0 to {size - 1}")
