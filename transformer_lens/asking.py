"""Resolve which text, answer, layer, head, expert and position a caller means; each question is answered here alone.

Layers and positions count from 0, or from the end if negative. A head is `"L3H2"`, `"3.2"` or `(3, 2)`, an expert
`"L3E2"`, `"3.2"` or `(3, 2)`, the layer first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens.checks import a_list, from_end, in_words, is_several, is_tensor, is_whole, whole_numbers
from transformer_lens.hooks.point import HookPoint

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge
    from transformer_lens.model_bridge.config import BridgeConfig

Input = str | Sequence[str] | Int[Tensor, "*batch pos"]
"""A text, several, or token ids."""
Texts = Sequence[str] | Int[Tensor, "batch pos"]
"""Several texts, or their token ids."""
Answer = str | int | Sequence[str | int] | Int[Tensor, " batch"]
"""One token for all texts or one for each: an id, a text of one token, or several of these."""
Layers = int | Sequence[int] | None
"""A layer, several, or `None` for all of them."""
Pair = str | Sequence[int]
"""A layer with one of its heads or experts: `"L3H2"` or `"L3E2"`, `"3.2"`, `(3, 2)`."""
Heads = Pair | Sequence[Pair] | Mapping[int, Sequence[int]]
"""A head, several, or the heads of each layer."""
Pairs = Pair | Sequence[str | tuple[int | None, int]]
"""An expert of a layer, or several; `(None, 2)` is that expert of every layer."""
Positions = int | Sequence[int] | slice | Bool[Tensor, "batch pos"] | None
"""A position, several, a slice, a mask over batch and positions, or `None` for all of them."""
LETTERS = {"head": "H", "expert": "E"}


class Named(Protocol):
    """A model whose hooks have names."""

    @property
    def cfg(self) -> BridgeConfig: ...

    def canonical_name(self, name: str) -> str: ...


def refuse_embeddings(input: Any) -> None:
    """Raise `TypeError` for input that has no token ids."""
    if isinstance(input, Tensor) and input.is_floating_point():
        raise TypeError(f"input: got a {input.dtype} tensor, expected text or token ids")


def check_one_text(what: str, text: Any, ids_only: bool = False) -> None:
    """Raise `TypeError` for anything but the token ids of one text or, without `ids_only`, one text."""
    ids = is_tensor(text) and text.ndim in (1, 2) and text.numel() == text.shape[-1] > 0
    if ids and not text.is_floating_point() and text.dtype != torch.bool:
        return
    if ids_only or not isinstance(text, str):
        kind = "" if ids_only else "one text, or "
        raise TypeError(f"{what}: got {in_words(text)}, expected {kind}the token ids of one text: [pos] or [1, pos]")


def check_texts(texts: Any) -> None:
    """Raise `TypeError` for one text, whose characters would pass for texts, and for anything without token ids."""
    suits = isinstance(texts, Sequence) and not isinstance(texts, (str, bytes))
    if not suits and not (is_tensor(texts) and texts.ndim == 2 and not texts.is_floating_point()):
        raise TypeError(f"texts: got {in_words(texts)}, expected a list of texts, or token ids [batch, pos]")


def answer_ids(model: TransformerBridge, what: str, answer: Answer, batch: int) -> Int[Tensor, " batch"]:
    """The id of the answer token in each text. Raises `ValueError` for several tokens, or another number of answers."""
    ids = model.token_ids(answer, what).reshape(-1)
    if len(ids) not in (1, batch):
        raise ValueError(f"{what}: got {len(ids)}, expected one, or one for each of the {batch} texts")
    return ids.expand(batch)


def layer_number(cfg: BridgeConfig, layer: Any, what: str = "layer", beyond: bool = False) -> int:
    """A layer, counted from 0; with `beyond`, `n_layers` stands for what follows the last one."""
    return from_end(what, layer, cfg.n_layers, f" in a model of {cfg.n_layers} layers", beyond)


def layer_numbers(cfg: BridgeConfig, layers: Layers, what: str = "layer") -> list[int]:
    """The chosen layers, counted from 0. Raises `ValueError` for a layer that does not exist or is named twice."""
    size = cfg.n_layers
    where = f" in a model of {size} layers"
    wanted = range(size) if layers is None else whole_numbers(what, layers, -size, size - 1, where)
    numbers = [number % size for number in wanted]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{what}: got {list(wanted)}, expected each layer once")
    return numbers


def layers_with(bridge: TransformerBridge, hook: str) -> list[int]:
    """The layers that have a hook such as `attn.hook_z`. Raises `KeyError` with the reason where none has it."""
    found = [layer for layer in range(bridge.cfg.n_layers) if f"blocks.{layer}.{hook}" in bridge.hook_dict]
    if not found:
        bridge.canonical_name(f"blocks.0.{hook}")
    return found


def place_name(model: Named, at: Any, what: str = "at") -> str:
    """A hook's name; a layer stands for the residual stream that leaves it. Raises `KeyError` for an unknown hook."""
    if isinstance(at, str):
        return model.canonical_name(at)
    if not is_whole(at):
        raise TypeError(f"{what}: got {in_words(at)}, expected a hook's name or a layer")
    return f"blocks.{layer_number(model.cfg, at, what)}.hook_resid_post"


