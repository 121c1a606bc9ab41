"""Checks with a KV cache: a text read in chunks and token by token, by the bare model and by the bridge.

Every step is evidence of its own, which the checks on values judge like a whole run; plain torch hooks on the bare
model compute what a write has to do.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, StaticCache

from transformer_lens.hooks.point import HookPoint
from transformer_lens.hooks.root import HookSpec
from transformer_lens.model_bridge.generalized_components.attention_run import AttentionPlace
from transformer_lens.model_bridge.upstream import arguments_of
from transformer_lens.model_bridge.verification import evidence, references
from transformer_lens.model_bridge.verification.evidence import Evidence, Looking, ModuleCall, OwnRun, Seen
from transformer_lens.model_bridge.verification.report import CheckResult

SPARE = 2
"""Empty places after the text in a cache of fixed size."""


def chunks(length: int) -> list[range]:
    """How a text is read: a beginning, a chunk of two if it is long enough, and two single tokens."""
    single = min(2, length - 1)
    ends = [length - single - 2] if length - single > 2 else []
    ends += range(length - single, length + 1)
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def growing(e: Evidence) -> Cache:
    """The cache that transformers makes by default."""
    return DynamicCache(config=e.bridge.original_model.config)


def fixed(e: Evidence) -> Cache:
    return StaticCache(config=e.bridge.original_model.config, max_cache_len=e.tokens.shape[1] + SPARE)


@dataclass
class Step(Seen):
    whole: Evidence
    columns: range
    own: OwnRun
    captured: tuple[Tensor, dict[str, Tensor]]
    keys: Sequence[tuple[int, int]]
    """How many keys each layer attends to, and the column of the first, according to transformers' own cache."""
    before: Sequence["Step"]

    def __post_init__(self) -> None:
        self.bridge = self.whole.bridge
        self.repeats_to = self.whole.repeats_to
        self.tokens = self.whole.tokens[:, self.columns.start : self.columns.stop]

    def __str__(self) -> str:
        return f"tokens {self.columns.start} to {self.columns.stop - 1} after {self.columns.start} cached ones"

    def attended_values(self, attention: str) -> Float[Tensor, "batch key kv_head d_head"] | None:
        return self.of_keys(attention, lambda step: step.wide(f"{attention}.hook_v"))

    def of_keys(self, attention: str, values: Callable[[Seen], Tensor | None]) -> Tensor | None:
        """The values of the cached keys, then the new ones, then the empty places of a cache of fixed size."""
        late = getattr(self.components.get(attention), "late_keys", False)  # then each call makes those of all keys
        steps = (self,) if late else (*self.before, self)
        found = [value for step in steps if (value := values(step)) is not None]
        if len(found) < len(steps):
            return None
        count, first = self.keys[int(attention.split(".")[1])]
        held = torch.cat(found, dim=1)[:, first : first + count]
        return F.pad(held, (0, 0, 0, 0, 0, count - held.shape[1]))


def steps(e: Evidence, make: Callable[[Evidence], Cache], pieces: Sequence[range]) -> list[Step]:
    """A text read piece by piece: what the bare model did, and what the bridge captured."""
    own, found, cache = list[tuple[OwnRun, list[tuple[int, int]]]](), list[Step](), make(e)
    with e.bare() as model:
        for columns in pieces:
            attending = [f"{block}.attn" in e.components for block in e.blocks]
            keys = [cache.get_mask_sizes(len(columns), i) if here else (0, 0) for i, here in enumerate(attending)]
            tokens = e.tokens[:, columns.start : columns.stop]
            own.append((e.watched(model, tokens, **{str(e.takes_cache): cache}), keys))
    cache = make(e)
    for columns, (run, keys) in zip(pieces, own, strict=True):
        captured = e.everything(e.tokens[:, columns.start : columns.stop], past_key_values=cache)
        found.append(Step(e, columns, run, captured, keys, tuple(found)))
    return found


def decoded(e: Evidence) -> list[Step]:
    """The text read piece by piece with a growing cache, once for all checks."""
    e.kept = e.kept or steps(e, growing, chunks(e.tokens.shape[1]))
    return e.kept


def decoding(e: Evidence) -> Iterator[CheckResult]:
    yield from _read("decoding", e, decoded(e))


