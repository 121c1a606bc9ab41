"""Servers fail at every call of forward, backward and generation: results are bitwise what they would have been."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.faults import Place, Schedule, every_call
from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, Edit, Keep

PLACES = {
    "tiny-falcon": ([range(0, 2), range(2, 4)], [range(0, 1), range(1, 3), range(3, 4)]),
    "tiny-mixtral": ([range(0, 3)], [range(0, 1), range(1, 3)]),
}
"""Where the first servers are cut, and where others are."""
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [31, 30, 29, 28, 27, 26]])


@pytest.fixture(scope="module", params=list(PLACES))
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    place = Place(request.param, *PLACES[request.param])
    yield place
    place.close()


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal to the last bit, names and orders included."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Diary:
    """A function at an edge that notes when it is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        self.calls.append(str(hook.name))
        return tensor * 1.5


def forward(bridge: TransformerBridge) -> Any:
    """Captures of everything, edits with values on both sides of edges, a function, what is kept."""
    diary, kept = Diary(), Keep()
    hooks = [
        ("blocks.0.hook_resid_post", Edit("add", torch.full((128,), 0.25))),
        ("blocks.1.hook_resid_pre", Edit("scale", 1.25, positions=[1])),
        ("blocks.1.attn.hook_z", Edit("set", torch.linspace(0, 1, 32), heads=[1])),
        ("blocks.2.hook_resid_pre", Edit("add", torch.full((128,), -0.5), positions=[-1])),
        ("blocks.2.attn.hook_pattern", kept),
        ("hook_embed", diary),
        ("blocks.2.hook_resid_post", diary),
    ]
    with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
        logits, cache = bridge.run_with_cache(TOKENS)
    return [logits, {name: cache[name] for name in cache}, kept.value, diary.calls]


def backward(bridge: TransformerBridge) -> Any:
    """Gradients at the embeddings, at values of edits on both sides of edges, through what is kept, at every hook."""
    steer = [torch.full((128,), 0.5, requires_grad=True) for _ in range(4)]
    rows = torch.full((2, 128), 0.1, requires_grad=True)
    kept, late = Keep(), Keep()
    hooks = [
        ("blocks.0.hook_resid_post", Edit("add", steer[0])),
        ("blocks.0.hook_resid_post", late),
        ("blocks.1.hook_resid_pre", Edit("add", steer[1])),
        ("blocks.1.hook_resid_pre", Edit("add", rows, positions=[0, 1])),
        ("blocks.2.hook_resid_pre", Edit("add", steer[2], positions=[2])),
        ("blocks.2.hook_mlp_out", Edit("add", steer[3])),
        ("blocks.2.attn.hook_pattern", kept),
    ]
    hooks.append(("hook_embed", lambda tensor, hook: tensor.requires_grad_()))
    at = [f"blocks.{n}.{name}" for n in range(3) for name in ("hook_resid_pre", "attn.hook_q", "hook_resid_post")]
    with bridge.hooks(fwd_hooks=hooks):
        _, cache = bridge.run_with_cache(TOKENS, return_type="loss", names_filter=at, incl_bwd=True)
        loss = bridge(TOKENS, return_type="loss")
        (loss + kept.value[0, 1, -1, 2] + late.value.square().mean()).backward()
    values = [loss.detach(), rows.grad, *(value.grad for value in steer)]
    assert all(value is not None for value in values)
    return [values, {name: cache[name] for name in cache}]


def greedy(bridge: TransformerBridge) -> Any:
    return generated(bridge, max_new_tokens=4)


def beams(bridge: TransformerBridge) -> Any:
    return generated(bridge, max_new_tokens=4, num_beams=3)


def generated(bridge: TransformerBridge, **options: Any) -> Any:
    diary = Diary()
    hooks = [
        ("blocks.0.attn.hook_z", Edit("scale", 0.5, heads=[1])),
        ("blocks.2.hook_resid_pre", Edit("add", torch.full((128,), 0.25))),
        ("blocks.0.hook_resid_post", diary),
    ]
    with bridge.hooks(fwd_hooks=hooks):
        found = bridge.original_model.generate(
            TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0, **options
        )
    return [found.sequences, list(found.scores), diary.calls]


WORK = [forward, backward, greedy, beams]


