"""`make mutants`: break each line of a formula in a scratch copy, and see a test fail.

Every mutant is one small change of the syntax tree of one file; a mutant that all tests of that file
pass is a survivor, and is printed, unless EQUIVALENT says why it computes the same.
"""

from __future__ import annotations

import argparse
import ast
import copy
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BRIDGE = "transformer_lens/model_bridge"


class Target(NamedTuple):
    """A file that is mutated, what pytest is told to run the tests likeliest to notice, and where the others are."""

    file: str
    first: tuple[str, ...]
    rest: str = ""


INSIDE = "tests/inside"
WIRE = "transformer_lens/distributed"
REMOTE = "tests/distributed"
READ = (
    f"{REMOTE}/test_limits.py",
    f"{REMOTE}/test_server.py",
    *("-k", "not hostile and not damaged and not estimate and not nothing_of_a_call"),
)
TARGETS = {
    "attention": Target(f"{BRIDGE}/generalized_components/attention.py", (f"{INSIDE}/test_core.py",), INSIDE),
    "attention_run": Target(f"{BRIDGE}/generalized_components/attention_run.py", (f"{INSIDE}/test_core.py",), INSIDE),
    "seams": Target(f"{BRIDGE}/access/seams.py", ("tests/adapters/test_seams.py", f"{INSIDE}/test_core.py"), INSIDE),
    "normalization": Target(
        f"{BRIDGE}/generalized_components/normalization.py",
        (f"{INSIDE}/test_norms.py", f"{INSIDE}/test_core.py"),
        INSIDE,
    ),
    "moe": Target(f"{BRIDGE}/generalized_components/moe.py", (f"{INSIDE}/test_experts.py",), INSIDE),
    "experts_run": Target(
        f"{BRIDGE}/generalized_components/experts_run.py",
        ("tests/adapters/test_seams.py", f"{INSIDE}/test_experts.py", f"{INSIDE}/test_core.py"),
        INSIDE,
    ),
    "experts_sharded": Target(f"{BRIDGE}/generalized_components/experts_run.py", ("tests/sharded/test_sharded.py",)),
    "weights": Target(f"{BRIDGE}/weights.py", ("tests/bridge/test_weights.py",), "tests/adapters/test_weights.py"),
    "component_weights": Target(
        f"{BRIDGE}/generalized_components/weights.py",
        ("tests/adapters/test_weights.py", "tests/bridge/test_weights.py"),
    ),
    "processing": Target(
        f"{BRIDGE}/processing/steps.py",
        ("tests/processing/test_mathematics.py", "tests/processing/test_refusals.py"),
        "tests/processing",
    ),
    "processing_changes": Target(
        f"{BRIDGE}/processing/changes.py", ("tests/processing/test_undo.py",), "tests/processing"
    ),
    "grouped_cache": Target(f"{BRIDGE}/calls/caches.py", ("tests/bridge/test_grouped_cache.py",)),
    "residual_stacks": Target("transformer_lens/cache/residual_stacks.py", ("tests/bridge/test_residual_stacks.py",)),
    "direct_logits": Target("transformer_lens/cache/direct_logits.py", ("tests/bridge/test_residual_stacks.py",)),
    "messages": Target(f"{WIRE}/protocol/messages.py", READ),
    "checks": Target(f"{WIRE}/server/checks.py", READ),
    "sessions": Target(f"{WIRE}/server/sessions.py", (*READ, f"{REMOTE}/test_call_queue.py")),
    "frames": Target(f"{WIRE}/network/frames.py", (f"{REMOTE}/test_frames.py", f"{REMOTE}/test_hostile_frames.py")),
    "spans": Target(
        f"{WIRE}/client/spans.py",
        (
            f"{REMOTE}/test_server.py",
            f"{REMOTE}/test_recovery.py",
            f"{REMOTE}/test_hostile_servers.py",
            *("-k", "answers_that_are or (backward and other and falcon) or test_lies"),
        ),
    ),
    "routing": Target(f"{WIRE}/client/routing.py", (f"{REMOTE}/test_routing.py",)),
    "route": Target(f"{WIRE}/client/route.py", (f"{REMOTE}/test_giving_up.py", "-k", "not many and not interrupt")),
    "remote_call": Target(
        f"{WIRE}/client/remote_call.py",
        (
            f"{REMOTE}/test_bridge.py",
            f"{REMOTE}/test_recovery.py",
            f"{REMOTE}/test_hostile_servers.py",
            *("-k", "(test_bridge and falcon) or (recovery and (backward or set_stops) and falcon) or cannot"),
        ),
    ),
    "remote_cache": Target(
        f"{WIRE}/client/remote_cache.py",
        (
            f"{REMOTE}/test_giving_up.py",
            f"{REMOTE}/test_generation.py",
            *("-k", "mixtral and not many and not sessions_are_closed"),
        ),
    ),
    "prompts": Target(f"{WIRE}/client/prompts.py", (f"{REMOTE}/test_prompts.py", "-k", "not metric and not saved")),
    "lm_head": Target(f"{WIRE}/client/lm_head.py", (f"{REMOTE}/test_head.py",)),
    "records": Target(  # its signatures in a private network alone
        f"{WIRE}/network/records.py", (f"{REMOTE}/test_records.py", "tests/swarm/test_signing.py")
    ),
}
FORMULAS = ("attention", "attention_run", "seams", "normalization", "moe", "experts_run")
"""What runs without a name: seams, and the formulas beside them."""

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
DROPPED = {
    "all",
    "any",
    "bool",
    "clone",
    "contiguous",
    "expand",
    "expand_as",
    "float",
    "sum",
    "mean",
    "sqrt",
    "square",
    "reciprocal",
    "rsqrt",
    "softmax",
    "tril",
    "transpose",
    "to",
    "unsqueeze",
    "flatten",
    "unflatten",
    "reshape",
    "masked_fill",
    "mul_",
    "div_",
    "add_",
    "argsort",
    "chunk",
    "index_put",
}
"""Methods whose call is left out; where what is left has another shape, that is the easiest mutant to kill."""

