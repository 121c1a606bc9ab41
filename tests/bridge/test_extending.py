"""What other libraries do to a bridge: replacing hook points, subclassing, freezing, compiling, copying."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.support import FAMILIES, family, tokens, torch_hooks
from transformer_lens import ActivationCache, HookPoint, TransformerBridge

MLP_OUT = "blocks.1.hook_mlp_out"


@pytest.fixture(params=FAMILIES)
def bridge(request) -> TransformerBridge:
    return TransformerBridge(family(request.param))


def double(tensor, hook):
    return 2 * tensor


class Autoencoder(nn.Module):
    """Stands in a hook's place, with hook points of its own."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.hook_acts = HookPoint()
        self.hook_recons = HookPoint()

    def forward(self, x):
        return self.hook_recons(self.factor * self.hook_acts(x))


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """As sparse-autoencoder libraries do it."""
    *parents, last = path.split(".")
    for part in parents:
        root = root[int(part)] if part.isdigit() else getattr(root, part)
    setattr(root, last, module)


# -- modules in hooks' places ---------------------------------------------------------------------


@pytest.mark.core
def test_a_module_takes_a_hooks_place_and_leaves_it(bridge):
    x = tokens()
    clean = bridge(x)
    doubled = bridge.run_with_hooks(x, fwd_hooks=[(MLP_OUT, double)])
    bridge.blocks[1].hook_mlp_out = Autoencoder()
    bridge.setup()
    assert torch.equal(bridge(x), clean)
    bridge.blocks[1].hook_mlp_out.factor = 2.0
    assert torch.equal(bridge(x), doubled)
    assert torch.equal(bridge.original_model(x).logits, doubled)
    assert f"{MLP_OUT}.hook_acts" in bridge.hook_dict
    assert MLP_OUT not in bridge.hook_dict
    output, cache = bridge.run_with_cache(x)
    assert torch.equal(output, doubled)
    assert torch.equal(cache[f"{MLP_OUT}.hook_recons"], 2 * cache[f"{MLP_OUT}.hook_acts"])
    bridge.blocks[1].hook_mlp_out = HookPoint()
    bridge.setup()
    assert torch.equal(bridge(x), clean)
    assert torch_hooks(bridge.original_model) == 0
    assert torch.equal(bridge.run_with_hooks(x, fwd_hooks=[(MLP_OUT, double)]), doubled)
    assert torch.equal(bridge.run_with_cache(x)[1][MLP_OUT], cache[f"{MLP_OUT}.hook_acts"])


@pytest.mark.parametrize("path", ["hook_embed", "blocks.0.attn.hook_q", "blocks.0.attn.hook_z", "blocks.0.hook_in"])
def test_deep_paths(bridge, path):
    x = tokens()
    clean = bridge(x)
    if path == "blocks.0.hook_in":
        path = bridge.canonical_name(path)
    expected = bridge.run_with_hooks(x, fwd_hooks=[(path, double)])
    put(bridge, path, Autoencoder(2.0))
    assert torch.equal(bridge(x), expected)
    put(bridge, path, HookPoint())
    assert torch.equal(bridge(x), clean)
    assert bridge.hook_dict[path].name == path
    assert bridge.hook_dict[path].axes


def test_inner_hook_points_are_edited_and_differentiated(bridge):
    x = tokens()
    bridge.blocks[1].hook_mlp_out = Autoencoder()
    acts = f"{MLP_OUT}.hook_acts"
    seen = {}
    output = bridge.run_with_hooks(
        x,
        fwd_hooks=[(acts, double)],
        bwd_hooks=[(lambda name: name.startswith(MLP_OUT), lambda grad, hook: seen.update({hook.name: grad.clone()}))],
    )
    output.sum().backward()
    assert set(seen) == {acts, f"{MLP_OUT}.hook_recons"}
    put(bridge, MLP_OUT, HookPoint())
    assert torch.equal(output, bridge.run_with_hooks(x, fwd_hooks=[(MLP_OUT, double)]))


def test_the_parameters_of_a_module_in_a_hooks_place_learn(bridge):
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(32))

        def forward(self, x):
            return x + self.shift

    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    bridge.blocks[0].hook_resid_post = Shift()
    bridge(tokens(), return_type="loss").backward()
    assert bridge.blocks[0].hook_resid_post.shift.grad.abs().sum() > 0
    assert not any("shift" in name for name in bridge.state_dict())
    assert not any("shift" in name for name, _ in bridge.named_parameters())


def test_a_hook_that_a_module_replaced_is_named_in_the_error(bridge):
    bridge.blocks[1].hook_mlp_out = Autoencoder()
    with pytest.raises(KeyError, match="in place of hook 'blocks.1.hook_mlp_out' sits a Autoencoder"):
        bridge.run_with_cache(tokens(), names_filter=MLP_OUT)


