"""Hostile and broken servers against a client: an error that says so, and a bridge and a text that go on as before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.distributed.hostile import PAYLOAD, message_of, parts_of_reply
from tests.support import with_cache
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, Edit, Keep, Limits, LocalSpan, SpanError
from transformer_lens.distributed.client.routing import Health
from transformer_lens.distributed.protocol.messages import MessageError, Reply, pack_reply, unpack_reply, unpack_request

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
Change = Callable[[bytes], bytes]


class HostileSpan:
    """The second of two spans; what it answers to calls, but not what it says it is, goes through `change`."""

    def __init__(self, span: LocalSpan) -> None:
        self.span = span
        self.blocks, self.peer = span.blocks, span.peer
        self.change: Change | None = None

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        answer = self.span.send(message)
        calls = unpack_request(message, Limits()).kind not in ("info", "close")
        return self.change(answer) if self.change and calls else answer


class World:
    """A bridge over two spans, of which one may lie, and all that it gives as long as nobody does."""

    def __init__(self, name: str) -> None:
        local = TransformerBridge.boot_transformers(name)
        n = local.cfg.n_layers
        spans = LocalSpan(name, range(0, 1)), LocalSpan(name, range(1, n))
        self.liar = HostileSpan(spans[1])
        self.spans = [spans[0], self.liar]
        model = AutoDistributedModelForCausalLM.from_pretrained(name, spans=self.spans, max_retries=1)
        self.route = model.route
        self.route.sleep = lambda _: None
        self.bridge = TransformerBridge(model, local.tokenizer)
        self.expected = {what: [t.clone() for t in work(local)] for what, work in WORK.items()}

    def lie_from_now(self, change: Change | None) -> None:
        """Nobody is banned for what was before."""
        self.liar.change = change
        self.route.health = Health(self.route.settings, self.route.clock)

    def check(self, what: str) -> None:
        """Nobody lies: the same, bit for bit."""
        self.lie_from_now(None)
        found = WORK[what](self.bridge)
        assert len(found) == len(self.expected[what])
        assert all(torch.equal(a, b) for a, b in zip(found, self.expected[what], strict=True))

    def lie(self, what: str, change: Change) -> str:
        """What a call raises whose answers are changed; empty where it did not find out."""
        self.lie_from_now(change)
        told = ""
        try:
            WORK[what](self.bridge)
        except SpanError as error:
            told = str(error)
        assert len(told) < 20_000 and (told.isprintable() or not told)
        self.lie_from_now(None)
        return told


def look(bridge: TransformerBridge) -> list[torch.Tensor]:
    logits, cache = bridge.run_with_cache(TOKENS, names_filter=lambda n: n.startswith("blocks.1.attn"))
    return [logits, *cache.values()]


def gradient(bridge: TransformerBridge) -> list[torch.Tensor]:
    add, kept = torch.zeros(bridge.cfg.d_model, requires_grad=True), Keep()
    hooks = [("blocks.1.hook_resid_pre", Edit("add", add)), ("blocks.1.attn.hook_pattern", kept)]
    loss = bridge.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=hooks)
    assert kept.value is not None
    (loss + kept.value[..., 0].sum()).backward()
    assert add.grad is not None
    return [loss.detach(), add.grad]


def generate(bridge: TransformerBridge) -> list[torch.Tensor]:
    return [bridge.original_model.generate(TOKENS, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0)]


def way_back(bridge: TransformerBridge) -> list[torch.Tensor]:
    add = torch.zeros(bridge.cfg.d_model, requires_grad=True)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", Edit("add", add))]):
        _, cache = bridge.run_with_cache(
            TOKENS, return_type="loss", names_filter=["blocks.1.attn.hook_q"], incl_bwd=True
        )
    assert add.grad is not None
    return [*cache.values(), add.grad]


WORK: dict[str, Callable[[TransformerBridge], list[torch.Tensor]]] = {
    "look": look,
    "gradient": gradient,
    "generate": generate,
    "way back": way_back,
}


@pytest.fixture(scope="module", params=["tiny-falcon", "tiny-mixtral"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    found = World(request.param)
    yield found
    for span in (found.spans[0], found.liar.span):
        span.close()


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def changed(answer: bytes) -> bytes:
        reply = unpack_reply(answer, Limits())
        change(reply.tensors)
        return pack_reply(reply)

    return changed


def with_seen(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return with_tensors(lambda found: found.update({n: change(t) for n, t in found.items() if n.startswith("seen")}))


def with_head(**changes: Any) -> Change:
    def changed(answer: bytes) -> bytes:
        head, header, data = parts_of_reply(answer)
        return message_of(({**head, **changes}, header, data))

    return changed


def an_error(text: str, info: Any) -> Change:
    return lambda _: message_of(({"error": text, "info": info, "turns": []}, {}, b""))


NASTY = "\x1b[2J\x1b]0;owned\x07" * 3000
LIES: dict[str, tuple[Change, str]] = {
    "nothing": (lambda _: b"", "not a message of this protocol"),
    "half": (lambda answer: answer[: len(answer) // 2], "the tensors"),
    "noise": (lambda answer: b"TLB1" + b"\xff" * 99, "the head says it has"),
    "a pickle": (lambda answer: PAYLOAD, "not a message"),
    "no stream": (with_tensors(lambda found: (found.pop("stream", None), found.pop("grad.stream", None))), ""),
    "a tensor too many": (
        with_tensors(lambda found: found.update(more=TOKENS)),
        "the server answered with the tensors",
    ),
    "a nasty name": (with_tensors(lambda found: found.update({NASTY: TOKENS})), r"answered with the tensors \['\\+x1b"),
    "another dtype": (with_tensors(lambda f: f.update({n: t.double() for n, t in f.items()})), "the server answered"),
    "another shape": (with_tensors(lambda f: f.update({n: t[:1] for n, t in f.items()})), "the server answered"),
    "more axes": (with_tensors(lambda f: f.update({n: t[None] for n, t in f.items()})), "the server answered"),
    "no turns": (with_head(turns=[]), ""),
    "turns twice": (with_head(turns=[0, 0, 0]), "answered for the hooks"),
    "many turns": (with_head(turns=[2**63] * 2000), "answered for the hooks"),
    "odd turns": (with_head(turns=[None]), "the turns of a reply"),
    "odd info": (with_head(info=[1, 2]), "a reply has the fields"),
    "odd error": (with_head(error=b"no"), "a reply has the fields"),
    "a long nasty error": (an_error(NASTY, {}), r"blocks 1 to \d on local-\d+: \\x1b\[2J\\x1b"),
    "no, and odd info": (an_error("no", {"retry": [None, {"a": 1}], "held": None}), "no"),
    "no, forever": (an_error("no", {"held": -1}), "no"),
    "not now, forever": (an_error("no", {"retry": "full"}), "max_retries is 1"),
    "an error beside an answer": (with_head(error="no"), "no"),
}


@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("lie", LIES)
def test_lies(world: World, what: str, lie: str) -> None:
    change, text = LIES[lie]
    told = world.lie(what, change)
    assert re.search(text, told), told
    world.check(what)


def on_the_way_back(change: Change) -> Change:
    """Forwards are answered as they should be."""

    def changed(answer: bytes) -> bytes:
        back = any(name.startswith("grad.") for name in unpack_reply(answer, Limits()).tensors)
        return change(answer) if back else answer

    return changed


BACK: dict[str, tuple[Change, str]] = {
    "a tensor too many": (with_tensors(lambda found: found.update(more=TOKENS)), "answered with the tensors"),
    "a stream": (with_tensors(lambda found: found.update(stream=TOKENS)), "answered with the tensors"),
    "of nobody": (with_tensors(lambda f: f.update({"grad.value.7": TOKENS})), "answered with the tensors"),
    "no turns": (with_head(turns=[]), r"answered for the hooks \[\], expected \[\d\]"),
    "turns twice": (with_head(turns=[2, 2]), r"answered for the hooks \[2, 2\]"),
    "others' turns": (with_head(turns=[0]), r"answered for the hooks \[0\]"),
    "another dtype": (
        with_tensors(lambda f: f.update({n: t.double() for n, t in f.items()})),
        "answered grad.stream as",
    ),
    "another shape": (
        with_tensors(lambda f: f.update({n: t[:1] for n, t in f.items() if "value" in n})),
        r"answered grad.value.\d as",
    ),
}


@pytest.mark.parametrize("lie", BACK)
def test_lies_on_the_way_back(world: World, lie: str) -> None:
    change, text = BACK[lie]
    told = world.lie("way back", on_the_way_back(change))
    assert re.search(text, told), told
    world.check("way back")


SEEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows": lambda t: t[:1],
    "positions": lambda t: torch.cat([t, t], 1),
    "no axes": lambda t: t.sum(),
    "an axis more": lambda t: t[None],
    "whole numbers": lambda t: t.long(),
}


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_v", "blocks.1.hook_resid_pre", "blocks.1.ln1.hook_scale"])
@pytest.mark.parametrize("change", SEEN)
def test_activations_that_cannot_be_theirs(world: World, change: str, name: str) -> None:
    """Of what hooks are given, batch, positions, width, number of axes and kind of number are known here."""
    kept = Keep()
    world.liar.change = with_seen(SEEN[change])
    with pytest.raises(SpanError, match=f"the server answered '{name}' as torch"):
        world.bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, kept)])
    assert kept.value is None
    world.check("look")


def test_a_text_goes_on_after_lies(world: World) -> None:
    """Before each step of one text a server lies; what is not found out was no lie, and the text is the same."""
    local = TransformerBridge.boot_transformers(world.route.expected["dht_prefix"]).original_model
    model = world.bridge.original_model
    caches, ids, refused = (DynamicCache(), DynamicCache()), TOKENS, 0
    with torch.no_grad():
        for change, _ in LIES.values():
            world.lie_from_now(change)
            try:
                logits = model(ids, **with_cache(caches[0])).logits
            except SpanError:
                refused += 1
                world.lie_from_now(None)
                logits = model(ids, **with_cache(caches[0])).logits
            assert torch.equal(logits, local(ids, **with_cache(caches[1])).logits)
            ids = logits[:, -1:].argmax(-1)
    assert caches[0].get_seq_length() == TOKENS.shape[1] + len(LIES) - 1
    assert refused == len(LIES) - 1  # "no turns" is what a step without hooks has
    world.check("look")


def test_numbers_are_taken_on_trust(world: World) -> None:
    """A server may answer other numbers, NaN too, of the right shape: nobody finds out."""
    nan = with_tensors(lambda found: found.update({n: torch.full_like(t, torch.nan) for n, t in found.items()}))
    assert world.lie("look", nan) == ""
    world.check("look")


CHANGES = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES, cut=st.none() | st.integers(0, 2000), what=st.sampled_from(["look", "generate"]))
def test_damaged_answers(world: World, changes: list[tuple[int, int]], cut: int | None, what: str) -> None:
    def damage(answer: bytes) -> bytes:
        damaged = bytearray(answer)
        for at, byte in changes:
            damaged[at % len(damaged)] = byte
        return bytes(damaged[:cut])

    world.lie(what, damage)
    if changes[0][1] % 8 == 0:
        world.check(what)


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(
    head=st.dictionaries(
        st.sampled_from(["error", "info", "turns", "more"]),
        st.none()
        | st.text()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.binary()
        | st.lists(st.integers(0, 9))
        | st.dictionaries(st.text(), st.integers(0, 9)),
    ),
    noise=st.binary(max_size=80),
)
def test_any_reply_is_read_or_refused(head: dict[str, Any], noise: bytes) -> None:
    for message in (noise, b"TLB1" + noise, message_of((head, {}, b"")), message_of((head, noise, b""))):
        try:
            reply = unpack_reply(message, Limits())
        except MessageError:
            continue
        assert isinstance(reply, Reply) and msgpack.packb(reply.info) is not None
