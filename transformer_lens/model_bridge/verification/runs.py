"""Checks on runs: hooks fire, reads change nothing, writes change something, and gradients come back.

And on padded texts and generated ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from transformer_lens.hooks.point import HookFunction, HookPoint
from transformer_lens.hooks.root import HookSpec
from transformer_lens.model_bridge.access.weights import inner_model
from transformer_lens.model_bridge.upstream import MASK
from transformer_lens.model_bridge.verification.evidence import Evidence, Looking, largest_difference
from transformer_lens.model_bridge.verification.references import compared
from transformer_lens.model_bridge.verification.report import CheckResult

NOISE = 0.5
"""Standard deviation of the noise, in standard deviations of what it is added to."""
FEW = 4
"""The most tokens that get noise, unless thorough: each hook of a layer costs a run."""
NEW_TOKENS = 3
PADDING = 2
"""Columns of padding in front of every text but the first."""


def untouched(e: Evidence) -> Iterator[CheckResult]:
    """Law 1: without hooks, the bridge's output is the bare model's."""
    yield CheckResult("untouched", "", "", largest_difference(e.output, e.own.output), *e.same)


def fires(e: Evidence) -> Iterator[CheckResult]:
    """Every hook fires once in a run that captures, and once in a run with user hooks."""
    for name in e.bridge.hook_dict:
        captured, shown = int(name in e.cache), len(e.shown[name])
        wrong = f"captured {captured}, shown to a user hook {shown} times in one forward"
        extra = float(abs(captured - 1) + abs(shown - 1))
        reason = "a count: once each"
        yield CheckResult("fires", name.rpartition(".")[0], name, extra, 0.0, reason, note=wrong if extra else "")


def shape(e: Evidence) -> Iterator[CheckResult]:
    """The axes that the hook table declares."""
    batch, pos = e.tokens.shape
    known = {"batch": batch, "pos": pos, "query_pos": pos, "key_pos": pos}
    table = e.bridge.hook_table()
    for name, value in e.cache.items():
        declared = [known.get(str(size), size) for size in table.row(name).shape]
        fits = len(declared) == value.ndim and all(
            isinstance(size, str) or size == got for size, got in zip(declared, value.shape, strict=True)
        )
        note = "" if fits else f"got shape {list(value.shape)}, the hook table says {declared}"
        yield CheckResult("shape", name.rpartition(".")[0], name, float(not fits), 0.0, "a shape", note=note)


def _by_component(
    e: Evidence, check: str, names: Sequence[str], run: Callable[[Sequence[str]], Tensor], expected: Tensor
) -> Iterator[CheckResult]:
    """One run with every hook; only if that changed the output, one per component to find which."""
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    together = largest_difference(run(names), expected)
    alone = dict.fromkeys(owners, 0.0)
    if not together <= e.same[0]:
        for owner in owners:
            alone[owner] = largest_difference(run([n for n in names if n.rpartition(".")[0] == owner]), expected)
    for owner, difference in alone.items():
        yield CheckResult(check, owner, "", difference, *e.same)
    if all(difference <= e.same[0] for difference in alone.values()):
        yield CheckResult(check, "", "", together, *e.same, note="the hooks of all components together")


def looking(e: Evidence) -> Iterator[CheckResult]:
    """Law 2: capturing leaves the output as it is."""

    def run(names: Sequence[str]) -> Tensor:
        return e.bridge.run_with_cache(e.tokens, names_filter=names)[0]  # type: ignore[no-any-return]

    yield from _by_component(e, "looking", list(e.cache), run, e.output)


def neutral_hook(e: Evidence) -> Iterator[CheckResult]:
    """Law 2: so does a user hook on a port that changes nothing, also while gradients are recorded."""

    def run(names: Sequence[str]) -> Tensor:
        return e.hooked([_recording(e), (names, Looking())])

    with torch.enable_grad():
        expected = run([]).detach()
        names = [name for name in e.cache if name in e.ports]
        yield from _by_component(e, "neutral hook", names, lambda names: run(names).detach(), expected)


def kept(e: Evidence) -> Iterator[CheckResult]:
    """Law 3: what is captured without a copy does not change until the end of the run."""
    _, after = e.everything(e.tokens, clone=False)
    for name, value in e.cache.items():
        difference = largest_difference(after[name], value)
        yield CheckResult("kept", name.rpartition(".")[0], name, difference, *e.same)


def inside(e: Evidence) -> Iterator[CheckResult]:
    """Every module with hooks inside: its output with user hooks, against that without, for the same input."""
    found: dict[str, float] = {}
    names = [name for name in e.cache if name not in e.ports]
    if names:
        with e.own_outputs(e.inside, e.own.calls, found.__setitem__):
            e.hooked([(names, Looking())])
    for component, difference in found.items():
        yield CheckResult("inside", component, "", difference, *e.rounding)


def noise(e: Evidence) -> Iterator[CheckResult]:
    """Law 4: noise at a hook, alone in its layer, changes the stream that leaves the layer.

    Each run adds noise in every layer, at one hook each, with all hooks attached; so without noise the streams are the
    same bit for bit. If thorough, at one hook of the model alone, judged at the output.
    """
    layers: dict[str, list[str]] = {}
    for name in e.cache:
        # With one expert there is no choice, and nothing depends on it.
        if not (e.bridge.cfg.num_experts == 1 and name.endswith(("hook_router_logits", "hook_expert_indices"))):
            layers.setdefault(".".join(name.split(".")[:2]) if name.startswith("blocks.") else "", []).append(name)
    names = [name for names in layers.values() for name in names]
    runs = [[name] for name in names] if e.thorough else _one_of_each(e, layers)
    quiet, reason = _left(e, names, []), "noise of half a standard deviation, or another choice of experts"
    for chosen in runs:
        noisy = _left(e, names, chosen)
        for name in chosen:
            change = largest_difference(noisy[_leaves(e, name)], quiet[_leaves(e, name)])
            change = float("inf") if change != change else change
            component = name.rpartition(".")[0]
            yield CheckResult("noise", component, name, change, e.same[0], reason, has_to_exceed=True)


def _one_of_each(e: Evidence, layers: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The hooks in as few lists as possible, each with at most one per layer, and one at either end."""
    outside = layers.get("", [])
    groups = [names for layer, names in layers.items() if layer]
    groups += [[name for name in outside if _leaves(e, name) == end] for end in (e.stages[0], "")]
    return [[name for name in names if name is not None] for names in zip_longest(*groups)]


