"""A model that two processes share, against the same model in one: every hook is whole, and every edit is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sharded.processes import in_two_processes
from tests.sharded.work import all_of_it, everything
from tests.support import falcon, mixtral
from tests.support import tokens as token_ids
from transformer_lens.model_bridge.access.sharding import ALONE, Sharding, Shards

KINDS = ("tensor", "tensor and expert", "falcon")
ROUNDING = 3e-5
"""Times the largest value: float32 sums in another order, through two layers whose weights are large."""

Runs = tuple[list[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What two processes found, and what one alone found."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shared")
    models = {"mixtral": mixtral(), "falcon": falcon(new_decoder_architecture=True, num_kv_heads=2)}
    ids = token_ids()
    for name, model in models.items():
        model.save_pretrained(folder / name)
    together = in_two_processes(all_of_it, folder / "out", str(folder / "mixtral"), str(folder / "falcon"), ids)
    alone = {name: everything(model, ids) for name, model in models.items()}
    return together, alone | {"tensor": alone["mixtral"], "tensor and expert": alone["mixtral"]}


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    if not expected.is_floating_point():
        assert torch.equal(got, expected), what
        return
    difference = float((got - expected).abs().max())
    assert difference <= ROUNDING * max(1.0, float(expected.abs().max())), f"{what}: {difference}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["cache", "edits", "gradients", "parameters", "decoded"])
def test_both_processes_see_what_one_alone_sees(runs: Runs, kind: str, part: str) -> None:
    together, alone = runs
    for rank, found in enumerate(together):
        assert set(found[kind][part]) == set(alone[kind][part])
        for name, expected in alone[kind][part].items():
            assert_close(found[kind][part][name], expected, f"rank {rank}, {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_see_the_very_same(runs: Runs, kind: str) -> None:
    first, second = (found[kind] for found in runs[0])
    for part in ("cache", "edits", "gradients"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])


@pytest.mark.parametrize("kind", KINDS)
def test_looking_leaves_a_shared_model_alone(runs: Runs, kind: str) -> None:
    assert all(found[kind]["untouched"] for found in runs[0])
    assert all(abs(found[kind]["loss"] - runs[1][kind]["loss"]) < ROUNDING for found in runs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_and_every_gradient_counts(runs: Runs, kind: str) -> None:
    """Or the comparisons above would hold for hooks that do nothing."""
    alone = runs[1][kind]
    for name, logits in alone["edits"].items():
        assert (logits - alone["logits"]).abs().max() > 100 * ROUNDING, name
    assert all(gradient.abs().max() > 0 for gradient in alone["gradients"].values())


def test_a_shared_falcon_needs_prepare_model_to_learn(runs: Runs) -> None:
    for found in runs[0]:
        assert "modified inplace" in found["falcon alone"]
        assert found["falcon prepared"] == ""


def test_divisions_that_are_not_understood_are_refused(runs: Runs) -> None:
    for found in runs[0]:
        assert (
            "transformer.h.0.self_attention: 8 query and 2 key-value heads cannot be shared by 2 processes"
            in (found["refused"]["fused"])
        )
        assert (
            "transformer.h.0.mlp.dense_h_to_4h is divided among processes in the style 'packed_colwise'"
            in (found["refused"]["packed"])
        )


@pytest.mark.parametrize("kind", KINDS)
def test_verify_says_that_it_needs_one_process(runs: Runs, kind: str) -> None:
    for found in runs[0]:
        assert found[kind]["verify"] == (
            "verify: this model is divided among processes, and the checks compare with whole weights and modules; "
            "verify the checkpoint in one process, or offloaded by accelerate"
        )


def test_a_model_alone_is_not_divided() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert ALONE.gather(x, -1) is x and ALONE.slice(x, -1) is x and ALONE.summed(x) is x and ALONE.entering(x) is x


def test_uneven_widths_are_divided_as_chunks() -> None:
    for total, size in ((48, 2), (7, 2), (5, 4), (3, 4)):
        chunks = [len(chunk) for chunk in torch.arange(total).chunk(size)]
        assert Shards(size=size).even(total) == chunks + [0] * (size - len(chunks))


def test_plans_name_layers_by_a_star() -> None:
    sharding = Sharding({"model.layers.*.mlp.experts": "moe_tp_experts"}, Shards(size=2), mixtral_cfg())
    assert sharding.of_experts("model.layers.11.mlp.experts").axes == ("d_mlp",)
    assert sharding.of_experts("model.layers.11.mlp.other").shards is ALONE


def mixtral_cfg() -> Any:
    from transformer_lens.model_bridge.supported_architectures import adapter_for

    return adapter_for(mixtral().config).cfg
