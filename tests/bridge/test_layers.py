"""`start_at_layer` and `stop_at_layer`: parts of the model, bitwise the same, and nothing else runs."""

import pytest
import torch

from tests.support import FAMILIES, family, tokens, torch_hooks
from transformer_lens import TransformerBridge

pytestmark = pytest.mark.core
LAYERS = 3


@pytest.fixture(params=FAMILIES)
def bridge(request) -> TransformerBridge:
    return TransformerBridge(family(request.param, num_hidden_layers=LAYERS))


def count_calls(bridge: TransformerBridge) -> tuple[dict[str, int], list]:
    """Calls of the Hugging Face modules inside the blocks and of the ends, by torch hooks of our own."""
    model, calls, handles = bridge.original_model, {}, []
    watched = {f"{i}": bridge.blocks[i].attn.original_component for i in range(LAYERS)}
    watched |= {
        "embed": model.get_input_embeddings(),
        "head": model.lm_head,
        "norm": bridge.ln_final.original_component,
    }
    for name, module in watched.items():
        calls[name] = 0

        def count(*_, name=name):
            calls[name] += 1

        handles.append(module.register_forward_hook(count))
    return calls, handles


@pytest.mark.parametrize("stop", range(LAYERS + 1))
def test_stopping_gives_the_stream_that_enters_the_layer(bridge, stop):
    x = tokens()
    _, cache = bridge.run_with_cache(x)
    stream = cache["resid_pre", stop] if stop < LAYERS else cache["resid_post", -1]
    calls, handles = count_calls(bridge)
    assert torch.equal(bridge(x, stop_at_layer=stop), stream)
    ran = {"embed", *map(str, range(stop))}
    assert calls == {name: int(name in ran) for name in calls}
    assert torch.equal(bridge(x, stop_at_layer=stop, return_type=None), stream)
    for handle in handles:
        handle.remove()
    assert torch_hooks(bridge.original_model) == 0


@pytest.mark.parametrize("start", range(LAYERS + 1))
def test_starting_continues_from_the_stream(bridge, start):
    x = tokens()
    clean = bridge(x)
    stream = bridge(x, stop_at_layer=start)
    calls, handles = count_calls(bridge)
    assert torch.equal(bridge(stream, start_at_layer=start), clean)
    ran = {"norm", "head", *map(str, range(start, LAYERS))}
    assert calls == {name: int(name in ran) for name in calls}
    for handle in handles:
        handle.remove()
    assert torch_hooks(bridge.original_model) == 0
    assert not any("forward" in vars(module) for module in bridge.original_model.modules())
    assert torch.equal(bridge(x), clean)


@pytest.mark.parametrize("start", range(LAYERS + 1))
def test_starting_and_stopping(bridge, start):
    x = tokens()
    stream = bridge(x, stop_at_layer=start)
    for stop in range(start, LAYERS + 1):
        part, cache = bridge.run_with_cache(stream, start_at_layer=start, stop_at_layer=stop)
        assert torch.equal(part, bridge(x, stop_at_layer=stop))
        assert {name.split(".")[1] for name in cache if name.startswith("blocks")} == set(map(str, range(start, stop)))
        assert not any(name.startswith(("hook_embed", "ln_final", "unembed")) for name in cache)


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_negative_layers_count_from_the_end(bridge, layer):
    x = tokens()
    stream = bridge(x, stop_at_layer=LAYERS - layer)
    assert torch.equal(bridge(x, stop_at_layer=-layer), stream)
    assert torch.equal(bridge(stream, start_at_layer=-layer), bridge(x))


def test_hooks_fire_inside_the_part(bridge):
    x = tokens()
    hooks = [("blocks.1.hook_mlp_out", lambda tensor, hook: 2 * tensor)]
    whole = bridge.run_with_hooks(x, fwd_hooks=hooks)
    stream = bridge(x, stop_at_layer=1)
    assert torch.equal(bridge.run_with_hooks(stream, fwd_hooks=hooks, start_at_layer=1), whole)
    assert torch.equal(
        bridge.run_with_hooks(x, fwd_hooks=hooks, stop_at_layer=2),
        bridge.run_with_hooks(stream, fwd_hooks=hooks, start_at_layer=1, stop_at_layer=2),
    )


def test_gradients_flow_through_the_part(bridge):
    x = tokens()
    stream = bridge(x, stop_at_layer=1).detach().requires_grad_()
    bridge(stream, start_at_layer=1).sum().backward()
    kept = []

    def keep(tensor, hook):
        tensor.retain_grad()
        kept.append(tensor)

    bridge.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_resid_pre", keep)]).sum().backward()
    assert torch.equal(stream.grad, kept[0].grad)


def test_left_padding_holds_for_the_part():
    bridge = TransformerBridge(family("40b"))
    x = tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    whole = bridge(x, attention_mask=mask)
    stream = bridge(x, attention_mask=mask, stop_at_layer=1)
    assert torch.equal(bridge(stream, attention_mask=mask, start_at_layer=1), whole)


@pytest.mark.parametrize("name", ["start_at_layer", "stop_at_layer"])
def test_layers_that_are_not_there(bridge, name):
    x = tokens() if name == "stop_at_layer" else bridge(tokens(), stop_at_layer=1)
    for layer in (LAYERS + 1, -LAYERS - 1, 100):
        with pytest.raises(ValueError, match=f"{name}: got {layer}, expected -3 to 3 in a model of 3 layers"):
            bridge(x, **{name: layer})
    for layer in (True, 1.0, "1"):
        with pytest.raises(TypeError, match=f"{name}: got {layer!r}, expected -3 to 3 in a model of 3 layers"):
            bridge(x, **{name: layer})
    assert torch_hooks(bridge.original_model) == 0


def test_calls_that_make_no_sense(bridge):
    x = tokens()
    stream = bridge(x, stop_at_layer=2)
    with pytest.raises(ValueError, match="start_at_layer=2 lies above stop_at_layer=1"):
        bridge(stream, start_at_layer=2, stop_at_layer=1)
    for return_type in ("loss", "both"):
        with pytest.raises(ValueError, match=f"return_type='{return_type}' needs the whole model, and stop_at_layer=1"):
            bridge(x, stop_at_layer=1, return_type=return_type)
    with pytest.raises(TypeError, match=r"start_at_layer=1: got a torch.int64 Tensor, expected the residual stream"):
        bridge(x, start_at_layer=1)
    with pytest.raises(TypeError, match="start_at_layer=1: got str"):
        bridge("text", start_at_layer=1)
    with pytest.raises(ValueError, match=r"got shape \[2, 7, 5\], expected \[batch, pos, 32\]"):
        bridge(torch.zeros(2, 7, 5), start_at_layer=1)
