"""Hostile messages, made from valid ones: changed fields, headers, tensors and bytes, cuts, splices, noise."""

from __future__ import annotations

import json
import pickle
import struct
from typing import Any

import msgpack
import torch
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from transformer_lens.distributed import Limits
from transformer_lens.distributed.protocol.messages import Action, Request

D_MODEL, BLOCKS = 128, range(1, 3)
LIMITS = Limits(
    message=2**20,
    head=2**14,
    tensors=40,
    actions=16,
    places=16,
    answer=2**21,
    rows=4,
    memory=2**26,
    work=2**22,
    sessions=3,
    sessions_of_all=8,
    session_bytes=2**19,
    session_bytes_of_all=2**20,
    kept=2**18,
    kept_of_all=2**19,
)
"""Small ones, so that fuzzing reaches them."""

PAYLOAD = pickle.dumps(Exception("a pickle"))
Parts = tuple[Any, dict[str, Any], bytes]
"""Head of a message, header of its tensors, and their bytes."""


def head_of(request: Request) -> dict[str, Any]:
    """A request's head as it goes over the wire."""
    head = {**vars(request), "actions": [dict(vars(action)) for action in request.actions]}
    del head["tensors"]
    return head


def parts_of(request: Request) -> Parts:
    """A request in parts that can be changed one by one."""
    data = save({name: tensor.contiguous().clone() for name, tensor in request.tensors.items()})
    (size,) = struct.unpack_from("<Q", data)
    return head_of(request), json.loads(data[8 : 8 + size]), data[8 + size :]


def header_bytes(header: Any) -> bytes:
    """Lists of pairs become maps, in which a name may stand twice."""
    if isinstance(header, bytes):
        return header
    if isinstance(header, list) and header and all(isinstance(pair, tuple) for pair in header):
        rows = ",".join(f"{json.dumps(name)}:{json.dumps(row)}" for name, row in header)
        return f"{{{rows}}}".encode()
    return json.dumps(header).encode()


def message_of(parts: Parts, magic: bytes = b"TLB1") -> bytes:
    """The bytes of a message in parts."""
    head, header, data = parts
    packed = head if isinstance(head, bytes) else msgpack.packb(head)
    text = header_bytes(header)
    return magic + struct.pack("<I", len(packed)) + packed + struct.pack("<Q", len(text)) + text + data


def seeds(experts: bool) -> list[Request]:
    """Valid requests of every kind; `experts` for a Mixtral."""
    torch.manual_seed(3)
    stream, mask = torch.randn(2, 3, D_MODEL), torch.ones(2, 3, dtype=torch.long)
    q, z, scores = (f"blocks.{n}.attn.hook_{what}" for n, what in ((1, "q"), (2, "z"), (1, "attn_scores")))
    vector = torch.randn(D_MODEL)
    edits = [
        Action(q, "look"),
        Action(z, "scale", 0.5, heads=[0, -1], positions=[-1]),
        Action("blocks.2.hook_mlp_out", "add"),
        Action("blocks.1.attn.hook_pattern", "keep"),
        Action("blocks.1.hook_resid_pre", "project_out"),
        Action(scores, "zero", heads=[1]),
    ]
    given = {"stream": stream, "mask": mask, "value.2": vector, "value.4": vector}
    gradients = [Action(q, "gradient"), Action(z, "keep"), Action(scores, "set", -1.0)]
    found = [
        Request("info", 0, 0),
        Request("close", 0, 0, session="mine"),
        Request("forward", 1, 3, tensors={"stream": stream}),
        Request(
            "forward", 2, 3, edits[1:2], True, True, tensors={"stream": stream, "position_ids": mask.cumsum(1) - 1}
        ),
        Request("forward", 1, 3, edits, tensors=given),
        Request("backward", 1, 3, tensors={"stream": stream, "grad.stream": stream}),
        Request(
            "backward",
            1,
            3,
            gradients,
            grad=True,
            tensors={"stream": stream, "grad.stream": stream, "grad.1": torch.randn(2, 3, 4, 32)},
        ),
        Request("step", 1, 3, session="mine", tensors={"stream": stream}),
        Request("step", 1, 3, edits[:1], session="mine", start=3, tensors={"stream": stream[:, :1]}),
        Request("step", 1, 3, session="mine", start=3, tensors={"stream": stream, "rows": torch.tensor([1, 1])}),
        Request("step", 2, 3, session="b2", tensors={"stream": stream, "mask": mask}),
    ]
    if experts:
        router = [Action("blocks.1.mlp.hook_router_logits", "scale", 2.0, experts=[1])]
        indices = [Action("blocks.2.mlp.hook_expert_indices", "set"), Action("blocks.2.mlp.hook_expert_out", "look")]
        found += [
            Request("forward", 1, 3, router, tensors={"stream": stream}),
            Request("forward", 1, 3, indices, tensors={"stream": stream, "value.0": torch.tensor([0, 3])}),
        ]
    return found


