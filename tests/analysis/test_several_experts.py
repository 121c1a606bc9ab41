"""Several experts taken away at once, in chosen layers or in all: against models whose weights are zero there."""

import copy

import pytest
import torch

from tests.analysis.test_experts import KERNELS, boot, by_hand, close
from tests.support import falcon, tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis.experts import ablate_expert


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


PLACES = [
    ([(0, 1)], None, [(0, 1)]),
    ([(0, 1), (2, 3), (0, 2)], None, [(0, 1), (0, 2), (2, 3)]),
    ([(-1, 0), (1, 3)], None, [(1, 3), (2, 0)]),
    ([(None, 2)], None, [(0, 2), (1, 2), (2, 2)]),
    ([(None, 2), (1, 0)], None, [(0, 2), (1, 2), (2, 2), (1, 0)]),
    (None, [0, 3], [(layer, expert) for layer in range(3) for expert in (0, 3)]),
    ([0, 2], [1, 2], [(0, 1), (0, 2), (2, 1), (2, 2)]),
    (1, [3], [(1, 3)]),
]


@pytest.mark.parametrize(("layer", "expert", "pairs"), PLACES)
def test_several_experts_are_gone_at_once(layer, expert, pairs):
    whole = boot(num_hidden_layers=3)
    without = copy.deepcopy(whole.original_model)
    for i, number in pairs:
        without.model.layers[i].mlp.experts.down_proj[number] = 0
    ids = tokens()
    ablated = whole.run_with_hooks(ids, fwd_hooks=ablate_expert(whole, layer, expert))
    assert torch.equal(ablated, without(ids).logits)
    assert (ablated - whole(ids)).abs().max() > 0.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_are_scaled_once_for_all_experts_of_a_layer(kernel):
    bridge, ids = boot(kernel, num_experts_per_tok=3), tokens()

    def reroute(logits, weights, indices):
        left = weights.masked_fill((indices == 1) | (indices == 3), 0)
        return left / left.sum(-1, keepdim=True), indices

    hooks = ablate_expert(bridge, [(1, 3), (1, 1)], renormalize=True)
    assert close(bridge.run_with_hooks(ids, fwd_hooks=hooks), by_hand(bridge, [1], reroute, ids))


def test_all_chosen_experts_gone_leave_nothing():
    bridge, ids = boot(num_experts_per_tok=2), tokens()
    for renormalize in (False, True):
        hooks = ablate_expert(bridge, 1, range(4), renormalize=renormalize)
        seen = []
        bridge.run_with_hooks(ids, fwd_hooks=[*hooks, ("blocks.1.hook_mlp_out", lambda out, hook: seen.append(out))])
        assert not seen[0].any()


@pytest.mark.parametrize(
    ("layer", "expert", "says"),
    [
        ([(0, 1), (0, 1)], None, r"experts: got \[1, 1\], expected each expert once"),
        ([(None, 1), (1, 1)], None, "expected each expert once"),
        ([(0, 4)], None, r"expert: got \(0, 4\), expected layers 0 to 1 and experts 0 to 3"),
        ("L2E0", None, "expert: got 'L2E0', expected layers 0 to 1 and experts 0 to 3"),
        ([(0, 1)], 2, r"expert: got 2 beside \[\(0, 1\)\], which names the experts already"),
        (0, None, r"got layer=0 and expert=None, expected layers and an expert, or both in one"),
        (None, None, "expected layers and an expert, or both in one"),
        ([0, (1, 2)], None, "expected layers and an expert, or both in one"),
        ([0, (1, 2)], 1, "which names the experts already"),
        (0, [1, 1], "expected each expert once"),
    ],
)
def test_refused(layer, expert, says):
    with pytest.raises(ValueError, match=says):
        ablate_expert(boot(), layer, expert)


def test_a_dense_model_has_none():
    with pytest.raises(ValueError, match="ablate_expert needs a mixture of experts"):
        ablate_expert(TransformerBridge(falcon()), [(0, 1)])
