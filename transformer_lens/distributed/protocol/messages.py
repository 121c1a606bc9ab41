"""Messages between client and server: a msgpack head and safetensors, checked against `Limits` before one is made."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from transformer_lens.checks import is_whole, needed

MISSING = "messages between clients and servers need msgpack: pip install 'transformer-lens-bridge[swarm]'"
MAGIC = b"TLB1"
PEAK = 3  # how many times a message is in memory while it is read: as it came, its tensors' part, and the tensors
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64}
"""The dtypes of tensors in a message, by safetensors name."""
FLOATS = tuple(dtype for dtype in DTYPES.values() if dtype.is_floating_point)
INTEGER = DTYPES["I64"]

KINDS = ("forward", "backward", "step", "close", "info")
READS = ("look", "keep", "gradient")  # actions that return the activation, the activation in the graph, or its gradient
EDITS = ("set", "add", "scale", "zero", "project_out")


class MessageError(ValueError):
    """A malformed or oversized message; `advice` tells the client what it may do about it."""

    def __init__(self, text: str, **advice: Any) -> None:
        super().__init__(text)
        self.advice = advice


class FullError(ValueError):
    """No room for a valid call; another server may have it, or this one later."""

    advice: ClassVar[dict[str, Any]] = {"retry": "full"}


class SpanError(RuntimeError):
    """A server refused, or answered something else; `info` is what it added."""

    def __init__(self, text: str, info: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.info = info or {}


class SpanUnreachable(SpanError):
    """No usable answer came: the peer is gone, too slow, or broke off. Another server may answer."""


@dataclass(frozen=True)
class Limits:
    """The largest message read, and the largest answer computed, in bytes."""

    message: int = 256 * 2**20
    head: int = 256 * 2**10
    tensors: int = 4096
    rank: int = 5
    actions: int = 2048
    places: int = 4096
    """Positions, heads or experts of one edit."""
    answer: int = 2**30
    rows: int = 256
    memory: int = 16 * 2**30
    """What a running call may take, estimated from its shapes."""
    work: int = 2**36
    """Numbers that a call may compute in its streams and at its hooks."""
    sessions: int = 16
    """Sessions of one peer."""
    sessions_of_all: int = 1024
    session_bytes: int = 2**30
    """Keys and values of one peer."""
    session_bytes_of_all: int = 4 * 2**30
    session_seconds: float = 600
    """A session is forgotten after this long without a request."""
    kept: int = 2**28
    """One peer's answers, kept in case they are asked for again."""
    kept_of_all: int = 2**30
    calls: int = 8
    """One peer's waiting or running calls."""
    calls_of_all: int = 64
    waiting: int = 2**30
    """What one peer's messages of waiting or running calls take, `PEAK` times their size."""
    waiting_of_all: int = 2**31


def limits_of(given: Mapping[str, Any] | None) -> Limits:
    """The limits with some changed. Raises `ValueError` for an unknown one, and for one that is not above 0 and finite.

    >>> limits_of({"memory": 64 * 2**30}).memory
    68719476736
    """
    names = [field.name for field in fields(Limits)]
    for name, number in (given or {}).items():
        if name not in names:
            raise ValueError(f"limits: got {name!r}, expected one of {', '.join(names)}")
        if type(number) not in (int, float) or not 0 < number < math.inf:
            raise ValueError(f"{name}: got {number}, expected a number above 0 and finite")
    return Limits(**(given or {}))


@dataclass(frozen=True)
class Action:
    """One action at a hook on the server; actions at one name run in order."""

    name: str
    do: str
    number: float | None = None
    positions: list[int] | None = None
    heads: list[int] | None = None
    experts: list[int] | None = None


