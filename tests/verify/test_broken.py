"""Every check of `verify` fails on something deliberately broken, and names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import family, mixtral
from transformer_lens import TransformerBridge
from transformer_lens.hooks.point import GenerationStep
from transformer_lens.model_bridge import architecture_adapter
from transformer_lens.model_bridge.access.ports import Port
from transformer_lens.model_bridge.access.views import Whole
from transformer_lens.model_bridge.architecture_adapter import HEADS, ArchitectureAdapter, Preparation
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    ExpertsBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    LayerNormBridge,
    MLPBridge,
    Part,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.attention_rows import FUSED, ROTATED, SCORES, qkv_hooks
from transformer_lens.model_bridge.generating import run as generation_run
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, adapter_for
from transformer_lens.model_bridge.upstream import CACHE, STREAM, layer_of_cache
from transformer_lens.model_bridge.verification.verify import CHECKS

Attention = JointQKVPositionEmbeddingsAttentionBridge


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test exchanged is back after it."""
    adapters, heads = dict(ADAPTERS), dict(HEADS)
    yield
    generation_run.GenerationStep = GenerationStep
    ADAPTERS.clear()
    ADAPTERS.update(adapters)
    architecture_adapter.HEADS.clear()
    architecture_adapter.HEADS.update(heads)


def exchanged(parts: dict[str, Any], role: str, change: dict[str, Any]) -> dict[str, Any]:
    """Parts with another kind or place in one role; `attn.o` is the role `o` of `attn`."""
    first, _, rest = role.partition(".")
    part = parts[first]

    def changed(part: Part) -> Part:
        return replace(part, parts=exchanged(part.parts, rest, change)) if rest else replace(part, **change)

    return {**parts, first: changed(part) if isinstance(part, Part) else lambda layer: changed(part(layer))}


def adapted(model: Any, **changes: dict[str, Any]) -> TransformerBridge:
    """A bridge whose adapter has other parts: `blocks__attn={"kind": ...}`."""
    right = type(adapter_for(model.config))

    class Broken(right):
        def components(self) -> dict[str, Part]:
            parts = super().components()
            for role, change in changes.items():
                parts = exchanged(parts, role.replace("__", "."), change)
            return parts

    ADAPTERS[right.model_type] = Broken
    return TransformerBridge(model)


def shown(kind: Any, name: str, wrong: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]) -> Any:
    """A component that shows something else than it computes with: `right` undoes `wrong`."""

    class Broken(kind):
        def inside(self, call: Any) -> Any:
            def fire(hook: str, value: Tensor) -> Tensor:
                if hook != name:
                    return call.fire(hook, value)
                new = call.fire(hook, false := wrong(value))
                return value if new is false else right(new)

            return super().inside(replace(call, fire=fire))

    return Broken


def returning(kind: Any, wrong: Callable[[Any, Tensor], Tensor]) -> Any:
    """A component that returns something else than its module where a hook may write."""

    class Broken(kind):
        def inside(self, call: Any) -> Any:
            output = super().inside(call)
            return wrong(call, output) if any(call.writes(hook.name) for hook in self.declared) else output

    return Broken


def with_hook(kind: Any, name: str, **changes: Any) -> Any:
    """A component one of whose hooks is declared otherwise."""

    class Broken(kind):
        def table(self, part: Part) -> Any:
            hooks, absent = super().table(part)
            return tuple(replace(hook, **changes) if hook.name == name else hook for hook in hooks), absent

    return Broken


# -- what is broken ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DroppedWrite(Port):
    """Reads, and goes on with what was there before."""

    def write(self, x: Tensor, value: Tensor, view: Any, known: Any, modules: Any) -> Tensor:
        return x


@dataclass(frozen=True)
class DroppedEdit(Port):
    """Goes on with what was there before, unless somebody wants the gradient."""

    def write(self, x: Tensor, value: Tensor, view: Any, known: Any, modules: Any) -> Tensor:
        return value if value.requires_grad else x


@dataclass(frozen=True)
class SpoilsWhatItReads(Port):
    """Shows a copy and changes the tensor behind it."""

    def read(self, x: Tensor, view: Any, known: Any) -> Tensor:
        value = x.clone()
        if not torch.is_grad_enabled():
            x.mul_(1.001)
        return value