def test_a_module_that_returns_a_wrong_shape_is_an_error(bridge):
    x = tokens()
    bridge.blocks[1].hook_mlp_out = nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r"'blocks.1.hook_mlp_out': got a replacement of shape \[2, 7, 5\]"):
        bridge(x)
    bridge.blocks[1].hook_mlp_out = nn.Identity()
    assert torch.equal(bridge(x), bridge.original_model(x).logits)


def test_hooks_of_a_hook_point_go_with_it(bridge):
    x = tokens()
    clean = bridge(x)
    bridge.add_hook(MLP_OUT, double)
    bridge.blocks[1].hook_mlp_out = HookPoint()
    assert torch.equal(bridge(x), clean)
    carrying = HookPoint()
    carrying.add_hook(double)
    bridge.blocks[1].hook_mlp_out = carrying
    assert torch.equal(bridge(x), bridge.run_with_hooks(x, fwd_hooks=[]))
    assert not torch.equal(bridge(x), clean)
    bridge.reset_hooks()
    assert torch_hooks(bridge.original_model) == 0


def test_a_subclass_may_take_over(bridge):
    class HookedSAETransformer(TransformerBridge):
        def run_doubled(self, x):
            return self.run_with_hooks(x, fwd_hooks=[(MLP_OUT, double)])

    x = tokens()
    expected = bridge.run_with_hooks(x, fwd_hooks=[(MLP_OUT, double)])
    bridge.__class__ = HookedSAETransformer
    assert torch.equal(bridge.run_doubled(x), expected)
    assert isinstance(bridge.run_with_cache(x)[1], ActivationCache)


def test_private_keys_and_a_wrapped_forward(bridge):
    x = tokens()
    clean = bridge(x)
    bridge.__dict__["_acts_to_saes"] = {"a": 1}
    bridge._another = "kept"
    calls = []
    original = bridge.forward

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    bridge.forward = counting
    assert torch.equal(bridge(x), clean)
    assert torch.equal(bridge.run_with_hooks(x, fwd_hooks=[], return_type="logits"), clean)
    assert torch.equal(bridge.run_with_cache(x, stop_at_layer=2)[1]["resid_post", 1], bridge(x, stop_at_layer=2))
    assert calls == [{}, {"return_type": "logits"}, {"stop_at_layer": 2}, {"stop_at_layer": 2}]
    del bridge.forward
    assert torch.equal(bridge(x), clean)
    assert bridge._acts_to_saes == {"a": 1}
    assert bridge._another == "kept"


# -- freezing and attributing ---------------------------------------------------------------------


def test_freezing_by_permanent_hooks_makes_the_rest_linear():
    # With every factor but the value path frozen, one backward pass gives contributions that sum up.
    bridge = TransformerBridge(family("rw"))
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    x = tokens(1, 5)
    clean = bridge(x)
    frozen = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.1.hook_attn_out"]
    bridge.add_hook(frozen, lambda tensor, hook: tensor.detach(), is_permanent=True)
    bridge.add_hook("hook_embed", lambda tensor, hook: tensor.requires_grad_(), is_permanent=True)
    bridge.reset_hooks()
    grads = {}
    final = "blocks.1.hook_resid_post"
    bridge.add_hook([final, "hook_embed"], lambda grad, hook: grads.update({hook.name: grad.clone()}), dir="bwd")
    output, cache = bridge.run_with_cache(x)
    assert torch.equal(output, clean)
    output[0, -1, 7].backward()
    # Nothing but the identity connects the embedding to the final stream.
    assert torch.equal(grads["hook_embed"], grads[final])
    streams = cache["embed"] + sum(cache[name] for name in frozen)
    # The same sum in another order: a few roundings of float32.
    assert torch.allclose(streams, cache[final], rtol=1e-5, atol=1e-5)
    assert not any(p.grad is not None for p in bridge.parameters())
    bridge.reset_hooks(including_permanent=True)
    assert torch_hooks(bridge.original_model) == 0


def test_a_gradient_at_the_embedding_of_a_frozen_model(bridge):
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    x = tokens()
    clean = bridge(x)
    kept = []

    def start(tensor, hook):
        tensor.requires_grad_()
        kept.append(tensor)

    output = bridge.run_with_hooks(x, fwd_hooks=[("hook_embed", start)])
    assert torch.equal(output, clean)
    output.sum().backward()
    embedded = bridge.original_model.get_input_embeddings()(x).requires_grad_()
    bridge.original_model(inputs_embeds=embedded).logits.sum().backward()
    assert torch.equal(kept[0].grad, embedded.grad)


def test_retain_grad_and_autograd_reach_tensors_kept_by_hooks(bridge):
    x = tokens()
    names = ["hook_embed", "blocks.0.hook_mlp_out", "blocks.0.attn.hook_z", "blocks.1.hook_resid_post"]
    kept = {}

    def keep(tensor, hook):
        tensor.retain_grad()
        kept[hook.name] = tensor

    bridge.run_with_hooks(x, fwd_hooks=[(names, keep)], return_type="loss").backward()
    held = {}
    hooks = [(names, lambda tensor, hook: held.update({hook.name: tensor}))]
    loss = bridge.run_with_hooks(x, fwd_hooks=hooks, return_type="loss")
    by_autograd = torch.autograd.grad(loss, list(held.values()))
    _, cache = bridge.run_with_cache(x, names_filter=names, return_type="loss", incl_bwd=True)
    for (name, tensor), gradient in zip(kept.items(), by_autograd, strict=True):
        assert torch.equal(tensor.grad, gradient)
        assert torch.equal(gradient, cache[f"{name}_grad"])


