"""Servers that compute something else under the same name, that say no, and that are too small for a call at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from tests.distributed.faults import FaultySpan
from tests.distributed.test_giving_up import Source
from tests.support import with_cache
from transformer_lens import TransformerBridge
from transformer_lens.data import tiny_model_path
from transformer_lens.distributed import (
    AutoDistributedModelForCausalLM,
    Edit,
    Limits,
    LocalSpan,
    SpanError,
    StaticSpans,
)
from transformer_lens.distributed.protocol.messages import Reply, pack_reply, unpack_reply

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [31, 30, 29, 28, 27, 26]])
NAME = "tiny-falcon"


@pytest.fixture(scope="module")
def local() -> TransformerBridge:
    return TransformerBridge.boot_transformers(NAME)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after a step of training in one block, under the same prefix."""
    folder = tmp_path_factory.mktemp("finetuned") / NAME
    shutil.copytree(tiny_model_path(NAME), folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if ".h.3." in name and name.endswith("dense_4h_to_h.weight"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, of which only the one outside the blocks is here, as after a client's download."""
    folder = tmp_path_factory.mktemp("outside") / NAME
    shutil.copytree(tiny_model_path(NAME), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    here = {name: tensor for name, tensor in tensors.items() if ".h." not in name}
    save_file(here, folder / "here.safetensors", {"format": "pt"})
    places = {name: "here.safetensors" if name in here else "there.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def served(name: Any, peer: str, blocks: range = range(0, 4), **options: Any) -> FaultySpan:
    return FaultySpan(LocalSpan(str(name), blocks, dht_prefix="tiny-falcon", **options), peer)


def model_of(name: Any = NAME, **options: Any) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(str(name), dht_prefix="tiny-falcon", **options)


def says(span: FaultySpan, **other: Any) -> FaultySpan:
    """A server that tells something else of itself."""
    send = span.send

    def told(message: bytes, timeout: float | None = None) -> bytes:
        reply = unpack_reply(send(message, timeout), Limits())
        return pack_reply(Reply(reply.tensors, {**reply.info, **other} if reply.info else {}, reply.error, reply.turns))

    span.send = told  # type: ignore[method-assign]
    return span


# -- weights ---------------------------------------------------------------------------------------


def test_other_weights_are_refused_and_passed_over(local: TransformerBridge, finetuned: Path) -> None:
    wrong, right = served(finetuned, "wrong"), served(NAME, "right")
    with pytest.raises(
        ValueError, match="another model: its weights of block 3 have the fingerprint '.{16}', and this"
    ):
        model_of(spans=[wrong])
    model_of(spans=[served(finetuned, "half", range(0, 3)), served(NAME, "rest", range(3, 4))])  # these are the same
    model = model_of(spans=Source([wrong, right], {"wrong": 0.1}))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, local(IDS))
    assert not wrong.sent


def test_a_client_without_the_blocks_holds_servers_to_the_first(
    local: TransformerBridge, outside: Path, finetuned: Path
) -> None:
    first, wrong, right = served(NAME, "first"), served(finetuned, "wrong"), served(NAME, "right")
    model = model_of(outside, max_retries=1, min_backoff=0.01)
    assert [bool(known) for known in model.checkpoint["weights"]] == [False] * 4 + [True]
    source = Source([first])
    model.connect(source)
    cache, mine = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :3], **with_cache(cache))
        first.dead, source.known = True, [first, wrong]
        with pytest.raises(
            SpanError, match="wrong is not used: the span of blocks 0 to 4 serves another model: its we"
        ):
            model(IDS[:, 3:], **with_cache(cache))
        source.known.append(right)
        found = model(IDS[:, 3:], **with_cache(cache)).logits
        local.original_model(IDS[:, :3], **with_cache(mine))
        assert torch.equal(found, local.original_model(IDS[:, 3:], **with_cache(mine)).logits)
    assert not wrong.sent


def test_other_weights_outside_the_blocks_tell_a_model_apart(outside: Path, tmp_path: Path) -> None:
    """Of a fine-tuned model whose blocks no file here tells."""
    folder = tmp_path / NAME
    shutil.copytree(tiny_model_path(NAME), folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = next(name for name in tensors if "word_embeddings" in name)
    tensors[embedding] = tensors[embedding] + 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="its weights outside the blocks have the fingerprint"):
        model_of(outside, spans=[served(folder, "other")])


def test_a_dtype_is_no_other_fingerprint() -> None:
    spans = [served(NAME, "half", dtype=torch.bfloat16)]
    assert model_of(dtype=torch.bfloat16, spans=spans).checkpoint == model_of().checkpoint


def hub(folder: Path, *names: str) -> dict[str, Any]:
    """A cache as of the hub, with the shipped model under these names."""
    for number, name in enumerate(names):
        place = folder / f"models--{name.replace('/', '--')}"
        shutil.copytree(tiny_model_path(NAME), place / "snapshots" / f"{number:040x}")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(f"{number:040x}")
    return {"cache_dir": str(folder), "local_files_only": True}


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """Falcon's prefix is the last part of the name: `anyone/falcon-180B` announces what `tiiuae/falcon-180B` does."""
    files = hub(tmp_path, "tiiuae/small", "anyone/small")
    span = LocalSpan("anyone/small", range(0, 4), **files)
    assert span.server.config.dht_prefix == "small"
    with pytest.raises(ValueError, match="its hub_name is 'anyone/small', and this model's is 'tiiuae/small'"):
        AutoDistributedModelForCausalLM.from_pretrained("tiiuae/small", spans=[span], **files)
    same = LocalSpan("tiiuae/small", range(0, 4), **files)
    AutoDistributedModelForCausalLM.from_pretrained("tiiuae/small", spans=[same], **files)
    old = says(FaultySpan(same, "old"), revision="f" * 40)
    with pytest.raises(ValueError, match=f"its revision is '{'f' * 40}', and this model's is '{0:040x}'"):
        AutoDistributedModelForCausalLM.from_pretrained("tiiuae/small", spans=[old], **files)


def test_other_releases_are_used_where_that_is_permitted(local: TransformerBridge) -> None:
    span = says(served(NAME, "old"), torch="2.0.0")
    with pytest.raises(ValueError, match="its torch is '2.0.0', and this .*'; same_libraries=False permits that"):
        model_of(spans=[span])
    with torch.no_grad():
        assert torch.equal(model_of(spans=[span], same_libraries=False)(IDS).logits, local(IDS))


@pytest.mark.parametrize("weights", [None, "abc", [], [1, 2], ["x"] * 6])
def test_fingerprints_that_are_none(weights: Any) -> None:
    with pytest.raises(ValueError, match="its weights have no fingerprints"):
        model_of(spans=[says(served(NAME, "odd"), weights=weights)])


def test_the_reason_is_in_the_error_where_nobody_fits() -> None:
    source = Source([served(NAME, "half", dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="half is not used: .* its dtype is 'bfloat16', and this model's is 'float32'"):
        model_of(spans=source)


# -- whoever says no -------------------------------------------------------------------------------


def test_many_that_nobody_can_reach_use_up_no_tries(local: TransformerBridge) -> None:
    one = served(NAME, "fake")
    fakes = [FaultySpan(one, f"fake-{number}") for number in range(60)]  # type: ignore[arg-type]
    for fake in fakes:
        fake.dead = True
    source = Source([*fakes, served(NAME, "right")], {fake.peer: 0.01 for fake in fakes})
    model = model_of(spans=source, max_retries=1)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, local(IDS))
    assert len(model.route.health.banned()) == 60


def test_an_error_after_many_failures_stays_short() -> None:
    fake = served(NAME, "fake")
    fakes = [FaultySpan(fake, f"fake-{number}") for number in range(60)]  # type: ignore[arg-type]
    for one in fakes:
        one.dead = True
    with pytest.raises(ValueError, match="; and 52 more") as caught:
        model_of(spans=Source(fakes), max_retries=1)
    assert str(caught.value).count(" said: ") == 8


def test_a_no_of_one_is_asked_elsewhere(local: TransformerBridge) -> None:
    strict, other = served(NAME, "strict", limits=Limits(rows=1)), served(NAME, "other")
    model = model_of(spans=StaticSpans([strict, other]))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, local(IDS))
    assert (len(strict.sent), len(other.sent)) == (1, 1) and not model.route.health.banned()
    (one,) = model.route.recoveries
    assert one.peers == ("strict",)
    both = [strict, served(NAME, "second", limits=Limits(rows=1))]
    model.connect(both)
    with pytest.raises(SpanError, match="on strict: MessageError: stream: got 2 rows of 6 positions, and at most 1 "):
        model(IDS)


def test_a_text_goes_on_elsewhere_after_a_no(local: TransformerBridge) -> None:
    strict, other = served(NAME, "strict"), served(NAME, "other")
    model = model_of(spans=StaticSpans([strict, other]))
    cache, mine = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for start, end in ((0, 3), (3, 5), (5, 6)):
            found = model(IDS[:, start:end], **with_cache(cache)).logits
            assert torch.equal(found, local.original_model(IDS[:, start:end], **with_cache(mine)).logits)
            strict.server.checks.limits = Limits(rows=1)
    assert (len(strict.sent), len(other.sent)) == (2, 3)


@pytest.mark.parametrize("replica", [True, False])
def test_a_server_that_comes_back_with_other_blocks(local: TransformerBridge, replica: bool) -> None:
    """The same peer, as with the same `--identity`, and other `--blocks`."""
    moves, rest = served(NAME, "moves", range(0, 2)), served(NAME, "rest", range(2, 4))
    source = StaticSpans([moves, rest])
    model = model_of(spans=source, max_retries=1, min_backoff=0.01)
    cache, mine = DynamicCache(), DynamicCache()
    late = served(NAME, "late", range(0, 3))
    with torch.no_grad():
        model(IDS[:, :4], **with_cache(cache))
        wanted = [local.original_model(ids, **with_cache(mine)).logits for ids in (IDS[:, :4], IDS[:, 4:])][1]
        moves.server = LocalSpan(NAME, range(2, 4)).server
        if replica:
            source.given.append(late)
        else:
            with pytest.raises(
                SpanError, match="moves said: .*blocks 0 to 2 were asked for, and this server has range"
            ):
                model(IDS[:, 4:], **with_cache(cache))
            source.given[0] = late
        assert torch.equal(model(IDS[:, 4:], **with_cache(cache)).logits, wanted)


# -- calls that are too much at once ---------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"memory": 300_000}, {"work": 10_000}])
def test_a_call_that_is_too_much_is_made_in_parts(local: TransformerBridge, limit: dict[str, int]) -> None:
    span = served(NAME, "small", limits=Limits(**limit))
    bridge = TransformerBridge(model_of(spans=StaticSpans([span]), max_retries=0), local.tokenizer)
    value = torch.full((128,), 0.5, requires_grad=True)
    mine = torch.full((128,), 0.5, requires_grad=True)
    for one, given in ((bridge, value), (local, mine)):
        with one.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", Edit("add", given))]):
            one(IDS, return_type="loss").backward()
    assert torch.equal(value.grad, mine.grad)
    assert not bridge.original_model.route.health.banned()
    kinds = [(request.kind, request.end - request.first) for request in span.sent]
    assert ("backward", 1) in kinds or ("backward", 2) in kinds
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
    with torch.no_grad():
        _, found = bridge.run_with_cache(IDS, names_filter=names)
        _, wanted = local.run_with_cache(IDS, names_filter=names)
    assert all(torch.equal(found[name], wanted[name]) for name in names)


def test_one_block_that_is_too_much_is_refused(local: TransformerBridge) -> None:
    span = served(NAME, "tiny", limits=Limits(memory=1000))
    model = model_of(spans=StaticSpans([span]))
    with pytest.raises(SpanError, match=r"^blocks 0 to 4 on tiny: MessageError: the call would take about \d+ bytes"):
        model(IDS)
    assert [request.end - request.first for request in span.sent] == [4, 2, 1]


def test_limits_of_the_client() -> None:
    span = served(NAME, "any")
    model = model_of(spans=StaticSpans([span]), limits={"message": 4000})
    with pytest.raises(SpanError, match=r"the request has \d+ bytes, and a message has at most 4000"):
        model(IDS)
    assert not span.sent
    with pytest.raises(ValueError, match="limits: got 'memry', expected one of message, head, "):
        model_of(limits={"memry": 1})
    with pytest.raises(ValueError, match="memory: got 0, expected a number above 0 and finite"):
        model_of(limits={"memory": 0})
