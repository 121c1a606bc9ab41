"""How well each estimate agrees with patching for real, on the shipped models; docs/attribution.md has the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_lens import TransformerBridge, patching
from transformer_lens.analysis.attribution import (
    atp_star,
    attribution_patching,
    edge_attribution_patching,
    edge_attribution_patching_ig,
    edge_effects,
    expert_attribution_patching,
    faithfulness,
)
from transformer_lens.data.generate import ioi_pair

MODELS = ("tiny-falcon", "tiny-mixtral")
SWEEPS = {"z": "out", "q": "q", "k": "k", "v": "v"}


class Task:
    """Eight pairs of indirect-object prompts of 15 tokens with unseen names, and their logit difference."""

    def __init__(self, name: str) -> None:
        self.bridge = TransformerBridge.boot_transformers(name)
        drawn = (ioi_pair(seed=seed) for seed in range(400))
        pairs = [one for one in drawn if self.bridge.to_tokens(one.clean).shape[1] == 15][:8]
        self.clean = self.bridge.to_tokens([one.clean for one in pairs])
        self.corrupted = self.bridge.to_tokens([one.corrupted for one in pairs])
        self.right = torch.tensor([self.bridge.to_single_token(one.answer) for one in pairs])
        self.wrong = torch.tensor([self.bridge.to_single_token(one.wrong_answer) for one in pairs])
        with torch.no_grad():
            logits, self.cache = self.bridge.run_with_cache(self.clean)
            self.best, self.worst = self.metric(logits).item(), self.metric(self.bridge(self.corrupted)).item()
        self.inputs: Any = (self.bridge, self.clean, self.corrupted, self.metric)

    def metric(self, logits: Tensor) -> Tensor:
        rows = torch.arange(len(logits))
        return (logits[rows, -1, self.right] - logits[rows, -1, self.wrong]).mean()

    def sweep(self, name: str) -> Tensor:
        run = getattr(patching, f"get_act_patch_{name}")
        return run(self.bridge, self.corrupted, self.cache, self.metric, verbose=False) - self.worst

    def hooks(self, name: str) -> list[str]:
        return [f"blocks.{i}.{name}" for i in range(self.bridge.cfg.n_layers)]


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest) -> Task:
    return Task(request.param)


def correlation(estimate: Tensor, measured: Tensor) -> float:
    """Pearson's, over all places."""
    return torch.corrcoef(torch.stack([estimate.double().flatten(), measured.double().flatten()]))[0, 1].item()


def check(task: Task, figures: dict[str, float], expected: dict[str, dict[str, float]]) -> None:
    """The measured correlations are those that the documentation states, rounded to three digits."""
    stated = expected[task.bridge.cfg.model_name]
    assert figures.keys() == stated.keys()
    wrong = {name: (figures[name], stated[name]) for name in figures if abs(figures[name] - stated[name]) > 2e-3}
    assert not wrong, f"{task.bridge.cfg.model_name}: measured and stated correlations differ: {wrong}"


PLACES = {
    "tiny-falcon": {
        "z": 0.998,
        "q": 0.966,
        "k": 0.426,
        "v": 1.000,
        "attn_out": 0.998,
        "mlp_out": 0.990,
        "resid_pre": 0.947,
    },
    "tiny-mixtral": {
        "z": 0.998,
        "q": 0.747,
        "k": 0.895,
        "v": 0.999,
        "attn_out": 0.997,
        "mlp_out": 0.999,
        "resid_pre": 0.832,
    },
}
QK_FIX = {"tiny-falcon": {"q": 0.983, "k": 0.990}, "tiny-mixtral": {"q": 0.895, "k": 0.975}}
GRAD_DROP = {
    "tiny-falcon": {"q": 0.976, "k": 0.863, "v": 1.000, "z": 0.995},
    "tiny-mixtral": {"q": 0.660, "k": 0.947, "v": 0.993, "z": 0.992},
}
EDGES = {
    "tiny-falcon": {"EAP": 0.826, "EAP at clean": 0.792, "EAP-IG": 0.999},
    "tiny-mixtral": {"EAP": 0.846, "EAP at clean": 0.807, "EAP-IG": 0.996},
}


def test_attribution_patching_agrees_with_patching_each_place(task):
    assert task.best > 10 and task.worst < -10
    figures = {}
    for part, name in SWEEPS.items():
        axes = "pos head" if part in "zq" else "pos kv_head"
        found = attribution_patching(*task.inputs, task.hooks(f"attn.hook_{part}")).stacked(axes)
        figures[part] = correlation(found, task.sweep(f"attn_head_{name}_by_pos"))
    for part in ("attn_out", "mlp_out", "resid_pre"):
        found = attribution_patching(*task.inputs, task.hooks(f"hook_{part}")).stacked("pos")
        figures[part] = correlation(found, task.sweep(part))
    check(task, figures, PLACES)


def test_the_qk_fix_agrees_better(task):
    found = atp_star(*task.inputs, ("q", "k"), grad_drop=False)
    figures = {
        part: correlation(scores.sum(1), task.sweep(f"attn_head_{part}_by_pos")) for part, scores in found.items()
    }
    check(task, figures, QK_FIX)
    assert all(figures[part] > PLACES[task.bridge.cfg.model_name][part] for part in figures)


def test_grad_drop_agrees_with_the_size_of_effects(task):
    found = atp_star(*task.inputs, tuple("qkvz"))
    sizes = {part: task.sweep(f"attn_head_{SWEEPS[part]}_by_pos").abs() for part in found}
    check(task, {part: correlation(found[part].sum(1), sizes[part]) for part in found}, GRAD_DROP)


def test_expert_attribution_agrees_with_patching_experts():
    task = Task("tiny-mixtral")
    found = expert_attribution_patching(*task.inputs).sum((1, 2))
    assert correlation(found, task.sweep("expert_out")) == pytest.approx(0.999, abs=1e-3)


def test_edge_attribution_agrees_with_patching_every_edge(task):
    measured = edge_effects(*task.inputs)
    found = {
        "EAP": edge_attribution_patching(*task.inputs),
        "EAP at clean": edge_attribution_patching(*task.inputs, at="clean"),
        "EAP-IG": edge_attribution_patching_ig(*task.inputs),
    }
    check(task, {name: correlation(one.values(), measured.values()) for name, one in found.items()}, EDGES)
    assert found["EAP-IG"].top(1)[0][:2] == measured.top(1)[0][:2]
    # A circuit of a tenth of the edges does nine tenths of the work; as many at random do next to nothing.
    torch.manual_seed(0)
    shuffled = type(measured)(measured.graph, torch.rand(measured.scores.shape) * measured.graph.exists)
    shares = faithfulness(*task.inputs, [found["EAP-IG"].keep(40), shuffled.keep(40)]).tolist()
    assert shares[0] > 0.9 and shares[1] < 0.1, shares