def static_cache(e: Evidence) -> Iterator[CheckResult]:
    """Values with a cache of fixed size: a prompt and one more token."""
    length = e.tokens.shape[1]
    yield from _read("static cache", e, steps(e, fixed, [range(length - 1), range(length - 1, length)]))


def _read(check: str, e: Evidence, found: Sequence[Step]) -> Iterator[CheckResult]:
    """What the steps show, except what is wrong in the whole text too and named there."""
    results = list(_compared(check, e, found))
    if not all(result.passed for result in results):
        whole = [result for equation in references.EQUATIONS for result in equation(e) if not result.passed]
        known = {result.hook or result.component for result in whole}
        results = [result for result in results if result.passed or (result.hook or result.component) not in known]
    yield from results


def _compared(check: str, e: Evidence, found: Sequence[Step]) -> Iterator[CheckResult]:
    for step in found:
        change = evidence.largest_difference(step.captured[0], step.own.output)
        yield CheckResult(check, "", "", change, *e.same, note=f"{step}: the output")
        for name in [name for name in e.cache if name not in step.cache]:
            reason = "a count: once in each call"
            yield CheckResult(check, name.rpartition(".")[0], name, 1.0, 0.0, reason, note=f"{step}: never fired")
        for equation in references.EQUATIONS:
            for result in equation(step):
                note = ": ".join(filter(None, (str(step), result.check, result.note)))
                yield replace(result, check=check, note=note)
        if e.elsewhere:  # no module shows the cached keys, and the whole text does
            yield from _as_in_the_whole(check, step)


def _as_in_the_whole(check: str, step: Step) -> Iterator[CheckResult]:
    """A step shows what the whole text shows at its positions; masked scores are not compared."""
    for name, value in step.cache.items():
        point = step.bridge.hook_dict[name]
        if point.integer:
            continue
        columns = slice(step.columns.start, step.columns.stop)
        places = {"pos": columns, "query_pos": columns, "key_pos": slice(step.columns.stop)}
        index = [places.get(axis, slice(None)) for axis in point.axes.split()]
        expected = step.whole.cache[name][tuple(index)]
        if value.shape == expected.shape and name.endswith("hook_attn_scores"):
            masked = expected < torch.finfo(expected.dtype).min / 2
            value, expected = value.masked_fill(masked, 0), expected.masked_fill(masked, 0)
        yield references.compared(check, name, value, expected, step.rounding, f"{step}: as in the whole text")


def neutral_writes(e: Evidence) -> Iterator[CheckResult]:
    """Law 2 with a cache: writing back what is there leaves every step as it is.

    First at ports, bit for bit, then at hooks inside modules, where each module's output is compared with its own and
    replaced by it.
    """
    ports = [name for name in e.cache if name in e.ports or e.block_elsewhere(name)]
    yield from _neutral(e, {"": ports}, e.rounding if e.elsewhere else e.same)
    inside = {owner: [name for name in names if name in e.cache] for owner, names in e.inside.items()}
    yield from _neutral(e, {owner: names for owner, names in inside.items() if names}, e.projecting)


def _neutral(e: Evidence, owners: Mapping[str, Sequence[str]], tolerance: tuple[float, str]) -> Iterator[CheckResult]:
    """All in one run; where an output changed, or everywhere if thorough, each hook of that module alone."""
    together = _changes(e, [name for names in owners.values() for name in names], owners)
    wrong = [owner for owner, change in together.items() if not change[0] <= tolerance[0]]
    alone = {owner: owners[owner] for owner in (owners if e.thorough else wrong)}
    guilty = set[str]()
    for names in zip_longest(*alone.values()):
        chosen = {owner: name for owner, name in zip(alone, names, strict=True) if name is not None}
        for owner, (change, step) in _changes(e, list(chosen.values()), chosen).items():
            guilty |= {owner} if not change <= tolerance[0] else set()
            name = chosen[owner]
            yield CheckResult("rewriting", owner or name.rpartition(".")[0], name, change, *tolerance, note=step)
    for owner, (change, step) in together.items():
        if owner not in guilty:
            yield CheckResult("rewriting", owner, "", change, *tolerance, note=f"{step}, all its hooks together")