class PutsTooMuch(Whole):
    def put(self, x: Tensor, value: Tensor) -> Tensor:
        return value * 1.001


class Scaled(Preparation):
    """Changes a weight, and changes it back."""

    def __init__(self, model: Any) -> None:
        self.weight = model.lm_head.weight.data
        self.weight.mul_(2)

    def undo(self) -> None:
        self.weight.div_(2)


def headed(kind: Any) -> TransformerBridge:
    architecture_adapter.HEADS["lm_head"] = ("unembed", Part(kind, "lm_head"))
    return TransformerBridge(family("40b"))


def prepared(name: str, prepare: Any) -> TransformerBridge:
    model = family(name)
    right = type(adapter_for(model.config))

    class Broken(right):
        prepare_model = staticmethod(prepare)

    ADAPTERS[right.model_type] = Broken
    return TransformerBridge(model)


def a_block_that_does_more() -> TransformerBridge:
    model = family("rw-rope")
    model.transformer.h[1].register_forward_hook(lambda module, args, output: (output[0] * 1.5, *output[1:]))
    return TransformerBridge(model)


def a_model_that_overwrites() -> TransformerBridge:
    model = family("rw-rope")

    def overwrite(module: Any, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            args[0].zero_()

    model.transformer.h[1].mlp.register_forward_hook(overwrite)
    return TransformerBridge(model)


def swapped_key_and_value() -> Any:
    places = {"q": FUSED["q"], "k": FUSED["v"], "v": FUSED["k"]}

    class Broken(Attention):
        hooks = (*qkv_hooks(places), *ROTATED, *SCORES)

    return Broken


def loses_the_gradient(call: Any, out: Tensor) -> Tensor:
    x = call.args[0]
    return out + 0 * (x - x.detach()).abs().sqrt()  # nothing, with an infinite slope


def heads_reversed(x: Tensor) -> Tensor:
    return x.flip(1)


def both_reversed() -> Any:
    """Scores and pattern agree with each other, and belong to other heads."""
    return shown(
        shown(Attention, "hook_pattern", heads_reversed, heads_reversed),
        "hook_attn_scores",
        heads_reversed,
        heads_reversed,
    )


def twice(kind: Any, name: str) -> Any:
    class Broken(kind):
        def inside(self, call: Any) -> Any:
            def fire(hook: str, value: Tensor) -> Tensor:
                value = call.fire(hook, value)
                return call.fire(hook, value) if hook == name else value

            return super().inside(replace(call, fire=fire))

    return Broken


def silent(kind: Any, name: str) -> Any:
    class Broken(kind):
        def inside(self, call: Any) -> Any:
            return super().inside(replace(call, fire=lambda hook, v: v if hook == name else call.fire(hook, v)))

    return Broken


def double(x: Tensor) -> Tensor:
    return x * 2


def half(x: Tensor) -> Tensor:
    return x / 2


def in_order(x: Tensor) -> Tensor:
    return x.flip(1)


def at_cached_steps(
    name: str, wrong: Callable[[Tensor, int], Tensor], right: Callable[[Tensor, Tensor], Tensor]
) -> Any:
    """Attention that shows something else at a hook, but only where the cache held keys before.

    `wrong` is given the value and how many tokens the call has, `right` what became of it and the value.
    """

    class Broken(Attention):
        def inside(self, call: Any) -> Any:
            layer = layer_of_cache(call.argument(CACHE), call.module.layer_idx)
            held = 0 if layer is None else int(layer.get_seq_length())

            def fire(hook: str, value: Tensor) -> Tensor:
                if hook != name or not held:
                    return call.fire(hook, value)
                return right(call.fire(hook, wrong(value, call.argument(STREAM).shape[1])), value)

            return super().inside(replace(call, fire=fire))

    return Broken


def without_the_past(pattern: Tensor, new: int) -> Tensor:
    """What a look-up of the cache by a wrong name made of it: the new keys alone."""
    return pattern[..., -new:]


def with_nothing_of_it(shown: Tensor, pattern: Tensor) -> Tensor:
    return F.pad(shown, (pattern.shape[-1] - shown.shape[-1], 0))


def rolled(pattern: Tensor, _new: int) -> Tensor:
    return pattern.roll(1, -1)


def rolled_if_fixed(pattern: Tensor, _new: int) -> Tensor:
    """Wrong keys where empty places come after the new ones."""
    return pattern.roll(1, -1) if pattern.shape[-1] > 8 else pattern


def as_shown(shown: Tensor, _pattern: Tensor) -> Tensor:
    return shown


def as_it_was(_shown: Tensor, pattern: Tensor) -> Tensor:
    return pattern


@dataclass(frozen=True)
class WrongForOneToken(Port):
    """A write that is right for several tokens."""

    def write(self, x: Tensor, value: Tensor, view: Any, known: Any, modules: Any) -> Tensor:
        right = super().write(x, value, view, known, modules)
        return right * 1.001 if x.shape[1] == 1 else right


class Forgetful(TransformerBridge):
    """Takes masks, and forgets them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, "attention_mask": None})


def counted_from_zero(step: int, columns: range, prompt_mask: Tensor, rows: int) -> GenerationStep:
    """Which part of the text a forward reads where the cache is not seen."""
    return GenerationStep(step, range(len(columns)), prompt_mask, rows)


def miscounting() -> TransformerBridge:
    generation_run.GenerationStep = counted_from_zero
    return TransformerBridge(family("7b"))


CASES: dict[str, tuple[Callable[[], TransformerBridge], set[str], str]] = {
    # what is broken: the bridge, the checks that fail, the component that one of the failures names
    "prepare_model changes a weight": (
        lambda: prepared("mixtral", Scaled),
        {"untouched", "hugging face", "decoding", "static cache"},
        "unembed",
    ),
    "a hook that never fires": (
        lambda: adapted(family("40b"), blocks__ln2={"kind": silent(LayerNormBridge, "hook_normalized")}),
        {"fires"},
        "blocks.1.ln2",
    ),
    "a hook that fires twice": (
        lambda: adapted(family("7b"), ln_final={"kind": twice(LayerNormBridge, "hook_scale")}),
        {"fires"},
        "ln_final",
    ),
    "axes that are not those of the value": (
        lambda: adapted(family("7b"), blocks__mlp={"kind": with_hook(MLPBridge, "hook_pre", axes="batch pos d_model")}),
        {"shape"},
        "blocks.0.mlp",
    ),
    "a port on the wrong module": (
        lambda: adapted(family("rw"), blocks__mlp={"kind": with_hook(MLPBridge, "hook_post", port=Port("in"))}),
        {"hugging face"},
        "blocks.1.mlp",
    ),
    "attention and MLP exchanged": (
        lambda: adapted(family("rw"), blocks={"kind": with_hook(BlockBridge, "hook_attn_out", port=Port("mlp"))}),
        {"hugging face", "stream"},
        "blocks.0",
    ),
    "key and value exchanged": (
        lambda: adapted(family("11b"), blocks__attn={"kind": swapped_key_and_value()}),
        {"hugging face", "pattern @ v"},
        "blocks.1.attn",
    ),
    "a block that does more than its parts": (a_block_that_does_more, {"stream"}, "blocks.1"),
    "a scale shown wrong": (
        lambda: adapted(family("7b"), blocks__ln1={"kind": shown(LayerNormBridge, "hook_scale", double, half)}),
        {"norm"},
        "blocks.1.ln1",
    ),
    "norms exchanged": (
        lambda: adapted(family("40b"), blocks__ln1={"at": "ln_mlp"}, blocks__ln2={"at": "ln_attn"}),
        {"norm", "writing"},
        "blocks.0.ln2",
    ),
    "scores shown wrong": (
        lambda: adapted(family("40b"), blocks__attn={"kind": shown(Attention, "hook_attn_scores", double, half)}),
        {"pattern"},
        "blocks.0.attn",
    ),
    "half a pattern": (
        lambda: adapted(family("40b"), blocks__attn={"kind": shown(Attention, "hook_pattern", half, double)}),
        {"pattern", "pattern @ v", "writing"},
        "blocks.1.attn",
    ),
    "the patterns of other heads": (
        lambda: adapted(family("40b"), blocks__attn={"kind": both_reversed()}),
        {"pattern @ v"},
        "blocks.0.attn",
    ),
    "the results of other heads": (
        lambda: adapted(
            family("7b"),
            blocks__attn={
                "kind": shown(Attention, "hook_result", lambda x: x.flip(2), lambda x: x.flip(2)),
            },
        ),
        {"z @ W_O", "writing"},
        "blocks.0.attn",
    ),
    "experts in another order": (
        lambda: adapted(
            mixtral(), blocks__mlp__experts={"kind": shown(ExpertsBridge, "hook_expert_out", in_order, in_order)}
        ),
        {"experts"},
        "blocks.1.mlp",
    ),
    "neurons of other experts": (
        lambda: adapted(mixtral(), blocks__mlp__experts={"kind": shown(ExpertsBridge, "hook_pre", in_order, in_order)}),
        {"experts"},
        "blocks.0.mlp",
    ),
    "a norm with a wrong scale": (
        lambda: adapted(family("rw"), blocks__ln2={"kind": returning(LayerNormBridge, lambda call, out: out * 1.001)}),
        {"inside", "rewriting"},
        "blocks.1.ln2",
    ),
    "reading spoils": (
        lambda: headed(with_hook(UnembeddingBridge, "hook_out", port=SpoilsWhatItReads())),
        {"looking", "decoding", "rewriting", "static cache"},
        "unembed",
    ),
    "putting back changes": (
        lambda: headed(with_hook(UnembeddingBridge, "hook_out", port=Port(view=lambda cfg: PutsTooMuch()))),
        {"neutral hook", "rewriting"},
        "unembed",
    ),
    "no prepare_model": (
        # Autograd loses the hook's place as well, when the model adds into a view of what was shown.
        lambda: prepared("7b", ArchitectureAdapter.prepare_model),
        {"kept", "gradient"},
        "blocks.1",
    ),
    "a model that overwrites what it has read": (a_model_that_overwrites, {"kept"}, "blocks.1.mlp"),
    "a dropped write": (
        lambda: adapted(family("7b"), blocks__mlp={"kind": with_hook(MLPBridge, "hook_pre", port=DroppedWrite("in"))}),
        {"noise", "gradient"},
        "blocks.0.mlp",
    ),
    "a dropped edit": (
        lambda: adapted(family("7b"), blocks__mlp={"kind": with_hook(MLPBridge, "hook_pre", port=DroppedEdit("in"))}),
        {"noise"},
        "blocks.0.mlp",
    ),
    "a gradient that is not a number": (
        lambda: adapted(family("7b"), ln_final={"kind": returning(LayerNormBridge, loses_the_gradient)}),
        {"gradient"},
        "blocks.1",
    ),
    "a norm that cuts the graph": (
        lambda: adapted(
            family("7b"), ln_final={"kind": shown(LayerNormBridge, "hook_scale", Tensor.detach, lambda x: x)}
        ),
        {"gradient"},
        "ln_final",
    ),
    "attention that does not see the cache": (
        lambda: adapted(
            family("40b"), blocks__attn={"kind": at_cached_steps("hook_pattern", without_the_past, with_nothing_of_it)}
        ),
        {"decoding", "rewriting", "writing", "static cache"},
        "blocks.1.attn",
    ),
    "cached keys in another order": (
        lambda: adapted(family("40b"), blocks__attn={"kind": at_cached_steps("hook_pattern", rolled, as_shown)}),
        {"decoding", "rewriting", "writing", "static cache"},
        "blocks.0.attn",
    ),
    "wrong keys of a cache of fixed size": (
        lambda: adapted(
            family("40b"), blocks__attn={"kind": at_cached_steps("hook_pattern", rolled_if_fixed, as_shown)}
        ),
        {"static cache"},
        "blocks.0.attn",
    ),
    "a write that the cache swallows": (
        lambda: adapted(
            family("40b"), blocks__attn={"kind": at_cached_steps("hook_pattern", lambda value, _: value, as_it_was)}
        ),
        {"writing"},
        "blocks.1.attn",
    ),
    "a write that is wrong for one token": (
        lambda: adapted(
            family("rw"), blocks__mlp={"kind": with_hook(MLPBridge, "hook_pre", port=WrongForOneToken("in"))}
        ),
        {"rewriting"},
        "blocks.0.mlp",
    ),
    "steps of a generation counted without the cache": (miscounting, {"generation"}, "blocks.1.attn"),
    "a mask that is forgotten": (lambda: Forgetful(family("40b")), {"left padding"}, "blocks.0.attn"),
}


@pytest.mark.parametrize("what", CASES)
def test_what_is_broken_fails_its_checks_and_no_others(what: str) -> None:
    make, checks, component = CASES[what]
    report = make().verify()
    failures = report.failures()
    assert {failure.check for failure in failures} == checks, report
    assert component in {failure.component for failure in failures}
    assert not report.passed
    assert f"{len(failures)} FAILED" in report.title()
    assert all(failure.sentence() in str(report) for failure in failures)


def test_every_check_is_broken_once() -> None:
    assert {check for _, checks, _ in CASES.values() for check in checks} == {check.name for check in CHECKS}
    alone = {check for _, checks, _ in CASES.values() if len(checks) == 1 for check in checks}
    # A bridge whose output is not the model's shows that at its last hook as well; what is wrong at a whole text is
    # wrong with a cache too; and what is wrong with one cache is so with the other.
    shared = {"untouched", "inside", "looking", "neutral hook", "z @ W_O", "decoding"}
    assert {check.name for check in CHECKS} - alone == shared


def test_a_cache_that_is_not_seen_is_said_where_it_shows() -> None:
    """The lines that a release of transformers brings which calls the cache otherwise, looked up in silence."""
    report = CASES["attention that does not see the cache"][0]().verify()
    lines = [failure.sentence() for failure in report.failures() if failure.component == "blocks.1.attn"]
    assert any(
        line.startswith("decoding: blocks.1.attn.hook_pattern: difference inf, tolerance 1.53e-05 (")
        and line.endswith(
            "): tokens 6 to 6 after 6 cached ones: pattern @ v: it has 1 keys, expected 7: those of the KV cache and "
            "the new ones"
        )
        for line in lines
    ), lines
    hooks = {failure.hook for failure in report.failures() if failure.check == "rewriting"}
    assert {f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)} <= hooks


def test_a_generation_that_is_miscounted_is_said() -> None:
    report = miscounting().verify()
    line = next(f.note for f in report.failures() if f.hook == "blocks.0.hook_resid_post")
    assert line == (
        "forward 1: hook.generation says step 1, prompt, columns [0], positions [[0], [-1]], "
        "expected step 1, continuation, columns [6], positions [[6], [4]]"
    )


def test_the_one_hook_is_named_that_is_wrong_for_one_token() -> None:
    report = CASES["a write that is wrong for one token"][0]().verify()
    assert [(f.check, f.hook) for f in report.failures()] == [
        ("rewriting", f"blocks.{layer}.mlp.hook_pre") for layer in (0, 1)
    ]


def test_only_the_broken_places_are_named() -> None:
    report = adapted(family("40b"), ln_final={"kind": shown(LayerNormBridge, "hook_scale", double, half)}).verify()
    (failure,) = report.failures()
    assert (failure.check, failure.component, failure.hook) == ("norm", "ln_final", "ln_final.hook_scale")
    assert failure.difference == pytest.approx(1.0)  # twice what it should be: off by all of it
    assert failure.tolerance == 2.0**-16


def test_what_a_module_returns_wrongly_is_not_handed_on() -> None:
    model = family("rw")
    first = model.transformer.h[0].post_attention_layernorm
    kind = returning(LayerNormBridge, lambda call, out: out * 1.5 if call.module is first else out)
    failures = adapted(model, blocks__ln2={"kind": kind}).verify().failures()
    assert {(failure.check, failure.component) for failure in failures} == {
        ("inside", "blocks.0.ln2"),
        ("rewriting", "blocks.0.ln2"),
    }


def test_where_a_gradient_is_lost_is_said() -> None:
    report = CASES["a gradient that is not a number"][0]().verify()
    (first,) = [failure for failure in report.failures() if failure.note]
    assert first.hook == "blocks.1.hook_resid_post"
    assert first.note == "the first on the way back from the output"


def test_weights_that_are_not_numbers_do_not_pass() -> None:
    model = family("40b")
    with torch.no_grad():
        model.transformer.h[1].mlp.dense_h_to_4h.weight.fill_(torch.nan)
    failures = TransformerBridge(model).verify().failures()
    assert {"gradient", "noise"} <= {failure.check for failure in failures}
    assert "blocks.1.mlp" in {failure.component for failure in failures}
