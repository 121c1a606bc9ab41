"""What is stored is what the model computed, for the tokens that were asked for, wherever the data come from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import FAMILIES, VOCAB, falcon, family
from transformer_lens import TransformerBridge
from transformer_lens.collect import ActivationStore, collect
from transformer_lens.collect.plan import Cursor

CONTEXT, BATCH = 8, 3


def documents(number: int = 12, longest: int = 20) -> list[list[int]]:
    lengths = torch.randint(0, longest, (number,)).tolist()
    return [torch.randint(3, VOCAB, (length,)).tolist() for length in lengths]


def contexts_by_hand(docs: list[list[int]], packing: bool) -> list[list[tuple[int, int, int]]]:
    """Contexts of (token, document, position in the document), written out token by token."""
    done: list[list[tuple[int, int, int]]] = []
    open_: list[tuple[int, int, int]] = []
    for number, doc in enumerate(docs):
        for position, token in enumerate(doc):
            open_.append((token, number, position))
            if len(open_) == CONTEXT:
                done.append(open_)
                open_ = []
        if not packing and open_:
            done.append(open_)
            open_ = []
    return [*done, open_] if open_ else done


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All shards, read by safetensors itself."""
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("layout", FAMILIES)
def test_values_are_bitwise_those_of_the_bare_model(layout: str, packing: bool, tmp_path: Path) -> None:
    model, docs = family(layout), documents()
    rows = contexts_by_hand(docs, packing)
    expected: dict[str, list[torch.Tensor]] = {"tokens": [], "stream": [], "embed": []}
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            longest = max(map(len, batch))
            ids = torch.tensor([[token for token, _, _ in row] + [0] * (longest - len(row)) for row in batch])
            hidden = model(ids, output_hidden_states=True).hidden_states
            for i, row in enumerate(batch):
                expected["embed"].append(hidden[0][i, : len(row)])
                expected["stream"].append(hidden[1][i, : len(row)])
                expected["tokens"].append(ids[i, : len(row)])
    bridge = TransformerBridge(model)
    names = ["hook_embed", "blocks.0.hook_resid_post"]
    options = {"context_size": CONTEXT, "batch_size": BATCH, "shard_tokens": 2 * CONTEXT * BATCH, "progress": False}
    store = bridge.collect(docs, names, tmp_path, packing=packing, **options)
    found = stored(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(found["token_ids"].long(), torch.cat(expected["tokens"]))
    assert torch.equal(found["hook_embed"], torch.cat(expected["embed"]))
    assert torch.equal(found["blocks.0.hook_resid_post"], torch.cat(expected["stream"]))
    flat = [(c, p, *entry) for c, row in enumerate(rows) for p, entry in enumerate(row)]
    about = ("context_ids", "positions", "token_ids", "document_ids", "document_positions")
    assert torch.stack([found[name].long() for name in about], 1).tolist() == [list(entry) for entry in flat]
    assert store.complete and len(store) == sum(map(len, docs))


@pytest.mark.parametrize(
    "name",
    ["attn.hook_z", "attn.hook_rot_k", "attn.hook_result", "ln1.hook_scale", "mlp.hook_expert_indices", "hook_q_input",
     "mlp.hook_router_logits", "mlp.hook_expert_out"],
)  # fmt: skip
def test_every_kind_of_hook(name: str, tmp_path: Path) -> None:
    bridge, docs, full = TransformerBridge(family("mixtral")), documents(), f"blocks.1.{name}"
    store = bridge.collect(docs, full, tmp_path, packing=False, context_size=20, progress=False)
    axes = bridge.hook_dict[full].axes.split()
    assert store[full].axes == " ".join(["token", *axes[2:]])
    for number in (i for i, doc in enumerate(docs) if doc):
        # Each document alone: another batch, so equal to rounding; its tokens are what they are.
        with torch.no_grad():
            _, cache = bridge.run_with_cache(torch.tensor([docs[number]]), names_filter=full)
        found = store.document(number)
        assert found["token_ids"].tolist() == docs[number]
        assert found[full].dtype == cache[full].dtype
        torch.testing.assert_close(found[full], cache[full][0], rtol=1e-4, atol=1e-4)


def test_filters_and_bfloat16(tmp_path: Path) -> None:
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    texts = ["Mary and John went to the store", "", "Noah and Adam", "John"]
    name = "blocks.0.attn.hook_q"
    common = {"packing": False, "append_eos": True, "progress": False}
    everything = bridge.collect(texts, name, tmp_path / "all", **common)
    bos, eos = bridge.tokenizer.bos_token_id, bridge.tokenizer.eos_token_id
    for number in (0, 2, 3):
        ids = bridge.tokenizer(texts[number], add_special_tokens=False)["input_ids"]
        assert everything.document(number)["token_ids"].tolist() == [bos, *ids, eos]
    with pytest.raises(KeyError, match="document 1: none of its tokens is stored"):
        everything.document(1)
    fewer = bridge.collect(texts, name, tmp_path / "few", drop_bos=True, drop_first=2, dtype=torch.bfloat16, **common)
    keep = (everything["positions"][:] >= 2) & (everything["token_ids"][:] != bos)
    assert 0 < int(keep.sum()) < len(everything)
    assert fewer["q", 0].dtype == torch.bfloat16
    assert torch.equal(fewer["q", 0][:], everything["q", 0][:][keep].bfloat16())
    assert torch.equal(fewer["token_ids"][:], everything["token_ids"][:][keep])
    no_bos = bridge.collect(texts, name, tmp_path / "bos", drop_bos=True, **common)
    assert len(no_bos) == len(everything) - 3


def test_texts_come_from_anywhere(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    texts = [f"Mary and John went to the store and gave {'Adam ' * i}a drink" for i in range(9)]
    (tmp_path / "lines.txt").write_text("\n\n".join(texts) + "\n")
    (tmp_path / "data").mkdir()
    for place, some in (("data/a.jsonl", texts[:4]), ("data/b.jsonl", texts[4:])):
        (tmp_path / place).write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in some))
    ids = [bridge.to_tokens(text)[0] for text in texts]
    rows = [{"text": text} for text in texts]
    sources = {
        "list": texts,
        "file": tmp_path / "lines.txt",
        "name": str(tmp_path / "lines.txt"),
        "folder": tmp_path / "data",
        "paths": [tmp_path / "data" / "a.jsonl", tmp_path / "data" / "b.jsonl"],
        "data set": datasets.Dataset.from_list(rows),
        "streamed": datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "iterator": iter(texts),
        "rows": rows,
        "token ids": ids,
        "lists": [row.tolist() for row in ids],
        "arrays": [row.numpy() for row in ids],
    }
    found = {}
    for name, source in sources.items():
        folder = tmp_path / "out" / name
        collect(bridge, source, "hook_embed", folder, context_size=16, shard_tokens=64, batch_size=2, progress=False)
        found[name] = stored(folder)
    assert int(found["list"]["document_ids"][-1]) == 8
    for name, tensors in found.items():
        assert all(torch.equal(tensors[key], value) for key, value in found["list"].items()), name