def is_pair(given: Any) -> bool:
    """Whether these are two whole numbers: a layer and one of its heads or experts."""
    several = isinstance(given, (list, tuple)) or (isinstance(given, (Tensor, np.ndarray)) and given.ndim == 1)
    return several and len(given) == 2 and all(map(is_whole, given))


def written_pair(kind: Literal["head", "expert"], given: Any, what: str) -> tuple[int, int]:
    """A layer and one of its heads or experts, in any spelling. Raises `ValueError` or `TypeError` otherwise."""
    letter = LETTERS[kind]
    found = re.fullmatch(rf"(?:L([0-9]+){letter}|([0-9]+)\.)([0-9]+)", given) if isinstance(given, str) else None
    if found:
        return int(found[1] or found[2]), int(found[3])
    if is_pair(given):
        return int(given[0]), int(given[1])
    error = ValueError if isinstance(given, (str, list, tuple)) else TypeError
    raise error(f"{what}: got {in_words(given)}, expected a layer and its {kind} as 'L3{letter}2', '3.2' or (3, 2)")


def pair_in(kind: Literal["head", "expert"], given: Any, sizes: Sequence[int], what: str) -> tuple[int, int]:
    """`written_pair`, counted from 0. Raises `ValueError` beyond these numbers of layers and heads or experts."""
    layer, number = written_pair(kind, given, what)
    layers, size = sizes
    if not (-layers <= layer < layers and 0 <= number < size):
        raise ValueError(
            f"{what}: got {in_words(given)}, expected layers 0 to {layers - 1} and {kind}s 0 to {size - 1}"
        )
    return layer % layers, number


def head_pairs(cfg: BridgeConfig, heads: Heads | None, what: str = "heads") -> list[tuple[int, int]]:
    """The chosen heads as (layer, head) pairs. Raises `ValueError` for none, and for a head that does not exist."""
    given: Any = heads
    if heads is None:
        given = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    elif isinstance(heads, Mapping):
        given = [(layer, head) for layer in heads for head in whole_numbers(what, heads[layer])]
    elif isinstance(heads, str) or is_pair(heads):
        given = [heads]
    a_list(what, given)
    found = [pair_in("head", one, (cfg.n_layers, cfg.n_heads), what) for one in given]
    if not found:
        raise ValueError(f"{what}: got none, expected at least one")
    return found


def part_label(label: Any) -> Any:
    """The label of a part of the model: a head as `"L3H2"` from any spelling, anything else unchanged."""
    if is_pair(label) or (isinstance(label, str) and re.fullmatch(r"[0-9]+\.[0-9]+", label)):
        layer, head = written_pair("head", label, "label")
        return f"L{layer}H{head}"
    return label


def need_experts(cfg: BridgeConfig, what: str) -> int:
    """The number of experts in a layer. Raises `ValueError`, on behalf of `what`, for a dense model."""
    if not cfg.num_experts:
        raise ValueError(f"{what} needs a mixture of experts, and {cfg.model_name} ({cfg.architecture}) has dense MLPs")
    return cfg.num_experts


def refuse_shared_experts(bridge: TransformerBridge, what: str) -> None:
    """Raise `ValueError` where the chosen experts are not all that an MLP computes."""
    if any(".mlp.shared." in name for name in bridge.hook_dict):
        raise ValueError(f"{what}: {bridge.cfg.architecture} has a shared expert, which it does not account for")


def need_whole_mlps(bridge: TransformerBridge, what: str) -> int:
    """The number of experts in a layer. Raises `ValueError` for a dense model, and where the chosen experts are not all
    that an MLP adds to the stream, or not as they are.
    """
    n_experts = need_experts(bridge.cfg, what)
    refuse_shared_experts(bridge, what)
    for block in bridge.blocks:
        if not all(branch.direct for branch in block.branches):
            raise ValueError(f"{what}: {bridge.cfg.architecture} has a norm or multiplier between experts and stream")
    return n_experts


def expert_numbers(cfg: BridgeConfig, experts: Any) -> list[int]:
    """The chosen experts. Raises `ValueError` for an expert that does not exist or is named twice."""
    n_experts = cfg.num_experts or 0
    wanted = whole_numbers("expert", experts, 0, n_experts - 1, f" in a model of {n_experts} experts a layer")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"experts: got {wanted}, expected each expert once")
    return wanted


def one_expert(sizes: Sequence[int], layer: Any, expert: Any) -> tuple[int, int]:
    """One expert of a layer, given as a pair or as two numbers, in a model with these numbers of layers and experts."""
    return pair_in("expert", layer if expert is None else (layer, expert), sizes, "expert")