ONE_DEVICE = "there is one device here; tests/gpu has several"
SYMMETRIC = "the function does not care for the order"
SHARED = "one process has all pairs and experts; tests/sharded (moe_sharded) kills it"
SETTLED = "the config of a mixture always says it"
DECLARED = "lengths between are refused for the bytes that they declare"
BLOCKLESS = "these requests are about no blocks"
STABLE = "torch sorts so few numbers in their order anyway"
GROUPED = "groups = _Groups(chosen, int(call.cfg.num_experts or 1), call.shards if by_expert else ALONE)"
SLICED = "return self.shards.slice(new.transpose(0, 1).reshape(-1, new.shape[-1])[self.order], 0, self.sizes)"
EQUIVALENT: dict[tuple[str, str], str] = {
    ('return sharding.of_attention(self.path, inputs, self.role("o").path)', "arguments swapped"): (
        "a whole model is not divided; tests/sharded divides one"
    ),
    ("wide = torch.promote_types(residual_stack.dtype, torch.float32)", "arguments swapped"): SYMMETRIC,
    (
        "wide = residual_stack.to(torch.promote_types(residual_stack.dtype, torch.float32))",
        "arguments swapped",
    ): SYMMETRIC,
    ("if not bool(torch.eq(each, each[:, :, :1]).all()):", "arguments swapped"): SYMMETRIC,
    ('by_expert = "expert" in call.divided', "In -> NotIn"): SHARED,
    ("each = experts // shards.size", "FloorDiv -> Mult"): SHARED,
    ("self.sizes = [sum(counts[each * rank : each * (rank + 1)]) for rank in range(shards.size)]", "1 -> 2"): SHARED,
    ("return self.shards.gather(pairs, 0, self.sizes)", "0 -> 1"): SHARED,
    (SLICED, "0 -> 1"): SHARED,
    ("return mine + more <= min(most, most_of_all - everyone)", "arguments swapped"): SYMMETRIC,
    (
        "if not has_room(more, held, self.limits.session_bytes, self.held(), self.limits.session_bytes_of_all):",
        "arguments swapped",
    ): SYMMETRIC,
    (
        "if has_room(len(answer), self.kept(peer), limits.kept, self.kept(), limits.kept_of_all):",
        "arguments swapped",
    ): SYMMETRIC,
    (
        "if not has_room(call.size, sizes[0], limits.waiting, sizes[1], limits.waiting_of_all):",
        "arguments swapped",
    ): SYMMETRIC,
    (
        'most = {"max_array_len": 2 * max(limits.actions, limits.places), "max_map_len": 64, "max_ext_len": 0}',
        "arguments swapped",
    ): SYMMETRIC,
    (
        "if not fits or not all(_is_int(n) and 0 < n < 2**63 for n in shape):",
        "63 -> 64",
    ): DECLARED,
    ("if not fits or not all(_is_int(n) and 0 < n < 2**63 for n in shape):", "2 -> 3"): DECLARED,
    (
        'ask(span, Request("close", 0, 0, session=session), timeout=self.settings.connect_timeout)',
        "0 -> 1",
    ): BLOCKLESS,
    ('told = ask(span, Request("info", 0, 0), timeout=timeout).info', "0 -> 1"): BLOCKLESS,
    (
        "return [reply.tensors[name].to(like.device) if name in reply.tensors else None for name, like in wanted]",
        "without .to",
    ): ONE_DEVICE,
    (
        "known.get(a, size) == size for a, size in zip(axes, found.shape, strict=True)",
        "True -> False",
    ): "their numbers were compared",
    ("expected = [known.get(axis, axis) for axis in axes]", "arguments swapped"): "both are the same",
    ('few = {"max_array_len": 8, "max_map_len": 8, "max_ext_len": 0}', "8 -> 9"): "no announcement has as many",
    (
        "memory = weight.new_empty(min(step, len(weight)), weight.shape[1], dtype=torch.float32)",
        "arguments swapped",
    ): SYMMETRIC,
    ("arrived: _Way = (0.0, 0, ())", "0.0 -> 1.0"): "the same seconds more for every way",
    ("way = min(entered, riding[number]) if number in riding else entered", "arguments swapped"): SYMMETRIC,
    (
        "return float(min(self.settings.max_backoff, self.settings.min_backoff * 2.0 ** min(nth - 1, 64)))",
        "64 -> 65",
    ): "longer than any that is allowed",
    ("super().__init__(text)", "statement dropped"): "an exception keeps what it was made with",
    (
        "weakref.finalize(self, route.closing.extend, self._sessions).atexit = False",
        "False -> True",
    ): "when the process ends, nobody sends what is noted",
    (
        "answer = NUMBER * sum(n for n, a in zip(sizes, request.actions, strict=True) if a.do not in EDITS)",
        "True -> False",
    ): "there is one size for each action",
    ("heads, device = self.cfg.n_heads, attention[0].W_O.device", "0 -> 1"): ONE_DEVICE,
    ("row.append(composition_scores(first.OV, READERS[mode](second)).to(device))", "without .to"): ONE_DEVICE,
}
"""(line as it stands, the change) -> why no test can tell."""


