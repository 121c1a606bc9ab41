"""One key and value per group: bitwise what transformers computes, in as little memory as the groups need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, OPTConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tests.support import LAYOUTS, VOCAB, cache_of, falcon, falcon_config, family, mixtral, tokens, with_cache
from transformer_lens import GroupedCache, TransformerBridge
from transformer_lens.model_bridge.calls import caches
from transformer_lens.model_bridge.calls.caches import GroupedLayer

pytestmark = pytest.mark.core

NEW = {"new_decoder_architecture": True}
GROUPED: dict[str, dict[str, Any]] = {
    "40b": LAYOUTS["40b"],
    "11b": LAYOUTS["11b"],
    "one group": {**NEW, "num_kv_heads": 1},
    "alibi": {**NEW, "num_kv_heads": 2, "alibi": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
    "prompt look-up": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


def held_bytes(cache: Any) -> int:
    """What the tensors of a cache really hold in memory."""
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def generated(model: Any, ids: Tensor, cache: Any, **options: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(
        ids,
        **with_cache(cache),
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **{"max_new_tokens": 10, **options},
    )


def assert_same(model: Any, ids: Tensor, **options: Any) -> Any:
    """Tokens and every logit are those with transformers' own cache; returns ours."""
    ours = GroupedCache(model.config)
    found = generated(model, ids, ours, **options)
    wanted = generated(model, ids, DynamicCache(config=model.config), **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(found.logits) == len(wanted.logits)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert torch.equal(one, other)
    assert cache_of(found) is ours
    return ours


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.filterwarnings("ignore:Falcon with ALiBi under eager")
def test_tokens_and_logits_are_bitwise_those_of_transformers(layout: str, attn: str, options: str) -> None:
    model = falcon(attn, **GROUPED[layout])
    ids = tokens(1 if "look-up" in options else 2, 9)
    cache = assert_same(model, ids, **OPTIONS[options])
    assert cache.layers[0].keys.shape[1] == model.config.num_kv_heads


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixtral"])
def test_every_layout_in_half_precision(layout: str) -> None:
    assert_same(family(layout, dtype=torch.bfloat16), tokens(2, 9), do_sample=False)


@pytest.mark.parametrize("options", ["greedy", "beams"])
def test_left_padding(options: str) -> None:
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :1] = 0
    assert_same(falcon(**LAYOUTS["40b"]), ids, attention_mask=mask, **OPTIONS[options])


def test_a_long_prompt() -> None:
    model = falcon(**LAYOUTS["40b"], max_position_embeddings=2048)
    assert_same(model, tokens(1, 1030), do_sample=False, max_new_tokens=3)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.filterwarnings("ignore:Falcon with ALiBi under eager")
