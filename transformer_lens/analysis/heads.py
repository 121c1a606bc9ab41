"""Attention heads: scores on repeated random tokens, ablation, and similarity of the subspaces they read and write."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens import HookPoint, TransformerBridge, asking
from transformer_lens.analysis.arguments import checked
from transformer_lens.analysis.head_detection import detect_head as detect_head  # a name of this module too
from transformer_lens.asking import Heads, Positions, layers_with
from transformer_lens.checks import a_tensor, one_of
from transformer_lens.data.generate import repeated_random_tokens
from transformer_lens.factored_matrix import wide

Matrix = Literal["W_Q", "W_K", "W_V", "W_O"]
MATRICES: tuple[Matrix, ...] = ("W_Q", "W_K", "W_V", "W_O")


@checked
def random_repeats(
    bridge: TransformerBridge, length: int = 16, batch: int = 16, seed: int = 0
) -> Int[Tensor, "batch pos"]:
    """BOS (if the model has one), then `length` random tokens, twice. With a tokenizer, special tokens are left out.

    >>> tokens = random_repeats(bridge, length=3, batch=2)
    >>> tokens.shape, torch.equal(tokens[:, 1:4], tokens[:, 4:])
    (torch.Size([2, 7]), True)
    """
    adapter, known, special = bridge.token_adapter, bridge.cfg.d_vocab, set()
    if adapter is not None:
        known, special = min(len(adapter.tokenizer), known), set(adapter.tokenizer.all_special_ids)
    ordinary = [token for token in range(known) if token not in special]
    first = ordinary[0] if adapter is None or adapter.bos is None else adapter.bos
    return repeated_random_tokens(ordinary, length, batch, first, Random(seed))


@checked
def induction_scores(
    bridge: TransformerBridge, length: int = 16, batch: int = 16, seed: int = 0
) -> Float[Tensor, "layer head"]:
    """Each head's induction score, 0 to 1: its mean attention, over the second half of repeated random tokens, to the
    token after the previous occurrence (Olsson et al. 2022, "In-context Learning and Induction Heads"). Layers without
    attention have NaN, here and in the two scores below.

    >>> (induction_scores(bridge) > 0.9).nonzero().tolist()
    [[1, 0], [1, 1], [1, 2], [1, 3]]
    """
    return _mean_attention(bridge, random_repeats(bridge, length, batch, seed), length + 1, back=length - 1)


@checked
def previous_token_scores(
    bridge: TransformerBridge, length: int = 16, batch: int = 16, seed: int = 0
) -> Float[Tensor, "layer head"]:
    """Each head's mean attention to the previous token, over all but the first of repeated random tokens: 0 to 1.

    >>> (previous_token_scores(bridge) > 0.5).nonzero().tolist()
    [[0, 2], [0, 3]]
    """
    return _mean_attention(bridge, random_repeats(bridge, length, batch, seed), 1, back=1)


@checked
def duplicate_token_scores(
    bridge: TransformerBridge, length: int = 16, batch: int = 16, seed: int = 0
) -> Float[Tensor, "layer head"]:
    """Each head's mean attention, over the second half of repeated random tokens, to the same token in the first half.

    >>> duplicate_token_scores(bridge).shape
    torch.Size([4, 4])
    """
    return _mean_attention(bridge, random_repeats(bridge, length, batch, seed), length + 1, back=length)


@torch.no_grad()
def _mean_attention(
    bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"], first: int, back: int
) -> Float[Tensor, "layer head"]:
    """Each head's mean attention, for queries from `first` on, to the key `back` positions earlier."""
    cfg = bridge.cfg
    means = torch.full((cfg.n_layers, cfg.n_heads), torch.nan)
    queries = torch.arange(first, tokens.shape[1])
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers_with(bridge, "attn.hook_pattern")]

    def keep(pattern: Float[Tensor, "batch head pos pos"], hook: HookPoint) -> None:
        means[hook.layer()] = pattern[:, :, queries, queries - back].float().mean((0, 2)).cpu()

    bridge.run_with_hooks(tokens, fwd_hooks=[(names, keep)], return_type=None, stop_at_layer=cfg.n_layers)
    return means