def test_a_tensor_is_one_document_in_each_row(tmp_path: Path) -> None:
    bridge = TransformerBridge(falcon())
    ids = torch.randint(0, VOCAB, (5, 8))
    store = bridge.collect(ids, "hook_embed", tmp_path, context_size=8, progress=False)
    assert torch.equal(store["token_ids"][:].reshape(5, 8).long(), ids)
    assert store["document_ids"][:].reshape(5, 8)[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("most", [1, 7, 8, 9, 40, 10_000])
def test_max_tokens(most: int, tmp_path: Path) -> None:
    docs = documents()
    options = {"context_size": CONTEXT, "batch_size": BATCH, "shard_tokens": 1, "progress": False}
    store = TransformerBridge(falcon()).collect(docs, "hook_embed", tmp_path, max_tokens=most, **options)
    flat = [token for doc in docs for token in doc]
    assert store["token_ids"][:].tolist() == flat[:most]


@pytest.mark.parametrize(
    ("names", "blocks_run", "stop"),
    [
        (["hook_embed"], 0, 0),
        (["blocks.1.hook_resid_pre", "hook_embed"], 2, 2),
        (["blocks.0.attn.hook_rot_k"], 1, 1),
        (["blocks.3.hook_resid_post"], 4, 4),
        (["blocks.0.hook_mlp_out", "ln_final.hook_normalized"], 4, None),
        (["unembed.hook_out"], 4, None),
    ],
)
def test_the_run_stops_after_the_last_hook(names: list[str], blocks_run: int, stop: int | None, tmp_path: Path) -> None:
    model = falcon(num_hidden_layers=4)
    ran: set[int] = set()
    for number, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.add(number))
    bridge = TransformerBridge(model)
    store = bridge.collect(documents(), names, tmp_path, progress=False)
    assert ran == set(range(blocks_run))
    assert store.manifest.job["stop_at_layer"] == stop
    assert store.hooks == bridge.select_names(names)


