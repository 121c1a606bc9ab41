"""The feed for trainers: each token once and as bare transformers computes it, mixed, bounded, resumed bit for bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from transformer_lens import TransformerBridge
from transformer_lens.collect import ActivationStream
from transformer_lens.data.generate import training_text

PLACE = "blocks.1.hook_resid_post"
ABOUT = ["token_ids", "context_ids", "positions", "document_ids"]
TEXTS = list(training_text(60, seed=3))
SMALL: dict[str, Any] = {"context_size": 24, "contexts": 3, "buffer": 200, "batch_size": 32}


@pytest.fixture(scope="module")
def falcon() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.fixture(scope="module")
def mixtral() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-mixtral")


def joined(stream: Any) -> dict[str, torch.Tensor]:
    batches = list(stream)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def packed(bridge: TransformerBridge, texts: list[str], size: int) -> list[list[int]]:
    """The contexts, by hand: each text behind BOS, one after the other."""
    assert bridge.tokenizer is not None
    flat = [token for text in texts for token in [bridge.tokenizer.bos_token_id, *bridge.tokenizer(text)["input_ids"]]]
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def test_every_token_comes_once_and_as_the_bare_model_computes_it(falcon: TransformerBridge) -> None:
    found = joined(falcon.activation_stream(TEXTS, [PLACE, *ABOUT], **SMALL))
    contexts, bos = packed(falcon, TEXTS, 24), falcon.tokenizer.bos_token_id
    places = list(zip(found["context_ids"].tolist(), found["positions"].tolist(), strict=True))
    expected = [(c, p) for c, ids in enumerate(contexts) for p, token in enumerate(ids) if token != bos]
    # Which contexts are computed together is told by their number in the batch of three.
    assert len(places) == len(expected) and bos not in found["token_ids"].tolist()
    tokens = sorted(found["token_ids"].tolist())
    assert tokens == sorted(contexts[c][p] for c, p in expected)
    whole = [falcon.original_model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2] for ids in contexts]
    rows = torch.cat([whole[c][0, p : p + 1] for c, p in expected])
    order, theirs = (value.double().sum(-1).argsort() for value in (found[PLACE], rows))
    torch.testing.assert_close(found[PLACE][order], rows[theirs], rtol=1e-4, atol=2e-5)


def test_the_order_of_the_texts_without_shuffling(falcon: TransformerBridge) -> None:
    stream = falcon.activation_stream(TEXTS, [1, "token_ids"], shuffle=False, drop_bos=False, **SMALL)
    assert stream.names == [PLACE, "token_ids"]
    batches = list(stream)
    assert [len(batch["token_ids"]) for batch in batches[:-1]] == [32] * (len(batches) - 1)
    assert torch.cat([batch["token_ids"] for batch in batches]).tolist() == [
        t for ids in packed(falcon, TEXTS, 24) for t in ids
    ]
    last = list(falcon.activation_stream(TEXTS, [1], shuffle=False, drop_last=True, **SMALL))
    assert {len(batch[PLACE]) for batch in last} == {32}


def test_batches_are_mixed_from_the_whole_buffer_and_the_seed_chooses_them(falcon: TransformerBridge) -> None:
    batches = list(falcon.activation_stream(TEXTS, "token_ids", **SMALL, seed=5))
    again = list(falcon.activation_stream(TEXTS, "token_ids", **SMALL, seed=5))
    other = list(falcon.activation_stream(TEXTS, "token_ids", **SMALL, seed=6))
    assert all(map(torch.equal, batches, again)) and not all(map(torch.equal, batches, other))
    documents = list(falcon.activation_stream(TEXTS, "document_ids", **SMALL, seed=5))
    assert min(len(batch.unique()) for batch in documents[:-3]) > 6
    ages = [float(batch.double().mean()) for batch in documents]
    assert ages[0] < ages[len(ages) // 2] < ages[-2], "what comes later is later in the data"


def test_memory_is_bounded_and_the_data_are_read_as_they_are_needed(falcon: TransformerBridge) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for text in training_text(10**6, seed=1):
            read += 1
            yield text

    stream = falcon.activation_stream(texts(), 1, **SMALL)
    for batch in islice(stream, 20):
        assert batch.shape == (32, 128)
    assert read < 32 * 6  # documents are tokenised 32 at a time
    state = stream.state_dict()
    assert state["buffer"][PLACE].shape[0] <= 200 and state["coming"][PLACE].shape[0] <= 3 * 24


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_stream_goes_on_bit_for_bit(falcon: TransformerBridge, shuffle: bool, packing: bool) -> None:
    options: dict[str, Any] = {**SMALL, "shuffle": shuffle, "packing": packing, "epochs": 2, "buffer": 90}
    options |= {"dtype": torch.bfloat16}
    make = lambda texts: falcon.activation_stream(texts, [PLACE, "blocks.0.attn.hook_z", "token_ids"], **options)  # noqa: E731
    stream, states, batches = make(TEXTS[:20]), [], []
    states.append(stream.state_dict())
    for batch in stream:
        batches.append(batch)
        states.append(stream.state_dict())
    assert len(batches) > 12 and sum(len(batch["token_ids"]) for batch in batches) % 2 == 0
    for cut in range(0, len(states), 3):
        file = io.BytesIO()
        torch.save(states[cut], file)
        file.seek(0)
        again = make(iter(TEXTS[:20]) if cut > len(batches) // 2 else TEXTS[:20])
        if cut > len(batches) // 2:  # what is given anew may be another kind of collection
            with pytest.raises(ValueError, match=r"made otherwise: data.kind was 'list', now 'iterable'"):
                again.load_state_dict(states[cut])
            again = make(TEXTS[:20])
        again.load_state_dict(torch.load(file, weights_only=True))
        rest = list(again)
        assert len(rest) == len(batches) - cut
        for ours, theirs in zip(rest, batches[cut:], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            assert ours[PLACE].dtype is torch.bfloat16 and ours["blocks.0.attn.hook_z"].shape[1:] == (4, 32)


def test_a_state_of_another_stream_is_refused(falcon: TransformerBridge) -> None:
    stream = falcon.activation_stream(TEXTS, 1, **SMALL)
    next(stream)
    state = stream.state_dict()
    with pytest.raises(ValueError, match="it is of a stream that was made otherwise: seed was 0, now 1"):
        falcon.activation_stream(TEXTS, 1, **SMALL, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"names was \['blocks.1.hook_resid_post'\], now \['blocks.2"):
        falcon.activation_stream(TEXTS, 2, **SMALL).load_state_dict(state)
    with pytest.raises(ValueError, match="it was made from other tokens; pass the same texts in the same order"):
        falcon.activation_stream(TEXTS[::-1], 1, **SMALL).load_state_dict(state)
    for wrong in (5, {}, {"buffer": {}}):
        with pytest.raises(TypeError, match=r"state_dict: got .*, expected what state_dict\(\) of a stream gave"):
            stream.load_state_dict(wrong)  # type: ignore[arg-type]


def test_padded_token_rows(falcon: TransformerBridge) -> None:
    ids, bos, pad = falcon.to_tokens(TEXTS[:8]), falcon.tokenizer.bos_token_id, falcon.tokenizer.pad_token_id
    left = torch.stack([torch.cat([row[row == pad], row[row != pad]]) for row in ids])
    assert (ids[:, -1] == pad).any() and (left[:, 0] == pad).any()
    for rows in (ids, left):
        stream = falcon.activation_stream(rows, [PLACE, "token_ids"], shuffle=False, packing=False)
        found = joined(stream)
        kept = [row[row != pad] for row in rows]
        alone = [falcon.original_model(row[None], output_hidden_states=True).hidden_states[2][0, 1:] for row in kept]
        assert found["token_ids"].tolist() == [token for row in kept for token in row.tolist() if token != bos]
        torch.testing.assert_close(found[PLACE], torch.cat(alone), rtol=1e-4, atol=2e-5)
    wanted = falcon.activation_stream(ids, "token_ids", shuffle=False, drop_bos=False, drop_padding=False)
    assert torch.cat(list(wanted)).tolist() == ids.flatten().tolist()


def test_a_streamed_data_set_of_texts_or_token_rows(falcon: TransformerBridge) -> None:
    made = datasets.Dataset.from_dict({"said": TEXTS})
    expected = list(falcon.activation_stream(TEXTS, 1, **SMALL))
    for data in (made, made.to_iterable_dataset()):
        found = list(falcon.activation_stream(data, 1, **SMALL, text_key="said"))
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    rows = [{"input_ids": falcon.to_tokens(text)[0].tolist()} for text in TEXTS]
    found = list(falcon.activation_stream(rows, 1, **SMALL, text_key="input_ids"))
    assert all(map(torch.equal, found, expected))


def test_passes_over_the_data(falcon: TransformerBridge) -> None:
    once = torch.cat(list(falcon.activation_stream(TEXTS, "token_ids", **SMALL)))
    thrice = torch.cat(list(falcon.activation_stream(TEXTS, "token_ids", **SMALL, epochs=3)))
    assert sorted(thrice.tolist()) == sorted(once.tolist() * 3)
    endless = falcon.activation_stream(TEXTS[:3], "token_ids", **SMALL, epochs=None)
    assert sum(len(batch) for batch in islice(endless, 50)) == 50 * 32
    with pytest.raises(ValueError, match="no tokens at all when read once more: pass what can be read again, such as"):
        list(falcon.activation_stream(iter(TEXTS[:3]), 1, **SMALL, epochs=2))
    with pytest.raises(ValueError, match="data: got no tokens at all$"):
        next(falcon.activation_stream([""], 1, **SMALL))


def test_a_loader_takes_it_in_this_process(falcon: TransformerBridge) -> None:
    expected = list(falcon.activation_stream(TEXTS, 1, **SMALL))
    loader = DataLoader(falcon.activation_stream(TEXTS, 1, **SMALL), batch_size=None)
    assert all(map(torch.equal, loader, expected))


@pytest.mark.filterwarnings("ignore")
def test_a_worker_is_refused(falcon: TransformerBridge) -> None:
    loader = DataLoader(falcon.activation_stream(TEXTS, 1, **SMALL), batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="it runs the model, which is in the main process; pass num_workers=0"):
        next(iter(loader))


def test_inside_experts_and_at_a_spliced_dictionary(mixtral: TransformerBridge) -> None:
    places = ["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_expert_out", "blocks.1.mlp.hook_expert_indices"]
    found = joined(mixtral.activation_stream(TEXTS[:10], [*places, "token_ids"], shuffle=False, packing=False))
    _, cache = mixtral.run_with_cache(TEXTS[0], names_filter=places)
    length = cache[places[0]].shape[1] - 1
    for place in places:
        torch.testing.assert_close(found[place][:length], cache[place][0, 1:], rtol=1e-4, atol=1e-5)
    assert found[places[1]].shape[1:] == (2, 128) and not found[places[2]].is_floating_point()


def test_nothing_is_left_on_the_model_and_no_gradient_is_kept(falcon: TransformerBridge) -> None:
    batch = next(falcon.activation_stream(TEXTS, 1, **SMALL))
    assert not batch.requires_grad and not any(point.has_hooks() for point in falcon.hook_dict.values())


def test_it_may_be_asked_in_inference_mode(falcon: TransformerBridge) -> None:
    """sparsify's trainer asks what a module gives out in inference mode before it trains."""
    stream, expected = (falcon.activation_stream(TEXTS, 1, **SMALL) for _ in range(2))
    with torch.inference_mode():
        first = next(stream)
    assert not first.is_inference() and torch.equal(first, next(expected)) and torch.equal(next(stream), next(expected))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"at": "blocks.1.hook_resid"}, KeyError, "blocks.1.hook_resid"),
        ({"at": 9}, ValueError, "at: got 9, expected"),
        ({"at": "blocks.1.attn.hook_pattern"}, ValueError, "has an entry for each pair of positions"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0, expected 1 or more"),
        ({"batch_size": 64, "buffer": 32}, ValueError, "buffer: got 32, expected at least the batch_size, 64"),
        ({"contexts": 0}, ValueError, "contexts: got 0, expected 1 or more"),
        ({"epochs": 0}, ValueError, "epochs: got 0, expected 1 or more"),
        ({"context_size": 9999}, ValueError, "context_size: got 9999, expected at most"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8, expected a float dtype"),
        ({"texts": 5}, TypeError, "data: got int, expected a path"),
        ({"shard_tokens": 5}, TypeError, "activation_stream: got an unknown keyword 'shard_tokens'; the nearest are"),
        ({"at": []}, ValueError, r"at: got \[\], expected a hook or a layer, or several"),
    ],
)
def test_what_cannot_be_streamed(
    falcon: TransformerBridge, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        falcon.activation_stream(**{"texts": TEXTS, "at": 1, **options})


def test_dropout_is_refused() -> None:
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    bridge.train()
    with pytest.raises(ValueError, match="activation_stream: the model is in training mode"):
        ActivationStream(bridge, TEXTS, 1)