@checked
def ablate_heads(
    bridge: TransformerBridge, heads: Heads, positions: Positions = None, *, mean: bool = False
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that ablate heads by replacing `attn.hook_z` with zero, or with its mean over the batch and positions of
    that forward (`mean=True`), at all or some positions (as in `bridge.steer`). Heads as in `detect_head`. Raises
    `ValueError` for a head that does not exist.

    >>> prompt = "When Mary and John went to the store, John gave a drink to"
    >>> hooks = ablate_heads(bridge, ["L3H0", "3.1", (3, 2), "L3H3"])
    >>> bridge.to_string(bridge.run_with_hooks(prompt, fwd_hooks=hooks)[0, -1].argmax())
    ' John'
    """
    where = asking.checked_positions(positions)
    of_layer: dict[int, list[int]] = {}
    for layer, head in asking.head_pairs(bridge.cfg, heads):
        of_layer.setdefault(layer, []).append(head)

    def ablate(z: Float[Tensor, "batch pos head d_head"], hook: HookPoint) -> Float[Tensor, "batch pos head d_head"]:
        gone = torch.zeros(z.shape[2], dtype=torch.bool, device=z.device)
        gone[of_layer[hook.layer()]] = True
        instead = z.mean((0, 1), keepdim=True) if mean else torch.zeros_like(z)
        return torch.where((asking.position_mask(where, z, hook)[..., None] & gone)[..., None], instead, z)

    return [(f"blocks.{layer}.attn.hook_z", ablate) for layer in sorted(of_layer)]


def principal_angles(
    first: Float[Tensor, "d_model rank"], second: Float[Tensor, "d_model other_rank"]
) -> Float[Tensor, " k"]:
    """The principal angles between the column spaces of two matrices, in radians from 0 to pi/2, smallest first, as
    many as the lower rank. Computed in float64 as in Björck and Golub 1973.

    >>> x, y, z = torch.eye(3).unbind()
    >>> principal_angles(torch.stack([x, y], 1), torch.stack([y, z], 1)).rad2deg()
    tensor([ 0., 90.])
    """
    a_tensor("first", first)
    a_tensor("second", second)
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[0]:
        got = f"{list(first.shape)} and {list(second.shape)}"
        raise ValueError(f"principal_angles: got {got}, expected two matrices of as many rows")
    A, B = (_basis(given.double(), _rounding(given)) for given in (first, second))
    if A.shape[1] < B.shape[1]:
        A, B = B, A
    cosines = torch.linalg.svdvals(A.mT @ B).clamp(max=1)
    sines = torch.linalg.svdvals(B - A @ (A.mT @ B)).clamp(max=1).flip(0)
    return torch.where(cosines > 0.5**0.5, sines.asin(), cosines.acos()).to(first.dtype)


@checked
@torch.no_grad()
def head_similarity(
    bridge: TransformerBridge, matrix: Matrix = "W_O", other: Matrix | None = None
) -> Float[Tensor, "layer head other_layer other_head"]:
    """How much one head's subspace of the residual stream overlaps another's: the mean squared cosine of their
    principal angles. 1 if one contains the other, 0 if they are orthogonal, about `d_head / d_model` if random.

    >>> same = head_similarity(bridge)
    >>> same.shape, torch.allclose(same[0, 1, 0, 1], torch.tensor(1.0))
    (torch.Size([4, 4, 4, 4]), True)
    >>> head_similarity(bridge, "W_O", "W_K").shape  # what heads write, and what keys read: one key per group
    torch.Size([4, 4, 4, 2])

    "W_O" is the subspace a head writes to; "W_Q", "W_K" and "W_V" are those it reads, with the preceding norm's weight
    folded in. W_K and W_V have one head per group: query head `h` uses `h // (n_heads / n_key_value_heads)`. Layers
    without attention have NaN. Memory holds a basis of every head, as large as the weights.
    """
    second = matrix if other is None else other
    one_of("matrix", matrix, MATRICES)
    one_of("other", second, MATRICES)
    layers, n_layers = layers_with(bridge, "attn.hook_z"), bridge.cfg.n_layers
    bases_of = {name: {layer: head_bases(bridge, name, layer) for layer in layers} for name in (matrix, second)}
    here, there = bases_of[matrix][layers[0]], bases_of[second][layers[0]]
    found = here.new_full((n_layers, len(here), n_layers, len(there)), torch.nan)
    for layer, bases in bases_of[matrix].items():
        for later, others in bases_of[second].items():
            overlap = torch.einsum("hdi,gdj->hgij", bases, others.to(bases.device)).square().sum((-1, -2))
            found[layer, :, later] = overlap / min(bases.shape[-1], others.shape[-1])
    return found


@checked
@torch.no_grad()
def head_bases(bridge: TransformerBridge, matrix: Matrix, layer: int) -> Float[Tensor, "head d_model d_head"]:
    """An orthonormal basis of the subspace each head of a layer reads or writes, in at least float32.

    >>> bases = head_bases(bridge, "W_V", 0)
    >>> bases.shape, torch.allclose(bases[0].mT @ bases[0], torch.eye(32), atol=1e-5)
    (torch.Size([2, 128, 32]), True)
    """
    one_of("matrix", matrix, MATRICES)
    block: Any = bridge.blocks[asking.layer_number(bridge.cfg, layer)]
    norm = block.branch("attn").norm
    weight = wide(getattr(block.attn, matrix).detach())
    if matrix == "W_O":
        return _basis(weight.mT)
    return _basis(weight * block.role(norm).w.detach().to(weight)[:, None] if norm else weight)


def _basis(columns: Float[Tensor, "*head d_model rank"], rounding: float | None = None) -> Tensor:
    """Orthonormal columns with the same span. Raises `ValueError` if the columns are linearly dependent."""
    U, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    floor = sizes[..., :1] * (rounding or _rounding(columns)) * max(columns.shape[-2:])
    if columns.shape[-1] > columns.shape[-2] or bool((sizes <= floor).any()):
        raise ValueError(f"a matrix of {list(columns.shape[-2:])} has not full rank; its columns span a smaller space")
    return U  # type: ignore[no-any-return]


def _rounding(x: Tensor) -> float:
    """The relative rounding error of this precision; singular values below it count as zero."""
    return torch.finfo(wide(x).dtype).eps