@pytest.fixture(scope="module")
def expected(place: Place) -> dict[str, Any]:
    """What the model in this process says."""
    return {run.__name__: run(place.local) for run in WORK}


FEWEST = {"forward": 1, "backward": 2, "greedy": 8, "beams": 8}
"""Calls of each run, at least."""


@pytest.mark.parametrize("run", WORK)
@pytest.mark.parametrize(
    ("fault", "replicas"),
    [
        ("dies_before", "primary"),
        ("dies_before", "other"),
        ("dies_before", "whole"),
        ("dies_after", "other"),
        ("hangs", "other"),
    ],
)
def test_another_server_takes_over(place: Place, expected: dict[str, Any], run, fault: str, replicas: str) -> None:
    times = 0
    for one in every_call(place, fault, getattr(place, replicas), run):
        assert same(one.found, expected[run.__name__]), f"call {one.nth}"
        # In generation, the function at an edge lets some servers have two stretches, which both move.
        assert {*one.lost} == {(one.faulty.peer,)} and len(one.lost) <= 2, f"call {one.nth}"
        assert len(one.faulty.sent) == one.faulty.failed_at, "who failed was asked again, with somebody else there"
        assert one.clock.slept == []
        times += 1
    assert times >= FEWEST[run.__name__]


SET = ["blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


@pytest.mark.parametrize("keeps", [False, True], ids=["", "and keep"])
@pytest.mark.parametrize("at", SET)
def test_what_is_set_stops_the_gradient(place: Place, at: str, keeps: bool) -> None:
    """No gradient comes to what is before it, or only that of what was kept there, on whichever servers."""

    def run(bridge: TransformerBridge) -> Any:
        values = torch.linspace(-1, 1, 2 * 6 * 128).view(2, 6, 128).requires_grad_()
        begin = torch.full((2, 6, 128), 0.5, requires_grad=True)
        early, kept = torch.full((32,), 0.25, requires_grad=True), Keep()
        hooks = [
            ("hook_embed", lambda tensor, hook: begin * 1.0),
            ("blocks.0.attn.hook_q", Edit("add", early)),
            ("blocks.0.attn.hook_pattern", kept),
            (at, Edit("set", values)),
        ]
        loss = bridge.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=hooks)
        (loss + (kept.value[0, 1, -1, 2] if keeps else 0)).backward()
        return [loss.detach(), values.grad, begin.grad, early.grad]

    expected = run(place.local)
    assert (expected[2] is None) == (at == SET[0] or (at != SET[1] and not keeps))
    times = 0
    for one in every_call(place, "dies_before", place.other, run):
        assert same(one.found, expected), f"call {one.nth}"
        times += 1
    assert times >= FEWEST["backward"]


ALONE = [(run, fault) for run in (forward, backward) for fault in ("loses_answer", "garbles", "is_busy")]
ALONE += [(greedy, fault) for fault in ("hangs", "loses_answer", "garbles", "answers_too_little", "restarts")]
ALONE += [(beams, fault) for fault in ("hangs", "is_busy", "forgets")]


@pytest.mark.parametrize(("run", "fault"), ALONE)
def test_a_server_that_is_alone_comes_back(place: Place, expected: dict[str, Any], run, fault: str) -> None:
    times = 0
    for one in every_call(place, fault, [], run):
        assert same(one.found, expected[run.__name__]), f"call {one.nth}"
        assert one.clock.slept == ([] if fault == "forgets" else [1.0]), f"call {one.nth}"
        times += 1
    assert times >= FEWEST[run.__name__]


def test_trained_prompts_get_the_same_gradients(place: Place) -> None:
    found = []
    for faults in ({}, {0: "dies_after"}, {len(place.primary): "dies_before"}):
        schedule = Schedule(faults)
        spans = [*place.spans(place.primary, "first", schedule), *place.spans(place.other, "replica")]
        torch.manual_seed(0)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            place.name, spans=spans, tuning_mode="deep_ptune", pre_seq_len=3
        )
        with torch.no_grad():
            for parameter in model.prompts.parameters():
                parameter.copy_(torch.randn_like(parameter))
        model(TOKENS, labels=TOKENS).loss.backward()
        assert len(model.route.recoveries) == len(faults)
        found.append([parameter.grad for parameter in model.prompts.parameters()])
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found[0])
    assert same(found[0], found[1]) and same(found[0], found[2])
