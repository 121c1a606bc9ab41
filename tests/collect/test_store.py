"""Reading: every index against the shards read whole by safetensors, and batches that miss and repeat nothing."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.support import VOCAB, falcon
from transformer_lens import TransformerBridge
from transformer_lens.collect import ActivationStore, RunningStatistics

Q, STREAM = "blocks.1.attn.hook_q", "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("store")
    lengths = torch.randint(0, 90, (60,)).tolist()
    documents = [torch.randint(3, VOCAB, (length,)).tolist() for length in lengths]
    options: dict[str, Any] = {"context_size": 32, "shard_tokens": 512, "progress": False, "dtype": torch.bfloat16}
    TransformerBridge(falcon()).collect(documents, [Q, STREAM], place, **options)
    return place


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert len(parts) > 3
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture
def store(folder: Path) -> ActivationStore:
    return ActivationStore(folder)


def test_every_index(store: ActivationStore, whole: dict[str, torch.Tensor]) -> None:
    size = len(store)
    assert size == len(whole[Q])
    mask = torch.rand(size) < 0.1
    indices: list[Any] = [
        0, -1, size - 1, slice(None), slice(0, 0), slice(500, 520), slice(-3, None), slice(3, size, 97), slice(9, 2),
        slice(None, None, -5), [5, 5, 1200, -size], [], torch.randint(0, size, (3, 4)), np.array([7]),
        mask, mask.numpy(),
    ]  # fmt: skip
    for index in indices:
        for name, expected in whole.items():
            # torch has no negative steps, and empty lists are floats to it.
            numbers = index
            if isinstance(index, slice):
                numbers = torch.tensor(list(range(size))[index], dtype=torch.long)
            elif isinstance(index, list):
                numbers = torch.tensor(index, dtype=torch.long)
            found = store[name][index]
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected[numbers]), (name, index)
    everything = store[700:720]
    assert set(everything) == set(whole)
    assert all(torch.equal(value, whole[name][700:720]) for name, value in everything.items())


def test_names(store: ActivationStore) -> None:
    assert store.hooks == [STREAM, Q]
    assert store["q", 1] is store[Q] and store["resid_post", 0].shape == (len(store), 32)
    assert store[Q].axes == "token head d_head"
    assert repr(store[Q]) == f"StoredTensor('{Q}', [{len(store)}, 8, 4], torch.bfloat16, axes='token head d_head')"
    assert f"{len(store)} tokens" in repr(store) and "complete" in repr(store)
    with pytest.raises(
        KeyError, match=r"'blocks\.0\.attn\.hook_q' was not collected; the nearest names are 'blocks\.1"
    ):
        store["q", 0]
    with pytest.raises(IndexError, match=f"the store has {len(store)}"):
        store[Q][len(store)]
    with pytest.raises(IndexError, match="got token numbers -"):
        store[Q][[-len(store) - 1]]
    with pytest.raises(TypeError, match="got an index of float64"):
        store[Q][[0.5]]
    with pytest.raises(TypeError, match="got an index of bool"):
        store[Q][[True, False]]


def test_names_that_are_none(store: ActivationStore) -> None:
    for wrong in (1024, [], [3], {"a": 1}, [[Q]]):
        for use in (store.batches, store.statistics, store.to_dataset):
            if (use, wrong) == (store.batches, 1024):
                continue  # all hooks, so many tokens at a time
            with pytest.raises(TypeError, match="names: got .*, expected a hook's name, several, or None"):
                use(wrong)
    with pytest.raises(TypeError, match="document: got 'a', expected a whole number"):
        store.document("a")
    with pytest.raises(TypeError, match="batch_size: got '8', expected 1 or more"):
        store.batches(Q, "8")
    assert list(store.statistics([("q", 1)])) == [Q]


def test_documents(store: ActivationStore, whole: dict[str, torch.Tensor]) -> None:
    ids = whole["document_ids"]
    for number in ids.unique().tolist():
        found = store.document(number)
        assert set(found) == set(whole)
        assert torch.equal(found[Q], whole[Q][ids == number])
        assert found["document_positions"].tolist() == list(range(len(found[Q])))
    for number in (-1, 60, 10**9):
        with pytest.raises(KeyError, match=f"document {number}: none of its tokens"):
            store.document(number)


def test_editing_what_was_read_does_not_change_the_file(store: ActivationStore, folder: Path) -> None:
    before = store[Q][:10].clone()
    store[Q][:10].zero_()
    assert torch.equal(ActivationStore(folder)[Q][:10], before)
    assert store.check() == []


def test_few_files_are_open(store: ActivationStore, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer_lens.collect.store.OPEN", 2)
    for _ in range(2):
        assert torch.equal(store[Q][::7], whole[Q][::7])
        assert len(store._shards._open) == 2


# -- batches -------------------------------------------------------------------------------------------


def tokens_of(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    columns = ("context_ids", "positions", "token_ids")
    return [
        tuple(row) for batch in batches for row in torch.stack([batch[name].long() for name in columns], 1).tolist()
    ]


ABOUT = ["context_ids", "positions", "token_ids", Q]


def test_filling_the_buffer_keeps_few_files_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer_lens.collect.store.OPEN", 1)
    counts = []

    class Watched(ActivationStore):
        def __getitem__(self, index: Any) -> Any:
            lines = Path("/proc/self/maps").read_text().splitlines()
            counts.append(len({line.split()[-1] for line in lines if str(folder) in line}))
            return super().__getitem__(index)

    watched = Watched(folder)
    assert len(watched._shards.records) > 4
    assert sum(len(batch) for batch in watched.batches(Q, 8, buffer_tokens=10**6)) == len(watched)
    assert max(counts) - counts[0] <= 2  # the open one, and the one that the last run is in


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("batch", [1000, 96])
def test_each_token_once(
    store: ActivationStore, whole: dict[str, torch.Tensor], batch: int, workers: int, shuffle: bool
) -> None:
    batches = store.batches(ABOUT, batch, shuffle=shuffle, buffer_tokens=1000)
    found = list(DataLoader(batches, batch_size=None, num_workers=workers))
    rows = tokens_of(found)
    expected = tokens_of([whole])
    assert len(set(expected)) == len(expected)
    assert sorted(rows) == sorted(expected)
    if not workers:
        assert (rows == expected) == (not shuffle)
        assert [len(b[Q]) for b in found[:-1]] == [batch] * (len(found) - 1)
    place = {row: number for number, row in enumerate(expected)}
    for piece in found:
        order = [place[row] for row in tokens_of([piece])]
        assert torch.equal(piece[Q], whole[Q][order])


@pytest.mark.parametrize(
    ("size", "buffer", "batch"), [(1, 8, 4), (7, 8, 8), (256, 256, 256), (300, 37, 37), (301, 64, 10)]
)
def test_sizes_that_do_not_fit(size: int, buffer: int, batch: int, tmp_path: Path) -> None:
    ids = torch.arange(3, 3 + 50).repeat(7)[:size]
    store = TransformerBridge(falcon()).collect([ids], "hook_embed", tmp_path, context_size=64, progress=False)
    assert len(store) == size
    for epoch in range(3):
        batches = store.batches(ABOUT[:3], batch, buffer_tokens=buffer)
        batches.set_epoch(epoch)
        found = list(batches)
        assert sorted(tokens_of(found)) == sorted(tokens_of([store[:]]))
        assert all(len(b["token_ids"]) == batch for b in found[:-1])
        assert len(batches) == len(found)
        batches.drop_last = True
        assert len(list(batches)) == len(batches) == size // batch
    short = store.batches(batch, buffer_tokens=buffer)
    assert (short.batch_size, short.names) == (batch, store.hooks)


def test_seeds_and_epochs(store: ActivationStore) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        batches = store.batches(ABOUT, 64, buffer_tokens=512, seed=seed)
        batches.set_epoch(epoch)
        return tokens_of(list(batches))

    assert order(0, 0) == order(0, 0)
    others = [order(0, 1), order(1, 0), order(1, 1)]
    assert all(other != order(0, 0) for other in others) and others[0] != others[1]


def test_a_batch_is_mixed_from_all_over(store: ActivationStore, whole: dict[str, torch.Tensor]) -> None:
    first = next(iter(store.batches(["context_ids"], 256, buffer_tokens=1024)))["context_ids"]
    last = int(whole["context_ids"].max())
    # Of 1,024 tokens held, a quarter: they come from everywhere, not from eight neighbouring contexts.
    assert len(first.unique()) > 16
    assert int(first.max()) - int(first.min()) > last // 2


def test_one_name_gives_tensors(store: ActivationStore, whole: dict[str, torch.Tensor]) -> None:
    found = list(store.batches(Q, 500, shuffle=False))
    assert torch.equal(torch.cat(found), whole[Q])
    assert set(next(iter(store.batches()))) == {Q, STREAM}
    with pytest.raises(ValueError, match="buffer_tokens: got 10, expected at least the batch_size, 20"):
        store.batches(Q, 20, buffer_tokens=10)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        store.batches(Q, 0)
    with pytest.raises(KeyError, match="was not collected"):
        store.batches("hook_embed")


def test_a_store_is_sent_to_workers_without_its_files(store: ActivationStore) -> None:
    store[Q][:]
    sent = pickle.dumps(store)
    assert len(sent) < 100_000
    assert torch.equal(pickle.loads(sent)[Q][:9], store[Q][:9])


# -- statistics and export -----------------------------------------------------------------------------


def test_statistics_against_numpy(
    store: ActivationStore, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformer_lens.collect.store.CHUNK", 300)
    found = store.statistics()
    assert list(found) == store.hooks
    for name in store.hooks:
        exact = whole[name].double().numpy()
        assert found[name].count == len(exact)
        np.testing.assert_allclose(found[name].mean, exact.mean(0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found[name].variance, exact.var(0), rtol=1e-10)
        np.testing.assert_allclose(found[name].norm_mean, np.linalg.norm(exact, axis=-1).mean(0), rtol=1e-10)


def test_statistics_do_not_cancel() -> None:
    values = 1e6 + torch.randn(2000, 3, dtype=torch.float64)
    running = RunningStatistics()
    for start in range(0, 2000, 7):
        running.update(values[start : start + 7].float() if start > 9999 else values[start : start + 7])
    np.testing.assert_allclose(running.variance, values.numpy().var(0), rtol=1e-8)
    running.update(torch.empty(0, 3))
    assert running.count == 2000 and repr(running) == "RunningStatistics of 2000 tokens"
    with pytest.raises(ValueError, match=r"got \[4\] for a token, before \[3\]"):
        running.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no values were seen"):
        _ = RunningStatistics().mean


def test_export(store: ActivationStore, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    array = store.to_numpy(Q, slice(10, 20))
    assert array.dtype == np.float32
    assert np.array_equal(array, whole[Q][10:20].float().numpy())
    tokens = store.to_numpy("token_ids")
    tokens[:] = 0  # an array of its own
    assert int(store["token_ids"][:].sum()) == int(whole["token_ids"].sum())
    data = store.to_dataset([STREAM, "token_ids"], cache_dir=str(tmp_path))
    assert data.column_names == [STREAM, "token_ids"] and len(data) == len(store)
    assert data[:]["token_ids"] == whole["token_ids"].tolist()
    assert torch.equal(torch.tensor(data[100:110][STREAM]), whole[STREAM][100:110].float())