def test_chunks_of_any_size(layout: str, attn: str) -> None:
    model, ids = falcon(attn, **GROUPED[layout]), tokens(2, 12)
    ours, theirs = GroupedCache(model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for start, end in ((0, 5), (5, 8), (8, 9), (9, 12)):
            found = model(ids[:, start:end], **with_cache(ours)).logits
            assert torch.equal(found, model(ids[:, start:end], **with_cache(theirs)).logits)
            assert ours.get_seq_length() == theirs.get_seq_length() == end


def test_assisted_decoding_crops_it() -> None:
    """The assistant guesses wrongly nearly always, so keys are taken back at every step."""
    model, assistant, ids = falcon(**LAYOUTS["40b"]), falcon(**LAYOUTS["40b"]), tokens(1, 9)
    assistant.generation_config.eos_token_id = None
    cropped: list[int] = []

    class Watched(GroupedCache):
        def crop(self, *args: Any) -> None:
            cropped.append(self.get_seq_length())
            super().crop(*args)

    plain = generated(model, ids, DynamicCache(config=model.config), do_sample=False)
    found = generated(model, ids, Watched(model.config), do_sample=False, assistant_model=assistant)
    assert torch.equal(found.sequences, plain.sequences)
    assert_same(model, ids, do_sample=False, assistant_model=assistant)
    assert len(cropped) > 3


# What a cache is told to do between forwards; `crop` takes a negative number in every release.
CHANGES = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "crop": lambda cache: cache.crop(-2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_forwards(change: str) -> None:
    model, ids = falcon(**LAYOUTS["40b"]), tokens(3, 7)
    ours, theirs = GroupedCache(model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for cache in (ours, theirs):
            model(ids, **with_cache(cache))
            CHANGES[change](cache)
        rows = len(theirs.layers[0].keys)
        assert ours.get_seq_length() == theirs.get_seq_length()
        more = tokens(rows, 2)
        found = model(more, **with_cache(ours)).logits
        assert torch.equal(found, model(more, **with_cache(theirs)).logits)


@pytest.mark.parametrize(("heads", "groups", "times"), [(128, 8, 16), (232, 8, 29), (8, 1, 8), (8, 2, 4)])
def test_the_memory_really_held(heads: int, groups: int, times: int) -> None:
    """The heads of 40B (16 times) and 180B (29 times), narrow ones."""
    sizes = {"hidden_size": 4 * heads, "num_attention_heads": heads, "num_kv_heads": groups}
    model, ids = falcon(**NEW, **sizes), tokens(2, 9)
    ours, theirs = GroupedCache(model.config), DynamicCache(config=model.config)
    for cache in (ours, theirs):
        generated(model, ids, cache, do_sample=False)
    # batch 2, 9 + 9 positions, d_head 4, float32, keys and values, 2 layers
    assert held_bytes(ours) == 2 * groups * 18 * 4 * 4 * 2 * 2
    assert held_bytes(theirs) == times * held_bytes(ours)
    assert ours.saves


@pytest.mark.parametrize("layout", ["7b", "rw", "rw-rope", "mixtral"])
def test_where_nothing_is_held_twice_the_layers_are_transformers_own(layout: str) -> None:
    model = family(layout)
    cache = GroupedCache(model.config)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2 and not cache.saves
    assert_same(model, tokens(2, 9), do_sample=False)


def test_a_sliding_window_stays_one() -> None:
    model = mixtral(sliding_window=6)
    cache = assert_same(model, tokens(2, 9), do_sample=False)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer] * 2
    assert cache.layers[0].keys.shape[-2] == 5


def test_as_many_groups_as_heads() -> None:
    model = falcon(**NEW, num_kv_heads=8)
    assert not GroupedCache(model.config).saves
    assert_same(model, tokens(2, 9), do_sample=False)


def test_gradients_through_the_cache() -> None:
    """A later chunk's loss reaches the shared key once for each head that read it."""
    model, ids = falcon(dtype=torch.float64, **LAYOUTS["40b"]), tokens(2, 8)
    gradients = []
    for cache in (GroupedCache(model.config), DynamicCache(config=model.config)):
        model.zero_grad()
        model(ids[:, :5], **with_cache(cache))
        model(ids[:, 5:], **with_cache(cache)).logits.pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


HEADS = ("blocks.0.hook_k_input", "blocks.1.hook_v_input")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.filterwarnings("ignore:Falcon with ALiBi under eager")
def test_an_edit_of_one_head_is_not_lost(layout: str, attn: str) -> None:
    """The key and value that one query head reads, edited while decoding: as with transformers' cache."""
    model, ids = falcon(attn, **GROUPED[layout]), tokens(2, 8)
    bridge = TransformerBridge(model)

    def push(stream: Tensor, hook: Any) -> None:
        stream[:, :, 5, :7] += 3.0

    chunks = ((0, 4), (4, 6), (6, 7), (7, 8))
    found: dict[type, list[Tensor]] = {}
    with torch.no_grad():
        for kind in (GroupedCache, DynamicCache):
            cache, plain = kind(config=model.config), kind(config=model.config)
            edited = [
                bridge.run_with_hooks(
                    ids[:, start:end], past_key_values=cache, fwd_hooks=[(name, push) for name in HEADS]
                )
                for start, end in chunks
            ]
            unedited = [bridge(ids[:, start:end], past_key_values=plain) for start, end in chunks]
            found[kind] = edited
            for one, other in zip(edited, unedited, strict=True):
                assert (one - other).abs().max() > 1e-2
    for one, other in zip(found[GroupedCache], found[DynamicCache], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", GROUPED)
@pytest.mark.parametrize("hooked", [(0, 2), (1, 3), (0, 1, 2, 3)])
@pytest.mark.filterwarnings("ignore:Falcon with ALiBi under eager")
def test_hooks_inside_work_on_it(layout: str, hooked: tuple[int, ...]) -> None:
    """Chunks with hooks inside attention and chunks without, on one cache; bitwise under eager attention."""
    model, ids = falcon("eager", **GROUPED[layout]), tokens(2, 8)
    bridge, name = TransformerBridge(model), "blocks.{}.attn.hook_pattern"
    neutral = [(name.format(i), lambda pattern, hook: None) for i in range(2)]
    with torch.no_grad():
        for kind in (GroupedCache, DynamicCache):
            plain, written, looked = (kind(config=model.config) for _ in range(3))
            _, whole = bridge.run_with_cache(ids, names_filter=name.format(1))
            for number, (start, end) in enumerate(((0, 4), (4, 6), (6, 7), (7, 8))):
                bare = bridge(ids[:, start:end], past_key_values=plain)
                hooks = neutral if number in hooked else []
                assert torch.equal(
                    bridge.run_with_hooks(ids[:, start:end], past_key_values=written, fwd_hooks=hooks), bare
                )
                logits, seen = bridge.run_with_cache(
                    ids[:, start:end], past_key_values=looked, names_filter=name.format(1)
                )
                assert torch.equal(logits, bare)
                wanted = whole["pattern", 1][:, :, start:end, :end]
                torch.testing.assert_close(seen["pattern", 1], wanted, rtol=1e-4, atol=1e-6)


# -- refusals ----------------------------------------------------------------------------------------


def test_keys_that_differ_within_a_group_are_refused() -> None:
    layer, keys = GroupedLayer(groups=2), torch.randn(1, 6, 3, 4)
    shared = keys[:, ::3].repeat_interleave(3, dim=1)
    with pytest.raises(ValueError, match="the keys of 6 heads differ within their 2 groups"):
        layer.update(keys, shared)
    with pytest.raises(ValueError, match="the values of 6 heads differ within their 2 groups"):
        layer.update(shared, keys)
    assert not layer.is_initialized
    found, _ = layer.update(shared, shared)
    assert torch.equal(found, shared)


def test_heads_that_do_not_fall_into_the_groups_are_kept_as_they_are() -> None:
    """A part of a sharded model may hold fewer heads than the whole model has groups."""
    layer, keys, values = GroupedLayer(groups=8), torch.randn(1, 5, 3, 4), torch.randn(1, 5, 3, 4)
    for _ in range(2):
        found = layer.update(keys, values)
    assert torch.equal(found[0], torch.cat([keys, keys], 2)) and torch.equal(found[1], torch.cat([values, values], 2))


def test_what_a_hook_made_nan_is_shared_too() -> None:
    shared = torch.full((1, 6, 3, 4), torch.nan)
    found, _ = GroupedLayer(groups=2).update(shared, shared)
    assert found.isnan().all()


@pytest.mark.parametrize("few", [0, caches.FEW], ids=["repeated", "selected"])
@pytest.mark.parametrize("pos", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_it_returns_lies_in_memory_as_transformers_does(
    groups: int, pos: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that follow choose by strides."""
    monkeypatch.setattr(caches, "FEW", few)
    ours, theirs = GroupedLayer(groups), DynamicLayer()
    for _ in range(2):
        # As `FalconAttention` hands values over: heads behind positions in memory.
        states = torch.randn(2, pos, groups, 1, 4).expand(2, pos, groups, 6 // groups, 4).flatten(2, 3).transpose(1, 2)
        for one, other in zip(ours.update(states, states), theirs.update(states, states), strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()


def test_an_empty_batch() -> None:
    nothing = torch.zeros(0, 6, 3, 4)
    found, _ = GroupedLayer(groups=2).update(nothing, nothing)
    assert found.shape == (0, 6, 3, 4)


def test_a_family_that_is_not_supported_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type 'opt' is not supported"):
        GroupedCache(OPTConfig())


def test_the_layers_are_there_from_the_config_alone() -> None:
    cache = GroupedCache(falcon_config(**LAYOUTS["40b"], num_hidden_layers=3, vocab_size=VOCAB))
    assert len(cache) == 3 and cache.get_seq_length() == 0
