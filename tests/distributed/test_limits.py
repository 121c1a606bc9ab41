"""What a peer may cost a server: each limit by itself, at its edge, counted in the bytes that are really held."""

from __future__ import annotations

import gc
import json
import math
import struct
import threading
import time
import tracemalloc
import weakref
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import torch
from safetensors.torch import save

from tests.distributed.hostile import message_of, parts_of
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedConfig, Limits, MessageError, SpanServer
from transformer_lens.distributed.protocol.messages import (
    PEAK,
    Action,
    FullError,
    Reply,
    Request,
    pack_reply,
    pack_request,
    printable,
    unpack_reply,
    unpack_request,
)
from transformer_lens.distributed.server.checks import Checks
from transformer_lens.distributed.server.server import ANSWERABLE
from transformer_lens.distributed.server.sessions import Session, Sessions

D_MODEL = 128
STREAM = torch.randn(2, 5, D_MODEL)
FORWARD = Request("forward", 1, 3, tensors={"stream": STREAM})
MODELS = ("tiny-falcon", "tiny-mixtral")
EACH = 2 * 2 * 2 * 32 * 4
"""Keys and values, two blocks, two heads, d_head, float32: bytes of one position of one row."""


def make(**limits: Any) -> SpanServer:
    return SpanServer("tiny-mixtral", range(1, 3), limits=Limits(**limits))


@pytest.fixture(scope="module")
def server():
    found = make()
    yield found
    found.close()


def answer(server: SpanServer, request: Request, peer: str = "local") -> Reply:
    return unpack_reply(server.handle(pack_request(request), peer), Limits())


def step(start: int, new: int, session: str = "a", rows: int = 2, **changes: Any) -> Request:
    torch.manual_seed(start)
    stream = torch.randn(rows, new, D_MODEL)
    return replace(FORWARD, kind="step", session=session, start=start, tensors={"stream": stream}, **changes)


# -- reading a message -----------------------------------------------------------------------------


def with_header(change: Any) -> bytes:
    """A forward whose tensors' header is another text."""
    head, header, data = parts_of(FORWARD)
    return message_of((head, change(header), data))


