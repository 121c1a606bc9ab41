"""`bridge.verify()` passes on every family, leaves the model as it was, and shows what it found."""

from __future__ import annotations

import copy
import json
import math
import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForQuestionAnswering,
    FalconForSequenceClassification,
    FalconForTokenClassification,
    FalconModel,
    MixtralConfig,
    MixtralForSequenceClassification,
    MixtralModel,
)

from tests.equivalence.grid import wrap
from tests.support import (
    FALCON_SMALL,
    FAMILIES,
    LAYOUTS,
    MIXTRAL_SMALL,
    family,
    mixtral,
    perturbed,
    tokens,
    torch_hooks,
)
from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.model_bridge.verification.decoding import WRITES, chunks
from transformer_lens.model_bridge.verification.evidence import largest_difference
from transformer_lens.model_bridge.verification.report import CheckResult, VerificationReport
from transformer_lens.model_bridge.verification.verify import CHECKS

SECONDS = 5
"""The budget of a tiny model, of one core's time, which other processes do not lengthen; it takes a fifth of that."""


def timed(bridge: TransformerBridge) -> VerificationReport:
    """The report, which has to come in time."""
    started = time.process_time()
    report = bridge.verify()
    assert time.process_time() - started < SECONDS
    return report


def cases() -> list[Any]:
    """Every family under both kinds of attention in float32, and under one of them in each half precision."""
    found = []
    for number, name in enumerate(FAMILIES):
        for place, attn in enumerate(("sdpa", "eager")):
            for half, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
                chosen = half == 0 or (number + place + half) % 2
                found.append(pytest.param(name, attn, dtype, marks=[] if chosen else [pytest.mark.slow]))
    return found