class Mutant(NamedTuple):
    """One change: which file, which line, what was done, and the whole text that results."""

    file: str
    line: int
    text: str
    change: str
    source: str


def changed_nodes(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """What may stand in a node's place, and what to call it; `None` takes a statement out."""
    new = copy.deepcopy(node)
    if isinstance(new, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(new.op) in SWAPPED:
        old = type(new.op).__name__
        new.op = SWAPPED[type(new.op)]()  # type: ignore[assignment]
        yield f"{old} -> {type(new.op).__name__}", new
    elif isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPPED:
        old = type(new.ops[0]).__name__
        new.ops[0] = SWAPPED[type(new.ops[0])]()  # type: ignore[call-overload]
        yield f"{old} -> {type(new.ops[0]).__name__}", new
    elif isinstance(new, ast.UnaryOp) and not isinstance(new.operand, ast.Constant):
        yield f"without {type(new.op).__name__}", new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, (bool, int, float)):
        new.value = not new.value if isinstance(new.value, bool) else new.value + 1
        yield f"{ast.unparse(node)} -> {new.value}", new
    elif isinstance(new, (ast.IfExp, ast.If)) and not isinstance(new.test, (ast.Compare, ast.UnaryOp)):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield "condition negated", new
    elif isinstance(new, ast.AugAssign) or (isinstance(new, ast.Expr) and isinstance(new.value, ast.Call)):
        yield "statement dropped", None
    elif isinstance(new, ast.Call):
        yield from changed_calls(new)


def changed_calls(call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(call.func, ast.Attribute) and call.func.attr in DROPPED:
        yield f"without .{call.func.attr}", call.func.value
    numbers = [a for a in call.args[:2] if not isinstance(a, (ast.Starred, ast.Constant, ast.UnaryOp))]
    if len(numbers) == 2 and ast.unparse(numbers[0]) != "call":
        swapped = copy.deepcopy(call)
        swapped.args[:2] = swapped.args[1::-1]
        yield "arguments swapped", swapped


class Replace(ast.NodeTransformer):
    """Puts something else in the place of one node."""

    def __init__(self, target: ast.AST, new: ast.AST | None) -> None:
        self.target = target
        self.new = new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.target:
            return ast.Pass() if self.new is None else self.new
        return super().generic_visit(node)


def formula_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node of a formula's body, without annotations and messages of errors; rows of tables are no formula."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for function in [n for n in functions if "-> tuple[Hook" not in ast.unparse(n) and "-> Hook" not in ast.unparse(n)]:
        waiting: list[ast.AST] = list(function.body)
        while waiting:
            node = waiting.pop(0)
            if isinstance(node, (ast.Raise, ast.FunctionDef, ast.arg)):
                continue
            yield node
            annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
            waiting += [child for child in ast.iter_child_nodes(node) if child is not annotation]


def mutants_of(name: str) -> list[Mutant]:
    """All mutants of one file, in the order of their lines."""
    file = TARGETS[name].file
    text = (ROOT / file).read_text()
    tree, found = ast.parse(text), []
    places = {node: place for place, node in enumerate(ast.walk(tree))}
    for node in formula_nodes(tree):
        for change, new in changed_nodes(node):
            fresh = copy.deepcopy(tree)
            target = list(ast.walk(fresh))[places[node]]
            source = ast.unparse(ast.fix_missing_locations(Replace(target, new).visit(fresh)))
            line: int = node.lineno  # type: ignore[attr-defined]
            found.append(Mutant(file, line, text.splitlines()[line - 1].strip(), change, source))
    return sorted(found, key=lambda mutant: mutant.line)


def tests_for(name: str, quick: bool) -> list[list[str]]:
    """The test files in the order they run: those likeliest to notice, then the others, the largest last."""
    target = TARGETS[name]
    first = list(target.first)
    if quick or not target.rest:
        return [first]
    place = ROOT / target.rest
    files = [place] if place.is_file() else place.glob("test_*.py")
    rest = [path for file in files if (path := file.relative_to(ROOT).as_posix()) not in first]
    return [first, sorted(rest, key=lambda file: ("exactness" in file, file))]


def run_tests(place: str, stages: list[list[str]], log: str) -> None:
    """In a process of its own: exit status 0 if everything passed, though the code is broken."""
    os.chdir(place)
    sys.path.insert(0, place)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import pytest

    for files in stages:
        options = [
            "-x",
            "-q",
            "-n",
            "0",
            "--assert",
            "plain",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow and not gpu",
            "--timeout",
            "120",
        ]
        status = pytest.main([*options, *files])
        import transformer_lens

        assert Path(transformer_lens.__file__).is_relative_to(place), "the tests ran on another copy of the package"
        if status:
            os._exit(1)
    os._exit(0)


def survives(place: Path, mutant: Mutant | None, name: str, limit: float, quick: bool = False) -> bool:
    """Whether every test passes with the mutant in its file; a mutant that never ends is noticed too."""
    target = place / TARGETS[name].file
    kept = target.read_text()
    if mutant is not None:
        target.write_text(mutant.source)
    try:
        process = CONTEXT.Process(target=run_tests, args=(str(place), tests_for(name, quick), str(place / "log.txt")))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode == 0
    finally:
        target.write_text(kept)


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "torch", "transformers.models.falcon", "transformers.models.mixtral"])


