"""Nothing that comes over the wire is ever run: no unpickling or evaluation in the source, and none seen at work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import transformer_lens

PACKAGE = Path(transformer_lens.__file__).parent
ROOT = PACKAGE.parent

MODULES = (
    *("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jsonpickle"),
    *("runpy", "code", "codeop", "ctypes", "subprocess", "multiprocessing"),
)
"""Modules that run, or make objects of, what they read."""
CALLS = (
    *("eval", "exec", "compile", "__import__", "getattr", "setattr", "globals", "vars().update", "input"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "np.load", "numpy.load", "torch.compile"),
    *("importlib.import_module", "os.system", "os.popen"),
)

WIRE = ("messages", "checks", "edits", "server", "sessions", "remote_call", "remote_cache", "spans")
"""The modules of `distributed` that touch what another process sent."""
WIRE += ("route", "frames", "records")


def file_of(module: str) -> Path | None:
    base = ROOT / Path(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def imported(path: Path) -> set[str]:
    """Names of modules a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


WHEN_CALLED = (
    "transformer_lens.model_bridge.drafting",
    "transformer_lens.model_bridge.verification.validation",
    "transformer_lens.dictionaries",
)
"""What a method of the bridge imports when a user calls it, which no message can do."""


def reached(*modules: str) -> dict[str, Path]:
    """These modules of ours, and all of ours that they import."""
    waiting, found = list(modules), dict[str, Path]()
    while waiting:
        name = waiting.pop()
        path = file_of(name)
        if path is not None and name not in found and not name.startswith(WHEN_CALLED):
            found[name] = path
            waiting += [other for other in imported(path) if other.startswith("transformer_lens")]
    return found


def calls(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


def test_modules_at_the_wire_can_run_nothing() -> None:
    for name in WIRE:
        (path,) = [*(PACKAGE / "distributed").rglob(f"{name}.py"), *(PACKAGE / "hooks").glob(f"{name}.py")]
        tops = {module.partition(".")[0] for module in imported(path)}
        assert not tops & set(MODULES), f"{path.name} imports {tops & set(MODULES)}"
        allowed = {"getattr"} if name in ALLOWED else set()
        assert not calls(path) & set(CALLS) - allowed, f"{path.name} calls {calls(path) & set(CALLS)}"


ALLOWED = ("remote_call",)
"""Where a name of ours is looked up on an object of ours: a user's own hook, for an error's text."""

RUNS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "np.load", "os.system", "os.popen"}


def test_no_module_that_a_server_uses_unpickles() -> None:
    found = reached("transformer_lens.distributed.server.server")
    assert len(found) > 50 and "transformer_lens.model_bridge.bridge" in found
    for name, path in found.items():
        tops = {module.partition(".")[0] for module in imported(path)}
        assert not tops & set(MODULES), f"{name} imports {tops & set(MODULES)}"
        assert not calls(path) & RUNS, f"{name} calls {calls(path) & RUNS}"


def test_what_a_method_imports_when_it_is_called_is_not_loaded_by_a_server() -> None:
    look = f"assert not [name for name in sys.modules if name.startswith({WHEN_CALLED})]"
    ask = f"import sys, transformer_lens.distributed.server.server\n{look}"
    subprocess.run([sys.executable, "-c", ask], check=True, cwd=ROOT)


PROGRAM = """
import os, pickle, random, struct, sys, threading
import torch
from tests.distributed.hostile import BLOCKS, LIMITS, PAYLOAD, message_of, parts_of, seeds
from transformer_lens.distributed import Limits, SpanServer
from transformer_lens.distributed.protocol.messages import unpack_reply

# Each model in a process of its own; torch and transformers are imported once.
for name in sys.argv[1:]:
    if os.fork() == 0:
        break
    assert os.wait()[1] == 0
else:
    sys.exit()
server = SpanServer(name, BLOCKS, limits=LIMITS)
worker = server._worker.submit(threading.get_ident).result()
requests = seeds(experts="mixtral" in name)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


bombs = [pickle.dumps(Bomb(), protocol) for protocol in range(6)]


def placed():
    # At every field of the head and of each action, at each fact of the tensors' header, as head, header and data.
    for number, request in enumerate([requests[4], requests[6], requests[9], requests[-1]]):
        bomb = bombs[number % len(bombs)]
        head, header, data = parts_of(request)
        for field in [*head, "more"]:
            for value in (bomb, bomb.decode("latin-1"), [bomb], {"a": bomb}):
                yield message_of(({**head, field: value}, header, data))
        for nth, action in enumerate(head["actions"]):
            for field in [*action, "more"]:
                for value in (bomb, bomb.decode("latin-1"), [bomb]):
                    rows = [dict(row) for row in head["actions"]]
                    rows[nth][field] = value
                    yield message_of(({**head, "actions": rows}, header, data))
        for tensor in header:
            for fact in ("dtype", "shape", "data_offsets", "more"):
                yield message_of((head, {**header, tensor: {**header[tensor], fact: bomb.decode("latin-1")}}, data))
            yield message_of((head, {**header, tensor: bomb.decode("latin-1")}, data))
            yield message_of((head, {**header, "__metadata__": {"format": bomb.decode("latin-1")}}, data))
        yield message_of((bomb, header, data))
        yield message_of((head, bomb, data))
        yield message_of((head, header, bomb))
        yield message_of((head, header, (bomb * (len(data) // len(bomb) + 1))[: len(data)]))
        yield message_of((head, header, data), magic=bomb[:4])
        yield bomb
        yield message_of((head, header, data)) + bomb


# Twice without watching: what torch and transformers import and compile at the first call is not the sender's.
valid = [message_of(parts_of(request)) for request in requests]
for message in [*valid, *valid]:
    server.handle(message, "warm")
server.sessions.of_peer.clear()

seen = {}
watching = False


def hook(event, args):
    if watching and threading.get_ident() == worker:
        seen[event] = seen.get(event, 0) + 1


sys.addaudithook(hook)
watching = True
served = refused = 0
for message in [*valid, *placed(), *bombs, *valid]:
    reply = unpack_reply(server.handle(message, "eve"), Limits())
    served, refused = served + (not reply.error), refused + bool(reply.error)
# The hook sees what it should, in that thread: a pickle that is loaded there.
before = dict(seen)
server._worker.submit(pickle.loads, pickle.dumps(Limits())).result()
assert "pickle.find_class" in seen
watching = False
print(name, served, refused, ",".join(sorted(before)), flush=True)
server.close()
"""

HARMLESS = {"builtins.id", "object.__getattr__", "object.__setattr__"}
"""`id()`, and attributes of functions and the like, which Python reports and torch reads."""


def test_a_server_at_work_opens_imports_and_runs_nothing() -> None:
    """CPython reports imports, files, sockets, processes, `exec`, `compile` and unpickled classes as audit events.

    None at all is seen in the thread that handles requests, once each kind of valid request was served twice.
    """
    names = ["tiny-falcon", "tiny-mixtral"]
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(" ") for line in done.stdout.split("\n") if line.startswith("tiny-")]
    assert [name for name, *_ in lines] == names
    for name, served, refused, events in lines:
        assert int(served) > 15 and int(refused) > 250, name
        assert set(events.split(",")) - {""} <= HARMLESS, name
