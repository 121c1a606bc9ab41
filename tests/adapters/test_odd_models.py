"""Components of models that lost a module, have none of a bias, or run on nothing: sentences, not stack traces."""

import pytest
import torch

from tests.support import falcon, mixtral, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.generalized_components import PartsElsewhere


def test_a_module_that_is_gone_is_named():
    model = falcon(multi_query=True)
    bridge = TransformerBridge(model)
    del model.transformer.h[1].mlp
    with pytest.raises(
        RuntimeError, match=r"blocks\.1\.mlp: the model has no module at 'transformer\.h\.1\.mlp' any more"
    ):
        bridge.run_with_cache(tokens())


def test_weights_of_a_block_that_is_elsewhere_are_refused():
    model = falcon(multi_query=True)
    bridge = TransformerBridge(model)
    model.transformer.h[1] = PartsElsewhere()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\S*: its block runs in another process"):
        _ = bridge.blocks[1].attn.W_Q
    assert bridge.blocks[0].attn.W_Q.shape == (8, 32, 4)


def test_a_bias_the_model_has_not_cannot_be_written():
    model = falcon(multi_query=True)
    bridge = TransformerBridge(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="b_O cannot be written: FalconLinear has no bias in this model"):
        bridge.blocks[0].attn.b_O = torch.ones(32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("write", [False, True])
def test_experts_without_a_single_token(write):
    """As on a process whose experts nobody chose."""
    model = mixtral(experts="eager")
    bridge = TransformerBridge(model)
    experts = bridge.blocks[0].mlp.experts
    hidden, chosen = torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long)
    seen = []

    def look(value, hook):
        seen.append(tuple(value.shape))
        return value + 1 if write else None

    with bridge.hooks(fwd_hooks=[("blocks.0.mlp.hook_expert_out", look)]):
        out = experts.original_component(hidden, chosen, torch.zeros(0, 2))
    assert out.shape == (0, 32)
    assert seen == [(0, 2, 32)]


def test_a_weight_that_is_not_in_memory_cannot_be_written():
    model = falcon(multi_query=True)
    bridge = TransformerBridge(model)
    dense = model.transformer.h[0].self_attention.dense
    dense.weight = torch.nn.Parameter(dense.weight.to("meta"))
    with pytest.raises(ValueError, match="W_O cannot be written: the weight of FalconLinear is no ordinary parameter"):
        bridge.blocks[0].attn.W_O = torch.zeros(8, 4, 32)