ROW = {"dtype": "F32", "shape": [2, 5, D_MODEL], "data_offsets": [0, STREAM.nbytes]}
HEADERS: dict[str, tuple[Any, str]] = {
    "a name twice": (lambda h: [("stream", ROW), ("stream", ROW)], "names something twice"),
    "a fact twice": (
        lambda h: json.dumps(h).replace('"dtype"', '"dtype": "F64", "dtype"').encode(),
        "names something twice",
    ),
    "NaN": (lambda h: {**h, "x": float("nan")}, "holds NaN, which is not JSON"),
    "another encoding": (lambda h: json.dumps(h).encode("utf-16"), "is not JSON"),
    "a fact too many": (lambda h: {"stream": {**ROW, "more": 1}}, "has other facts than dtype, shape and"),
    "a fact too few": (lambda h: {"stream": {"dtype": "F32", "shape": [1]}}, "has other facts than"),
    "a long length": (lambda h: {"stream": {**ROW, "shape": [10**400, 1, 1]}}, "has no shape of at most 5 lengths"),
    "no length": (lambda h: {**h, "x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "lengths above 0"),
    "lengths below 0": (lambda h: {"stream": {**ROW, "shape": [-2, -5, D_MODEL]}}, "lengths above 0"),
    "many axes": (lambda h: {"stream": {**ROW, "shape": [2, 5, D_MODEL, 1, 1, 1]}}, "has no shape of at most 5"),
    "a float length": (lambda h: {"stream": {**ROW, "shape": [2.0, 5, D_MODEL]}}, "has no shape of at most 5"),
    "a list for a dtype": (lambda h: {"stream": {**ROW, "dtype": [[[]]]}}, "has the dtype list; allowed are F32"),
    "overlapping": (
        lambda h: {
            "stream": {**ROW, "shape": [1, 5, D_MODEL], "data_offsets": [0, STREAM.nbytes // 2]},
            "x": {**ROW, "shape": [1, 5, D_MODEL], "data_offsets": [0, STREAM.nbytes // 2]},
        },
        "are not safetensors",
    ),
    "a hole": (
        lambda h: {"stream": {**ROW, "data_offsets": [8, STREAM.nbytes + 8]}},
        "are not safetensors",
    ),
    "deep": (lambda h: b'{"a":' * 9000 + b"1" + b"}" * 9000, "is not JSON"),
    "a list": (lambda h: [], "the tensors are no map"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_tensors(case: str) -> None:
    change, text = HEADERS[case]
    with pytest.raises(MessageError, match=text):
        unpack_request(with_header(change), Limits())


def test_a_header_that_is_cut_off() -> None:
    head, _, _ = parts_of(FORWARD)
    packed = msgpack.packb(head)
    message = b"TLB1" + struct.pack("<I", len(packed)) + packed + struct.pack("<Q", 5000) + b"{}"
    with pytest.raises(MessageError, match="the header of the tensors says it has 5000 bytes"):
        unpack_request(message, Limits())


def test_a_header_that_nobody_changed_is_read() -> None:
    assert torch.equal(unpack_request(with_header(lambda header: header), Limits()).tensors["stream"], STREAM)


def test_lists_in_lists_reserve_little() -> None:
    """msgpack makes room for what a list says it holds before that is there, here in each of 500 levels."""
    head = (500 * (b"\xdd" + struct.pack(">I", 250_000))).ljust(260_000, b"\x01")
    message = b"TLB1" + struct.pack("<I", len(head)) + head + save({"stream": STREAM})
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="not msgpack"):
            unpack_request(message, Limits())
        careful = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with pytest.raises(ValueError, match="incomplete input"):
            msgpack.unpackb(head, strict_map_key=True)
        careless = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert careful < 2**20 < 2**24 < careless


HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "a block far away": ({"end": 2**31}, "end: got 2147483648"),
    "a list for a kind": ({"kind": [[]]}, "kind: got list"),
    "a long text for a kind": ({"kind": "x" * 500}, "kind: got 'x{60,70}"),
    "a timestamp": ({"session": msgpack.Timestamp(1)}, "the head is not msgpack"),
    "a number for a name": ({1: 2}, "the head is not msgpack"),
    "bytes for a session": ({"session": b"a"}, "session: got bytes"),
    "a blank in a session": ({"session": "a b"}, "session: got 'a b'"),
    "many names": ({str(n): n for n in range(70)}, "the head is not msgpack"),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case: str) -> None:
    changes, text = HEADS[case]
    head, header, data = parts_of(FORWARD)
    with pytest.raises(MessageError, match=text):
        unpack_request(message_of(({**head, **changes}, header, data)), Limits())


@pytest.mark.parametrize("what", ["positions", "heads", "experts"])
def test_places_of_an_edit(what: str) -> None:
    for places, fine in (([], False), ([0], True), ([0, 1, 2], True), ([0, 1, 2, 3], False), ([True], False)):
        action = Action("blocks.1.hook_mlp_out", "zero", **{what: places})
        message = pack_request(replace(FORWARD, actions=[action]))
        if fine:
            assert unpack_request(message, Limits(places=3)).actions == [action]
        else:
            with pytest.raises(MessageError, match=f"{what} of an action: whole numbers, 1 to 3 of them"):
                unpack_request(message, Limits(places=3))


def test_a_head_ends_where_it_says() -> None:
    for size, text in ((1, "a request has the fields"), (2, "the head says it has 2 bytes"), (9, "the head says it")):
        with pytest.raises(MessageError, match=text):
            unpack_request(b"TLB1" + struct.pack("<I", size) + msgpack.packb({}), Limits())


@pytest.mark.parametrize(
    ("fits", "more"),
    [
        ({str(n): n for n in range(64)}, {str(n): n for n in range(65)}),
        ({"a": [0] * 6}, {"a": [0] * 7}),
        ({"a": msgpack.ExtType(1, b"")}, {"a": msgpack.ExtType(1, b"x")}),
    ],
)
def test_what_is_in_a_head_is_small(fits: dict[str, Any], more: dict[str, Any]) -> None:
    limits = Limits(actions=2, places=3)
    assert unpack_reply(pack_reply(Reply(info=fits)), limits).info == fits
    with pytest.raises(MessageError, match="the head is not msgpack"):
        unpack_reply(pack_reply(Reply(info=more)), limits)


def test_actions_are_counted() -> None:
    message = pack_request(replace(FORWARD, actions=[Action("blocks.1.hook_mlp_out", "zero")] * 3))
    assert len(unpack_request(message, Limits(actions=3)).actions) == 3
    with pytest.raises(MessageError, match="the request has 3 actions, and at most 2 are read"):
        unpack_request(message, Limits(actions=2))


def test_what_a_stranger_wrote_is_shown_in_part() -> None:
    with pytest.raises(MessageError) as caught:
        unpack_request(pack_request(replace(FORWARD, kind="x" * 500)), Limits())
    assert str(caught.value) == "kind: got '" + "x" * 65


def test_turns_of_a_reply_are_counted() -> None:
    message = pack_reply(Reply({"x": STREAM}, turns=[0] * 9))
    assert unpack_reply(message, Limits(actions=9)).turns == [0] * 9
    with pytest.raises(MessageError, match="the turns of a reply"):
        unpack_reply(message, Limits(actions=8, places=8))


def test_a_reply_may_be_as_large_as_an_answer() -> None:
    message = pack_reply(Reply({"x": STREAM}))
    assert unpack_reply(message, Limits(message=10, answer=len(message))).tensors
    with pytest.raises(MessageError, match="and at most 99 are read"):
        unpack_reply(message, Limits(message=10, answer=99))


def test_texts_of_others_cannot_move_the_cursor() -> None:
    assert printable("a\x1b]0;b\x07\n\u202e\ud800c é") == r"a\x1b]0;b\x07\n\u202e\ud800c é"
    assert printable("\x00" * 5000) == (r"\x00" * 500)
    assert printable("x" * 50, 7) == "x" * 7


# -- checks before anything runs -------------------------------------------------------------------

INDICES = Action("blocks.1.mlp.hook_expert_indices", "set")
POSITIONS = torch.arange(5)[None]
LOOK = Action("blocks.1.attn.hook_q", "look")
CHECKED: dict[str, tuple[Request, str]] = {
    "a start outside a step": (replace(FORWARD, start=1), "start: got 1, and only a step goes on"),
    "a step beyond every text": (step(252, 5), "got 2 rows of 5 positions after 252, and at most 256 of 256 are run"),
    "a step that keeps nothing": (step(0, 5, use_cache=False), "use_cache: a step keeps keys and values"),
    "positions beyond every text": (
        replace(FORWARD, tensors={"stream": STREAM, "position_ids": POSITIONS + 252}),
        "position_ids: expected whole numbers 0 ... 255",
    ),
    "floats for experts": (
        replace(FORWARD, actions=[INDICES], tensors={"stream": STREAM, "value.0": torch.tensor([0.0, 1.0])}),
        "it can be set, to 0 ... 3",
    ),
    "whole numbers added to experts": (
        replace(
            FORWARD,
            actions=[replace(INDICES, do="add")],
            tensors={"stream": STREAM, "value.0": torch.tensor([0, 1])},
        ),
        "it can be set, to 0 ... 3",
    ),
    "a gradient at whole numbers": (
        replace(
            FORWARD,
            kind="backward",
            actions=[replace(INDICES, do="keep")],
            tensors={"stream": STREAM, "grad.0": torch.zeros(2, 5, 2)},
        ),
        "grad.0: expected a gradient",
    ),
    "whole numbers for a gradient": (
        replace(
            FORWARD,
            kind="backward",
            actions=[replace(LOOK, do="keep")],
            tensors={"stream": STREAM, "grad.0": torch.zeros(2, 5, 4, 32, dtype=torch.long)},
        ),
        "grad.0: expected a gradient",
    ),
    "digits of another script": (
        replace(FORWARD, actions=[replace(LOOK, name="blocks.\u0661.attn.hook_q")]),
        "is not in the blocks of this server",
    ),
    "a scalar for a mask": (replace(FORWARD, tensors={"stream": STREAM, "mask": torch.tensor(1)}), "mask: expected"),
    "rows beyond": (
        replace(step(0, 5), tensors={"stream": STREAM, "rows": torch.tensor([0, 2])}),
        "rows: expected whole numbers 0 ... 1",
    ),
    "rows below": (
        replace(step(0, 5), tensors={"stream": STREAM, "rows": torch.tensor([0, -1])}),
        "rows: expected whole numbers",
    ),
}


@pytest.mark.parametrize("case", CHECKED)
def test_requests_that_are_refused(server: SpanServer, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request, text = CHECKED[case]
    monkeypatch.setattr(server, "_run", lambda *_: pytest.fail("it ran"))
    reply = answer(server, request)
    assert text in reply.error and reply.error.startswith("MessageError: ")
    assert not server.sessions.of_peer


def test_the_first_and_the_last_expert_can_be_set(server: SpanServer) -> None:
    look = replace(INDICES, do="look")
    values = {"stream": STREAM, "value.0": torch.tensor([3, 0])}
    reply = answer(server, replace(FORWARD, actions=[INDICES, look], tensors=values))
    assert torch.equal(reply.tensors["seen.1"], torch.tensor([3, 0]).expand(2, 5, 2))


def test_the_last_positions_of_the_longest_text_are_run(server: SpanServer) -> None:
    assert not answer(server, replace(FORWARD, tensors={"stream": STREAM, "position_ids": POSITIONS + 251})).error
    assert not answer(server, step(0, 251)).error
    assert not answer(server, step(251, 5)).error
    assert "at most 256 of 256 are run" in answer(server, step(256, 1)).error
    server.sessions.of_peer.clear()


def test_high_positions_change_nothing_for_others() -> None:
    """Frequencies of this kind are computed anew, and kept, where a position is beyond the longest text."""
    options = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "head_dim": 32}
    server = SpanServer("tiny-mixtral", range(1, 3), **options)
    assert server.model.rotary_emb.rope_type == "dynamic"
    before = server.handle(pack_request(FORWARD))
    for positions in (POSITIONS + 10**6, POSITIONS + 252, POSITIONS + 251):
        answer(server, replace(FORWARD, tensors={"stream": STREAM, "position_ids": positions}), "eve")
    assert server.handle(pack_request(FORWARD)) == before
    assert server.model.rotary_emb.max_seq_len_cached == 256
    server.close()


@pytest.mark.parametrize("name", MODELS)
def test_no_answer_is_larger_than_was_expected(name: str) -> None:
    """Every hook of two blocks, read in a forward, a step that goes on with a text, and a backward pass."""
    server = SpanServer(name, range(1, 3))
    hooks = [r.name.replace("{i}", "2") for r in server.checks.table.present() if r.name.startswith("blocks.")]
    assert len(hooks) > 25
    first = step(0, 7)
    assert not answer(server, first).error
    for base in (FORWARD, step(7, 3), replace(FORWARD, kind="backward", grad=True)):
        tensors = base.tensors | ({"grad.stream": STREAM} if base.kind == "backward" else {})
        reads = [hook for hook in hooks if base.kind != "backward" or not hook.endswith("indices")]
        do = "gradient" if base.kind == "backward" else "look"
        request = replace(base, actions=[Action(hook, do) for hook in reads], tensors=tensors)
        reply = answer(server, request)
        assert not reply.error and len(reply.turns) > 15
        for nth in reply.turns:
            assert list(reply.tensors[f"seen.{nth}"].shape) == server.checks.shape(request, request.actions[nth])
        seen = sum(t.nbytes for key, t in reply.tensors.items() if key.startswith("seen."))
        expected = sum(8 * math.prod(server.checks.shape(request, request.actions[nth])) for nth in reply.turns)
        assert seen <= expected <= 2 * seen
    server.close()


@pytest.mark.parametrize(
    ("limits", "fine", "text"),
    [
        ({"work": 2 * 5 * 2 * D_MODEL}, FORWARD, "would compute 3840 numbers"),
        ({"work": 3 * 2 * 5 * 2 * D_MODEL}, replace(FORWARD, kind="backward"), "would compute"),
    ],
)
def test_the_work_of_a_call(limits: dict[str, int], fine: Request, text: str) -> None:
    server = make(**limits)
    tensors = {"grad.stream": STREAM} if fine.kind == "backward" else {}
    fine = replace(fine, tensors={**fine.tensors, **tensors})
    assert not answer(server, fine).error
    more = replace(fine, actions=[Action("blocks.1.hook_mlp_out", "zero")])
    assert text in answer(server, more).error
    server.close()


ZERO, KEEP = Action("blocks.1.hook_mlp_out", "zero"), Action("blocks.2.attn.hook_q", "keep")
STREAMS = 2 * 5 * D_MODEL
BLOCK = 2 * 5 * (12 * D_MODEL + 4 * 2 * 64 + 3 * 5)
"""Numbers of one block: widths of 128, two experts of 64 for each token, a mask of five keys."""
SCORES = 2 * 5 * 3 * 3 * 5
"""What three more heads add, where the scores of all four exist."""
PATTERN = Action("blocks.1.attn.hook_pattern", "zero")


@pytest.mark.parametrize(
    ("limit", "exact", "changes"),
    [
        ("answer", 8 * STREAMS, {"actions": [ZERO, KEEP]}),
        ("memory", 4 * BLOCK, {}),
        ("memory", 4 * (BLOCK + SCORES + 3 * 2 * 4 * 5 * 5), {"actions": [PATTERN]}),
        ("memory", 4 * (BLOCK + 3 * STREAMS), {"actions": [ZERO, ZERO]}),
        ("memory", 4 * (2 * BLOCK + 3 * 2 * STREAMS), {"actions": [ZERO, ZERO], "grad": True}),
        ("memory", 4 * 2 * BLOCK + 8 * STREAMS, {"actions": [KEEP], "kind": "backward"}),
        ("work", 3 * (2 + 1) * STREAMS, {"actions": [KEEP], "kind": "backward"}),
    ],
)
def test_what_a_call_would_take_by_hand(limit: str, exact: int, changes: dict[str, Any]) -> None:
    request = replace(FORWARD, **changes)
    if request.kind == "backward":
        request.tensors = {"stream": STREAM, "grad.stream": STREAM}
    for most, refused in ((exact, False), (exact - 1, True)):
        server = make(**{limit: most})
        assert bool(answer(server, request).error) is refused, most
        server.close()


def test_the_memory_of_a_call_is_bounded_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    server = make(memory=900 * 2**10)
    wide = torch.zeros(1, 64, D_MODEL)
    calls = {
        "forward": replace(FORWARD, tensors={"stream": wide}),
        "graph": replace(FORWARD, grad=True, tensors={"stream": wide}),
        "backward": replace(FORWARD, kind="backward", tensors={"stream": wide, "grad.stream": wide}),
        "edit": replace(FORWARD, tensors={"stream": wide}, actions=[Action("blocks.1.hook_attn_in", "zero")]),
        "scores": replace(step(192, 64), tensors={"stream": wide}, actions=[PATTERN]),
    }
    assert not answer(server, calls.pop("forward")).error
    monkeypatch.setattr(server, "_run", lambda *_: pytest.fail("it ran"))
    for request in calls.values():
        assert "the call would take about" in answer(server, request).error
    server.close()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_falcon_180b_may_run_its_own_length(kind: torch.dtype) -> None:
    """Its published shape on one server that has a fifth of it, from shapes alone: nothing is allocated."""
    config = AutoDistributedConfig.from_pretrained("tiny-falcon")
    published = {"hidden_size": 14848, "num_attention_heads": 232, "num_kv_heads": 8, "num_hidden_layers": 80}
    for name, value in published.items():
        setattr(config, name, value)
    config.ffn_hidden_size, config.max_position_embeddings = 4 * 14848, 2048
    with torch.device("meta"):
        bridge = TransformerBridge(config.base_class(config).to(kind))
        stream = torch.empty(1, 2048, 14848, dtype=kind)
    checks = Checks(bridge, config, range(0, 16), Limits())
    checks.check(Request("forward", 0, 16, tensors={"stream": stream}))
    checks.check(Request("step", 0, 16, tensors={"stream": stream}))
    with pytest.raises(MessageError, match="the call would take about") as caught:  # a graph of 16 blocks
        checks.check(Request("forward", 0, 16, grad=True, tensors={"stream": stream}))
    assert caught.value.advice == {"fewer_blocks": True}
    checks.check(Request("forward", 0, 2, grad=True, tensors={"stream": stream}))


def test_the_peak_of_a_message_is_what_is_counted() -> None:
    """Python counts the bytes: those that came, in the buffer that they came in, and what is made of them."""
    message = pack_request(replace(FORWARD, tensors={"stream": torch.ones(64, 256, D_MODEL)}))
    tracemalloc.start()
    try:
        arrived = bytes(bytearray(message))
        unpack_request(arrived, Limits())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2 * len(message) < peak < PEAK * len(message) + 2**20


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("eager", [False, True])
def test_the_estimate_of_memory_is_above_what_is_used(name: str, kind: str, eager: bool) -> None:
    """Measured by torch's profiler: the most bytes that were allocated at one time in the call."""
    options = {"attn_implementation": "eager"} if eager else {}
    server = SpanServer(name, range(0, 3), **options)
    stream = torch.randn(2, 200, D_MODEL)
    tensors = {"stream": stream} | ({"grad.stream": stream} if kind == "backward" else {})
    actions = [Action("blocks.0.attn.hook_pattern", "scale", 0.5, heads=[1]), Action("blocks.1.attn.hook_z", "look")]
    request = Request(kind, 0, 3, actions, grad=kind == "backward", tensors=tensors)

    def run() -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            call = server._backward if kind == "backward" else server._forward
            call(unpack_request(pack_request(request), server.limits))
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    used = server._worker.submit(run).result()
    assert used > 2 * stream.nbytes
    server.checks.limits = replace(server.limits, memory=used)
    assert "the call would take about" in answer(server, request).error
    server.close()


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ANSWERABLE)
def test_errors_in_the_blocks_are_answered_without_their_text(kind: Any, monkeypatch: Any, caplog: Any) -> None:
    server = make()

    def run(*_: object) -> None:
        raise kind("/home/operator/secret \x1b[2J")

    before = server.handle(pack_request(FORWARD))
    monkeypatch.setattr(server, "_run", run)
    for request in (
        FORWARD,
        step(0, 5),
        replace(FORWARD, kind="backward", tensors={"stream": STREAM, "grad.stream": STREAM}),
    ):
        error = answer(server, request).error
        told = issubclass(kind, (ValueError, TypeError))
        assert ("secret" in error) == told and error.isprintable()
        assert told or "secret" in caplog.text
    monkeypatch.undo()
    assert not server.sessions.of_peer and server._given == {} and server.queue.load() == 0
    assert server.handle(pack_request(FORWARD)) == before
    server.close()


# -- what is held ----------------------------------------------------------------------------------


def caches(server: SpanServer) -> list[weakref.ref[Any]]:
    """The keys of every session, without holding them."""
    sessions = [session for of in server.sessions.of_peer.values() for session in of.values()]
    return [weakref.ref(layer.keys) for session in sessions for layer in set(session.cache.layers)]


def test_a_client_that_vanished_is_freed() -> None:
    server, now = make(session_seconds=10), [0.0]
    server.sessions.clock = lambda: now[0]
    assert not answer(server, step(0, 5), "gone").error
    held = caches(server)
    assert len(held) == 2 and all(keys() is not None for keys in held) and server.sessions.held("gone") == 10 * EACH
    gc.disable()
    try:
        now[0] = 10
        server.tidy()
        assert all(keys() is not None for keys in held)
        now[0] = 10.1
        server.tidy()
        assert all(keys() is None for keys in held)
    finally:
        gc.enable()
    assert (server.sessions.of_peer, server.sessions.held(), server.sessions.kept()) == ({}, 0, 0)
    server.close()


@pytest.mark.parametrize(
    "request_", [Request("info", 0, 0), FORWARD, Request("nothing", 0, 0)], ids=["info", "fwd", "bad"]
)
def test_any_call_frees_what_has_expired(request_: Request) -> None:
    server, now = make(session_seconds=10), [0.0]
    server.sessions.clock = lambda: now[0]
    answer(server, step(0, 5), "gone")
    held, now[0] = caches(server), 11
    server.handle(pack_request(request_), "other")
    assert held and all(keys() is None for keys in held)
    server.close()


@pytest.mark.parametrize("how", ["closed", "failed"])
def test_a_session_that_ends_is_freed_at_once(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make()
    answer(server, step(0, 5))
    held = caches(server)
    gc.disable()
    try:
        if how == "closed":
            answer(server, Request("close", 0, 0, session="a"))
        else:
            wrong = Action("blocks.2.attn.hook_z", "zero", heads=[99])
            assert "outside its 4 places" in answer(server, step(5, 1, actions=[wrong])).error
        assert all(keys() is None for keys in held)
    finally:
        gc.enable()
    server.close()


def test_nothing_of_a_call_stays(server: SpanServer) -> None:
    """Counted by the tensors that Python knows, after many calls of every kind."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    backward = replace(FORWARD, kind="backward", tensors={"stream": STREAM, "grad.stream": STREAM})
    calls = [
        FORWARD,
        replace(FORWARD, grad=True, actions=[replace(LOOK, do="keep")]),
        backward,
        replace(FORWARD, first=0),
    ]
    calls += [
        step(0, 5),
        Request("close", 0, 0, session="a"),
        replace(FORWARD, actions=[replace(LOOK, do="zero", heads=[9])]),
    ]
    for call in calls:
        server.handle(pack_request(call))
    before = tensors()
    for call in calls * 5:
        server.handle(pack_request(call))
    assert tensors() == before


def test_answers_that_are_kept_have_a_budget() -> None:
    look = [Action("blocks.2.hook_resid_post", "look")]
    one = len(make_answer(look))
    server = make(kept=2 * one + 10)
    for session in "abc":
        assert not answer(server, step(0, 5, session, actions=look), "one").error
    held = server.sessions.of_peer["one"]
    assert [session.last is not None for session in held.values()] == [True, True, False]
    assert server.sessions.kept("one") == 2 * one == sum(len(s.last[1]) for s in held.values() if s.last)
    # One that was not kept is not there to be given again: the client starts anew.
    assert not answer(server, step(0, 5, "a", actions=look), "one").error
    assert answer(server, step(0, 5, "c", actions=look), "one").info == {"held": 5}
    # A kept answer makes room for the next one of its text.
    assert not answer(server, step(5, 5, "a", actions=look), "one").error
    assert held["a:1-3"].last is not None and server.sessions.kept("one") == 2 * one
    answer(server, Request("close", 0, 0, session="a"), "one")
    assert server.sessions.kept("one") == one
    server.close()


def make_answer(actions: list[Action]) -> bytes:
    server = make()
    found = server.handle(pack_request(step(0, 5, actions=actions)))
    server.close()
    return found


def test_keys_and_values_of_all_peers() -> None:
    """Of room for 12 rows of 5 positions, a peer gets what is left for the others; somebody new finds room."""
    server = make(session_bytes_of_all=12 * 5 * EACH)
    taken = {}
    for peer in ("one", "two", "three"):
        taken[peer] = 0
        while not (reply := answer(server, step(0, 5, f"s{taken[peer]}", rows=1), peer)).error:
            taken[peer] += 1
        assert reply.info == {"retry": "full"} and "a peer may have as much as is left" in reply.error
        assert len(server.sessions.of_peer[peer]) == taken[peer]
    assert taken == {"one": 6, "two": 3, "three": 2}
    assert server.sessions.held() == 11 * 5 * EACH
    server.close()


def test_a_text_that_finds_no_room_is_not_lost() -> None:
    server = make(session_bytes=2 * 6 * EACH)
    assert not answer(server, step(0, 5)).error
    reply = answer(server, step(5, 2))
    assert reply.info == {"retry": "full"} and f"would take {2 * 7 * EACH} bytes" in reply.error
    assert server.sessions.of_peer["local"]["a:1-3"].length == 5
    assert not answer(server, step(5, 1)).error
    assert answer(server, step(0, 7, "b")).info == {"retry": "full"}
    assert list(server.sessions.of_peer["local"]) == ["a:1-3"]
    server.close()


def test_sessions_of_all_peers() -> None:
    sessions = Sessions(Limits(sessions=3, sessions_of_all=8))
    opened = {}
    for number in range(9):
        opened[number] = 0
        try:
            while opened[number] < 9:
                sessions.open(f"p{number}", f"s{opened[number]}", lambda: Session(None, 1, 1))
                opened[number] += 1
        except FullError:
            pass
    assert opened == {0: 3, 1: 3, 2: 1, 3: 1, 4: 0, 5: 0, 6: 0, 7: 0, 8: 0}
    assert len(sessions.of_peer) == 4  # nobody who was refused is remembered


def test_a_session_that_cannot_be_made_is_not_remembered() -> None:
    sessions = Sessions(Limits())

    def make() -> Session:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        sessions.open("one", "a", make)
    assert sessions.of_peer == {}


def test_sessions_of_others_are_out_of_reach(server: SpanServer) -> None:
    assert not answer(server, step(0, 5), "one").error
    for other in ("two", "on", "one:", "one:a", ""):
        answer(server, Request("close", 0, 0, session="a"), other)
        answer(server, Request("close", 0, 0, session=""), other)
        assert answer(server, step(5, 1), other).info == {"held": 0}
    assert list(server.sessions.of_peer) == ["one"]
    assert not answer(server, step(5, 1), "one").error
    server.sessions.of_peer.clear()


# -- calls at once ---------------------------------------------------------------------------------


class Queue:
    """A server whose blocks are held up, so that calls wait; notes whose call ran when."""

    def __init__(self, **limits: Any) -> None:
        self.server = make(**limits)
        self.gate, self.ran = threading.Event(), list[str]()
        self.answers: dict[str, list[Reply]] = {}
        self.threads: list[threading.Thread] = []
        run = self.server._answer

        def slow(message: bytes, peer: str) -> bytes:
            self.gate.wait(20)
            self.ran.append(peer)
            return run(message, peer)

        self.server._answer = slow  # type: ignore[method-assign]

    def send(self, peer: str, request: Request = FORWARD) -> None:
        """In a thread; returns when it waits or was answered."""
        load, found = self.server.queue.load(), self.answers.setdefault(peer, [])
        number = len(found)
        self.threads.append(threading.Thread(target=lambda: found.append(answer(self.server, request, peer))))
        self.threads[-1].start()
        end = time.monotonic() + 10
        while self.server.queue.load() == load and len(found) == number and time.monotonic() < end:
            time.sleep(0.001)

    def finish(self) -> None:
        self.gate.set()
        for thread in self.threads:
            thread.join(20)
        assert self.server.queue.load() == 0
        self.server.close()

    def errors(self, peer: str) -> list[str]:
        return [reply.error for reply in self.answers[peer] if reply.error]


def test_calls_at_once() -> None:
    queue = Queue(calls=3, calls_of_all=6)
    for peer, times in (("one", 5), ("two", 4), ("three", 2), ("four", 1)):
        for _ in range(times):
            queue.send(peer)
    queue.finish()
    served = {peer: sum(not reply.error for reply in replies) for peer, replies in queue.answers.items()}
    assert served == {"one": 3, "two": 2, "three": 1, "four": 0}
    assert all(
        reply.info == {"retry": "full"} for replies in queue.answers.values() for reply in replies if reply.error
    )
    assert queue.errors("one")[0] == "FullError: 3 calls of this peer and 3 of all wait or run, and no more may"


def test_peers_take_turns() -> None:
    queue = Queue()
    for peer in ("flood", "flood", "flood", "flood", "honest", "flood", "late", "honest"):
        queue.send(peer)
    queue.finish()
    assert queue.ran == ["flood", "honest", "late", "flood", "honest", "flood", "flood", "flood"]


def test_bytes_that_wait() -> None:
    size = len(pack_request(FORWARD))
    queue = Queue(waiting=2 * PEAK * size, waiting_of_all=6 * PEAK * size)
    for peer in ("one", "one", "one", "two", "two", "three", "three"):
        queue.send(peer)
    queue.finish()
    assert {peer: len(queue.errors(peer)) for peer in queue.answers} == {"one": 1, "two": 0, "three": 1}
    assert (
        queue.errors("one")[0]
        == f"FullError: {2 * PEAK * size} bytes of this peer and {2 * PEAK * size} of all wait or run, and no more may"
    )


def test_closing_waits_for_what_was_asked() -> None:
    queue = Queue()
    queue.send("one")
    queue.send("one")
    closing = threading.Thread(target=queue.server.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive()
    queue.gate.set()
    closing.join(20)
    for thread in queue.threads:
        thread.join(20)
    assert [bool(reply.error) for reply in queue.answers["one"]] == [False, False]
    with pytest.raises(RuntimeError, match="shutdown"):
        queue.server.handle(pack_request(FORWARD))
    assert queue.server.queue.load() == 0
