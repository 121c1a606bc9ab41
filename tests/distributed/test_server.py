"""A server by its messages alone: what it answers, what it refuses before anything is allocated, what it keeps."""

from __future__ import annotations

import json
import pickle
import re
import struct
import sys
from dataclasses import replace
from importlib.metadata import version

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from transformer_lens import TransformerBridge
from transformer_lens.distributed import Limits, LocalSpan, MessageError, SpanError, SpanServer
from transformer_lens.distributed.client.spans import ask
from transformer_lens.distributed.protocol.messages import (
    Action,
    Reply,
    Request,
    pack_reply,
    pack_request,
    too_much,
    unpack_reply,
    unpack_request,
)
from transformer_lens.distributed.server.sessions import Session, Sessions

D_MODEL = 128
STREAM = torch.randn(2, 5, D_MODEL)
HEAD = {
    "kind": "forward",
    "first": 1,
    "end": 3,
    "actions": [],
    "use_cache": True,
    "grad": False,
    "session": "",
    "start": 0,
}


@pytest.fixture(scope="module")
def server():
    found = SpanServer("tiny-mixtral", range(1, 3), limits=Limits(rows=4, actions=8, tensors=16, places=8))
    yield found
    found.close()


def forward(**changes) -> Request:
    return replace(Request("forward", 1, 3, tensors={"stream": STREAM}), **changes)


def answer(server: SpanServer, request: Request, peer: str = "local") -> Reply:
    return unpack_reply(server.handle(pack_request(request), peer), Limits())


def raw(head: object, tensors: bytes, magic: bytes = b"TLB1") -> bytes:
    packed = msgpack.packb(head)
    return magic + struct.pack("<I", len(packed)) + packed + tensors


def header(rows: object, data: bytes = b"") -> bytes:
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text + data


def alive(server: SpanServer) -> bool:
    return answer(server, forward()).tensors["stream"].shape == STREAM.shape


# -- what it answers -------------------------------------------------------------------------------


def test_requests_and_replies_survive_the_wire() -> None:
    actions = [Action("blocks.1.attn.hook_q", "add", 0.1, [0, -1], [1], None), Action("a", "look")]
    tensors = {"stream": STREAM, "mask": torch.ones(2, 5, dtype=torch.long), "value.0": torch.randn(3).bfloat16()}
    request = Request("backward", 1, 3, actions, False, True, "mine", 4, tensors)
    again = unpack_request(pack_request(request), Limits())
    assert {**vars(again), "tensors": 0} == {**vars(request), "tensors": 0}
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[name], tensors[name]) for name in tensors)
    reply = Reply({"x": STREAM.transpose(0, 1)[:, 1:]}, {"a": [1, "b"]}, "no", [2, 0])
    back = unpack_reply(pack_reply(reply), Limits())
    assert (back.info, back.error, back.turns) == (reply.info, reply.error, reply.turns)
    assert torch.equal(back.tensors["x"], reply.tensors["x"])


def test_info(server) -> None:
    info = answer(server, Request("info", 0, 0)).info
    assert info.pop("seconds_per_block") >= 0
    assert len(set(info.pop("weights"))) == 3 + 1  # each block, and what is outside
    assert info == {
        "dht_prefix": "tiny-mixtral",
        "model_type": "mixtral",
        "blocks": [1, 3],
        "n_layers": 3,
        "d_model": D_MODEL,
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "torch": version("torch").partition("+")[0],
        "transformers": version("transformers"),
        "hub_name": None,
        "revision": None,
        "state": "serving",
        "load": 1,  # this call itself
        "version": version("transformer-lens-bridge"),
        "sessions": 0,
        "kv_bytes": 0,
        "kv_bytes_free": Limits().session_bytes_of_all,
    }


def test_a_stretch_inside_the_span(server) -> None:
    local = TransformerBridge.boot_transformers("tiny-mixtral")
    for first, end in ((1, 3), (1, 2), (2, 3)):
        expected = local(STREAM, start_at_layer=first, stop_at_layer=end)
        assert torch.equal(answer(server, forward(first=first, end=end)).tensors["stream"], expected)