def _leaves(e: Evidence, name: str) -> str:
    """Where a hook's change is judged: the stage that reads it, or "", the output."""
    if e.thorough:
        return ""
    if name.startswith("blocks."):
        return e.stages[int(name.split(".")[1]) + 1]
    return e.stages[0] if name in {hook.name for hook in e.bridge.adapter.root_hooks} else ""


def _left(e: Evidence, names: Sequence[str], noisy: Sequence[str]) -> dict[str, Tensor]:
    """The input of each stage, and the output (""), in a run with hooks at `names` and noise at some."""
    rows, columns = (None, None) if e.thorough else (1, FEW)
    streams = {stage: stream[:rows, :columns] for stage, stream in e.streams.items()}
    looks = Looking()
    quiet = [name for name in names if name not in noisy]
    hooks: list[HookSpec] = [(name, e.rewriting(name) if e.block_elsewhere(name) else looks) for name in quiet]
    hooks += [(name, _noisy(e, name)) for name in noisy]
    came: dict[str, Tensor] = {}
    with nullcontext() if e.thorough else e.forced(streams, came):
        output = e.bridge.run_with_hooks(e.tokens[:rows, :columns], fwd_hooks=hooks)
    return {**came, "": output}


def _noisy(e: Evidence, name: str) -> HookFunction:
    block = e.block_elsewhere(name)
    if block is None:
        return partial(_add_noise, e, name)
    if e.bridge.hook_dict[name].integer:
        return block.editing("set", torch.zeros((), dtype=torch.long))
    return block.editing("scale", -1.0)