def test_hooks_of_the_user_act_and_are_written_down(tmp_path: Path) -> None:
    bridge, docs = TransformerBridge(falcon()), documents()
    plain = bridge.collect(docs, "blocks.0.hook_resid_post", tmp_path / "plain", progress=False)
    with bridge.hooks(fwd_hooks=[("hook_embed", lambda x, hook: 0 * x)]):
        other = bridge.collect(docs, "blocks.0.hook_resid_post", tmp_path / "hooked", progress=False)
    assert plain.manifest.job["model"]["hooked"] == []
    assert other.manifest.job["model"]["hooked"] == ["hook_embed"]
    assert not torch.equal(plain["resid_post", 0][:], other["resid_post", 0][:])


def test_processes_share_a_job(tmp_path: Path) -> None:
    bridge, docs = TransformerBridge(falcon()), documents(30)
    options = {"context_size": CONTEXT, "batch_size": BATCH, "shard_tokens": 1, "progress": False}
    alone = bridge.collect(docs, "hook_embed", tmp_path / "alone", **options)
    for rank in (2, 0, 1):
        assert alone.complete
        part = bridge.collect(docs, "hook_embed", tmp_path / "shared", shard=(rank, 3), **options)
        assert part.complete == (rank == 1)
        assert len(part) < len(alone) or part.complete
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "shared").iterdir())
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    bridge = TransformerBridge.boot_transformers("tiny-mixtral")
    store = collect(bridge, ["Mary and John"], ["blocks.0.attn.hook_k"], tmp_path, dtype=torch.bfloat16, progress=False)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    job, [shard] = manifest["job"], manifest["shards"]
    assert job["hooks"] == {
        "blocks.0.attn.hook_k": {
            "axes": "token kv_head d_head",
            "shape": list(store["k", 0].shape[1:]),
            "dtype": "bfloat16",
        }
    }
    assert job["model"]["name"] == "tiny-mixtral" and job["model"]["dtype"] == "float32"
    assert job["tokenizer"]["bos"] == bridge.tokenizer.bos_token_id
    assert job["data"] == {"kind": "list", "documents": 1}
    assert manifest["environment"]["versions"]["torch"] == torch.__version__
    assert manifest["tokens"] == shard["tokens"] == 5
    assert shard["begin"] == asdict(Cursor()) and shard["end"] == {"document": 0, "offset": 5, "tokens": 5}
    assert shard["bytes"] == (tmp_path / shard["file"]).stat().st_size


def test_nothing_of_the_bridge_is_changed(tmp_path: Path) -> None:
    bridge = TransformerBridge(falcon())
    ids = torch.randint(3, VOCAB, (2, 7))
    before = bridge(ids)
    bridge.collect(documents(), "blocks.1.attn.hook_z", tmp_path, progress=False)
    assert torch.equal(bridge(ids), before)
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())
    assert isinstance(ActivationStore(tmp_path), ActivationStore)


def test_the_side_on_which_the_tokenizer_pads_does_not_matter(tmp_path: Path) -> None:
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    pad = bridge.tokenizer.pad_token_id
    docs = [[pad, 40, 41, 42], [43, 44], [45, pad, pad, 46, 47, pad]]
    for side in ("right", "left"):
        bridge.tokenizer.padding_side = side
        bridge.collect(docs, "blocks.1.hook_resid_post", tmp_path / side, packing=False, progress=False)
    assert stored(tmp_path / "right")["token_ids"].tolist() == [token for doc in docs for token in doc]
    found = stored(tmp_path / "left")
    for name, value in stored(tmp_path / "right").items():
        assert torch.equal(value, found[name]), name


def test_progress_shows_the_rate_and_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = [[5] * 8] * 10
    TransformerBridge(falcon()).collect(docs, "hook_embed", tmp_path, context_size=8, batch_size=2, shard_tokens=16)
    said = capsys.readouterr().err.split("\r")[-1]
    assert "collect: 100%" in said and "80.0/80.0" in said and "tokens/s" in said


def test_a_document_that_begins_with_bos_gets_no_other(tmp_path: Path) -> None:
    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    texts = ["<|bos|> Mary and", " Mary and"]
    store = bridge.collect(texts, "blocks.0.hook_resid_post", tmp_path, append_eos=False, progress=False)
    ids = bridge.tokenizer("<|bos|> Mary and")["input_ids"]
    assert [store.document(number)["token_ids"].tolist() for number in (0, 1)] == [ids, ids]