@dataclass
class Request:
    """A client's request to a span: run blocks `first` to `end`, with these actions inside."""

    kind: str
    first: int
    end: int
    actions: list[Action] = field(default_factory=list)
    use_cache: bool = True
    grad: bool = False
    session: str = ""
    start: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Reply:
    """The reply: tensors by name, facts about the server, or an error."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    turns: list[int] = field(default_factory=list)  # the reading actions, in the order in which the model reached them


def printable(text: str, most: int = 2000) -> str:
    """Another process's text without control characters, cut to `most`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])[:most]


def _frame(head: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    packed = needed("msgpack", MISSING).packb(head)
    # One buffer for each tensor: safetensors refuses shared and strided ones.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return b"".join([MAGIC, struct.pack("<I", len(packed)), packed, save(plain)])


def pack_request(request: Request) -> bytes:
    head = {**vars(request), "actions": [vars(action) for action in request.actions]}
    tensors = head.pop("tensors")
    return _frame(head, tensors)


def pack_reply(reply: Reply) -> bytes:
    return _frame({"error": reply.error, "info": reply.info, "turns": reply.turns}, reply.tensors)


def too_much(message: bytes, limits: Limits) -> str:
    """Why the size of our own message would be refused; empty if it would not."""
    if len(message) > limits.message:
        return f"the request has {len(message)} bytes, and a message has at most {limits.message}"
    (head,) = struct.unpack_from("<I", message, 4)
    (names,) = struct.unpack_from("<Q", message, 8 + head)
    if max(head, names) > limits.head:
        return (
            f"the hooks of the request take {max(head, names)} bytes, and a message has room for {limits.head}; each "
            "position, head and expert that an edit names counts: use fewer hooks, or fewer places, or edit all of "
            "them, or let a server have fewer blocks"
        )
    return ""


REQUEST_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in KINDS,
    "first": lambda value: is_whole(value) and 0 <= value < 2**31,
    "end": lambda value: is_whole(value) and 0 <= value < 2**31,
    "actions": lambda value: isinstance(value, list),
    "use_cache": lambda value: isinstance(value, bool),
    "grad": lambda value: isinstance(value, bool),
    "session": lambda value: isinstance(value, str) and len(value) <= 64 and (value.isalnum() or not value),
    "start": lambda value: is_whole(value) and 0 <= value < 2**31,
}
REPLY_FIELDS: dict[str, type] = {"error": str, "info": dict, "turns": list}


def _split(message: bytes, limits: Limits) -> tuple[dict[str, Any], memoryview]:
    if not isinstance(message, bytes) or len(message) < len(MAGIC) + 4 or message[:4] != MAGIC:
        raise MessageError("not a message of this protocol")
    if len(message) > limits.message:
        raise MessageError(f"the message has {len(message)} bytes, and at most {limits.message} are read")
    (size,) = struct.unpack_from("<I", message, 4)
    if size > limits.head or 8 + size > len(message):
        raise MessageError(f"the head says it has {size} bytes; at most {limits.head}, and what is there, are read")
    msgpack = needed("msgpack", MISSING)
    try:
        # A list declares its length before its content: without a limit, nested lists reserve much memory.
        most = {"max_array_len": 2 * max(limits.actions, limits.places), "max_map_len": 64, "max_ext_len": 0}
        head = msgpack.unpackb(message[8 : 8 + size], strict_map_key=True, **most)
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageError("the head is not msgpack") from error
    if not isinstance(head, dict):
        raise MessageError("the head is not a map")
    return head, memoryview(message)[8 + size :]


def _tensors(data: memoryview, limits: Limits) -> dict[str, Tensor]:
    """The tensors of a message, after checking their whole header."""
    if len(data) < 8:
        raise MessageError("the tensors are cut off")
    (size,) = struct.unpack_from("<Q", data)
    if size > limits.head or 8 + size > len(data):
        raise MessageError(f"the header of the tensors says it has {size} bytes")
    try:
        text = bytes(data[8 : 8 + size]).decode()
        header = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except MessageError:
        raise
    except (ValueError, RecursionError) as error:
        raise MessageError("the header of the tensors is not JSON") from error
    if not isinstance(header, dict) or len(header) > limits.tensors:
        raise MessageError(f"the tensors are no map, or more than {limits.tensors}")
    total = sum(_declared_bytes(name, row, limits) for name, row in header.items())
    if total != len(data) - 8 - size:
        raise MessageError(f"the tensors say they have {total} bytes, and there are {len(data) - 8 - size}")
    try:
        return dict(load(bytes(data)))
    except SafetensorError as error:
        raise MessageError("the tensors are not safetensors") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON map without duplicate keys, of which readers choose differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MessageError("the header of the tensors names something twice")
    return found