def _add_noise(e: Evidence, name: str, tensor: Tensor, hook: HookPoint) -> None:
    if hook.integer:
        tensor.copy_((tensor + 1) % int(e.bridge.cfg.num_experts or 1))
        return
    if name.endswith("hook_router_logits"):
        tensor.neg_()  # where one expert is chosen, only another choice changes anything
        return
    # Masked scores are the lowest number; with one expert chosen, its weight is always one.
    usual = tensor[tensor.abs() < torch.finfo(tensor.dtype).max / 2].float()
    spread = (float(usual.std(correction=0)) or float(usual.abs().mean())) if usual.numel() else 0.0
    sample = torch.randn(tensor.shape, generator=e.random).to(tensor.device)
    tensor.add_((sample * (NOISE * (spread or 1.0))).to(tensor.dtype))


def _recording(e: Evidence) -> HookSpec:
    """A hook that has gradients recorded from where the stream begins: tokens, and learned positions."""

    def require(tensor: Tensor, hook: HookPoint) -> None:
        tensor.requires_grad_()

    return [name for name in e.cache if "." not in name], require


def gradient(e: Evidence) -> Iterator[CheckResult]:
    count = Looking(lambda gradient, hook: int((~gradient.isfinite()).sum()))
    names = [name for name in e.cache if not e.bridge.hook_dict[name].integer]
    with torch.enable_grad():
        output = e.hooked([_recording(e)], bwd_hooks=[(names, count)])
        weights = torch.randn(output.shape, generator=e.random).to(output.device)
        if output.requires_grad:
            (output.float() * weights).mean().backward()
    counted = {name: max(wrong) for name, wrong in count.found.items()}
    first = next((name for name, wrong in counted.items() if wrong), None)
    for name in names:
        note = "" if name in counted else "no gradient came back"
        note = "the first on the way back from the output" if name == first else note
        wrong = float(counted.get(name, 1))
        reason = "a count of entries that are not finite"
        yield CheckResult("gradient", name.rpartition(".")[0], name, wrong, 0.0, reason, note=note)


def left_padded(ids: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor, list[int]]:
    """Ids and mask of texts of the same width, left-padded except the first, and each one's padding.

    >>> left_padded(torch.tensor([[5, 6, 7], [8, 9, 1]]))[0]
    tensor([[5, 6, 7],
            [0, 0, 8]])

    A single text is padded, and a text keeps one token at least.
    """
    width = ids.shape[1]
    padding = [min(PADDING, width - 1) if row or len(ids) == 1 else 0 for row in range(len(ids))]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, before in enumerate(padding):
        padded[row, before:] = ids[row, : width - before]
        mask[row, before:] = 1
    return padded, mask, padding


def left_padding(e: Evidence) -> Iterator[CheckResult]:
    """A left-padded text shows what it shows alone; every layer starts from the same stream.

    A token whose experts are decided by rounding is left out of what follows the choice.
    """
    ids, mask, padding = left_padded(e.tokens)
    streams = {  # every text behind its padding
        stage: torch.stack([text.roll(before, 0) for text, before in zip(stream, padding, strict=True)])
        for stage, stream in e.streams.items()
    }
    with e.forced(streams, {}):
        _, found = e.everything(ids, attention_mask=mask)
    for row, before in enumerate(padding):
        places = slice(before, None), slice(0, ids.shape[1] - before)
        other = _chose_others(e, found, row, places)
        for name, value in e.cache.items():
            got, expected = (_of_row(e, name, x, row, at) for x, at in zip((found[name], value), places, strict=True))
            if name in other:
                got, expected = got[~other[name]], expected[~other[name]]
            note = f"text {row}, behind {before} columns of padding, and by itself"
            yield compared("left padding", name, got, expected, e.rounding, note)