# -- what it refuses -------------------------------------------------------------------------------

LOOK = Action("blocks.1.attn.hook_q", "look")
ADD = replace(LOOK, do="add")
INDICES = Action("blocks.1.mlp.hook_expert_indices", "set")
MASK = torch.ones(2, 5, dtype=torch.long)

REFUSED = {
    "blocks it has not": (forward(first=0), "blocks 0 to 3 were asked for"),
    "no blocks": (forward(first=2, end=2), "blocks 2 to 2 were asked for"),
    "backwards": (forward(first=3, end=1), "were asked for"),
    "no stream": (forward(tensors={}), r"stream: expected a tensor \[batch, pos, 128\]"),
    "another width": (forward(tensors={"stream": STREAM[..., :7]}), "stream: expected"),
    "another dtype": (forward(tensors={"stream": STREAM.double()}), "stream: expected"),
    "rows": (
        forward(tensors={"stream": STREAM[:1].expand(5, -1, -1)}),
        "got 5 rows of 5 positions, and at most 4 of 256",
    ),
    "positions": (forward(tensors={"stream": torch.zeros(1, 257, D_MODEL)}), "got 1 rows of 257 positions"),
    "mask": (forward(tensors={"stream": STREAM, "mask": MASK[:1]}), "mask: expected whole numbers 0 ... 1"),
    "mask of 2": (forward(tensors={"stream": STREAM, "mask": MASK * 2}), "mask: expected"),
    "float mask": (forward(tensors={"stream": STREAM, "mask": MASK.float()}), "mask: expected"),
    "positions below 0": (forward(tensors={"stream": STREAM, "position_ids": -MASK}), "position_ids: expected"),
    "a tensor too many": (forward(tensors={"stream": STREAM, "more": MASK}), "tensors nobody asked for: more"),
    "a gradient too many": (forward(tensors={"stream": STREAM, "grad.stream": STREAM}), "tensors nobody asked for"),
    "a hook elsewhere": (forward(actions=[replace(LOOK, name="blocks.0.attn.hook_q")]), "is not in the blocks of this"),
    "a hook outside": (forward(actions=[replace(LOOK, name="unembed.hook_out")]), "is not in the blocks of this"),
    "no such hook": (forward(actions=[replace(LOOK, name="blocks.1.attn.hook_x")]), "no hook of these blocks is named"),
    "attributes": (forward(actions=[replace(LOOK, name="blocks.1.__class__")]), "no hook of these blocks is named"),
    "a hook that does not fire": (
        forward(end=2, actions=[replace(LOOK, name="blocks.2.attn.hook_q")]),
        r"hooks that did not fire in blocks 1 to 2: \['blocks.2.attn.hook_q'\]",
    ),
    "no value": (forward(actions=[ADD]), "add at 'blocks.1.attn.hook_q': expected one value"),
    "two values": (
        forward(actions=[replace(ADD, number=1.0)], tensors={"stream": STREAM, "value.0": STREAM}),
        "expected one value",
    ),
    "zero with a value": (forward(actions=[replace(ADD, do="zero", number=1.0)]), "expected no value"),
    "a look with a value": (
        forward(actions=[LOOK], tensors={"stream": STREAM, "value.0": STREAM}),
        "tensors nobody asked for: value.0",
    ),
    "experts that are none": (
        forward(actions=[INDICES], tensors={"stream": STREAM, "value.0": torch.tensor([0, 4])}),
        "holds the numbers of experts; it can be set, to 0 ... 3",
    ),
    "experts below 0": (
        forward(actions=[INDICES], tensors={"stream": STREAM, "value.0": torch.tensor([0, -1])}),
        "holds the numbers of experts",
    ),
    "experts added": (forward(actions=[replace(INDICES, do="add", number=1.0)]), "holds the numbers of experts"),
    "too many actions": (forward(actions=[LOOK] * 9), "the request has 9 actions, and at most 8 are read"),
    "too many places": (
        forward(actions=[replace(LOOK, heads=list(range(9)))]),
        "heads of an action: whole numbers, 1 to 8",
    ),
    "a heads that is outside": (forward(actions=[replace(ADD, do="zero", heads=[99])]), "are outside its 4 places"),
    "too many tensors": (
        forward(tensors={"stream": STREAM, **{f"t{n}": MASK for n in range(16)}}),
        "the tensors are no map, or more than 16",
    ),
    "backward of nothing": (forward(kind="backward"), "no gradient came with the request"),
    "another gradient": (
        forward(kind="backward", tensors={"stream": STREAM, "grad.stream": STREAM[:, :2]}),
        "grad.stream: expected the shape and dtype of the stream",
    ),
    "a gradient that does not fit": (
        forward(kind="backward", actions=[replace(LOOK, do="keep")], tensors={"stream": STREAM, "grad.0": STREAM}),
        r"grad.0: expected a gradient of shape \[2, 5, 4, 32\]",
    ),
    "rows that are not there": (
        forward(kind="step", tensors={"stream": STREAM, "rows": torch.tensor([0, 2])}),
        "rows: expected whole numbers 0 ... 1",
    ),
    "rows of another number": (
        forward(kind="step", tensors={"stream": STREAM, "rows": torch.tensor([0])}),
        "rows: expected whole numbers",
    ),
    "rows outside a step": (
        forward(tensors={"stream": STREAM, "rows": torch.tensor([0, 1])}),
        "nobody asked for: rows",
    ),
    "a session that is none": (forward(kind="step", session="a:b"), "session: got 'a:b'"),
    "a step with gradients": (forward(kind="step", actions=[replace(LOOK, do="gradient")]), "a step has no gradients"),
    "a step into nothing": (forward(kind="step", start=3), "holds 0 positions of 2 rows, and the step has 2 rows and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_are_refused(server, case) -> None:
    request, text = REFUSED[case]
    reply = answer(server, request)
    assert re.search(text, reply.error) and not reply.tensors
    assert not any(point.has_hooks() for point in server.bridge.hook_points())
    assert server.sessions.of_peer == {}
    assert alive(server)


BROKEN = {
    "empty": b"",
    "another protocol": raw(HEAD, save({"stream": STREAM}), magic=b"HTTP"),
    "cut head": raw(HEAD, b"")[:9],
    "a head that is longer than the message": b"TLB1" + struct.pack("<I", 2**31) + b"x",
    "not msgpack": b"TLB1" + struct.pack("<I", 1) + b"\xc1" + save({"stream": STREAM}),
    "a list": raw([1, 2], save({"stream": STREAM})),
    "a pickle for a head": b"TLB1" + struct.pack("<I", 50) + pickle.dumps({"a": STREAM})[:50],
    "an extension type": raw({**HEAD, "session": msgpack.ExtType(1, b"x")}, save({"stream": STREAM})),
    "a field too many": raw({**HEAD, "eval": "1"}, save({"stream": STREAM})),
    "a field too few": raw({k: v for k, v in HEAD.items() if k != "grad"}, save({"stream": STREAM})),
    "another kind": raw({**HEAD, "kind": "exec"}, save({"stream": STREAM})),
    "a float for a block": raw({**HEAD, "first": 1.0}, save({"stream": STREAM})),
    "a true for a block": raw({**HEAD, "first": True}, save({"stream": STREAM})),
    "a start beyond every text": raw({**HEAD, "start": 2**63}, save({"stream": STREAM})),
    "a long session": raw({**HEAD, "session": "x" * 65}, save({"stream": STREAM})),
    "another operation": raw({**HEAD, "actions": [{**vars(LOOK), "do": "exec"}]}, save({"stream": STREAM})),
    "half an action": raw({**HEAD, "actions": [{"name": "x"}]}, save({"stream": STREAM})),
    "no tensors": raw(HEAD, b""),
    "a header that is longer than the message": raw(HEAD, struct.pack("<Q", 2**40) + b"{}"),
    "no JSON": raw(HEAD, header(b"{'a'")),
    "deep JSON": raw(HEAD, header(b"[" * 100000)),
    "a dtype of ours": raw(HEAD, header({"stream": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x")),
    "a huge tensor": raw(
        HEAD, header({"stream": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"xxxx")
    ),
    "a shape below 0": raw(
        HEAD, header({"stream": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"xxxx")
    ),
    "no length": raw(HEAD, header({"stream": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
    "many axes": raw(HEAD, header({"stream": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, b"xxxx")),
    "offsets outside": raw(HEAD, header({"stream": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, b"xxxx")),
    "metadata": raw(HEAD, header({"__metadata__": {"a": "b"}})),
}


@pytest.mark.parametrize("case", BROKEN)
def test_messages_that_are_none(server, case) -> None:
    reply = unpack_reply(server.handle(BROKEN[case]), Limits())
    assert reply.error.startswith("MessageError: ") and not reply.tensors
    assert alive(server)


def test_large_messages_are_not_read() -> None:
    message = pack_request(forward())
    with pytest.raises(MessageError, match=rf"the message has {len(message)} bytes, and at most 100 are read"):
        unpack_request(message, Limits(message=100))
    with pytest.raises(MessageError, match="the head says it has"):
        unpack_request(message, Limits(head=10))
    assert unpack_request(message, Limits(message=len(message))).kind == "forward"


def test_the_size_of_an_answer_is_known_before_it_is_computed(monkeypatch) -> None:
    server = SpanServer("tiny-mixtral", range(1, 3), limits=Limits(answer=2 * 5 * 128 * 8))
    look = replace(LOOK, name="blocks.1.hook_mlp_out")
    assert not answer(server, forward(actions=[look])).error
    monkeypatch.setattr(server, "_run", lambda *_: pytest.fail("it ran"))
    reply = answer(server, forward(actions=[look, LOOK]))
    assert reply.error.startswith("MessageError: the answer would have up to 20480 bytes, and at most 10240 are made")
    server.close()


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["blocks.1.attn.hook_q", "blocks.2.mlp.hook_router_logits", "blocks.1.hook_resid_pre", "x"])
actions = st.fixed_dictionaries(
    {
        "name": names | values,
        "do": st.sampled_from(["look", "keep", "gradient", "set", "add", "zero", "scale", "project_out"]) | values,
        "number": st.none() | st.floats() | values,
        "positions": st.none() | st.lists(st.integers(-7, 7), max_size=3) | values,
        "heads": st.none() | st.lists(st.integers(-7, 7), max_size=3),
        "experts": st.none() | st.lists(st.integers(-7, 7), max_size=3),
    }
)
tensors = st.dictionaries(
    st.sampled_from(["stream", "mask", "position_ids", "value.0", "grad.stream", "grad.0", "x"]),
    st.sampled_from(
        [STREAM, STREAM[:, :1], torch.ones(2, 5, dtype=torch.long), torch.tensor(float("nan")), STREAM.half()]
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["forward", "backward", "step", "info"]) | values,
            "first": st.sampled_from([1, 2]) | values,
            "end": st.sampled_from([3, 2]) | values,
            "actions": st.lists(actions, max_size=3) | values,
            "use_cache": st.booleans() | values,
            "grad": st.booleans(),
            "session": st.text(max_size=3),
            "start": st.integers(0, 9) | st.integers(0, 2**64 - 1),
        }
    ),
    parts=tensors,
    valid=st.booleans(),
)
def test_hostile_requests_never_break_a_server(server, head, parts, valid) -> None:
    parts = {"stream": STREAM, **parts} if valid else parts
    plain = {name: tensor.contiguous().clone() for name, tensor in parts.items()}
    reply = unpack_reply(server.handle(raw(head, save(plain)), "hostile"), Limits())
    assert bool(reply.error) != bool(reply.tensors or reply.info.keys() - {"retry", "fewer_blocks"})
    assert not any(point.has_hooks() for point in server.bridge.hook_points())
    server.sessions.of_peer.clear()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_messages_never_break_a_server(server, data) -> None:
    message = bytearray(pack_request(forward(actions=[LOOK])))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, min(len(message) - 1, 600)))] = data.draw(st.integers(0, 255))
    message = message[: data.draw(st.integers(0, len(message)))] if data.draw(st.booleans()) else message
    unpack_reply(server.handle(bytes(message)), Limits())
    assert not any(point.has_hooks() for point in server.bridge.hook_points())


def test_the_server_is_as_before_after_all_that(server) -> None:
    local = TransformerBridge.boot_transformers("tiny-mixtral")
    assert torch.equal(answer(server, forward()).tensors["stream"], local(STREAM, start_at_layer=1, stop_at_layer=3))


def test_no_pickle_is_read_or_written(server, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    for module in ("pickle", "_pickle"):
        for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
            monkeypatch.setattr(sys.modules[module], name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    for request in (forward(actions=[LOOK]), forward(kind="step"), Request("info", 0, 0)):
        assert not answer(server, request, "pickler").error
    gradient = forward(kind="backward", tensors={"stream": STREAM, "grad.stream": STREAM})
    assert not answer(server, gradient).error
    server.sessions.drop("pickler", "")


# -- what a client refuses of a server -------------------------------------------------------------


class Liar:
    """A span that changes what its server answers."""

    def __init__(self, change) -> None:
        self.span = LocalSpan("tiny-mixtral", range(0, 3))
        self.blocks = self.span.blocks
        self.peer = self.span.peer
        self.change = change

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        reply = unpack_reply(self.span.send(message), Limits())
        if reply.tensors:
            self.change(reply)
        return pack_reply(reply)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda reply: reply.tensors.pop("stream"), "the server answered with the tensors"),
        (lambda reply: reply.tensors.update(more=STREAM), "the server answered with the tensors"),
        (lambda reply: reply.tensors.update(stream=STREAM[:, :2]), "the server answered stream as"),
        (lambda reply: reply.tensors.update(stream=STREAM.double()), "the server answered stream as torch.float64"),
        (lambda reply: reply.turns.append(0), r"the server answered for the hooks \[0, 0\], expected \[0\]"),
        (lambda reply: reply.turns.clear(), "the server answered for the hooks"),
    ],
)
def test_answers_that_are_refused(change, text) -> None:
    from transformer_lens.distributed import AutoDistributedModelForCausalLM

    model = AutoDistributedModelForCausalLM.from_pretrained("tiny-mixtral", spans=[Liar(change)], max_retries=0)
    with pytest.raises(SpanError, match=text):
        TransformerBridge(model).run_with_cache(torch.tensor([[5, 6, 7, 8, 9]]), names_filter="blocks.1.attn.hook_q")


# -- sessions --------------------------------------------------------------------------------------


def step(start: int, end: int, whole: torch.Tensor, **changes) -> Request:
    return forward(kind="step", session="a", start=start, tensors={"stream": whole[:, start:end]}, **changes)


def test_steps_are_the_whole_text_in_parts(server) -> None:
    local = TransformerBridge.boot_transformers("tiny-mixtral")
    whole = torch.randn(2, 9, D_MODEL)
    with torch.no_grad():
        expected = local(whole, start_at_layer=1, stop_at_layer=3)
    parts = []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        request = step(start, end, whole, actions=[replace(LOOK, name="blocks.1.attn.hook_pattern")])
        reply = answer(server, request, "one")
        assert reply.tensors["seen.0"].shape == (2, 4, end - start, end)
        again = answer(server, request, "one")
        assert torch.equal(again.tensors["stream"], reply.tensors["stream"])
        assert server.sessions.of_peer["one"]["a:1-3"].length == end
        parts.append(reply.tensors["stream"])
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=2e-5)
    for request in (step(4, 5, whole), step(8, 9, whole), step(0, 4, whole)):
        assert "holds 9 positions of 2 rows" in answer(server, request, "one").error
    assert server.sessions.of_peer["one"]["a:1-3"].length == 9
    server.sessions.drop("one", "a")


def test_steps_of_some_blocks_and_closing(server) -> None:
    local = TransformerBridge.boot_transformers("tiny-mixtral")
    whole = torch.randn(2, 9, D_MODEL)
    with torch.no_grad():
        expected = local(whole, start_at_layer=2, stop_at_layer=3)
    steps = [answer(server, step(start, end, whole, first=2), "one") for start, end in ((0, 4), (4, 5), (5, 9))]
    assert torch.allclose(torch.cat([reply.tensors["stream"] for reply in steps], dim=1), expected, atol=2e-5)
    assert not answer(server, step(0, 4, whole), "one").error
    assert list(server.sessions.of_peer["one"]) == ["a:2-3", "a:1-3"]
    held = server.sessions.of_peer["one"]
    assert held["a:1-3"].bytes_per_position == 2 * held["a:2-3"].bytes_per_position
    assert answer(server, Request("close", 0, 0, session="b"), "one").info == {"closed": "b"}
    assert len(held) == 2
    answer(server, Request("close", 0, 0, session="a"), "two")
    assert len(held) == 2
    answer(server, Request("close", 0, 0, session="a"), "one")
    assert server.sessions.of_peer == {}


def test_rows_are_reordered_once_in_each_block(server) -> None:
    whole = torch.randn(2, 9, D_MODEL)
    for first in (1, 2):
        order = torch.tensor([1, 0])
        answer(server, step(0, 4, whole, first=first), "one")
        swapped = step(4, 5, whole, first=first)
        swapped.tensors["rows"] = order
        got = answer(server, swapped, "one").tensors["stream"]
        answer(server, step(0, 4, whole[order], first=first), "two")
        assert torch.equal(got, answer(server, step(4, 5, whole, first=first), "two").tensors["stream"])
        server.sessions.drop("one", "a")
        server.sessions.drop("two", "a")


def test_peers_do_not_see_each_other(server) -> None:
    whole = torch.randn(2, 9, D_MODEL)
    answer(server, step(0, 4, whole), "one")
    assert "holds 0 positions" in answer(server, step(4, 5, whole), "two").error
    assert list(server.sessions.of_peer) == ["one"]
    server.sessions.drop("one", "a")


def test_a_step_that_fails_leaves_no_half_filled_cache(server) -> None:
    whole = torch.randn(2, 9, D_MODEL)
    answer(server, step(0, 4, whole), "one")
    broken = step(4, 5, whole, actions=[Action("blocks.2.attn.hook_z", "zero", heads=[99])])
    assert "outside its 4 places" in answer(server, broken, "one").error
    assert server.sessions.of_peer == {}
    for start, end in ((0, 4), (4, 5)):  # the client replays the same parts
        assert not answer(server, step(start, end, whole), "one").error
    server.sessions.drop("one", "a")


def test_budgets_and_expiry() -> None:
    now = [0.0]
    limits = Limits(sessions=2, session_bytes=1000, session_seconds=10)
    sessions = Sessions(limits, clock=lambda: now[0])
    make = lambda: Session(object(), bytes_per_position=10, rows=2)  # noqa: E731
    first = sessions.open("one", "a", make)
    assert sessions.open("one", "a", make) is first
    first.length = 30
    sessions.check_room("one", first, 20)
    with pytest.raises(ValueError, match="keys and values of this peer would take 1020 bytes, and it may have 1000"):
        sessions.check_room("one", first, 21)
    other = sessions.open("one", "b", make)
    with pytest.raises(ValueError, match="would take 1020 bytes"):
        sessions.check_room("one", other, 21)
    with pytest.raises(ValueError, match="this peer has 2 sessions, as many as it may"):
        sessions.open("one", "c", make)
    sessions.open("two", "a", make)
    now[0] = 9
    sessions.open("one", "b", make)
    now[0] = 12
    sessions.expire()
    assert {peer: list(of) for peer, of in sessions.of_peer.items()} == {"one": ["b"]}


def test_the_servers_budget_counts_keys_and_values() -> None:
    each = 2 * 2 * 2 * 32 * 4  # keys and values, two blocks, two heads, d_head, float32
    server = SpanServer("tiny-mixtral", range(1, 3), limits=Limits(session_bytes=each * 2 * 6))
    whole = torch.randn(2, 9, D_MODEL)
    assert not answer(server, step(0, 6, whole)).error
    cache = server.sessions.of_peer["local"]["a:1-3"].cache
    held = sum(t.numel() * t.element_size() for layer in set(cache.layers) for t in (layer.keys, layer.values))
    assert held == each * 2 * 6
    assert f"would take {each * 2 * 7} bytes" in answer(server, step(6, 7, whole)).error
    server.close()


def test_ask_says_which_blocks_and_who(server) -> None:
    span = LocalSpan("tiny-mixtral", range(1, 3))
    with pytest.raises(SpanError, match=f"^blocks 1 to 3 on {span.peer}: MessageError: blocks 0 to 3 were asked for"):
        ask(span, forward(first=0))
    size = len(pack_request(forward()))
    with pytest.raises(SpanError, match=f"^blocks 1 to 3 on {span.peer}: the request has {size} bytes, .* at most 99"):
        ask(span, forward(), Limits(message=99))
    assert ask(span, forward(), Limits(message=size)).tensors
    span.close()


class Silent:
    """A span that is not to be asked."""

    blocks, peer = range(0, 80), "silent"

    def send(self, message: bytes, timeout: float | None = None) -> bytes:
        raise AssertionError("a message that nobody would read was sent")


def test_too_many_places_are_refused_before_anything_is_sent() -> None:
    """As deep prompts of 1500 positions in 80 blocks would have; the server's own check, at the client."""
    for places, refused in ((1000, False), (1500, True)):
        actions = [Action(f"blocks.{n}.hook_resid_pre", "add", positions=list(range(places))) for n in range(80)]
        message = pack_request(Request("forward", 0, 80, actions=actions))
        head = struct.unpack_from("<I", message, 4)[0]
        assert (head > Limits().head) is refused
        if refused:
            with pytest.raises(
                SpanError, match=f"80 on silent: the hooks of the request take {head} bytes, and .* 262"
            ):
                ask(Silent(), Request("forward", 0, 80, actions=actions))
            with pytest.raises(MessageError, match=f"the head says it has {head} bytes"):
                unpack_request(message, Limits())
        else:
            assert too_much(message, Limits()) == too_much(message, Limits(head=head)) == ""
            assert too_much(message, Limits(head=head - 1)) != ""
            assert len(unpack_request(message, Limits(head=head)).actions) == 80
            with pytest.raises(MessageError, match=f"the head says it has {head} bytes; at most {head - 1}"):
                unpack_request(message, Limits(head=head - 1))
    many = Request("forward", 0, 80, tensors={f"value.{n}": torch.zeros(1) for n in range(4000)})
    with pytest.raises(SpanError, match="fewer hooks"):  # the header of the tensors
        ask(Silent(), many)


REPLY = {"error": "", "info": {}, "turns": []}


@pytest.mark.parametrize(
    "head",
    [
        {**REPLY, "more": 1},
        {"error": ""},
        {**REPLY, "error": None},
        {**REPLY, "info": [1]},
        {**REPLY, "turns": ["a"]},
        {**REPLY, "turns": [True]},
        [],
    ],
)
def test_replies_that_are_none(head) -> None:
    with pytest.raises(MessageError):
        unpack_reply(raw(head, save({"x": STREAM})), Limits())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_replies_raise_a_message_error_or_are_read(data) -> None:
    message = bytearray(pack_reply(Reply({"stream": STREAM}, {"a": 1}, "", [0])))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    try:
        reply = unpack_reply(bytes(message), Limits())
    except MessageError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in reply.tensors.values())


def test_declared_sizes_are_compared_before_anything_is_read() -> None:
    for shape, declared in (([2**40, 2**40], 2**82), ([3], 12)):
        rows = {"stream": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
        with pytest.raises(MessageError, match=rf"the tensors say they have {declared} bytes, and there are 4"):
            unpack_request(raw(HEAD, header(rows, b"xxxx")), Limits())