def _no_number(word: str) -> None:
    raise MessageError(f"the header of the tensors holds {word}, which is not JSON")


def _declared_bytes(name: str, row: Any, limits: Limits) -> int:
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise MessageError(f"tensor {name[:64]!r} has other facts than dtype, shape and data_offsets")
    dtype, shape = row["dtype"], row["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MessageError(f"tensor {name[:64]!r} has the dtype {_shown(dtype)}; allowed are {', '.join(DTYPES)}")
    fits = isinstance(shape, list) and len(shape) <= limits.rank
    if not fits or not all(is_whole(n) and 0 < n < 2**63 for n in shape):
        raise MessageError(f"tensor {name[:64]!r} has no shape of at most {limits.rank} lengths above 0")
    return DTYPES[dtype].itemsize * math.prod(shape)


def _shown(value: Any) -> str:
    """An untrusted value in an error: a short one as it is, otherwise its type."""
    return repr(value)[:66] if isinstance(value, (str, int, float)) else type(value).__name__


def unpack_request(message: bytes, limits: Limits) -> Request:
    """Read a request. Raises `MessageError` before anything declared is allocated."""
    head, data = _split(message, limits)
    if set(head) != set(REQUEST_FIELDS):
        raise MessageError(f"a request has the fields {', '.join(REQUEST_FIELDS)}")
    for name, fits in REQUEST_FIELDS.items():
        if not fits(head[name]):
            raise MessageError(f"{name}: got {_shown(head[name])}")
    if len(head["actions"]) > limits.actions:
        raise MessageError(f"the request has {len(head['actions'])} actions, and at most {limits.actions} are read")
    actions = [_action(row, limits) for row in head.pop("actions")]
    return Request(**head, actions=actions, tensors=_tensors(data, limits))


def _action(row: Any, limits: Limits) -> Action:
    if not isinstance(row, dict) or set(row) != set(Action.__dataclass_fields__):
        raise MessageError(f"an action has the fields {', '.join(Action.__dataclass_fields__)}")
    if not isinstance(row["name"], str) or len(row["name"]) > 128 or row["do"] not in (*READS, *EDITS):
        raise MessageError(f"an action is a name and one of {', '.join((*READS, *EDITS))}")
    if row["number"] is not None and not isinstance(row["number"], float):
        raise MessageError("the number of an action is a float")
    for what in ("positions", "heads", "experts"):
        places = row[what]
        several = isinstance(places, list) and 0 < len(places) <= limits.places and all(map(is_whole, places))
        if places is not None and not several:
            raise MessageError(f"{what} of an action: whole numbers, 1 to {limits.places} of them, or nothing")
    return Action(**row)


def unpack_reply(message: bytes, limits: Limits) -> Reply:
    """Read a reply, which may be as large as an answer. Raises `MessageError` as `unpack_request` does."""
    limits = replace(limits, message=max(limits.message, limits.answer))
    head, data = _split(message, limits)
    if set(head) != set(REPLY_FIELDS) or not all(isinstance(head[name], kind) for name, kind in REPLY_FIELDS.items()):
        raise MessageError(f"a reply has the fields {', '.join(REPLY_FIELDS)}")
    if len(head["turns"]) > limits.actions or not all(map(is_whole, head["turns"])):
        raise MessageError("the turns of a reply are numbers of actions")
    return Reply(tensors=_tensors(data, limits), **head)
