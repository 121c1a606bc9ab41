"""`bridge.verify()` on every layout: hooks inside modules, equations, every hook, under both attention kinds."""

import pytest
import torch

from tests.equivalence.grid import EXPERTS, RUNNABLE, point_id
from tests.support import falcon, mixtral, tokens
from transformer_lens import TransformerBridge


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("point", RUNNABLE, ids=point_id)
@pytest.mark.filterwarnings("ignore:Falcon with ALiBi under eager attention:UserWarning")
def test_every_falcon_layout(point, attn):
    bridge = TransformerBridge(falcon(attn, bias=bool(point["num_kv_heads"] % 4), **point))
    report = bridge.verify(tokens(2, 5))
    assert report.passed, str(report)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 2), (8, 3)], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_mixtral_shapes(shape, experts, attn, window):
    n_experts, chosen = shape
    changes = {"num_local_experts": n_experts, "num_experts_per_tok": chosen, "sliding_window": window}
    bridge = TransformerBridge(mixtral(attn, experts, torch.float32, **changes))
    report = bridge.verify(tokens(2, 5))
    assert report.passed, str(report)
