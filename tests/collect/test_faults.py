"""Going on after faults, and refusing what would mix two jobs: nothing that was finished is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import VOCAB, falcon
from transformer_lens import TransformerBridge
from transformer_lens.collect import ActivationStore
from transformer_lens.collect.run import Background

OPTIONS: dict[str, Any] = {"context_size": 8, "batch_size": 2, "shard_tokens": 16, "progress": False}
HOOK = "blocks.0.attn.hook_z"


def documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (14,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(autouse=True)
def _documents_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformer_lens.collect.plan.TOGETHER", 1)


@pytest.fixture
def bridge() -> TransformerBridge:
    return TransformerBridge(falcon())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def failing(docs: list[list[int]], at: int) -> Any:
    for number, doc in enumerate(docs):
        if number == at:
            raise RuntimeError("the network is gone")
        yield doc


# -- going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_data_that_fail_half_way(bridge: TransformerBridge, packing: bool, tmp_path: Path) -> None:
    docs = documents()
    bridge.collect(iter(docs), HOOK, tmp_path / "whole", packing=packing, **OPTIONS)
    for at in (0, 5, 9, 13):
        with pytest.raises(RuntimeError, match="the network is gone"):
            bridge.collect(failing(docs, at), HOOK, tmp_path / "broken", packing=packing, **OPTIONS)
        partial = ActivationStore(tmp_path / "broken")
        assert not partial.complete and partial.check() == []
        assert (len(partial) > 0) == (at > 3)
        assert not list((tmp_path / "broken").glob("*.part"))
    store = bridge.collect(iter(docs), HOOK, tmp_path / "broken", packing=packing, **OPTIONS)
    assert store.complete
    assert bytes_of(tmp_path / "broken") == bytes_of(tmp_path / "whole")


def test_finished_shards_are_not_computed_again(bridge: TransformerBridge, tmp_path: Path) -> None:
    docs = documents()
    with pytest.raises(RuntimeError):
        bridge.collect(failing(docs, 12), HOOK, tmp_path, packing=False, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert before
    kind = "iterable"
    assert ActivationStore(tmp_path).manifest.job["data"] == {"kind": kind}
    ran: list[Any] = []
    bridge.original_model.transformer.h[0].register_forward_hook(lambda *a: ran.append(1))
    bridge.collect(iter(docs), HOOK, tmp_path, packing=False, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    shards = len(list(tmp_path.glob("shard-*.safetensors")))
    # Two tokens to see what the hooks give, then a batch for each shard that was missing.
    assert len(ran) == 1 + shards - len(before) // 2
    ran.clear()
    bridge.collect(iter(docs), HOOK, tmp_path, packing=False, **OPTIONS)
    assert len(ran) == 1


@pytest.mark.parametrize("damage", ["flipped", "shorter", "missing"])
def test_a_damaged_shard(bridge: TransformerBridge, damage: str, tmp_path: Path, caplog: Any) -> None:
    bridge.collect(documents(), HOOK, tmp_path, **OPTIONS)
    good = bytes_of(tmp_path)
    path = tmp_path / "shard-000002.safetensors"
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[-5] ^= 1
        path.write_bytes(raw)
    elif damage == "shorter":
        path.write_bytes(raw[:-1])
    else:
        path.unlink()
    [trouble] = ActivationStore(tmp_path).check()
    expected = {"flipped": "has the sha256", "shorter": f"has {len(raw) - 1} bytes", "missing": "is missing"}
    assert trouble.startswith("shard-000002.safetensors") and expected[damage] in trouble
    if damage != "flipped":
        with pytest.raises(ValueError, match="make the same collect call again to have it computed, the other shards"):
            ActivationStore(tmp_path)[HOOK][:]
        assert ActivationStore(tmp_path)[HOOK][:16].shape == (16, 8, 4)
    others = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p != path}
    with caplog.at_level(logging.WARNING, "transformer_lens.collect"):
        bridge.collect(documents(), HOOK, tmp_path, check=True, **OPTIONS)
    assert "shard-000002.safetensors is missing or not as it was written" in caplog.text
    assert bytes_of(tmp_path) == good
    assert {p: p.stat().st_mtime_ns for p in others} == others


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_a_full_disk(bridge: TransformerBridge, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge.collect(documents(), HOOK, tmp_path / "whole", **OPTIONS)
    original, calls = getattr(os, call), []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    def collect_again_and_again() -> None:
        for _ in range(20):  # where a call is made once in a shard, several folders reach it
            bridge.collect(documents(), HOOK, tmp_path / "full", **OPTIONS)
            for path in (tmp_path / "full").iterdir():
                path.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match="the disk is full: make room") as raised:
            collect_again_and_again()
    assert raised.value.errno == errno.ENOSPC
    kept = ActivationStore(tmp_path / "full")
    assert f"{len(kept._shards.records)} finished shard" in str(raised.value)
    assert "the same call goes on from there" in str(raised.value)
    assert not list((tmp_path / "full").glob("*.safetensors.part"))
    assert kept.check() == []
    bridge.collect(documents(), HOOK, tmp_path / "full", **OPTIONS)
    assert bytes_of(tmp_path / "full") == bytes_of(tmp_path / "whole")


def test_a_folder_that_cannot_be_written(bridge: TransformerBridge, tmp_path: Path, monkeypatch: Any) -> None:
    # The superuser may write anywhere, so a file in the folder's place stands for a folder of somebody else.
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        bridge.collect(documents(), HOOK, tmp_path / "file", **OPTIONS)
    assert (tmp_path / "file").read_text() == "mine"

    def refuse(*args: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="can only be read: choose another out_dir"):
        bridge.collect(documents(), HOOK, tmp_path / "new", **OPTIONS)


def test_two_processes_do_not_write_one_shard(bridge: TransformerBridge, tmp_path: Path) -> None:
    tmp_path.joinpath("out").mkdir()
    with (tmp_path / "out" / "shard-000000.safetensors.part").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="shard-000000.safetensors is being written by another process; give each"):
            bridge.collect(documents(), HOOK, tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out" / "shard-000000.safetensors.part").exists()
    assert bridge.collect(documents(), HOOK, tmp_path / "out", **OPTIONS).complete


# -- refusing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"context_size": 16}, "context_size was 8, now 16"),
        ({"drop_first": 1}, "drop_first was 0, now 1"),
        ({"packing": False}, "packing was True, now False"),
        ({"dtype": torch.bfloat16}, "hooks.blocks.0.attn.hook_z.dtype was 'float32', now 'bfloat16'"),
        ({"names": "blocks.1.attn.hook_z"}, "hooks.blocks.1.attn.hook_z was None, now {"),
        ({"dataset": [[3, 4]]}, "data.documents was 14, now 1"),
        ({"max_tokens": 50}, "max_tokens was None, now 50"),
    ],
)
def test_other_parameters_are_refused(
    bridge: TransformerBridge, change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    first: dict[str, Any] = {"dataset": documents(), "names": HOOK, **OPTIONS}
    bridge.collect(out_dir=tmp_path, **first)
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError, match="holds another job; choose another out_dir") as raised:
        bridge.collect(out_dir=tmp_path, **{**first, **change})
    assert sentence in str(raised.value)
    assert bytes_of(tmp_path) == before


def test_another_model_is_refused(bridge: TransformerBridge, tmp_path: Path) -> None:
    bridge.collect(documents(), HOOK, tmp_path, **OPTIONS)
    bridge.original_model.transformer.h[1].mlp.dense_4h_to_h.weight.data.mul_(1.001)
    with pytest.raises(ValueError, match=r"model\.weights was '\w+', now '\w+'"):
        bridge.collect(documents(), HOOK, tmp_path, **OPTIONS)


def test_another_environment_is_refused_unless_allowed(bridge: TransformerBridge, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        bridge.collect(failing(documents(), 9), HOOK, tmp_path, packing=False, **OPTIONS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["environment"]["versions"]["torch"] = "2.0"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"versions\.torch was '2\.0', now .*same_environment=False"):
        bridge.collect(iter(documents()), HOOK, tmp_path, packing=False, **OPTIONS)
    store = bridge.collect(iter(documents()), HOOK, tmp_path, packing=False, same_environment=False, **OPTIONS)
    assert store.complete and store.manifest.environment["versions"]["torch"] == "2.0"


@pytest.mark.parametrize("at", [0, 9])
def test_other_data_are_noticed(bridge: TransformerBridge, at: int, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        bridge.collect(failing(documents(), 12), HOOK, tmp_path, **OPTIONS, packing=False)
    before = bytes_of(tmp_path)
    changed = documents()
    changed[at] = [5, *changed[at]]
    if at == 0:
        # What lies far behind is not read again; a shard that is missing there is compared with its record.
        (tmp_path / "shard-000000.safetensors").unlink()
        before.pop("shard-000000.safetensors")
    with pytest.raises(ValueError, match="was made from other tokens; pass the documents of the first call"):
        bridge.collect(iter(changed), HOOK, tmp_path, **OPTIONS, packing=False)
    assert bytes_of(tmp_path) == before


def test_data_that_are_shorter_now(bridge: TransformerBridge, tmp_path: Path) -> None:
    """A shard begins in the middle of a document that does not reach so far any more."""
    with pytest.raises(RuntimeError):
        bridge.collect(failing(documents(), 12), HOOK, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="was made from other tokens; pass the documents of the first call"):
        bridge.collect(([5] for _ in range(99)), HOOK, tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"names": "blocks.0.attn.hook_pattern"}, ValueError, "has an entry for each pair of positions"),
        ({"names": "blocks.0.attn.hook_attn_scores"}, ValueError, "collect attn.hook_rot_q and attn.hook_rot_k"),
        ({"names": "blocks.0.attn.hook_zz"}, KeyError, "the nearest names are"),
        ({"context_size": 65}, ValueError, "context_size: got 65, expected at most 64"),
        ({"context_size": True}, ValueError, "context_size: got True"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0, expected a whole number from 1 on"),
        ({"drop_first": 8}, ValueError, "so none would be left"),
        ({"drop_bos": True}, ValueError, "drop_bos: this bridge knows no beginning-of-sequence token"),
        ({"append_eos": True}, ValueError, "append_eos: this bridge knows no end"),
        ({"prepend_bos": True}, ValueError, "prepend_bos: this bridge knows no beginning"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
        ({"shard": (2, 2)}, ValueError, "shard: got (2, 2)"),
        ({"contextsize": 3}, TypeError, "collect has no option 'contextsize'; the nearest is 'context_size'"),
        ({"dataset": []}, ValueError, "data: got no tokens at all"),
        ({"dataset": [[]]}, ValueError, "data: got no tokens at all"),
        ({"dataset": ["text"]}, ValueError, "this bridge has no tokenizer"),
        ({"dataset": [[3, VOCAB]]}, ValueError, f"document 0: got token ids from 3 to {VOCAB}, expected 0 to"),
        ({"dataset": [[3], [-1]]}, ValueError, "document 1: got token ids from -1"),
        ({"dataset": [[0.5]]}, TypeError, "document 0: got float64 [1]"),
        (
            {"dataset": [{"body": "x"}]},
            ValueError,
            "document 0 has no 'text', only 'body'; name the text with text_key",
        ),
        ({"dataset": "nothing.txt"}, ValueError, "there is no file 'nothing.txt'; for a text rather than a file"),
        ({"dataset": 3}, TypeError, "data: got int"),
        ({"dataset": torch.ones(2, 2)}, ValueError, "data: got float32 of shape [2, 2]"),
    ],
)
def test_what_makes_no_sense(
    bridge: TransformerBridge, arguments: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as raised:
        bridge.collect(**{"dataset": documents(), "names": HOOK, "out_dir": tmp_path / "out", **OPTIONS, **arguments})
    assert sentence in str(raised.value)
    assert not list((tmp_path / "out").glob("shard-*")) if (tmp_path / "out").exists() else True


def test_a_file_that_cannot_be_read(bridge: TransformerBridge, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": [3, 4]}\n{"text"\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        bridge.collect(tmp_path / "a.jsonl", HOOK, tmp_path / "out", **OPTIONS)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"got the file 'a.csv', expected \.txt"):
        bridge.collect(tmp_path / "a.csv", HOOK, tmp_path / "out", **OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file that could be read"):
        bridge.collect(tmp_path / "empty", HOOK, tmp_path / "out", **OPTIONS)


def test_a_data_set_without_a_split(bridge: TransformerBridge, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"validation": datasets.Dataset.from_list([{"text": "a"}])})
    with pytest.raises(ValueError, match=r"expected one of its splits: data\['validation'\]"):
        bridge.collect(splits, HOOK, tmp_path, **OPTIONS)


def test_training_mode_and_overflow(bridge: TransformerBridge, tmp_path: Path) -> None:
    bridge.original_model.train()
    with pytest.raises(ValueError, match="the model is in training mode"):
        bridge.collect(documents(), HOOK, tmp_path, **OPTIONS)
    bridge.original_model.eval()
    with (
        bridge.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x * 1e6)]),
        pytest.raises(ValueError, match=r"'hook_embed' reaches .* beyond float16's 65504; pass dtype=torch.bfloat16"),
    ):
        bridge.collect(documents(), "hook_embed", tmp_path, dtype=torch.float16, **OPTIONS)
    assert not list(tmp_path.glob("shard-*"))


def test_a_manifest_that_was_changed(bridge: TransformerBridge, tmp_path: Path) -> None:
    bridge.collect(documents(), HOOK, tmp_path, **OPTIONS)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"context_size": 8', '"context_size": 9'))
    with pytest.raises(ValueError, match="was changed since it was written"):
        ActivationStore(tmp_path)
    (tmp_path / "manifest.json").write_text(text[:100])
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        ActivationStore(tmp_path)
    with pytest.raises(ValueError, match="holds no manifest.json: nothing was collected there"):
        ActivationStore(tmp_path / "nowhere")


def test_datasets_are_not_needed(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['datasets'] = None\n"
        "from transformer_lens import TransformerBridge\n"
        "bridge = TransformerBridge.boot_transformers('tiny-falcon')\n"
        f"store = bridge.collect(['Mary'], 'hook_embed', {str(tmp_path)!r}, progress=False)\n"
        "try: store.to_dataset()\n"
        "except ImportError as error: sys.stdout.write(str(error))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "to_dataset needs datasets: pip install 'transformer-lens-bridge[data]'"


# -- the writer's thread -------------------------------------------------------------------------------


def test_calls_wait_when_there_are_many() -> None:
    gate, given, done = threading.Event(), [], []
    with Background(waiting=2) as thread:

        def give() -> None:
            for number in range(6):
                thread.call(lambda number=number: (gate.wait(), done.append(number)))
                given.append(number)

        giver = threading.Thread(target=give)
        giver.start()
        giver.join(0.3)
        assert given == [0, 1] and done == []
        gate.set()
        giver.join()
    assert done == [0, 1, 2, 3, 4, 5]


def test_what_was_given_is_done_when_the_block_is_left_by_an_error() -> None:
    done: list[int] = []

    def give() -> None:
        with Background(waiting=9) as thread:
            for number in range(5):
                thread.call(lambda number=number: done.append(number))
            raise RuntimeError("elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"):
        give()
    assert done == [0, 1, 2, 3, 4]


def test_nothing_is_called_after_an_error() -> None:
    done: list[int] = []
    gate = threading.Event()

    def fail() -> None:
        gate.wait()
        raise RuntimeError("stop")

    def give() -> None:
        with Background(waiting=9) as thread:
            for function in (lambda: done.append(1), fail, lambda: done.append(2), lambda: done.append(3)):
                thread.call(function)
            gate.set()

    with pytest.raises(RuntimeError, match="stop"):
        give()
    assert done == [1]
