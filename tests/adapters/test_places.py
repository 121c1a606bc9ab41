"""A module put in a component's place is what the model runs, with hooks at its ends; taken away it leaves nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.bridge.test_detach import picture
from tests.support import FAMILIES, family, tokens, torch_hooks
from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.model_bridge.generalized_components import ComponentBridge

every_family = pytest.mark.parametrize("name", FAMILIES)
PARALLEL = ("7b", "11b", "40b")


class Twice(nn.Module):
    """Gives a first argument back, doubled, in the shape in which what was here gave its own."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.gives_tuple = isinstance(before, tuple)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (2 * x, None) if self.gives_tuple else 2 * x


class Around(nn.Module):
    """Calls the component it was put in place of, between hook points of its own, as attribution packages do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.hook_in, self.hook_out, self.hook_own = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_out(self.hook_own(self.inner(self.hook_in(x))))


def at(bridge: TransformerBridge, name: str) -> tuple[Any, str]:
    owner, _, role = name.rpartition(".")
    return bridge.get_submodule(owner), role


def put(bridge: TransformerBridge, name: str, module: Any) -> None:
    owner, role = at(bridge, name)
    setattr(owner, role, module)


def in_a_bare_model(bridge: TransformerBridge, name: str, module: nn.Module) -> Any:
    """The bare model with another module at a component's path."""
    bare = copy.deepcopy(bridge).detach()
    bare.set_submodule(bridge.get_submodule(name).path, module)
    return bare


@every_family
@pytest.mark.parametrize("name_of", ["ln1", "mlp", "first linear"])
def test_the_model_runs_what_was_put_in_place(name: str, name_of: str) -> None:
    model, x = family(name), tokens()
    before = picture(model)
    bridge = TransformerBridge(model)
    inside = "mlp.in" if name != "mlp" and "in" in bridge.blocks[1].mlp._modules else "attn.o"
    place = f"blocks.1.{inside if name_of == 'first linear' else name_of}"
    component = bridge.get_submodule(place)
    linear = isinstance(component.original_component, nn.Linear)
    mine = (
        nn.Linear(component.original_component.in_features, component.original_component.out_features)
        if linear
        else Twice(None)
    )
    with torch.no_grad():
        usual = bridge(x)
        expected = in_a_bare_model(bridge, place, mine)(x).logits
        put(bridge, place, mine)
        assert bridge.get_submodule(place) is mine
        assert torch.equal(bridge(x), expected) and torch.equal(model(x).logits, expected)
        assert not torch.equal(expected, usual)
        put(bridge, place, component)
        assert torch.equal(bridge(x), usual)
        put(bridge, place, mine)
        cached, cache = bridge.run_with_cache(x)
        assert torch.equal(cached, expected)
        if name_of == "mlp":
            assert torch.equal(cache["blocks.1.mlp.hook_out"], 2 * cache["blocks.1.mlp.hook_in"])
            assert torch.equal(cache["blocks.1.hook_mlp_out"], cache["blocks.1.mlp.hook_out"])
        edited = bridge.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_mlp_out", lambda v, hook: torch.zeros_like(v))])
        silent = in_a_bare_model(TransformerBridge(family(name)), "blocks.1.mlp", nn.Identity())
        assert edited.shape == silent(x).logits.shape and not torch.equal(edited, expected)
    assert torch_hooks(model) == 0
    assert bridge.detach() is model and picture(model) == before
    with torch.no_grad():
        assert torch.equal(model(x).logits, usual)


@every_family
def test_a_module_that_calls_the_component_it_replaces(name: str) -> None:
    model, x = family(name), tokens()
    bridge = TransformerBridge(model)
    parameters = {id(p) for p in model.parameters()}
    usual, everything = bridge.run_with_cache(x)
    for block in bridge.blocks:
        block.mlp = Around(block.mlp)
    bridge.unembed = Around(bridge.unembed)
    bridge.setup()
    assert {id(p) for p in model.parameters()} == {id(p) for p in bridge.parameters()} == parameters
    logits, cache = bridge.run_with_cache(x)
    assert torch.equal(logits, usual)
    for hook in set(cache) & set(everything):
        assert torch.equal(cache[hook], everything[hook]), hook
    own = {f"blocks.{i}.mlp.{hook}" for i in range(2) for hook in ("hook_own", "hook_out")}
    own |= {"unembed.hook_in", "unembed.hook_own"}
    assert set(cache) - set(everything) == own
    assert torch.equal(cache["blocks.1.mlp.hook_own"], everything["blocks.1.hook_mlp_out"])
    assert torch.equal(bridge.unembed.inner.W_U, model.get_output_embeddings().inner.displaced_module.weight.T)

    def zero(value: Tensor, hook: HookPoint) -> Tensor:
        return torch.zeros_like(value)

    silenced = bridge.run_with_hooks(x, fwd_hooks=[("blocks.0.mlp.hook_own", zero)])
    plain = TransformerBridge(copy.deepcopy(bridge).detach())
    assert torch.equal(silenced, plain.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_mlp_out", zero)]))
    grads: list[Tensor] = []
    bridge.run_with_hooks(x, bwd_hooks=[("blocks.0.mlp.hook_own", lambda g, hook: grads.append(g))]).sum().backward()
    plain.run_with_hooks(x, bwd_hooks=[("blocks.0.hook_mlp_out", lambda g, hook: grads.append(g))]).sum().backward()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PARALLEL)