NUMBERS = [0, 1, -1, 2, 3, 4, 5, 99, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [0.0, -0.0, 0.5, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 5e-324]
ODD: list[Any] = [
    *(None, True, False, "", "a", "mine", "é" * 40, "\x00", "../../etc/passwd", "x" * 2000),
    *(b"", PAYLOAD, [], {}, [[]], {"a": 1}, [None], [0] * 17, [2**63], [-(2**63)], [1.5], [0, 0], ["a"]),
    *(msgpack.ExtType(1, PAYLOAD), msgpack.Timestamp(1)),
]
odd = st.sampled_from([*NUMBERS, *FLOATS, *ODD]) | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=70)
LENGTHS = st.sampled_from(
    [0, 1, 2, 3, 7, 64, 128, 256, 2**20, 2**31, 2**40, 2**62, 2**63, 2**70, 10**400, -1, True, 1.0]
)
WORDS = {
    "kind": ["forward", "backward", "step", "close", "info", "exec", "__class__"],
    "do": ["look", "keep", "gradient", "set", "add", "scale", "zero", "project_out", "exec"],
    "name": [
        *("blocks.1.attn.hook_q", "blocks.2.attn.hook_pattern", "blocks.2.mlp.hook_out", "blocks.01.attn.hook_q"),
        *(
            "blocks.1.hook_resid_pre",
            "blocks.0.hook_resid_pre",
            "blocks.99999.attn.hook_q",
            "blocks.\u0661.hook_attn_in",
        ),
        *("blocks.1.attn.hook_k", "blocks.1.attn.hook_rot_k", "blocks.1.hook_attn_in", "blocks.1.ln1.hook_scale"),
        *("blocks.1.mlp.hook_expert_indices", "blocks.2.mlp.hook_expert_weights", "blocks.1.mlp.hook_post"),
        *("blocks.1.attn.__class__", "blocks.1.attn.hook_q.fwd_hooks", "unembed.hook_out", "blocks.1"),
    ],
    "dtype": ["F32", "BF16", "F16", "F64", "I64", "I32", "BOOL", "U8", "F8_E4M3", "C64", "f32", "F4"],
}
TENSORS: list[Tensor] = [
    *(torch.randn(2, 3, D_MODEL), torch.randn(1, 1, D_MODEL), torch.randn(4, 16, D_MODEL), torch.zeros(2, 3, D_MODEL)),
    *(torch.full((2, 3, D_MODEL), value) for value in (float("nan"), float("inf"), 1e38, 1e-45)),
    *(torch.randn(2, 3, D_MODEL).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    *(torch.tensor(value) for value in (0.0, float("nan"), 1, -1, 2**62)),
    *(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), 255), torch.full((2, 3), 2**31), torch.full((1, 3), 2)),
    *(
        torch.tensor([0, 0]),
        torch.tensor([1, 0]),
        torch.tensor([0, 255]),
        torch.tensor([-1, 0]),
        torch.zeros(1, 1, 1, 1, 1),
    ),
    *(torch.randn(D_MODEL), torch.zeros(D_MODEL), torch.randn(32), torch.randn(2, 3, 4, 32), torch.randn(2, 4, 3, 3)),
]
TENSOR_NAMES = ["stream", "mask", "position_ids", "rows", "grad.stream", "x", "", "__metadata__", "value.-1", "é"]
TENSOR_NAMES += [f"{what}.{n}" for what in ("value", "grad", "seen") for n in range(4)]


@st.composite
def a_changed_head(draw: Any, parts: Parts) -> Parts:
    """A field of the head or of an action is another one, is missing, or is new."""
    head, header, data = parts
    head = {**head, "actions": [dict(action) for action in head["actions"]]}
    rows = [head, *head["actions"]]
    row = draw(st.sampled_from(rows))
    field = draw(st.sampled_from([*row, "more"]))
    how = draw(st.integers(0, 9))
    if how == 0:
        row.pop(field, None)
    elif field in ("first", "end", "start") and how < 7:
        row[field] = draw(st.integers(0, 9) | st.sampled_from(NUMBERS))
    elif field in ("positions", "heads", "experts") and how < 7:
        row[field] = draw(st.lists(st.integers(-5, 5) | st.sampled_from(NUMBERS), min_size=1, max_size=17))
    elif field in WORDS and how < 8:
        row[field] = draw(st.sampled_from(WORDS[field]))
    elif field == "actions" and how < 8 and head["actions"]:
        head["actions"] = head["actions"] * draw(st.integers(0, 9))
    else:
        row[field] = draw(odd)
    return head, header, data


