"""Padding: every row of a batch gives what it gives alone, from text, ids, masks, embeddings and KV caches."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from tests.bridge.texts import tokenizer
from tests.support import cache_of, family, tokens, with_cache
from transformer_lens import GroupedCache, TransformerBridge
from transformer_lens.model_bridge import PrefixCache
from transformer_lens.model_bridge.calls.padding import not_padding
from transformer_lens.utilities import lm_cross_entropy_loss

PAD, BOS, EOS = range(3)
SHORT, LONG, MIDDLE = "John went", "the dog ran on the mat and sat", "Mary and John ran"
TEXTS = [SHORT, LONG, MIDDLE]

TOKENIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What the tokenizer is like, and what the config declares beside it.
    "pad": ({}, {}),
    "as Mixtral's": ({"without": ("pad_token",)}, {}),
    "as Falcon's": ({"without": ("pad_token", "bos_token")}, {"bos_token_id": EOS}),
    "pad is eos": ({"pad_token": "</s>"}, {}),
    "pad is bos": ({"pad_token": "<s>"}, {}),
}
MODELS = {
    "falcon 40b": ("40b", "sdpa"),
    "falcon 7b eager": ("7b", "eager"),
    "falcon alibi": ("rw", "sdpa"),
    "mixtral": ("mixtral", "sdpa"),
    "mixtral eager": ("mixtral", "eager"),
}
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}
"""float32: masked kernels and other batch sizes round differently."""


def made(model: str = "falcon 40b", words: str = "pad", **changes: Any) -> TransformerBridge:
    name, attn = MODELS[model]
    how, config = TOKENIZERS[words]
    special = {"pad_token_id": None, "bos_token_id": BOS, "eos_token_id": EOS, **config}
    return TransformerBridge(family(name, attn=attn, **special), tokenizer(**{**how, **changes}))


def alone(bridge: TransformerBridge, text: str) -> Tensor:
    """The bare model on one text without padding: [pos d_vocab]."""
    with torch.no_grad():
        logits: Tensor = bridge.original_model(bridge.to_tokens(text)).logits[0]
    return logits


def agree(found: Tensor, bridge: TransformerBridge, texts: list[str], side: str) -> None:
    for row, text in zip(found, texts, strict=True):
        wanted = alone(bridge, text)
        where = slice(-len(wanted), None) if side == "left" else slice(len(wanted))
        torch.testing.assert_close(row[where], wanted, **ROUNDING)


# -- ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("model", "words"), [*((model, "as Falcon's") for model in MODELS), *(("mixtral", words) for words in TOKENIZERS)]
)
@torch.no_grad()
def test_padded_ids_give_each_text_s_own_answer(model: str, words: str, side: str) -> None:
    bridge = made(model, words)
    ids = bridge.to_tokens(TEXTS, padding_side=side)
    foreign = ids.clone()  # nothing but the numbers
    for given in ({"input": ids}, {"input": ids, "padding_side": side}, {"input": foreign, "padding_side": side}):
        agree(bridge(**given), bridge, TEXTS, side)
    agree(bridge(TEXTS, padding_side=side), bridge, TEXTS, side)
    bridge.tokenizer.padding_side = side
    agree(bridge(foreign), bridge, TEXTS, side)
    agree(bridge(foreign[1:]), bridge, TEXTS[1:], side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("words", TOKENIZERS)
@torch.no_grad()
def test_the_loss_of_padded_ids(words: str, side: str) -> None:
    bridge = made(words=words)
    ids = bridge.to_tokens(TEXTS, padding_side=side)
    each = [bridge(text, return_type="loss", loss_per_token=True)[0] for text in TEXTS]
    for given in (ids, ids.clone()):
        found = bridge(given, return_type="loss", padding_side=side)
        torch.testing.assert_close(found, torch.cat(each).mean(), **ROUNDING)


@pytest.mark.parametrize(
    ("model", "words"), [("falcon 40b", "as Falcon's"), ("falcon alibi", "pad"), *(("mixtral", w) for w in TOKENIZERS)]
)
def test_generating_from_padded_ids(model: str, words: str) -> None:
    bridge = made(model, words)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    ids = bridge.to_tokens(TEXTS, padding_side="left")
    for given in (ids, ids.clone()):
        found = bridge.generate(given, **options)
        for row, text in zip(found, TEXTS, strict=True):
            wanted = bridge.original_model.generate(bridge.to_tokens(text), **options)[0]
            assert torch.equal(row[-len(wanted) :], wanted)
    behind = bridge.to_tokens(TEXTS, padding_side="right")
    for given in (behind, behind.clone()):
        with pytest.raises(ValueError, match="a prompt ends in padding"):
            bridge.generate(given, **options)


def test_a_pad_token_that_stands_in_no_text_is_padding_at_both_ends() -> None:
    bridge = made()
    rows = [bridge.to_tokens(text)[0].tolist() for text in TEXTS]
    both = torch.tensor([[PAD] * 3 + rows[0] + [PAD] * 5, [PAD] * 2 + rows[1], rows[2] + [PAD] * 6])
    assert bridge.input_and_mask(both).mask.sum(-1).tolist() == [3, 9, 5]
    logits = bridge(both)
    for row, start, text in zip(logits, (3, 2, 0), TEXTS, strict=True):
        wanted = alone(bridge, text)
        torch.testing.assert_close(row[start : start + len(wanted)], wanted, **ROUNDING)


L, R, LR = ("left",), ("right",), ("left", "right")
RULE: list[tuple[bool, tuple[str, ...], list[list[int]], list[list[int]]]] = [
    # in_texts, sides, ids (9 fills up), mask
    (False, L, [[9, 9, 1, 5]], [[0, 0, 1, 1]]),
    (False, L, [[5, 6, 9, 9]], [[1, 1, 0, 0]]),
    (False, R, [[5, 9, 6, 7]], [[1, 1, 1, 1]]),
    (False, R, [[9, 9, 9, 9]], [[0, 0, 0, 0]]),
    # One row has no padding, whatever it begins or ends with.
    (True, L, [[9, 9, 5, 6]], [[1, 1, 1, 1]]),
    (True, R, [[5, 6, 9, 9]], [[1, 1, 1, 1]]),
    # The longest text has none; what it begins or ends with, the others do as well.
    (True, L, [[9, 9, 9, 5], [9, 6, 7, 8]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
    (True, L, [[9, 9, 4, 5], [5, 6, 7, 8]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
    (True, R, [[5, 9, 9, 9], [6, 7, 8, 9]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
    (True, R, [[5, 6, 9, 9], [6, 7, 8, 5]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
    (True, R, [[9, 9, 5, 6], [6, 7, 8, 5]], [[1, 1, 1, 1], [1, 1, 1, 1]]),
    # A row of nothing else keeps one.
    (True, L, [[9, 9, 9, 9], [9, 6, 7, 8]], [[0, 0, 0, 1], [1, 1, 1, 1]]),
    (True, R, [[9, 9, 9, 9], [9, 6, 7, 8]], [[1, 0, 0, 0], [1, 1, 1, 1]]),
    (True, R, [[9], [6]], [[1], [1]]),
    (True, LR, [[9, 9, 9, 9], [9, 6, 7, 9], [9, 9, 7, 9]], [[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
    (True, LR, [[9, 9, 9, 9], [5, 6, 7, 8], [5, 6, 9, 9]], [[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 0, 0]]),
]


@pytest.mark.parametrize(("in_texts", "sides", "ids", "mask"), RULE)
def test_the_rule_for_ids(in_texts: bool, sides: tuple[str, ...], ids: list[list[int]], mask: list[list[int]]) -> None:
    assert not_padding(torch.tensor(ids), 9, in_texts, sides).long().tolist() == mask


def test_ids_of_to_tokens_keep_their_mask_until_they_are_written_to() -> None:
    bridge = made(words="as Mixtral's")
    texts = ["</s> </s> John", "Mary"]
    ids = bridge.to_tokens(texts, prepend_bos=False)
    assert ids.tolist()[0][:2] == [EOS, EOS]
    assert bridge.input_and_mask(ids, padding_side="left").mask.tolist() == [[True] * 3, [True, False, False]]
    assert bridge.input_and_mask(ids.clone(), padding_side="left").mask.tolist()[0] == [False, False, True]
    ids[1] = torch.tensor([5, 6, 7])
    assert bridge.input_and_mask(ids, padding_side="left").mask.tolist()[0] == [False, False, True]


def test_without_a_tokenizer_no_id_is_padding() -> None:
    bridge = TransformerBridge(family("40b", pad_token_id=0))
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 0]])
    assert torch.equal(bridge(ids), bridge.original_model(ids).logits)


# -- a pad token that ends texts ------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["as Mixtral's", "pad is eos"])
def test_a_real_end_token_stays_in_the_loss(words: str) -> None:
    bridge = made(words=words)
    text = torch.tensor([[BOS, 5, 6, 7, EOS]])
    several = torch.tensor([[BOS, 5, 6, 7, EOS], [BOS, 8, EOS, EOS, EOS]])
    for ids, real in ((text, [5]), (several, [5, 3])):
        logits = bridge.original_model(ids).logits.log_softmax(-1)
        each = [-logits[row, at - 1, ids[row, at]] for row, length in enumerate(real) for at in range(1, length)]
        torch.testing.assert_close(bridge(ids, return_type="loss"), torch.stack(each).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("words", ["as Falcon's", "pad is eos", "pad is bos"])
def test_one_row_that_begins_with_the_pad_token_is_no_padding(words: str) -> None:
    bridge = made(words=words, padding_side="left")
    ids = torch.tensor([[bridge.token_adapter.pad] * 2 + [5, 6, 7]])
    assert torch.equal(bridge(ids), bridge.original_model(ids).logits)


def test_a_loss_over_nothing_is_an_error() -> None:
    bridge = made()
    with pytest.raises(ValueError, match="loss: there is no token to predict"):
        bridge("Mary", return_type="loss", prepend_bos=False)
    with pytest.raises(ValueError, match="loss: the attention mask leaves no token to predict"):
        bridge(tokens(2, 4), return_type="loss", attention_mask=torch.tensor([[0, 0, 0, 1]] * 2))
    assert bridge("Mary", return_type="loss", loss_per_token=True, prepend_bos=False).shape == (1, 0)


def test_one_mask_for_every_text_of_a_loss() -> None:
    logits, ids, mask = torch.randn(3, 5, 61), tokens(3, 5), torch.tensor([[0, 1, 1, 1, 0]])
    counted = lm_cross_entropy_loss(logits[:, 1:4], ids[:, 1:4])
    torch.testing.assert_close(lm_cross_entropy_loss(logits, ids, mask), counted)
    torch.testing.assert_close(lm_cross_entropy_loss(logits, ids, mask.expand(3, 5).bool()), counted)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 5\], expected \[3, 5\]"):
        lm_cross_entropy_loss(logits, ids, mask.expand(2, 5))
    with pytest.raises(ValueError, match=r"loss: got logits \[3, 5, 61\] and tokens \[3, 4\]"):
        lm_cross_entropy_loss(logits, ids[:, 1:])


# -- caches ---------------------------------------------------------------------------------------------


def new_cache(kind: str, config: Any) -> Any:
    if kind == "static":
        return StaticCache(config=config, max_cache_len=24)
    return {"dynamic": DynamicCache, "of the config": lambda: DynamicCache(config=config)}.get(
        kind, lambda: GroupedCache(config)
    )()


CACHES = ("dynamic", "of the config", "grouped", "static")
FIRST, THEN = ["John", "the dog ran on the mat", "Mary and John"], ["went to", "and", "sat on the mat"]


def filled(bridge: TransformerBridge, kind: str, side: str) -> Any:
    cache = new_cache(kind, bridge.original_model.config)
    with torch.no_grad():
        bridge(FIRST, padding_side=side, past_key_values=cache, return_type=None)
    return cache


def go_on(bridge: TransformerBridge, cache: Any, order: list[int], firsts: list[str] = FIRST) -> None:
    """Continue in two steps; each row gives what its two texts give as one."""
    then = [THEN[row] for row in order]
    with torch.no_grad():
        found = bridge(then, prepend_bos=False, padding_side="right", past_key_values=cache)
        last = bridge(torch.tensor([[5]] * len(order)), past_key_values=cache)
    for place, row in enumerate(order):
        first, second = bridge.to_tokens(firsts[row]), bridge.to_tokens(THEN[row], prepend_bos=False)
        whole = torch.cat([first, second, torch.tensor([[5]])], 1)
        with torch.no_grad():
            wanted = bridge.original_model(whole).logits[0, first.shape[1] :]
        length = second.shape[1]
        torch.testing.assert_close(found[place, :length], wanted[:length], **ROUNDING)
        torch.testing.assert_close(last[place, 0], wanted[length], **ROUNDING)


@pytest.mark.core
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("model", MODELS)
def test_going_on_from_padded_prompts(model: str, kind: str, side: str) -> None:
    if (model, kind) == ("falcon alibi", "static"):
        return  # transformers itself fails: pinned in tests/inside/test_attention_cache.py
    bridge = made(model, "as Mixtral's")
    go_on(bridge, filled(bridge, kind, side), [0, 1, 2])


@pytest.mark.core
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("change", ["copy", "reorder", "select", "repeat"])
def test_a_cache_whose_rows_change_keeps_its_padding(change: str, kind: str, side: str) -> None:
    bridge = made("mixtral")
    cache = filled(bridge, kind, side)
    order = [0, 1, 2]
    if change == "copy":
        cache = copy.deepcopy(cache)
    elif change == "reorder":
        order = [2, 0, 1]
        cache.reorder_cache(torch.tensor(order))
    elif kind == "static":
        return  # transformers has no such method there
    elif change == "select":
        order = [2, 0]
        cache.batch_select_indices(torch.tensor(order))
    else:
        order = [0, 0, 1, 1, 2, 2]
        cache.batch_repeat_interleave(2)
    go_on(bridge, cache, order)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_cropped_cache_keeps_the_padding_it_still_has(kind: str, side: str) -> None:
    bridge = made("mixtral")
    if kind == "static" and not hasattr(StaticLayer, "crop"):
        return  # older releases of transformers cannot crop one
    cache = filled(bridge, kind, side)
    cache.crop(-2)
    firsts = ["John", "the dog ran on", "Mary and John"] if side == "right" else None
    if firsts is None:  # the last two tokens of every row are gone
        rows = [bridge.to_tokens(text)[0, :-2] for text in FIRST]
        with torch.no_grad():
            found = bridge(torch.tensor([[5]] * 3), past_key_values=cache)[1:]
        for row, logits in zip(rows[1:], found, strict=True):
            wanted = bridge.original_model(torch.cat([row, torch.tensor([5])])[None]).logits[0, -1]
            torch.testing.assert_close(logits[0], wanted, **ROUNDING)
    else:
        go_on(bridge, cache, [0, 1, 2], firsts)


def test_a_cache_of_a_sliding_window_knows_its_rows_by_what_it_still_holds() -> None:
    bridge = TransformerBridge(family("mixtral", sliding_window=4), tokenizer())
    cache = filled(bridge, "of the config", "left")
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    with torch.no_grad():
        found = bridge(torch.tensor([[5]] * 3), past_key_values=cache)
    for row, logits in zip([1, 2, 0], found, strict=True):
        whole = torch.cat([bridge.to_tokens(FIRST[row]), torch.tensor([[5]])], 1)
        torch.testing.assert_close(logits[0], bridge.original_model(whole).logits[0, -1], **ROUNDING)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefix_cache_takes_the_padding_along(side: str) -> None:
    bridge = made("falcon 40b")
    whole = filled(bridge, "dynamic", side)
    held = whole.get_seq_length()
    go_on(bridge, PrefixCache(whole, held), [0, 1, 2])
    stream = bridge.original_model.get_input_embeddings()(torch.tensor([[5], [6]] * 3))
    twice = bridge(stream, past_key_values=PrefixCache(whole, held, copies=2))
    once = bridge(torch.tensor([[5], [6], [5]]), past_key_values=PrefixCache(whole, held))
    torch.testing.assert_close(twice[:3], once, **ROUNDING)
    layer = bridge(stream, start_at_layer=1, past_key_values=PrefixCache(whole, held, copies=2, layer=1))
    plain = bridge(stream[:3], start_at_layer=1, past_key_values=PrefixCache(whole, held))
    torch.testing.assert_close(layer[:3], plain, **ROUNDING)


def test_a_given_mask_wins_over_what_a_cache_knows() -> None:
    bridge = made("falcon 40b")
    cache = filled(bridge, "dynamic", "left")
    held, new = cache.get_seq_length(), torch.tensor([[5]] * 3)
    everything = torch.ones(3, held + 1, dtype=torch.long)
    bare = bridge.original_model(new, attention_mask=everything, **with_cache(copy.deepcopy(cache))).logits
    assert torch.equal(bridge(new, attention_mask=everything, past_key_values=cache), bare)


@torch.no_grad()
def test_a_cache_that_was_filled_elsewhere_is_taken_as_transformers_takes_it() -> None:
    bridge = made("falcon 40b", padding_side="left")
    ids, new = bridge.to_tokens(FIRST), torch.tensor([[5]] * 3)
    cache = cache_of(bridge.original_model(ids))
    bare = bridge.original_model(new, **with_cache(copy.deepcopy(cache))).logits
    assert torch.equal(bridge(new, past_key_values=cache), bare)


@torch.no_grad()
def test_tokens_that_others_added_count_and_another_s_rows_are_refused() -> None:
    bridge = made("falcon 40b")
    cache = filled(bridge, "dynamic", "left")
    held, extra = cache.get_seq_length(), torch.tensor([[5]] * 3)
    mask = torch.cat([bridge.input_and_mask(FIRST, padding_side="left").mask, torch.ones(3, 2).bool()], 1).long()
    positions = mask[:, :-1].cumsum(-1)[:, -1:] - 1
    told = {"attention_mask": mask[:, :-1], "position_ids": positions}
    bridge.original_model(extra, **with_cache(cache), **told)
    fresh = copy.deepcopy(cache)
    torch.testing.assert_close(
        bridge(extra, past_key_values=cache), bridge(extra, attention_mask=mask, past_key_values=fresh)
    )
    other = filled(bridge, "dynamic", "left")
    for layer in other.layers:
        layer.keys = layer.keys.flip(2)
    for strange in (other, PrefixCache(other, held)):
        with pytest.raises(ValueError, match="this cache holds padded texts, and its rows are not those"):
            bridge(extra, past_key_values=strange)
    bridge(extra, past_key_values=other, attention_mask=mask[:, : held + 1])
    for kind in ("dynamic", "static", "grouped"):
        with pytest.raises(ValueError, match="got a cache of 3 texts, and 2 to go on with"):
            bridge(extra[:2], past_key_values=filled(bridge, kind, "left"))
    with pytest.raises(TypeError, match="past_key_values: got tuple, expected a transformers Cache"):
        bridge(extra, past_key_values=((torch.ones(3, 1, 1, 1),) * 2,))


@torch.no_grad()
def test_a_cache_that_is_used_again_forgets() -> None:
    bridge = made("falcon 40b")
    ids = tokens(3, 5)
    for kind in ("dynamic", "static"):
        cache = filled(bridge, kind, "left")
        cache.reset()
        bridge(ids[:, :4], past_key_values=cache)
        rest = bridge(ids[:, 4:], past_key_values=cache)
        torch.testing.assert_close(rest, bridge.original_model(ids).logits[:, 4:], **ROUNDING)


@torch.no_grad()
def test_masks_that_are_written_to_later_change_nothing() -> None:
    bridge = made("falcon 40b")
    ids, mask, cache = tokens(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool(), DynamicCache()
    wanted = bridge(ids, attention_mask=mask)[:, 4:]
    bridge(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    mask.fill_(True)
    torch.testing.assert_close(bridge(ids[:, 4:], past_key_values=cache), wanted, **ROUNDING)
    padded = bridge.to_tokens(TEXTS, padding_side="left")
    bridge.input_and_mask(padded).mask.fill_(True)
    assert not bridge.input_and_mask(padded).mask.all()


def test_nothing_is_kept_in_a_cache_without_padding() -> None:
    bridge = made("falcon 40b")
    cache, before = DynamicCache(), set(vars(DynamicCache()))
    bridge(tokens(2, 5), past_key_values=cache)
    assert set(vars(cache)) == before


@pytest.mark.core
@pytest.mark.parametrize("pad", [PAD, None], ids=["pad", "pad is eos"])
@pytest.mark.parametrize("model", ["falcon 40b", "falcon alibi", "mixtral"])
def test_going_on_after_a_generation(model: str, pad: int | None) -> None:
    """One text ends before the others; what fills its row up is no part of it."""
    bridge = made(model)
    options = {"do_sample": True, "temperature": 9.0, "pad_token_id": pad, "suppress_tokens": [PAD]}
    prompts, cache = bridge.to_tokens(FIRST, padding_side="left"), DynamicCache()
    torch.manual_seed(5)
    plain = bridge.generate(prompts, 5, eos_token_id=None, **options)[:, -5:]
    stop = int(plain[0, 1])
    assert stop not in plain[1:]  # else another seed
    torch.manual_seed(5)
    pad = stop if pad is None else pad
    new = bridge.generate(prompts, 5, **{**options, "eos_token_id": stop, "pad_token_id": pad}, past_key_values=cache)
    new = new[:, -5:]
    assert new[0].tolist() == [*plain[0, :2].tolist(), pad, pad, pad]
    with torch.no_grad():
        found = bridge(torch.tensor([[5]] * 3), past_key_values=cache)
    for row, text in enumerate(FIRST):
        written = new[row, :-1] if row else new[row, :2]  # the last one has not been read
        whole = torch.cat([bridge.to_tokens(text)[0], written, torch.tensor([5])])
        torch.testing.assert_close(found[row, 0], bridge.original_model(whole[None]).logits[0, -1], **ROUNDING)


def test_generating_from_a_cache_of_padded_prompts() -> None:
    bridge = made("falcon 40b")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    first, then = (
        bridge.to_tokens(FIRST, padding_side="right"),
        bridge.to_tokens(["went to", "and the", "sat on"], False),
    )
    whole = torch.cat([first, then], 1)
    found = bridge.generate(whole, past_key_values=filled(bridge, "dynamic", "right"), **options)[:, -4:]
    mask = torch.cat([bridge.input_and_mask(FIRST, padding_side="right").mask.long(), torch.ones_like(then)], 1)
    given = bridge.generate(then, past_key_values=filled(bridge, "dynamic", "right"), attention_mask=mask, **options)
    for row, text in enumerate(FIRST):
        alone = torch.cat([bridge.to_tokens(text), then[row : row + 1]], 1)
        wanted = bridge.original_model.generate(alone, **options)[0, -4:]
        assert torch.equal(found[row], wanted) and torch.equal(given[row, -4:], wanted)
    with pytest.raises(ValueError, match="got 2 tokens and a KV cache of 7, expected the whole text"):
        bridge.generate(then, past_key_values=filled(bridge, "dynamic", "right"), **options)


# -- masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_a_hole_hides_a_token_and_moves_none(model: str) -> None:
    bridge = made(model)
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 1, 0]])
    bare = bridge.original_model(ids, attention_mask=mask).logits
    assert torch.equal(bridge(ids, attention_mask=mask), bare)
    # Behind padding on the left it is the same text.
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), mask], 1)
    found = bridge(torch.cat([tokens(2, 2), ids], 1), attention_mask=padded)[:, 2:]
    torch.testing.assert_close(found[mask.bool()], bare[mask.bool()], **ROUNDING)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("model", ["falcon 40b", "falcon alibi", "mixtral"])
@torch.no_grad()
def test_going_on_with_a_given_mask_is_the_whole_run(model: str, cut: int) -> None:
    bridge = made(model)
    ids = tokens(3, 6)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    whole, cache = bridge(ids, attention_mask=mask), DynamicCache()
    first = bridge(ids[:, :cut], attention_mask=mask[:, :cut], past_key_values=cache)
    known = copy.deepcopy(cache)
    rest = bridge(ids[:, cut:], attention_mask=mask, past_key_values=cache)
    real = mask.bool()
    torch.testing.assert_close(torch.cat([first, rest], 1)[real], whole[real], **ROUNDING)
    if cut == 5:  # the cache knows what was hidden
        torch.testing.assert_close(bridge(ids[:, cut:], past_key_values=known), rest, **ROUNDING)


def test_the_cache_of_a_generation_counts_as_the_generation_did() -> None:
    bridge = made("falcon 40b")
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    name = "blocks.1.hook_resid_post"
    longer = bridge.generate(ids, 3, **options)
    for cached in (True, False):
        found, cache = bridge.generate(
            ids, 2, return_cache=True, names_filter=name, use_past_kv_cache=cached, **options
        )
        assert torch.equal(found, longer[:, :-1])
        logits = bridge(cache[name][:, -1:], start_at_layer=bridge.cfg.n_layers)
        assert torch.equal(logits[:, -1].argmax(-1), longer[:, -1])


@torch.no_grad()
def test_kinds_of_masks_are_one() -> None:
    bridge = made()
    ids, mask = tokens(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    wanted = bridge(ids, attention_mask=mask)
    for same in (mask.bool(), mask.float(), mask.int()):
        assert torch.equal(bridge(ids, attention_mask=same), wanted)
    embedded = bridge.original_model.get_input_embeddings()(ids)
    torch.testing.assert_close(bridge(embedded, attention_mask=mask), wanted, **ROUNDING)


WRONG_MASKS: list[tuple[Any, type[Exception], str]] = [
    (torch.ones(2, 4), ValueError, r"attention_mask: got shape \[2, 4\], expected \[2, 5\]: one row per text, one col"),
    (torch.ones(2, 6), ValueError, r"attention_mask: got shape \[2, 6\], expected \[2, 5\]: one row per text, one col"),
    (torch.ones(1, 5), ValueError, r"attention_mask: got shape \[1, 5\], expected \[2, 5\]"),
    (torch.ones(5), ValueError, r"attention_mask: got shape \[5\], expected \[2, 5\]"),
    (torch.ones(2, 1, 5, 5), ValueError, r"attention_mask: got shape \[2, 1, 5, 5\], expected \[2, 5\]"),
    (torch.full((2, 5), 2), ValueError, "attention_mask: got other numbers than 0 and 1"),
    (torch.full((2, 5), -1e9), ValueError, "attention_mask: got other numbers than 0 and 1"),
    ([[1] * 5] * 2, TypeError, r"attention_mask: got .*, expected a tensor \[2, 5\] of ones and zeros"),
]


@pytest.mark.parametrize(("mask", "error", "message"), WRONG_MASKS)
def test_what_is_no_mask_is_refused_everywhere(mask: Any, error: type[Exception], message: str) -> None:
    bridge = made()
    ids = tokens(2, 5)
    for run in (bridge, bridge.run_with_cache, bridge.input_and_mask, bridge.generate, bridge.generate_stream):
        with pytest.raises(error, match=message):
            run(ids, attention_mask=mask)


def test_rows_that_are_all_masked_leave_the_others_as_they_are() -> None:
    bridge = made()
    ids, mask = tokens(2, 5), torch.tensor([[0] * 5, [1] * 5])
    loss = bridge(ids, attention_mask=mask, return_type="loss")
    torch.testing.assert_close(loss, bridge(ids[1:], return_type="loss"), **ROUNDING)
    with pytest.raises(ValueError, match="a prompt ends in padding"):
        bridge.generate(ids, attention_mask=mask)


# -- too long -------------------------------------------------------------------------------------------


def test_text_beyond_the_context_is_cut_once_aloud() -> None:
    bridge = TransformerBridge(family("40b", max_position_embeddings=4), tokenizer())
    with pytest.warns(UserWarning, match=r"text is cut to its first 4 tokens, cfg.n_ctx, of 9; .*truncate=False"):
        assert bridge(LONG).shape[1] == 4
    assert bridge.to_tokens(TEXTS).shape[1] == 4  # said once
    assert bridge(bridge.to_tokens(LONG, truncate=False)).shape[1] == 9
    assert bridge.generate(LONG, max_new_tokens=1, return_type="tokens").shape[1] == 10
