"""Checks on texts as users have them: generated ones, whose steps are counted, and texts padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from transformer_lens.hook_point import HookPoint
from transformer_lens.model_bridge.peft_layers import inner_model
from transformer_lens.model_bridge.upstream import MASK
from transformer_lens.model_bridge.verification.evidence import Evidence, Looking, largest_difference
from transformer_lens.model_bridge.verification.report import CheckResult
from transformer_lens.model_bridge.verification.values import compared

NEW_TOKENS = 3
PADDING = 2
"""Columns of padding in front of every text but the first."""

Reading = tuple[int, bool, list[int], list[list[int]]]
"""Of one forward of a generation: its number, whether it reads the prompt, its columns, the positions of its tokens."""


def left_padded(ids: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor, list[int]]:
    """Ids and mask of texts of the same width, all but the first behind padding; and how much each has.

    >>> left_padded(torch.tensor([[5, 6, 7], [8, 9, 1]]))[0]
    tensor([[5, 6, 7],
            [0, 0, 8]])

    A single text is padded, and a text keeps one token at least.
    """
    width = ids.shape[1]
    padding = [min(PADDING, width - 1) if row or len(ids) == 1 else 0 for row in range(len(ids))]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, before in enumerate(padding):
        padded[row, before:] = ids[row, : width - before]
        mask[row, before:] = 1
    return padded, mask, padding


def left_padding(e: Evidence) -> Iterator[CheckResult]:
    """What a padded text shows behind its padding is what it shows alone; every layer starts from the same stream.

    Where rounding decides which experts a token gets, what they compute is another thing: such a token is left out of
    what follows the choice.
    """
    ids, mask, padding = left_padded(e.tokens)
    streams = {stage: _moved(e.own_input(stage), padding) for stage in e.stages}
    with e.forced(streams, {}):
        _, found = e.everything(ids, attention_mask=mask)
    for row, before in enumerate(padding):
        places = slice(before, None), slice(0, ids.shape[1] - before)
        other = _chose_others(e, found, row, places)
        for name, value in e.cache.items():
            got, expected = (_of_row(e, name, x, row, at) for x, at in zip((found[name], value), places, strict=True))
            if name in other:
                got, expected = got[~other[name]], expected[~other[name]]
            note = f"text {row}, behind {before} columns of padding, and by itself"
            yield compared("left padding", name, got, expected, e.rounding, note)


def _moved(stream: Tensor, padding: Sequence[int]) -> Tensor:
    """Every text behind its padding."""
    return torch.stack([text.roll(before, 0) for text, before in zip(stream, padding, strict=True)])


def _of_row(e: Evidence, name: str, value: Tensor, row: int, places: slice) -> Tensor:
    """One text's part of a hook's value, at some of its positions. Learned positions may have one row for all texts."""
    axes = e.bridge.hook_dict[name].axes.split()[1:]
    index = [places if axis in ("pos", "query_pos", "key_pos") else slice(None) for axis in axes]
    return value[min(row, len(value) - 1)][tuple(index)]


def _chose_others(e: Evidence, found: Mapping[str, Tensor], row: int, places: tuple[slice, slice]) -> dict[str, Tensor]:
    """By the hooks that follow a choice of experts: the positions where it was another one."""
    other: dict[str, Tensor] = {}
    for name in [name for name in e.cache if name.endswith("mlp.hook_expert_indices")]:
        got, expected = (_of_row(e, name, x[name], row, at) for x, at in zip((found, e.cache), places, strict=True))
        block = name.removesuffix(".mlp.hook_expert_indices")
        following = [n for n in e.cache if n.startswith(f"{block}.mlp.") and not n.endswith(("hook_in", "_logits"))]
        for hook in (*following, f"{block}.hook_mlp_out", f"{block}.hook_resid_post"):
            other[hook] = (got != expected).any(-1)
    return other


# -- generating --------------------------------------------------------------------------------------


def generation(e: Evidence) -> Iterator[CheckResult]:
    """The tokens are those of Hugging Face's `generate`; hooks are told what each forward reads of the text."""
    width = max(1, e.tokens.shape[1] - NEW_TOKENS + 1)
    ids, mask, padding = left_padded(e.tokens[:, :width])
    config = GenerationConfig(max_new_tokens=e.tokens.shape[1] - width + 1, do_sample=False, pad_token_id=0)
    named = e.bridge.arguments.named({MASK: mask})
    with e.bare() as model:
        own = inner_model(model)[1].generate(ids, **named, generation_config=config)  # type: ignore[operator]
    read = Looking(_reading)
    names = [name for name in e.cache if name in e.ports]
    got = e.bridge.generate(
        ids, fwd_hooks=[(names, read)], return_type="tokens", attention_mask=mask, generation_config=config
    )
    wrong = largest_difference(got, own)
    yield CheckResult("generation", "", "", wrong, 0.0, "tokens", note="the tokens of the model's own generate")
    expected = [_expected(forward, width, padding) for forward in range(own.shape[1] - width)]
    for name in names:
        note = _first_difference(read.found[name], expected)
        reason = "forwards whose hook.generation differs from counting"
        yield CheckResult("generation", name.rpartition(".")[0], name, float(bool(note)), 0.0, reason, note=note)


def _reading(tensor: Tensor, hook: HookPoint) -> Reading | None:
    step = hook.generation
    return None if step is None else (step.step, step.is_prompt, list(step.columns), step.positions.tolist())


def _expected(forward: int, width: int, padding: Sequence[int]) -> Reading:
    """The first forward reads the prompt, each further one the token that the one before it chose."""
    if not forward:
        return 0, True, list(range(width)), [[-1] * before + list(range(width - before)) for before in padding]
    column = width + forward - 1
    return forward, False, [column], [[column - before] for before in padding]


def _first_difference(got: Sequence[Reading | None], expected: Sequence[Reading]) -> str:
    """In words; "" where there is none."""
    if len(got) != len(expected):
        return f"it fired {len(got)} times in {len(expected)} forwards"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a != b:
            return f"forward {number}: hook.generation says {_words(a)}, expected {_words(b)}"
    return ""


def _words(reading: Reading | None) -> str:
    if reading is None:
        return "nothing"
    step, is_prompt, columns, positions = reading
    return f"step {step}, {'prompt' if is_prompt else 'continuation'}, columns {columns}, positions {positions}"