def _of_row(e: Evidence, name: str, value: Tensor, row: int, places: slice) -> Tensor:
    """One text's part of a hook's value, at some positions. Learned positions may have one row for all texts."""
    axes = e.bridge.hook_dict[name].axes.split()[1:]
    index = [places if axis in ("pos", "query_pos", "key_pos") else slice(None) for axis in axes]
    return value[min(row, len(value) - 1)][tuple(index)]


def _chose_others(e: Evidence, found: Mapping[str, Tensor], row: int, places: tuple[slice, slice]) -> dict[str, Tensor]:
    """The positions with another choice of experts, by the hooks that follow it."""
    other: dict[str, Tensor] = {}
    for name in [name for name in e.cache if name.endswith("mlp.hook_expert_indices")]:
        got, expected = (_of_row(e, name, x[name], row, at) for x, at in zip((found, e.cache), places, strict=True))
        block = name.removesuffix(".mlp.hook_expert_indices")
        following = [n for n in e.cache if n.startswith(f"{block}.mlp.") and not n.endswith(("hook_in", "_logits"))]
        for hook in (*following, f"{block}.hook_mlp_out", f"{block}.hook_resid_post"):
            other[hook] = (got != expected).any(-1)
    return other


def generation(e: Evidence) -> Iterator[CheckResult]:
    """The tokens are those of Hugging Face's `generate`, and hooks are told what each forward pass reads."""
    width = max(1, e.tokens.shape[1] - NEW_TOKENS + 1)
    ids, mask, padding = left_padded(e.tokens[:, :width])
    config = GenerationConfig(max_new_tokens=e.tokens.shape[1] - width + 1, do_sample=False, pad_token_id=0)
    named = e.bridge.arguments.named({MASK: mask})
    with e.bare() as model:
        own = inner_model(model)[1].generate(ids, **named, generation_config=config)  # type: ignore[operator]
    read = Looking(_reading)
    names = [name for name in e.cache if name in e.ports]
    got = e.bridge.generate(
        ids, fwd_hooks=[(names, read)], return_type="tokens", attention_mask=mask, generation_config=config
    )
    wrong = largest_difference(got, own)
    yield CheckResult("generation", "", "", wrong, 0.0, "tokens", note="the tokens of the model's own generate")
    # The first forward pass reads the prompt, each further one the token that was chosen before it.
    read_columns = [list(range(width)), *([column] for column in range(width, own.shape[1] - 1))]
    expected = [
        _words(forward, not forward, columns, [[max(column - before, -1) for column in columns] for before in padding])
        for forward, columns in enumerate(read_columns)
    ]
    for name in names:
        note = _first_difference(read.found[name], expected)
        reason = "forwards whose hook.generation differs from counting"
        yield CheckResult("generation", name.rpartition(".")[0], name, float(bool(note)), 0.0, reason, note=note)


def _reading(tensor: Tensor, hook: HookPoint) -> str:
    s = hook.generation
    return "nothing" if s is None else _words(s.step, s.is_prompt, list(s.columns), s.positions.tolist())


def _words(step: int, is_prompt: bool, columns: list[int], positions: list[list[int]]) -> str:
    return f"step {step}, {'prompt' if is_prompt else 'continuation'}, columns {columns}, positions {positions}"


def _first_difference(got: Sequence[str], expected: Sequence[str]) -> str:
    """In words; "" if there is none."""
    if len(got) != len(expected):
        return f"it fired {len(got)} times in {len(expected)} forwards"
    pairs = enumerate(zip(got, expected, strict=True))
    return next((f"forward {n}: hook.generation says {a}, expected {b}" for n, (a, b) in pairs if a != b), "")