def _changes(e: Evidence, names: Sequence[str], modules: Iterable[str]) -> dict[str, tuple[float, str]]:
    """The largest change, and at which step, of these modules' outputs, each given its own, or of the model's ("")."""
    cache, worst = growing(e), dict[str, tuple[float, str]]()
    hooks = [(name, e.rewriting(name)) for name in names]
    for step in decoded(e):

        def note(component: str, change: float, step: Step = step) -> None:
            most = worst.get(component, (-1.0, ""))[0]
            if not (change <= most or math.isnan(most)):
                worst[component] = change, str(step)

        with e.own_outputs(filter(None, modules), step.own.calls, note):
            output = e.bridge.run_with_hooks(step.tokens, past_key_values=cache, fwd_hooks=hooks)
        if "" in modules:
            note("", evidence.largest_difference(output, step.captured[0]))
    return worst


@dataclass(frozen=True)
class Write:
    """A write at attention in the last step, and the expected z, from the values of the keys."""

    hook: str
    new: Callable[[Tensor], Tensor]
    z: Callable[[Float[Tensor, "batch key head d_head"], Float[Tensor, "batch pos head d_head"]], Tensor] | None
    """From the values of all keys and the z without the write; `None`: attention reads `new`."""


def _first_and_last(pattern: Tensor) -> Tensor:
    halves = torch.zeros_like(pattern)
    halves[..., 0] += 0.5
    halves[..., -1] += 0.5
    return halves


def _first_alone(scores: Tensor) -> Tensor:
    return torch.full_like(scores, torch.finfo(scores.dtype).min).index_fill(-1, scores.new_zeros(1).long(), 0)


def _without_head_0(x: Tensor) -> Tensor:
    return x.index_fill(2, x.new_zeros(1).long(), 0)


WRITES = (
    Write("attn.hook_pattern", _first_and_last, lambda v, z: (v[:, :1] + v[:, -1:]) / 2),
    Write("attn.hook_attn_scores", _first_alone, lambda v, z: v[:, :1]),
    # Without a rotated query every score is zero, and z is the mean of the values.
    Write("attn.hook_rot_q", torch.zeros_like, lambda v, z: v.mean(1, keepdim=True)),
    Write("attn.hook_z", lambda z: z / 2, lambda v, z: z / 2),
    Write("attn.hook_result", _without_head_0, lambda v, z: _without_head_0(z)),
    Write("hook_attn_in", lambda stream: stream.flip(-1), None),
)
"""Each is made in a batch row of its own, in every layer at once."""


def writes(e: Evidence) -> Iterator[CheckResult]:
    """Real writes in the last step, in every layer at once: each layer starts from the bare model's stream."""
    if e.elsewhere:
        yield from _patterns_elsewhere(e)
        return
    here = {block: [row for row, write in enumerate(WRITES) if _has(e, block, write)] for block in e.blocks}
    here = {block: rows for block, rows in here.items() if rows}
    if not here:
        return
    read = decoded(e)[-1]
    streams = {stage: cast(Tensor, read.own.calls[stage].input)[:1] for stage in e.stages}
    streams = {stage: stream.expand(len(WRITES), -1, -1) for stage, stream in streams.items()}
    prompt, last = e.tokens[:1].repeat(len(WRITES), 1).split([e.tokens.shape[1] - 1, 1], dim=1)
    with e.bare() as model:
        cache = {str(e.takes_cache): growing(e)}
        model(prompt, **cache)
        with _expecting(e, here, read, streams):
            oracle = _last_step(e, here, streams, lambda: model(last, **cache))
    options: Any = {"past_key_values": growing(e), "return_type": None}
    e.bridge(prompt, **options)
    hooks: list[HookSpec] = [
        (f"{block}.{WRITES[row].hook}", partial(_on_row, row, WRITES[row].new))
        for block, rows in here.items()
        for row in rows
    ]
    got = _last_step(e, here, streams, lambda: e.bridge.run_with_hooks(last, fwd_hooks=hooks, **options))
    what = f"the last token written after {prompt.shape[1]} cached ones: what attention returns"
    for block, rows in here.items():
        for row in rows:
            hook = f"{block}.{WRITES[row].hook}"
            yield references.compared("writing", hook, got[block][row], oracle[block][row], e.projecting, what)