def test_what_falcon_adds_in_place_does_not_reach_the_output_of_a_module(name: str) -> None:
    """Also for plain torch hooks, and twice; the class of the module is its own again afterwards."""
    bridge, x = TransformerBridge(family(name)), tokens()
    TransformerBridge(bridge.original_model).detach()
    mine = Around(bridge.blocks[0].mlp)
    bridge.blocks[0].mlp = mine
    seen: list[Tensor] = []
    mine.register_forward_hook(lambda m, args, output: seen.append((output, output.clone())))  # type: ignore[arg-type]
    with torch.no_grad():
        bridge(x)
    assert torch.equal(*seen[0])
    assert isinstance(mine, Around) and type(mine) is not Around and type(mine).__name__ == "Around"
    bridge.blocks[0].mlp = mine.inner
    assert type(mine) is Around and "preparations" not in mine.__dict__
    bridge.blocks[0].mlp = mine
    bridge.blocks[0].mlp = other = Around(mine)
    assert type(mine) is Around and type(other) is not Around
    bridge.detach()
    assert type(other) is Around


@every_family
def test_attention_and_the_hooks_of_the_block_that_look_into_it(name: str) -> None:
    bridge, x = TransformerBridge(family(name)), tokens()
    found: list[Any] = []
    attn = bridge.blocks[0].attn
    handle = attn.original_component.register_forward_hook(lambda m, a, output: found.append(output))
    with torch.no_grad():
        bridge(x)
    handle.remove()

    class Zero(nn.Module):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (torch.zeros_like(hidden_states), None)

    assert isinstance(found[0], tuple)
    with torch.no_grad():
        none = bridge.run_with_hooks(x, fwd_hooks=[("blocks.0.hook_attn_out", lambda v, hook: torch.zeros_like(v))])
        bridge.blocks[0].attn = Zero()
        logits, cache = bridge.run_with_cache(x)
    assert torch.equal(logits, none)
    assert not cache["blocks.0.hook_attn_out"].any()
    assert "blocks.0.attn.hook_pattern" not in cache and "blocks.1.attn.hook_pattern" in cache
    for hook in ("blocks.0.attn.hook_pattern", "blocks.0.hook_q_input", "blocks.0.attn.q.hook_out"):
        with pytest.raises(KeyError, match="in place of component 'blocks.0.attn' sits a Zero, and what is inside it"):
            bridge.run_with_cache(x, names_filter=hook)
    bridge.blocks[0].attn = attn
    with torch.no_grad():
        _, cache = bridge.run_with_cache(x, names_filter=["blocks.0.attn.hook_pattern", "blocks.0.hook_q_input"])
    assert len(cache) == 2


@every_family
def test_what_looks_through_a_place_sees_the_module_there(name: str) -> None:
    """The norm in front of attention and the output projection: formulas and weights read those that run."""
    bridge, x = TransformerBridge(family(name)), tokens()
    block, attn = bridge.blocks[1], bridge.blocks[1].attn
    attn.o = mine = nn.Linear(32, 32, bias=attn.b_O is not None)
    block.ln1 = Twice(None)
    with torch.no_grad():
        usual, cache = bridge.run_with_cache(x, names_filter=lambda hook: "blocks.1." in hook)
        result = cache["blocks.1.attn.hook_result"].sum(-2) + (0 if attn.b_O is None else mine.bias)
        torch.testing.assert_close(result, cache["blocks.1.hook_attn_out"], rtol=1e-4, atol=1e-5)
        assert torch.equal(attn.W_O.reshape(32, 32), mine.weight.T)
        same = bridge.run_with_hooks(x, fwd_hooks=[("blocks.1.hook_q_input", lambda v, hook: v.clone())])
        torch.testing.assert_close(same, usual, rtol=1e-4, atol=1e-4)
        stream = cache["blocks.1.hook_resid_pre"]
        torch.testing.assert_close(cache["blocks.1.attn.hook_in"], 2 * stream, rtol=0, atol=0)