def copies(number: int, folder: Path) -> list[Path]:
    """Scratch copies of what the tests need."""
    places = []
    for nth in range(number):
        place = folder / f"copy{nth}"
        for part in ("transformer_lens", "tests", "docs"):
            shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", place)
        places.append(place)
    return places


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help=f"of {', '.join(TARGETS)}; by default {', '.join(FORMULAS)}")
    parser.add_argument("--line", type=int, nargs="*", help="only mutants of these lines")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="only every n-th mutant")
    parser.add_argument("--quick", action="store_true", help="the likeliest tests alone")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one mutant")
    asked = parser.parse_args()
    todo = [
        (name, mutant)
        for name in asked.files or FORMULAS
        for mutant in mutants_of(name)
        if not asked.line or mutant.line in asked.line
    ][:: asked.every]
    if asked.list:
        for _, mutant in todo:
            print(f"{mutant.file}:{mutant.line}: {mutant.change}: {mutant.text}")
        print(f"{len(todo)} mutants")
        return 0
    began, survivors, argued = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        free = copies(asked.jobs, Path(folder))

        def attempt(job: tuple[str, Mutant]) -> bool:
            place = free.pop()
            try:
                return survives(place, job[1], job[0], asked.limit, asked.quick)
            finally:
                free.append(place)

        for name in asked.files or FORMULAS:
            if not survives(free[0], None, name, asked.limit, quick=True):
                print((free[0] / "log.txt").read_text()[-3000:])
                print(f"the tests of {name} fail on the code as it stands; nothing was mutated")
                return 2
        with ThreadPoolExecutor(asked.jobs) as pool:
            for done, ((_, mutant), alive) in enumerate(zip(todo, pool.map(attempt, todo), strict=True), 1):
                why = EQUIVALENT.get((mutant.text, mutant.change)) if alive else None
                argued += why is not None
                if alive:
                    survivors += [mutant] if why is None else []
                    label = "SURVIVED" if why is None else "equivalent"
                    print(f"{label} {mutant.file}:{mutant.line}: {mutant.change}: {mutant.text}", flush=True)
                if done % 20 == 0:
                    print(f"... {done} of {len(todo)} after {time.monotonic() - began:.0f} s", flush=True)
    killed = len(todo) - len(survivors) - argued
    seconds = time.monotonic() - began
    print(f"{len(todo)} mutants: {killed} killed, {argued} equivalent, {len(survivors)} survived; {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