def _has(e: Evidence, block: str, write: Write) -> bool:
    by_scores = write.hook in ("attn.hook_attn_scores", "attn.hook_rot_q")  # a sink takes its part of them
    by_values = by_scores or write.hook == "attn.hook_pattern"  # a norm or a gate may make z of what they come to
    apart = by_values and f"{block}.attn.hook_attended" in e.bridge.hook_dict
    attention = e.components.get(f"{block}.attn")
    apart |= write.hook == "attn.hook_rot_q" and isinstance(attention, AttentionPlace) and attention.chooses
    here = f"{block}.{write.hook}" in e.bridge.hook_dict
    return here and not apart and not (by_scores and references.has_sinks(e, block))


def _patterns_elsewhere(e: Evidence) -> Iterator[CheckResult]:
    """The first write in blocks of other processes, judged by the resulting z."""
    *before, last = decoded(e)
    cache = growing(e)
    for step in before:
        e.bridge(step.tokens, past_key_values=cache, return_type=None)
    write, seen = WRITES[0], Looking(lambda tensor, hook: tensor.detach().clone())
    hooks: list[HookSpec] = []
    for block in e.blocks:
        name = f"{block}.{write.hook}"
        elsewhere, pattern = e.block_elsewhere(name), last.cache.get(name)
        if elsewhere is not None and pattern is not None and _has(e, block, write):
            hooks.append((name, elsewhere.editing("set", write.new(pattern))))
            hooks.append(([f"{block}.attn.hook_v", f"{block}.attn.hook_z"], seen))
    e.bridge.run_with_hooks(last.tokens, past_key_values=cache, return_type=None, fwd_hooks=hooks)
    for name in [name for name in seen.found if name.endswith("hook_z")]:
        new, (z,) = seen.found[name.removesuffix("z") + "v"], seen.found[name]
        past = [value for step in before if (value := step.cache.get(name.removesuffix("z") + "v")) is not None]
        v = torch.cat([*past, *new], dim=1).repeat_interleave(z.shape[2] // new[0].shape[2], dim=2)
        assert write.z is not None
        what = f"{write.hook} written in the last step: half of what the first key holds, and half of the last"
        yield references.compared("writing", name, z, write.z(v, z), e.rounding, what)


@contextmanager
def _expecting(
    e: Evidence, here: Mapping[str, Sequence[int]], read: Step, streams: Mapping[str, Tensor]
) -> Iterator[None]:
    """Plain torch hooks that put the expected values into each row's attention, in the bare model."""

    def put_z(block: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        attention = f"{block}.attn"
        v = cast(Tensor, read.of_keys(attention, lambda step: references.projected(step, attention, "v")))[:1]
        v = v.repeat_interleave(e.bridge.cfg.n_heads // v.shape[2], dim=2)
        z = args[0].unflatten(-1, v.shape[-2:]).clone()
        for row in here[block]:
            if (expected := WRITES[row].z) is not None:
                z[row] = expected(v, z[row, None])[0].to(z.dtype)
        return (z.flatten(-2), *args[1:]), kwargs

    def put_input(block: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        arguments, entering = arguments_of(type(module)), e.block(block).entering("attn")
        x = arguments.first_value(args, kwargs).clone()
        for row in here[block]:
            if WRITES[row].z is None:
                x[row] = entering(WRITES[row].new(streams[block][row, None]))[0]
        return arguments.with_first(x, args, kwargs)

    reading, projecting = ({block: e.modules[f"{block}.{role}"] for block in here} for role in ("attn", "attn.o"))
    with evidence.plain_hooks(projecting, put_z), evidence.plain_hooks(reading, put_input):
        yield


def _last_step(
    e: Evidence, blocks: Iterable[str], streams: Mapping[str, Tensor], run: Callable[[], Any]
) -> dict[str, Tensor]:
    """What attention returns in these blocks."""
    calls: dict[str, ModuleCall] = {}
    with e.forced(streams, {}), evidence.watching({block: e.modules[f"{block}.attn"] for block in blocks}, calls):
        run()
    return {block: cast(Tensor, evidence.tensors(call.output)[0]) for block, call in calls.items()}


def _on_row(row: int, new: Callable[[Tensor], Tensor], tensor: Tensor, hook: HookPoint) -> None:
    tensor[row : row + 1] = new(tensor[row : row + 1])