@every_family
def test_parts_of_a_run_know_the_module_in_the_place_of_the_final_norm(name: str) -> None:
    bridge, x = TransformerBridge(family(name)), tokens()
    with torch.no_grad():
        bridge.ln_final = mine = Twice(None)
        logits, cache = bridge.run_with_cache(x)
        stream = bridge(x, stop_at_layer=2)
        assert torch.equal(stream, cache["blocks.1.hook_resid_post"])
        assert torch.equal(bridge(stream, start_at_layer=2), logits)
        assert torch.equal(mine(stream), cache["ln_final.hook_out"])
        assert torch.equal(bridge.unembed(bridge.ln_final(stream)), logits)


@every_family
def test_a_copy_with_a_module_in_place_is_one_too(name: str) -> None:
    bridge, x = TransformerBridge(family(name)), tokens()
    bridge.blocks[1].mlp = Around(bridge.blocks[1].mlp)
    other = copy.deepcopy(bridge)
    bridge.to(torch.float64)
    with torch.no_grad():
        assert other(x).dtype == torch.float32
        _, cache = other.run_with_cache(x, names_filter="blocks.1.mlp.hook_own")
        assert torch.equal(
            cache["blocks.1.mlp.hook_own"], other.blocks[1].mlp(other.run_with_cache(x)[1]["blocks.1.mlp.hook_in"])
        )
        other.blocks[1].mlp = other.blocks[1].mlp.inner
        assert "blocks.1.mlp.hook_own" not in other.hook_dict and "blocks.1.mlp.hook_own" in bridge.hook_dict
        assert torch.equal(other(x), other.detach()(x).logits)


def test_hooks_stay_at_the_ends_and_are_refused_inside() -> None:
    bridge, x = TransformerBridge(family("40b")), tokens()
    seen: list[Tensor] = []
    bridge.add_hook("blocks.0.mlp.hook_out", lambda value, hook: seen.append(value))
    bridge.blocks[0].mlp = Twice(None)
    with torch.no_grad():
        bridge(x)
        expected = bridge.run_with_cache(x, names_filter="blocks.0.mlp.hook_in")[1]["blocks.0.mlp.hook_in"]
    assert torch.equal(seen[0], 2 * expected)
    bridge.add_hook("blocks.1.mlp.hook_pre", lambda value, hook: None)
    with pytest.raises(ValueError, match="in its place would leave these out: blocks.1.mlp.hook_pre; take the hooks"):
        bridge.blocks[1].mlp = Twice(None)
    bridge.reset_hooks()
    put(bridge, "blocks.1.mlp.in", nn.Linear(32, 48))
    with pytest.raises(ValueError, match="would leave these out: blocks.1.mlp.in; take"):
        bridge.blocks[1].mlp = Twice(None)


def test_what_needs_the_weights_of_a_component_says_who_is_in_its_place() -> None:
    bridge = TransformerBridge(family("40b"))
    bridge.blocks[0].mlp = nn.Identity()
    for function in (bridge.fold_ln, bridge.process_weights, bridge.verify):
        with pytest.raises(ValueError, match="in place of component 'blocks.0.mlp' sits a Identity"):
            function()
    other = TransformerBridge(family("40b"))
    other.unembed = nn.Linear(32, 61)
    with pytest.raises(ValueError, match="in place of component 'unembed' sits a Linear"):
        other._component("unembed")


@pytest.mark.parametrize("value", [None, "relu", torch.relu, torch.zeros(2)])
def test_what_is_no_module_has_no_place(value: Any) -> None:
    bridge = TransformerBridge(family("40b"))
    kind = type(value).__name__
    with pytest.raises(
        TypeError, match=f"blocks.0.mlp: got {kind}, expected a torch module, which the model then runs"
    ):
        bridge.blocks[0].mlp = value
    with pytest.raises(TypeError, match=f"hook 'blocks.0.hook_mlp_out': got {kind}, expected a module to run in its"):
        bridge.blocks[0].hook_mlp_out = value
    assert isinstance(bridge.blocks[0].mlp, ComponentBridge)
    assert isinstance(bridge.blocks[0].hook_mlp_out, HookPoint)


