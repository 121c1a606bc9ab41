"""Text generated over remote blocks is, bit for bit, what the model in this process generates; also with losses."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.distributed.conftest import Pair, make_pair
from tests.support import FAMILIES, cache_of, family, with_cache
from transformer_lens import GroupedCache, HookPoint
from transformer_lens.distributed import Edit, Keep, LocalSpan, SpanError

PROMPT = "When Mary and John went to the store, John gave a drink to"


def outputs(pair: Pair, **options: Any) -> list[Any]:
    """Ids and scores of both models; beams' scores hold their whole way."""
    found = []
    for bridge in pair:
        torch.manual_seed(1)
        found.append(
            bridge.original_model.generate(
                pair.tokens, max_new_tokens=6, output_scores=True, return_dict_in_generate=True, **options
            )
        )
    return found


def same_text(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.scores, other.scores, strict=True))


@pytest.mark.core
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "sampled", "beams", "sampled beams", "no cache"],
)
def test_tokens_and_scores(pair: Pair, options: dict[str, Any]) -> None:
    remote, local = outputs(pair, **options)
    same_text(remote, local)
    assert remote.sequences.shape[1] > pair.tokens.shape[1] + 1


def test_a_step_sends_the_new_positions_alone(pair: Pair) -> None:
    outputs(pair, do_sample=False)
    for span in pair.spans:
        sizes = [len(message) for message in span.sent if len(message) > 400]
        assert len(sizes) == 6
        assert max(sizes[1:]) < sizes[0] / 3


@pytest.mark.core
def test_texts_of_several_lengths_hooks_and_captures(pair: Pair) -> None:
    texts = [PROMPT, "Mary and"]
    hooks = [
        ("blocks.1.attn.hook_z", Edit("scale", 0.5, heads=[1])),
        ("blocks.0.hook_mlp_out", Edit("add", 0.01, positions=[-1]), "continuation"),
    ]
    found = [
        bridge.generate(texts, max_new_tokens=5, do_sample=False, fwd_hooks=hooks, return_cache=True) for bridge in pair
    ]
    assert found[0][0] == found[1][0]
    assert list(found[0][1]) == list(found[1][1])
    assert [name for name in found[1][1] if not torch.equal(found[0][1][name], found[1][1][name])] == []


def test_what_is_kept_is_of_the_last_step(pair: Pair) -> None:
    kept = []
    for bridge in pair:
        pattern = Keep()
        bridge.generate(PROMPT, 4, do_sample=False, fwd_hooks=[("blocks.1.attn.hook_pattern", pattern)])
        kept.append(pattern.value)
    assert torch.equal(*kept)
    assert kept[0].shape[2] == 1


def test_a_function_at_an_edge_during_generation(pair: Pair) -> None:
    def louder(tensor: Tensor, hook: HookPoint) -> Tensor:
        return tensor * 1.05

    for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"):
        caches = [
            bridge.generate(PROMPT, 4, do_sample=False, fwd_hooks=[(name, louder)], return_cache=True)[1]
            for bridge in pair
        ]
        last = f"blocks.{pair.local.cfg.n_layers - 1}.hook_resid_post"
        assert torch.equal(caches[0][last], caches[1][last])


def test_a_function_that_comes_late_is_refused() -> None:
    pair = make_pair("tiny-falcon", (2,), shipped="tiny-falcon")
    hook = ("blocks.1.hook_resid_pre", lambda tensor, hook: tensor, "continuation")
    with pytest.raises(
        ValueError, match=r"were not called by themselves for the first 15 positions.*before the prompt"
    ):
        pair.remote.generate(PROMPT, 4, do_sample=False, fwd_hooks=[hook])