@pytest.mark.core
@pytest.mark.parametrize("name, attn, dtype", cases())
def test_every_family_passes(name: str, attn: str, dtype: torch.dtype) -> None:
    report = timed(wrap(family(name, attn=attn, dtype=dtype)))
    assert report.passed, report
    assert report.without_results() == ([] if name == "mixtral" else ["experts"])
    assert list(report.not_applicable) == (["static cache"] if name == "rw" else [])


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_the_shipped_models_pass_in_time(name: str) -> None:
    report = timed(TransformerBridge.boot_transformers(name))
    assert report.passed, report
    assert report.tokens == (2, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": "eager", "dtype": torch.float64},
        {"experts": "batched_mm"},
        {"num_local_experts": 1, "num_experts_per_tok": 1},
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 3, "head_dim": 16},
        {"num_local_experts": 2, "num_experts_per_tok": 1, "experts": "batched_mm", "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_mixtrals_of_other_shapes_pass(changes: dict[str, Any]) -> None:
    report = TransformerBridge(mixtral(**changes)).verify()
    assert report.passed, report


@pytest.mark.parametrize("layout", ["7b", "rw", "40b"])
@pytest.mark.parametrize(
    "kind", [FalconModel, FalconForSequenceClassification, FalconForTokenClassification, FalconForQuestionAnswering]
)
def test_falcons_of_every_task_pass(kind: Any, layout: str) -> None:
    report = TransformerBridge(perturbed(kind(FalconConfig(**FALCON_SMALL, **LAYOUTS[layout])))).verify()
    assert report.passed, report


@pytest.mark.parametrize("kind", [MixtralModel, MixtralForSequenceClassification])
def test_mixtrals_of_other_tasks_pass(kind: Any) -> None:
    report = TransformerBridge(perturbed(kind(MixtralConfig(**MIXTRAL_SMALL)))).verify()
    assert report.passed, report


def test_every_hook_of_every_layer_is_compared() -> None:
    bridge = TransformerBridge(mixtral())
    report = bridge.verify()
    for check in ("fires", "shape", "kept", "noise"):
        assert {r.hook for r in report.results if r.check == check} == set(bridge.hook_dict)
    differentiable = {name for name, point in bridge.hook_dict.items() if not point.integer}
    assert {r.hook for r in report.results if r.check == "gradient"} == differentiable


@pytest.mark.parametrize("name", FAMILIES)
def test_every_port_is_compared_with_hugging_face(name: str) -> None:
    bridge = TransformerBridge(family(name))
    ports = {row.name.replace("{i}", "1") for row in bridge.hook_table().present() if row.kind == "port"}
    compared = {r.hook for r in bridge.verify().results if r.check == "hugging face"}
    assert ports <= compared


def test_own_tokens() -> None:
    bridge = TransformerBridge(family("40b"))
    assert bridge.verify(tokens(3, 5)).tokens == (3, 5)
    report = bridge.verify(tokens(1, 6)[0])
    assert report.tokens == (1, 6)
    assert report.passed


# -- with a cache, generating, padded ----------------------------------------------------------------


@pytest.mark.parametrize("length, pieces", [(2, [1, 1]), (3, [1, 1, 1]), (5, [1, 2, 1, 1]), (8, [4, 2, 1, 1])])
def test_a_text_is_read_in_pieces(length: int, pieces: list[int]) -> None:
    found = chunks(length)
    assert [len(piece) for piece in found] == pieces
    assert [column for piece in found for column in piece] == list(range(length))


@pytest.mark.parametrize("pos", [2, 3])
def test_short_texts_pass(pos: int) -> None:
    report = TransformerBridge(mixtral()).verify(tokens(1, pos))
    assert report.passed, report


def test_every_hook_is_looked_at_with_a_cache_and_behind_padding() -> None:
    bridge = TransformerBridge(mixtral())
    report = bridge.verify()
    assert {r.hook for r in report.results if r.check == "left padding"} == set(bridge.hook_dict)
    ports = {row.name.replace("{i}", "1") for row in bridge.hook_table().present() if row.kind == "port"}
    for check in ("decoding", "static cache"):
        hooks = {r.hook for r in report.results if r.check == check}
        assert ports | {"blocks.1.attn.hook_pattern", "blocks.1.mlp.hook_expert_out"} <= hooks
    writes = {r.hook for r in report.results if r.check == "writing"}
    assert writes == {f"blocks.{layer}.{write.hook}" for layer in (0, 1) for write in WRITES}


@pytest.mark.parametrize("name", ["rw", "mixtral"])
def test_thorough_takes_every_hook_alone(name: str) -> None:
    bridge = TransformerBridge(family(name))
    report = bridge.verify(thorough=True)
    assert report.passed, report
    assert report.sampled == {}
    assert "thorough" not in str(report)
    for check in ("noise", "rewriting"):
        assert set(bridge.hook_dict) <= {r.hook for r in report.results if r.check == check}
    quick = bridge.verify()
    assert set(quick.sampled) == {"noise", "rewriting"}
    assert "noise: 4 tokens; one hook of every layer in the same run" in str(quick)


def test_what_a_model_cannot_do_is_said() -> None:
    report = wrap(family("rw")).verify()
    assert "not applicable: static cache: transformers itself fails there" in str(report)
    kind = FalconForQuestionAnswering(FalconConfig(**FALCON_SMALL, **LAYOUTS["7b"]))
    absent = TransformerBridge(perturbed(kind)).verify().not_applicable
    assert absent["decoding"] == "FalconForQuestionAnswering takes no KV cache"
    assert absent["generation"] == "FalconForQuestionAnswering predicts no next token"
    assert absent["left padding"] == "FalconForQuestionAnswering takes no position ids"


def test_a_check_that_cannot_be_run_is_a_failure() -> None:
    bridge = TransformerBridge(family("7b"))
    bridge.run_with_cache = lambda *args, **kwargs: {}["nothing"]
    (failure, *_) = bridge.verify().failures()
    assert failure.sentence().endswith("(the check has to run to its end): KeyError: 'nothing'")


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    TransformerBridge(family("7b")).verify(tokens(1, 2))
    assert capsys.readouterr() == ("", "")


# -- what is left behind -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["7b", "rw", "mixtral"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = family(name)
    model.train()
    model.base_model.get_submodule("layers" if name == "mixtral" else "h")[0].eval()
    first, *others = model.parameters()
    first.requires_grad_(False)
    others[0].grad = torch.ones_like(others[0])
    modes = {name: module.training for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    bridge = TransformerBridge(model)
    prepared = {name: type(module) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    threads = torch.get_num_threads()

    bridge.verify()

    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert prepared == {name: type(module) for name, module in model.named_modules()}
    assert [p.requires_grad for p in model.parameters()] == [False, *(True for _ in others)]
    assert torch.equal(others[0].grad, torch.ones_like(others[0]))
    assert all(parameter.grad is None for parameter in [first, *others[1:]])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch_hooks(model) == 0
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(point.has_hooks() for point in bridge.hook_dict.values())
    recorded = model(tokens(), output_hidden_states=True).hidden_states
    assert len(recorded) == 3  # transformers still records them when asked
    bridge.detach()
    assert classes == {name: type(module) for name, module in model.named_modules()}


def test_it_runs_where_gradients_are_off() -> None:
    bridge = TransformerBridge(family("7b"))
    with torch.no_grad():
        assert bridge.verify().passed
    with torch.inference_mode():
        assert bridge.verify().passed
    bridge.original_model.requires_grad_(False)
    assert bridge.verify().passed
    assert not any(parameter.requires_grad for parameter in bridge.parameters())


def test_twice_is_the_same() -> None:
    bridge = TransformerBridge(family("mixtral"))
    assert bridge.verify().to_dicts() == bridge.verify().to_dicts()


# -- refusals ----------------------------------------------------------------------------------------


def test_hooks_are_refused() -> None:
    bridge = TransformerBridge(family("7b"))
    bridge.add_hook("blocks.0.attn.hook_q", lambda tensor, hook: None)
    with pytest.raises(ValueError, match=r"^verify: hooks are attached at 'blocks.0.attn.hook_q', and would be"):
        bridge.verify()
    bridge.reset_hooks()
    bridge.blocks[1].hook_mlp_out = nn.Identity()
    with pytest.raises(ValueError, match=r"^verify: hooks are attached at 'blocks.1.hook_mlp_out', and would be"):
        bridge.verify()
    bridge.blocks[1].hook_mlp_out = HookPoint()
    assert bridge.verify().passed


def test_a_detached_bridge_is_refused() -> None:
    bridge = TransformerBridge(family("7b"))
    bridge.detach()
    with pytest.raises(ValueError, match=r"^this bridge was detached from its model"):
        bridge.verify()


@pytest.mark.parametrize(
    "given, got",
    [
        ("text", "str"),
        (torch.zeros(1, 4), r"torch.float32 of shape \[1, 4\]"),
        (torch.zeros(1, 1, dtype=torch.long), r"torch.int64 of shape \[1, 1\]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"torch.int64 of shape \[1, 2, 3\]"),
    ],
)
def test_other_tokens_are_refused(given: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"^verify: got {got}, expected token ids"):
        TransformerBridge(family("7b")).verify(given)


# -- the numbers and the report ----------------------------------------------------------------------


def test_a_difference_is_a_share_of_the_largest_value() -> None:
    expected = torch.tensor([1.0, -4.0])
    assert largest_difference(expected, expected) == 0
    assert largest_difference(torch.tensor([2.0, -4.0]), expected) == 0.25
    assert largest_difference(torch.tensor([1.0]), expected) == math.inf
    assert largest_difference(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert largest_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == 1
    assert largest_difference(torch.zeros(0), torch.zeros(0)) == 0


def test_not_a_number_equals_itself_only() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    assert largest_difference(nan, nan) == 0
    assert math.isnan(largest_difference(nan, torch.ones(2)))
    assert not CheckResult("c", "x", "x.h", math.nan, 1.0, "why").passed
    assert not CheckResult("c", "x", "x.h", math.nan, 0.0, "why", has_to_exceed=True).passed


def test_masked_scores_do_not_hide_the_others() -> None:
    lowest = torch.finfo(torch.float16).min
    expected = torch.tensor([lowest, 2.0], dtype=torch.float16)
    assert largest_difference(torch.tensor([lowest, 1.0], dtype=torch.float16), expected) == 0.5
    assert largest_difference(torch.tensor([0.0, 2.0], dtype=torch.float16), expected) > 1e4


def small_report() -> VerificationReport:
    results = (
        CheckResult("fires", "blocks.0.attn", "blocks.0.attn.hook_q", 0.0, 0.0, "a count"),
        CheckResult("fires", "blocks.0.mlp", "blocks.0.mlp.hook_pre", 0.0, 0.0, "a count"),
        CheckResult("inside", "blocks.0.attn", "", 1e-7, 1e-5, "rounding"),
        CheckResult("inside", "blocks.1.attn", "", math.nan, 1e-5, "rounding", note="a <note>"),
        CheckResult("noise", "", "hook_embed", 0.5, 0.0, "noise", has_to_exceed=True),
    )
    meanings = {"fires": "once", "inside": "as its module", "noise": "changes", "experts": "sum", "static cache": "too"}
    about = ("tiny", "FalconForCausalLM", "float32", "cpu", "sdpa", (2, 8), 0.25, meanings, results)
    return VerificationReport(
        *about,
        not_applicable={"static cache": "it has none"},
        sampled={"noise": "one hook of every layer in the same run"},
    )


def test_the_report_as_text() -> None:
    assert str(small_report()) == (
        "tiny: FalconForCausalLM, float32, sdpa, cpu: 5 comparisons in 0.2 s, 1 FAILED\n"
        "check   difference  tolerance  where it is largest   result\n"
        "-----------------------------------------------------------\n"
        "fires   0           0          2 kinds of component  ok\n"
        "inside  nan         1e-05      blocks.1.attn         FAILED\n"
        "noise   5.0e-01     > 0        hook_embed            ok\n"
        "noise: one hook of every layer in the same run (thorough: each hook alone)\n"
        "not applicable: static cache: it has none\n"
        "nothing to compare in this model: experts\n"
        "inside: blocks.1.attn: difference nan, tolerance 1e-05 (rounding): a <note>"
    )
    assert repr(small_report()) == str(small_report())


def test_the_report_as_html_and_rich() -> None:
    from rich.console import Console

    page = small_report()._repr_html_()
    assert page.count("<tr") == 4
    assert "a &lt;note&gt;" in page
    console = Console(width=80, record=True, file=None, quiet=True)
    console.print(small_report())
    console = Console(width=80)
    with console.capture() as captured:
        console.print(TransformerBridge(mixtral()).verify())
    lines = captured.get().splitlines()
    assert any(line.split()[:1] == ["experts"] for line in lines)
    assert not any(line.strip() in ("hts", "ts") for line in lines)  # no name is broken at 80 columns


def test_the_report_as_json() -> None:
    report = TransformerBridge(family("40b")).verify()
    data = json.loads(report.to_json())
    assert list(data) == [
        "model",
        "architecture",
        "dtype",
        "device",
        "attention",
        "tokens",
        "seconds",
        "passed",
        "checks",
        "not_applicable",
        "sampled",
        "results",
    ]
    assert data["passed"] is True
    assert data["checks"] == {check.name: check.meaning for check in CHECKS}
    assert data["results"] == report.to_dicts()
    for result in data["results"]:
        assert list(result) == [
            "check",
            "component",
            "hook",
            "difference",
            "tolerance",
            "reason",
            "has_to_exceed",
            "note",
            "passed",
        ]
        assert isinstance(result["difference"], float)
        assert result["reason"]
    failed = json.loads(small_report().to_json())["results"][3]
    assert failed["difference"] is None
    assert failed["passed"] is False