def test_backward_hooks_change_the_gradient_below_them(bridge):
    x = tokens()

    def gradient_of_embedding(answer):
        bridge.zero_grad()
        hooks = [("blocks.0.hook_resid_post", answer)]
        bridge.run_with_hooks(x, bwd_hooks=hooks, return_type="loss").backward()
        return bridge.original_model.get_input_embeddings().weight.grad.clone()

    plain = gradient_of_embedding(lambda grad, hook: None)
    head = bridge.original_model.lm_head.weight
    tied = head is bridge.original_model.get_input_embeddings().weight
    fourfold = gradient_of_embedding(lambda grad, hook: 4 * grad)  # a power of two: no rounding
    as_tuple = gradient_of_embedding(lambda grad, hook: (4 * grad,))

    def in_place(grad, hook):
        grad *= 4

    assert torch.equal(fourfold, as_tuple)
    assert torch.equal(fourfold, gradient_of_embedding(in_place))
    if tied:
        assert not torch.equal(fourfold, plain)
    else:
        assert torch.equal(fourfold, 4 * plain)


# -- copying --------------------------------------------------------------------------------------


class Doubling:
    """A hook that can be pickled."""

    def __call__(self, tensor, hook):
        return 2 * tensor


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_bridge_of_its_own(bridge, make):
    x = tokens()
    clean = bridge(x)
    other = make(bridge)
    assert torch.equal(other(x), clean)
    assert not {p.data_ptr() for p in bridge.parameters()} & {p.data_ptr() for p in other.parameters()}
    bridge.add_hook(MLP_OUT, double)
    assert torch.equal(other(x), clean)
    edited = bridge(x)
    assert torch.equal(other.run_with_hooks(x, fwd_hooks=[(MLP_OUT, double)]), edited)
    assert torch_hooks(other.original_model) == 0
    classes = [type(module) for module in other.detach().modules()]
    assert classes == [type(module) for module in family_like(bridge).modules()]
    assert torch.equal(bridge(x), edited)


def family_like(bridge: TransformerBridge) -> nn.Module:
    """A fresh model of the same class and config."""
    return type(bridge.original_model)(bridge.original_model.config)


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_takes_its_hooks_along(bridge, make):
    x = tokens()
    clean = bridge(x)
    bridge.add_hook(MLP_OUT, Doubling())
    edited = bridge(x)
    other = make(bridge)
    assert torch.equal(other(x), edited)
    bridge.reset_hooks()
    assert torch.equal(bridge(x), clean)
    assert torch.equal(other(x), edited)
    other.reset_hooks()
    assert torch.equal(other(x), clean)
    assert torch_hooks(other.original_model) == 0


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_after_detach_is_spent_and_its_model_works(bridge, make):
    x = tokens()
    clean = bridge(x)
    bridge.detach()
    other = make(bridge)
    with pytest.raises(ValueError, match="detached"):
        other(x)
    assert torch.equal(TransformerBridge(other.original_model)(x), clean)
    assert torch.equal(make(bridge.original_model)(x).logits, clean)


def test_a_cache_can_be_copied(bridge):
    _, cache = bridge.run_with_cache(tokens())
    other = copy.deepcopy(cache)
    assert list(other) == list(cache)
    assert torch.equal(other["q", 0], cache["q", 0])


def test_a_model_with_hooks_at_ports_and_inside_is_pickled(bridge):
    ids = tokens()
    plain = bridge(ids)
    bridge.add_hook("blocks.0.hook_resid_pre", double)
    bridge.add_hook("blocks.0.attn.hook_pattern", double)
    written = bridge(ids)
    assert not torch.equal(written, plain)
    copied = pickle.loads(pickle.dumps(bridge))
    assert torch.equal(copied(ids), written)
    copied.reset_hooks()
    assert torch.equal(copied(ids), plain)
    assert not any("forward" in vars(module) for module in copied.original_model.modules())
    assert torch.equal(pickle.loads(pickle.dumps(bridge.original_model))(ids).logits, written)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_second_bridge_cannot_exchange_what_another_has_put_in(bridge, order):
    class Own(nn.Module):
        def forward(self, x, *args):
            return x

    model, second = bridge.original_model, TransformerBridge(bridge.original_model)
    modules = dict(model.named_modules())
    bridge.blocks[0].mlp = Own()
    with pytest.raises(ValueError, match="another bridge has put a Own in its place"):
        second.blocks[0].mlp = Own()
    for number in order:
        (bridge, second)[number].detach()
    assert dict(model.named_modules()) == modules