def experts_by_layer(cfg: BridgeConfig, layer: Any, expert: Any) -> dict[int, list[int]]:
    """The chosen experts by layer. Raises `ValueError` for a missing or repeated one, and unless given exactly once."""
    several = list(layer) if is_several(layer) else [layer]
    if expert is not None:
        if any(isinstance(one, str) or is_several(one) for one in several):
            raise ValueError(f"expert: got {expert} beside {in_words(layer)}, which names the experts already")
        return dict.fromkeys(layer_numbers(cfg, layer), expert_numbers(cfg, expert))
    pairs = [layer] if is_pair(layer) else several
    if not pairs or any(one is None or is_whole(one) for one in pairs):
        raise ValueError(
            f"experts: got layer={layer} and expert=None, expected layers and an expert, or both in one as 'L3E2'"
        )
    found: dict[int, list[int]] = {}
    for one in pairs:
        everywhere = isinstance(one, (list, tuple)) and len(one) == 2 and one[0] is None
        for each in [(i, one[1]) for i in range(cfg.n_layers)] if everywhere else [one]:
            i, number = pair_in("expert", each, (cfg.n_layers, cfg.num_experts or 0), "expert")
            found[i] = expert_numbers(cfg, [*found.get(i, []), number])
    return dict(sorted(found.items()))


def checked_positions(positions: Any) -> Positions:
    """Positions in usable form, numbers as a list. Raises `TypeError` for anything that cannot be positions."""
    if positions is None or (isinstance(positions, slice) and (positions.step or 1) > 0):
        return positions
    if is_tensor(positions) and positions.dtype == torch.bool and positions.ndim == 2:
        return positions
    try:
        numbers = whole_numbers("positions", positions)
    except TypeError:
        numbers = []
    if not numbers:
        got = in_words(positions)
        raise TypeError(f"positions: got {got}, expected ints, a forward slice, a boolean mask [batch, pos] or None")
    return numbers


def position_mask(positions: Positions, like: Tensor, hook: HookPoint) -> Bool[Tensor, "batch pos"]:
    """The mask over the first two axes of an activation that checked positions choose.

    In a plain run positions are columns. In `generate` they count within each text, padding excluded: negative ones
    from the end of the prompt, an open slice into the generated text, a mask over the prompt. Raises `ValueError` for
    a mask of another shape and, in a plain run, a position out of range.
    """
    (batch, pos), step = like.shape[:2], hook.generation
    if positions is None:
        return torch.ones(batch, pos, dtype=torch.bool, device=like.device)
    if step is None:
        index, length = torch.arange(pos).expand(batch, pos), torch.full((batch, 1), pos)
    else:
        index = step.positions[:, -pos:].cpu()  # `generate` computes the logits of the last column alone
        length = step.prompt_mask.sum(-1, keepdim=True).cpu().repeat_interleave(batch // len(step.prompt_mask), 0)
    if isinstance(positions, Tensor):
        expected = [batch, pos] if step is None else list(step.prompt_mask.shape)
        if list(positions.shape) != expected:
            raise ValueError(f"positions: got a mask of shape {list(positions.shape)}, expected {expected}")
        found = positions.cpu()
        if step is not None:
            found = torch.nn.functional.pad(found, (0, max(0, step.columns.stop - found.shape[1])))
            found = found.repeat_interleave(batch // len(found), 0)[:, step.columns.start : step.columns.stop][:, -pos:]
    elif isinstance(positions, slice):
        start = _counted(positions.start or 0, length).clamp(min=0)
        found = (index >= start) & ((index - start) % (positions.step or 1) == 0)
        found = found if positions.stop is None else found & (index < _counted(positions.stop, length))
    else:
        found = torch.zeros(batch, pos, dtype=torch.bool)
        shortest = int(length.min())
        for position in whole_numbers("positions", positions):
            if position < -shortest or (step is None and position >= shortest):
                where = f" in a run of {pos} positions" if step is None else f" in texts of at least {shortest} tokens"
                raise ValueError(f"positions: got {position}, expected {-shortest} to {shortest - 1}{where}")
            found |= index == _counted(position, length)
    return found.to(like.device)


def _counted(position: int, length: Tensor) -> Tensor:
    """One position in each row; a negative one counts from the end."""
    return length + position if position < 0 else torch.full_like(length, position)


def position_number(position: Any, length: int, what: str = "position") -> int:
    """One position of a run of `length` tokens, counted from 0."""
    return from_end(what, position, length, f" in a run of {length} positions")


def columns(mask: Bool[Tensor, "batch pos"], position: Any, first: int = 0) -> Int[Tensor, " batch"]:
    """The column of one token in each text, padding excluded: one number for all texts, or one for each.

    Raises `ValueError` for a position a text does not have, naming the text by its number from `first`.
    """
    numbers = [position] * len(mask) if not is_several(position) else position
    found = []
    for row, number in enumerate(numbers):
        real = mask[row].nonzero().flatten().tolist()
        where = f" in text {first + row}, which has {len(real)} tokens"
        found.append(real[from_end("position", number, len(real), where)])
    return torch.tensor(found, dtype=torch.long)