@pytest.mark.core
@pytest.mark.parametrize("layout", FAMILIES)
def test_every_layout(layout: str, tmp_path) -> None:
    torch.manual_seed(6)
    family(layout, num_hidden_layers=3).save_pretrained(tmp_path)
    pair = make_pair(str(tmp_path), (1,))
    pair.tokens = pair.tokens % 50 + 5
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    same_text(*outputs(pair, do_sample=False, attention_mask=mask, pad_token_id=0))
    same_text(*outputs(pair, do_sample=False, num_beams=2, pad_token_id=0))


def test_a_grouped_cache_may_come_empty(pair: Pair) -> None:
    found = []
    for bridge in pair:
        cache = GroupedCache(bridge.original_model.config)
        found.append(
            bridge.original_model.generate(pair.tokens, max_new_tokens=4, **with_cache(cache), do_sample=False)
        )
        assert cache.get_seq_length() == pair.tokens.shape[1] + 3
    assert torch.equal(*found)


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lost_after", range(6))
def test_a_server_that_lost_everything_is_told_again(pair: Pair, lost_after: int, beams: int) -> None:
    expected = outputs(pair, do_sample=False, num_beams=beams)[1]
    pair.calls()
    span = pair.spans[-1]
    send, steps = span.send, [0]

    def losing(message: bytes, timeout: float | None = None) -> bytes:
        if b"step" in message[:200]:
            if steps[0] == lost_after:
                span.server.sessions.of_peer.clear()
            steps[0] += 1
        return send(message)

    span.send = losing
    try:
        remote = pair.remote.original_model.generate(
            pair.tokens,
            max_new_tokens=6,
            output_scores=True,
            return_dict_in_generate=True,
            do_sample=False,
            num_beams=beams,
        )
    finally:
        del span.send
    same_text(remote, expected)
    # The one that was refused, all before it once more, and itself again.
    assert steps[0] == 6 + (lost_after + 1 if lost_after else 0)


def test_another_server_takes_over_in_the_middle() -> None:
    pair = make_pair("tiny-falcon", (2,), shipped="tiny-falcon")
    expected = outputs(pair, do_sample=False)[1]
    cache, ids = DynamicCache(), pair.tokens
    with torch.no_grad():
        logits = pair.remote.original_model(ids, **with_cache(cache)).logits[:, -1:]
        for _ in range(2):
            logits = pair.remote.original_model(logits.argmax(-1), **with_cache(cache)).logits[:, -1:]
        first = pair.spans[0]
        first.span.close()
        pair.remote.original_model.config.max_retries = 0
        with pytest.raises(SpanError, match=r"step of blocks 0 to 2: given up .* was closed"):
            pair.remote.original_model(logits.argmax(-1), **with_cache(cache))
        assert cache.get_seq_length() == 11
        first.span = LocalSpan("tiny-falcon", range(0, 2))
        logits = pair.remote.original_model(logits.argmax(-1), **with_cache(cache)).logits[:, -1:]
    assert cache.get_seq_length() == 12
    assert torch.equal(logits[:, 0], expected.scores[3])


@pytest.mark.parametrize("other_hooks", [False, True])
def test_a_step_that_failed_half_way_is_done_once(pair: Pair, other_hooks: bool) -> None:
    cache = DynamicCache()
    edit = ("blocks.0.hook_mlp_out", Edit("zero"))
    model, local = (bridge.original_model for bridge in pair)
    last = pair.spans[-1]
    with torch.no_grad():
        model(pair.tokens, **with_cache(cache))
        last.send = lambda message, timeout=None: (_ for _ in ()).throw(RuntimeError("no line"))
        token = pair.tokens[:, :1]
        with pytest.raises(RuntimeError, match="no line"):
            model(token, **with_cache(cache))
        assert cache.get_seq_length() == 9
        del last.send
        here = DynamicCache()
        local(pair.tokens, **with_cache(here))
        hooks = [edit] if other_hooks else []
        with pair.remote.hooks(fwd_hooks=hooks), pair.local.hooks(fwd_hooks=hooks):
            assert torch.equal(model(token, **with_cache(cache)).logits, local(token, **with_cache(here)).logits)
        held = [session.length for session in pair.spans[0].server.sessions.of_peer["local"].values()]
        assert max(held) == 10
        for span in pair.spans:
            span.server.sessions.of_peer.clear()
        assert torch.equal(model(token, **with_cache(cache)).logits, local(token, **with_cache(here)).logits)