def test_the_list_of_blocks_is_not_changed() -> None:
    bridge = TransformerBridge(family("40b"))
    block = bridge.blocks[0]
    attempts = [
        lambda: bridge.blocks.append(block),
        lambda: bridge.blocks.extend([block]),
        lambda: bridge.blocks.insert(0, block),
        lambda: bridge.blocks.pop(0),
        lambda: bridge.blocks.__setitem__(0, nn.Identity()),
        lambda: bridge.blocks.__delitem__(0),
        lambda: bridge.blocks.__iadd__([block]),
        lambda: setattr(bridge.blocks, "0", nn.Identity()),
        lambda: bridge.set_submodule("blocks.0", nn.Identity()),
    ]
    for attempt in attempts:
        with pytest.raises(TypeError, match="bridge.blocks lists the layers of the model and cannot be changed"):
            attempt()
    with pytest.raises(AttributeError, match="blocks: they are the layers of the model; put modules in the places of"):
        bridge.blocks = nn.ModuleList()
    bridge.blocks.note = "an attribute"
    assert list(bridge.blocks) == [*bridge.blocks[:1], *bridge.blocks[1:]] and bridge.blocks[-1] is not block


def test_what_is_the_models_own_is_set_on_the_model() -> None:
    bridge = TransformerBridge(family("40b"))
    with pytest.raises(AttributeError, match=r"set it there \(bridge.original_model.lm_head = ...\), and hooks follow"):
        bridge.lm_head = nn.Linear(32, 61)
    with pytest.raises(AttributeError, match="for another model make a new TransformerBridge"):
        bridge.original_model = family("40b")
    for owner, name in ((bridge, "unembed"), (bridge.blocks[0], "hook_mlp_out"), (bridge.blocks[0], "attn")):
        with pytest.raises(AttributeError, match=f"{name} cannot be deleted"):
            delattr(owner, name)
    bridge.mine = nn.Linear(2, 2)  # a name that nothing has is the caller's
    del bridge.mine
    assert not hasattr(bridge, "mine")


@pytest.mark.parametrize("place", ["generate", "blocks.0.attn.role", "blocks.1.mlp.inside"])
def test_no_module_takes_the_place_of_a_method(place: str) -> None:
    """torch would list it, and calls would go to the method."""
    bridge = TransformerBridge(family("40b"))
    owner, _, name = place.rpartition(".")
    modules = list(bridge.named_modules())
    with pytest.raises(AttributeError, match=f"^{name}: got Linear, which cannot stand for this method; places"):
        setattr(bridge.get_submodule(owner), name, nn.Linear(2, 2))
    assert list(bridge.named_modules()) == modules


def test_what_the_class_sets_in_its_own_way_it_sets_of_modules_and_parameters_too() -> None:
    bridge = TransformerBridge(family("40b"))
    attention, modules = bridge.blocks[0].attn, list(bridge.named_modules())
    for owner, name in ((bridge, "device"), (bridge, "W_U"), (attention, "original_component")):
        with pytest.raises(AttributeError, match=f"property '{name}' of '.*' object has no setter"):
            setattr(owner, name, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"W_Q: got Linear\(in_features=2.*, expected a tensor of shape"):
        attention.W_Q = nn.Linear(2, 2)
    doubled = nn.Parameter(2 * attention.W_Q)
    attention.W_Q = doubled
    assert torch.equal(attention.W_Q, doubled) and list(bridge.named_modules()) == modules


def replicas(module: nn.Module) -> nn.Module:
    """A replica as `DataParallel` makes one, on the same device: `torch.nn.parallel.replicate` itself needs GPUs."""
    modules = list(module.modules())
    copies = {one: one._replicate_for_data_parallel() for one in modules}
    for one in modules:
        for key, child in one._modules.items():
            if child is not None:
                setattr(copies[one], key, copies[child])
        for key, parameter in one._parameters.items():
            if parameter is None:
                copies[one]._parameters[key] = None
            else:
                setattr(copies[one], key, parameter.detach() * 2)
    return copies[module]


def test_a_replica_computes_with_its_own_parameters() -> None:
    bridge, x = TransformerBridge(family("40b")), tokens()
    doubled = {key: value.detach() * 2 for key, value in bridge.named_parameters()}
    with torch.no_grad():
        usual = bridge(x)
        replica = replicas(bridge)
        assert torch.equal(replica(x), functional_call(bridge.original_model, doubled, (x,)).logits)
        assert replica.input_device() == torch.device("cpu")
        assert torch.equal(bridge(x), usual) and torch.equal(bridge.run_with_cache(x)[1]["unembed.hook_out"], usual)