@st.composite
def a_changed_header(draw: Any, parts: Parts) -> tuple[Any, Any, bytes]:
    """A tensor's dtype, shape or place is another one; names stand twice, or mean the same bytes."""
    head, header, data = parts
    header = {name: dict(row) for name, row in header.items()}
    if not header:
        return head, draw(st.sampled_from([b"", b"[]", b"{", b"null", b'{"a":1}', b"\xff\xfe{\0}\0", PAYLOAD])), data
    name = draw(st.sampled_from(list(header)))
    row, how = header[name], draw(st.integers(0, 7))
    if how == 0:
        row["dtype"] = draw(st.sampled_from(WORDS["dtype"]) | odd.filter(_is_json))
    elif how == 1:
        row["shape"] = draw(st.lists(LENGTHS, max_size=6))
    elif how == 2:
        row["data_offsets"] = draw(st.lists(LENGTHS | st.integers(0, len(data)), max_size=3))
    elif how == 3:
        row[draw(st.sampled_from(["more", "dtype", "shape"]))] = draw(odd.filter(_is_json))
    elif how == 4:
        return head, [*header.items(), (name, draw(st.sampled_from(list(header.values()))))], data
    elif how == 5:
        header[draw(st.sampled_from(TENSOR_NAMES))] = dict(row)
    elif how == 6:
        other = draw(st.sampled_from(list(header)))
        header[name], header[other] = header[other], header[name]
    else:
        header[draw(st.sampled_from(TENSOR_NAMES))] = header.pop(name)
    return head, header, data


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


@st.composite
def another_tensor(draw: Any, request: Request) -> Parts:
    """Well-formed tensors that do not belong there, or do."""
    tensors = dict(request.tensors)
    for _ in range(draw(st.integers(1, 2))):
        names = st.sampled_from([*tensors, *TENSOR_NAMES])
        tensors[draw(names)] = draw(st.sampled_from(TENSORS))
    tensors.pop("__metadata__", None)
    if tensors and draw(st.integers(0, 3)) == 0:
        tensors.pop(draw(st.sampled_from(list(tensors))))
    return parts_of(Request(**{**vars(request), "tensors": tensors}))


VALUES = [0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e38, 1e-45]


@st.composite
def other_values(draw: Any, request: Request) -> Parts:
    """Tensors of the right names, shapes and dtypes that hold something else: these run."""
    tensors = dict(request.tensors)
    for name in draw(st.lists(st.sampled_from(list(tensors)), max_size=3)) if tensors else ():
        if tensors[name].is_floating_point():
            tensors[name] = torch.full_like(tensors[name], draw(st.sampled_from(VALUES)))
        else:
            tensors[name] = torch.full_like(tensors[name], draw(st.sampled_from([0, 1, 2, 3, 255])))
    session = draw(st.sampled_from(["mine", "b2", "honest", "", "x1", "x2", "x3"])) if request.session else ""
    start = draw(st.integers(0, 4)) if request.kind == "step" else 0
    return parts_of(Request(**{**vars(request), "tensors": tensors, "session": session, "start": start}))


@st.composite
def hostile_messages(draw: Any, requests: list[Request]) -> bytes:
    """One message. Most are nearly valid, since those come furthest."""
    request = draw(st.sampled_from(requests))
    parts: Any = parts_of(request)
    how = draw(st.integers(0, 14))
    if how >= 12:
        parts = draw(other_values(request))
    elif how >= 10:
        parts = draw(another_tensor(request))
    if how in (0, 1, 2, 10):
        parts = draw(a_changed_head(parts))
        if how == 1:
            parts = (
                draw(a_changed_head(parts)) if isinstance(parts[0].get("actions"), list) and _rows(parts[0]) else parts
            )
    elif how in (3, 4):
        parts = draw(a_changed_header(parts))
    message = message_of(parts)
    if how == 5:
        message = _with_bytes(draw, message)
    elif how == 6:
        message = message[: draw(st.integers(0, len(message)))]
    elif how == 7:
        other = message_of(parts_of(draw(st.sampled_from(requests))))
        message = message[: draw(st.integers(0, len(message)))] + other[draw(st.integers(0, len(other))) :]
    elif how == 8:
        at = draw(st.integers(0, len(message)))
        message = message[:at] + draw(st.sampled_from([PAYLOAD, b"\0" * 99, b"TLB1", b"\xff" * 8])) + message[at:]
    elif how == 9:
        message = draw(st.binary(max_size=300) | st.binary(max_size=300).map(lambda noise: b"TLB1" + noise))
    return message


def _rows(head: dict[str, Any]) -> bool:
    return all(isinstance(action, dict) for action in head["actions"])


def _with_bytes(draw: Any, message: bytes) -> bytes:
    changed = bytearray(message)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(changed), 900) - 1) | st.integers(0, len(changed) - 1))
        changed[at] = draw(st.integers(0, 255))
    return bytes(changed)


def parts_of_reply(answer: bytes) -> Parts:
    """A reply in parts that can be changed one by one."""
    (size,) = struct.unpack_from("<I", answer, 4)
    head, data = msgpack.unpackb(answer[8 : 8 + size]), answer[8 + size :]
    (size,) = struct.unpack_from("<Q", data)
    return head, json.loads(data[8 : 8 + size]), data[8 + size :]