def test_sessions_are_closed_when_the_text_is_gone(pair: Pair) -> None:
    def held() -> int:
        return sum(len(sessions) for span in pair.spans for sessions in span.server.sessions.of_peer.values())

    for _ in range(20):  # more than a peer may have at a time
        pair.remote.generate(PROMPT, 2, do_sample=False)
        gc.collect()
    pair.remote(pair.tokens)
    assert held() == 0
    cache = DynamicCache()
    with torch.no_grad():
        pair.remote(pair.tokens, past_key_values=cache)
        assert held() == len(pair.spans)
        del cache
        gc.collect()
        pair.remote(pair.tokens)
    assert held() == 0


# -- what is refused -------------------------------------------------------------------------------


def test_caches_that_cannot_be_used(pair: Pair) -> None:
    model, local = (bridge.original_model for bridge in pair)
    used = DynamicCache()
    with torch.no_grad():
        local(pair.tokens, **with_cache(used))
        with pytest.raises(
            ValueError, match="a cache has to come here empty and without a fixed size; pass DynamicCache"
        ):
            model(pair.tokens, **with_cache(used))
        with pytest.raises(ValueError, match="without a fixed size"):
            model(pair.tokens, **with_cache(StaticCache(config=local.config, max_cache_len=20)))
        with pytest.raises(TypeError, match=r"past_key_values: got list, expected a transformers Cache"):
            model(pair.tokens, **with_cache([]))
        mine = DynamicCache()
        model(pair.tokens, **with_cache(mine))
        with pytest.raises(ValueError, match="a cache on servers cannot be cropped"):
            mine.crop(-1)
        with pytest.raises(ValueError, match="keys and values of this cache are on servers"):
            mine.update(torch.zeros(1), torch.zeros(1), 0)
        other = make_pair("tiny-falcon", (), shipped="tiny-falcon")
        with pytest.raises(ValueError, match="this cache was made by another distributed model"):
            other.remote.original_model(pair.tokens, **with_cache(mine))
    with pytest.raises(ValueError, match="no gradient comes back through keys and values on servers"):
        model(pair.tokens, **with_cache(DynamicCache()))
    assert cache_of(model(pair.tokens)) is None


def test_an_error_in_a_step_reaches_the_caller(pair: Pair) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        pair.remote(pair.tokens, past_key_values=cache)
        wrong = pair.remote.hooks(fwd_hooks=[("blocks.0.attn.hook_z", Edit("zero", heads=[99]))])
        with wrong, pytest.raises(SpanError, match="are outside its 4 places"):
            pair.remote(pair.tokens[:, :1], past_key_values=cache)
        here = DynamicCache()
        pair.local(pair.tokens, past_key_values=here)
        expected = pair.local(pair.tokens[:, :1], past_key_values=here)
        assert torch.equal(pair.remote(pair.tokens[:, :1], past_key_values=cache), expected)


def test_rows_may_be_reordered_several_times_between_steps(pair: Pair) -> None:
    orders = [torch.tensor([1, 0, 1]), torch.tensor([2, 0, 0]), torch.tensor([0, 2, 1])]
    ids = torch.cat([pair.tokens, pair.tokens[:1].flip(1)])
    found = []
    for bridge in pair:
        cache = DynamicCache()
        with torch.no_grad():
            bridge.original_model(ids, **with_cache(cache))
            for order in orders:
                cache.reorder_cache(order)
            found.append(bridge.original_model(ids[:, :1], **with_cache(cache)).logits)
    assert torch.equal(*found)
