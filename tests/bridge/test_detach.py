"""`detach()` and the `with` block give the model back exactly as it came."""

import pytest
import torch

from tests.support import FAMILIES, family, tokens, torch_hooks
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter

pytestmark = pytest.mark.core

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def picture(model: torch.nn.Module) -> list[tuple]:
    """Everything about a model's modules that a bridge could have left something in."""
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            module.training,
            {kind: list(getattr(module, kind)) for kind in HOOKS},
            [
                (key, id(parameter), parameter is not None and parameter.requires_grad)
                for key, parameter in module._parameters.items()
            ],
            [(key, id(buffer)) for key, buffer in module._buffers.items()],
            [(key, id(child)) for key, child in module._modules.items()],
        )
        for name, module in model.named_modules()
    ]


@pytest.fixture(params=FAMILIES)
def model(request):
    return family(request.param)


def use(bridge: TransformerBridge, x: torch.Tensor) -> None:
    """Everything that attaches something."""
    bridge.add_hook("hook_embed", lambda tensor, hook: None)
    bridge.add_perma_hook("blocks.1.hook_mlp_out", lambda tensor, hook: 2 * tensor)
    bridge.add_hook("blocks.0.attn.hook_q", lambda grad, hook: None, dir="bwd")
    bridge.run_with_cache(x, return_type="loss", incl_bwd=True)
    bridge(bridge(x, stop_at_layer=1), start_at_layer=1)
    bridge.blocks[0].hook_resid_post = torch.nn.Identity()
    bridge.zero_grad()


@pytest.mark.parametrize("training", [False, True])
def test_detach_gives_the_model_back(model, training):
    model.train(training)
    x = tokens()
    before = picture(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    bridge = TransformerBridge(model)
    use(bridge, x)
    assert bridge.detach() is model
    assert not any(point.has_hooks() for point in bridge.hook_points())
    assert picture(model) == before
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert bridge.detach() is model
    assert picture(model) == before


def test_leaving_a_with_block_detaches(model):
    x = tokens()
    plain = model(x).logits
    before = picture(model)
    with TransformerBridge(model) as bridge:
        use(bridge, x)
        assert not torch.equal(bridge(x), plain)
    assert picture(model) == before
    assert torch.equal(model(x).logits, plain)

    def interrupted() -> None:
        with TransformerBridge(model) as bridge:
            use(bridge, x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert picture(model) == before


def test_a_detached_bridge_refuses_to_run_and_attaches_nothing(model):
    x = tokens()
    bridge = TransformerBridge(model)
    bridge.detach()
    for run in (bridge, bridge.run_with_cache, bridge.run_with_hooks):
        with pytest.raises(ValueError, match="this bridge was detached from its model"):
            run(x)
    plain = model(x).logits
    bridge.add_hook("hook_embed", lambda tensor, hook: 0 * tensor)
    assert torch_hooks(model) == 0
    assert torch.equal(model(x).logits, plain)


def test_a_model_may_be_wrapped_again(model):
    x = tokens()
    clean = TransformerBridge(model)(x)
    for _ in range(3):
        with TransformerBridge(model) as bridge:
            assert torch.equal(bridge.run_with_cache(x)[0], clean)


def test_hooks_of_others_stay(model):
    calls = []
    block = TransformerBridge(model).blocks[0].original_component
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    bridge = TransformerBridge(model)
    bridge.run_with_cache(tokens())
    bridge.detach()
    model(tokens())
    assert calls == [1, 1]
    handle.remove()
    assert torch_hooks(model) == 0


def test_a_model_without_a_bridge_has_no_trace_of_wrapping(model):
    before = picture(model)
    bridge = TransformerBridge(model)
    changed = [(old, new) for old, new in zip(before, picture(model), strict=True) if old != new]
    # What `prepare_model` declares, and nothing else: the parallel blocks' MLPs.
    assert all(old[0].endswith("mlp") for old, _ in changed)
    expected = 2 if getattr(model.config, "parallel_attn", False) else 0
    assert len(changed) == expected
    assert torch_hooks(model) == 0
    bridge.detach()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_preparations_are_counted(order):
    model = family("7b")
    before = picture(model)
    prepare = FalconArchitectureAdapter.prepare_model
    preparations = [prepare(model), prepare(model), prepare(model)]
    prepared = type(model.transformer.h[0].mlp)
    for which in order[:-1]:
        preparations[which].undo()
        preparations[which].undo()
        assert type(model.transformer.h[0].mlp) is prepared
    preparations[order[-1]].undo()
    assert picture(model) == before


def test_the_stream_of_anybodys_hooks_is_right_while_prepared():
    model = family("40b")
    x = tokens()
    kept = {}
    mlp = model.transformer.h[0].mlp
    handles = [
        mlp.register_forward_hook(lambda module, args, output: kept.update(mlp=(output, output.clone()))),
        mlp.register_full_backward_hook(lambda *_: kept.update(fired=True)),
    ]
    preparation = FalconArchitectureAdapter.prepare_model(model)
    model(x).logits.sum().backward()
    assert torch.equal(*kept["mlp"])
    assert kept["fired"]
    preparation.undo()
    for handle in handles:
        handle.remove()
