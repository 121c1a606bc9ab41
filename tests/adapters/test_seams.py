"""Seams by themselves: what passes is exchanged for one call, what does not pass is an error, and nothing stays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support import family, mixtral, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.access.seams import (
    FirstCall,
    Probabilities,
    TorchCalls,
    attention_function,
    beside,
    cache_update,
    unhooked,
)
from transformer_lens.model_bridge.access.sharding import ALONE, Interior
from transformer_lens.model_bridge.generalized_components import ComponentBridge, ExpertsBridge, LayerNormBridge
from transformer_lens.model_bridge.generalized_components.attention import OpenAttentionBridge
from transformer_lens.model_bridge.generalized_components.normalization import OpenNormalizationBridge
from transformer_lens.model_bridge.upstream import UpstreamError, attention_functions, eager_forward

MODULE = nn.Identity()


def same(x: Tensor) -> Tensor:
    return x


def attention(steps: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    """Steps of an attention, its softmax and dropout watched."""
    with Probabilities(MODULE, same, same, **{"drops": True, **options}):
        return steps(torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "steps, missing",
    [
        (lambda x: x, "one softmax in its attention (it made 0)"),
        (lambda x: F.softmax(x, -1), "one softmax in its attention (it made 1) with dropout after it"),
        (lambda x: F.dropout(F.softmax(F.softmax(x, -1), -1)), "one softmax in its attention (it made 2)"),
    ],
)
def test_an_attention_that_passes_no_probabilities_is_an_error(steps: Any, missing: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        attention(steps)
    assert missing in str(caught.value) and "Identity" in str(caught.value)


def test_scores_and_pattern_are_exchanged_where_they_pass() -> None:
    x = torch.randn(2, 3)
    with Probabilities(MODULE, lambda s: s + 1, lambda p: p * 2, drops=True):
        got = F.dropout(torch.softmax(input=x, dim=-1), 0.0)
    torch.testing.assert_close(got, (x + 1).softmax(-1) * 2)
    with Probabilities(MODULE, lambda s: s * 3, lambda p: p / 2, drops=False):
        got = x.softmax(-1)
        again = x.softmax(-1)  # what comes after the pattern is not attention's any more
    torch.testing.assert_close(got, (x * 3).softmax(-1) / 2)
    assert torch.equal(again, x.softmax(-1))


def test_queries_are_the_first_factor_of_the_first_product() -> None:
    x, keys = torch.randn(2, 3), torch.randn(3, 2)
    with Probabilities(MODULE, same, same, drops=False, queries=lambda q: q * 2):
        got = ((x @ keys) @ torch.eye(2)).softmax(-1)
    torch.testing.assert_close(got, (2 * x @ keys).softmax(-1))


def test_steps_that_share_their_memory_give_the_same_numbers() -> None:
    """Multiples and sums of the product go into it; what would change its shape or dtype does not."""
    q, k = torch.randn(2, 5, 4), torch.randn(2, 4, 5)
    mask, wide, double = torch.randn(1, 5, 5), torch.randn(3, 1, 1, 1), torch.randn(2, 5, 5, dtype=torch.float64)
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda s: s * 0.5 + mask,
        lambda s: s / 2 + wide,
        lambda s: s + double,
        lambda s: torch.tanh(s * 0.5) * 2 + mask,
        lambda s: torch.Tensor.add(s, mask, alpha=2),
    ]
    for step in steps:
        for options in ({}, {"dtype": torch.float64}):
            expected = F.softmax(step(q @ k), dim=-1, **options)
            held: list[int] = []
            with Probabilities(MODULE, same, same, drops=True, reuses=True):
                product = q @ k
                held.append(product.data_ptr())
                got = F.dropout(F.softmax(step(product), dim=-1, **options), 0.0)
            assert torch.equal(got, expected)
            assert (got.data_ptr() in held) == (step in steps[:1] and not options)


def test_what_a_hook_computes_is_its_own() -> None:
    from transformer_lens.hook_points import HookPoint

    point = HookPoint("here")
    point.add_hook(lambda value, hook: value + F.softmax(value, -1).sum() * 0)
    with Probabilities(MODULE, lambda s: s + 1, same, drops=False):
        got = point(torch.zeros(2, 3)).softmax(-1)
    torch.testing.assert_close(got, torch.full((2, 3), 1 / 3))


def test_the_first_call_alone() -> None:
    with FirstCall((torch.sort,), lambda f, args, kwargs: f(-args[0], **kwargs)) as first:
        once, twice = torch.sort(torch.arange(3)), torch.sort(torch.arange(3))
    assert first.made and once[0].tolist() == [-2, -1, 0] and twice[0].tolist() == [0, 1, 2]
    with pytest.raises(NotImplementedError, match="TorchCalls has to say what it does with a call"), TorchCalls():
        torch.zeros(1).sort()


def test_a_look_up_is_exchanged_for_one_module_of_one_thread() -> None:
    """Another module, another thread and a later call get the real function; the last user puts the look-up back."""
    model = mixtral()
    module, other = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    assert attention_functions(module) is ALL_ATTENTION_FUNCTIONS

    def eager(*args: Any) -> tuple[str, Any]:
        return "eager", args[0]

    def ask(who: nn.Module) -> Any:
        return ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager)(who)[0]

    found: list[Any] = []
    with attention_function(module, lambda real, default: lambda *_: ("instead", real is default)):
        assert ask(module) == "instead" and ask(other) == "eager"
        thread = threading.Thread(target=lambda: found.append(ask(module)))
        thread.start()
        thread.join()
        with attention_function(other, lambda *_: lambda *_: ("inner", None)):
            assert ask(other) == "inner" and ask(module) == "eager"
        assert ask(module) == "instead"
    assert found == ["eager"] and ask(module) == "eager"
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


@pytest.mark.parametrize("had", [False, True])
def test_a_caches_update_comes_back(had: bool) -> None:
    cache = DynamicCache()
    if had:
        cache.update = cache.update
    before = vars(cache).get("update")
    keys = torch.ones(1, 2, 3, 4)
    with cache_update(cache, lambda k, v: (k * 2, v), lambda k, v: (k + 1, v)) as passed:
        assert passed is cache
        assert torch.equal(cache.update(keys, keys, 0)[0], keys * 3)
    assert vars(cache).get("update") is before and ("update" in vars(cache)) == had
    assert torch.equal(cache.layers[0].keys, keys * 2)  # what is added after the cache is not kept in it


def test_a_module_beside_itself_shares_what_is_not_exchanged() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    seen: list[Any] = []
    module[1][0].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(3, 2)
    other = beside(module, {"0": nn.Identity()})
    assert torch.equal(other(x), x.relu()) and isinstance(module[0], nn.Linear) and len(seen) == 1
    assert torch.equal(unhooked(module)(x), module(x)) and len(seen) == 2
    assert unhooked(module)[0].weight is module[0].weight


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_what_runs_beside_a_kernel_ends_with_what_is_wanted(name: str) -> None:
    """Scores alone are those that come with the pattern; so are rotated queries alone."""
    model, ids = family(name), tokens()
    bridge = TransformerBridge(model)
    names = [f"blocks.0.attn.hook_{short}" for short in ("rot_q", "attn_scores", "pattern")]
    with torch.no_grad():
        _, together = bridge.run_with_cache(ids, names_filter=names)
        for hook in names:
            _, alone = bridge.run_with_cache(ids, names_filter=hook)
            assert torch.equal(alone[hook], together[hook]), hook
    torch.testing.assert_close(together[names[1]].softmax(-1), together[names[2]])


class AnotherProduct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(x.shape[-1])


def test_a_file_without_a_registry_and_experts_without_a_kernel_are_errors() -> None:
    with pytest.raises(UpstreamError, match="the file of Linear .* has no registry ALL_ATTENTION_FUNCTIONS"):
        attention_functions(nn.Linear(2, 2))
    with pytest.raises(UpstreamError, match="Linear .* has no forward of its own under the one that chooses a kernel"):
        eager_forward(nn.Linear(2, 2))


def test_a_router_and_experts_that_pass_something_else_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtral(experts="eager")
    bridge, ids = TransformerBridge(model), tokens()
    router, experts = model.model.layers[0].mlp.gate, model.model.layers[0].mlp.experts

    def look(name: str) -> None:
        bridge.run_with_cache(ids, names_filter=f"blocks.0.mlp.{name}")

    chosen = router(torch.randn(14, 32))
    with monkeypatch.context() as patch:
        patch.setattr(router, "forward", lambda x: chosen)
        with pytest.raises(UpstreamError, match="MixtralTopKRouter .* has no product with a matrix in its forward"):
            look("hook_router_logits")
    activation, experts.act_fn = experts.act_fn, AnotherProduct()
    with pytest.raises(UpstreamError, match="MixtralExperts .* has no two products for each of the"):
        look("hook_expert_out")
    experts.act_fn = activation
    model.config._experts_implementation = "grouped_mm"

    def unsorted(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return module._apply_gate(torch.cat([x, x], -1))[:, :1] * x  # gates, and sorts no pairs

    with monkeypatch.context() as patch:
        patch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", unsorted)
        with pytest.raises(UpstreamError, match="MixtralExperts .* has no sort of its pairs where its kernel had one"):
            look("hook_post")


def double(value: Tensor, hook: Any) -> Tensor:
    return value * 2


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["hook_pre", "hook_pre_linear", "hook_post", "hook_expert_out"])
def test_each_kernel_of_experts_is_opened_where_it_is(how: str, name: str) -> None:
    """Alone and with the others, looked at and written: every pair's value is its expert's, by hand."""
    model, ids = mixtral(experts=how), tokens()
    bridge, hook = TransformerBridge(model), f"blocks.0.mlp.{name}"
    mlp = model.model.layers[0].mlp
    inside = ["hook_in", "hook_expert_indices", "hook_expert_weights", "hook_pre", "hook_pre_linear", "hook_post"]
    with torch.no_grad():
        bare = model(ids).logits
        logits, alone = bridge.run_with_cache(ids, names_filter=hook)
        _, cache = bridge.run_with_cache(ids, names_filter=[f"blocks.0.mlp.{n}" for n in (*inside, "hook_expert_out")])
        same = bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda value, hook: value.clone())])
        with bridge.hooks([(hook, double)]):
            _, written = bridge.run_with_cache(ids, names_filter=["blocks.0.hook_mlp_out"])
        found = [cache[f"blocks.0.mlp.{n}"] for n in inside]
        x, chosen, weights = found[:3]
        hidden = torch.einsum("bpd,bpchd->bpch", x, mlp.experts.gate_up_proj[chosen])
        gate, up = hidden.chunk(2, -1)
        gate, up = (2 * gate if name == "hook_pre" else gate), (2 * up if name == "hook_pre_linear" else up)
        neurons = F.silu(gate) * up * (2 if name == "hook_post" else 1)
        out = torch.einsum("bpch,bpcdh->bpcd", neurons, mlp.experts.down_proj[chosen])
        total = ((2 * out if name == "hook_expert_out" else out) * weights[..., None]).sum(2)
    assert torch.equal(logits, bare) and torch.equal(same, bare)
    assert torch.equal(alone[hook], cache[hook])
    torch.testing.assert_close(torch.cat(found[3:5], -1), hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(written["blocks.0.hook_mlp_out"], total, rtol=1e-5, atol=1e-5)


def test_experts_whose_forward_was_exchanged_are_looked_into_beside_it() -> None:
    """It may do anything, so its kernel is not opened, and its output stands."""
    model, ids = mixtral(experts="grouped_mm"), tokens()
    experts, name = model.model.layers[0].mlp.experts, "blocks.0.mlp.hook_expert_out"
    bridge = TransformerBridge(model)
    with torch.no_grad():
        _, expected = bridge.run_with_cache(ids, names_filter=name)
        experts.forward = lambda *args: 2 * type(experts).forward(experts, *args)
        bare = model(ids).logits
        logits, cache = bridge.run_with_cache(ids, names_filter=name)
    assert torch.equal(logits, bare)
    torch.testing.assert_close(cache[name], expected[name], rtol=1e-5, atol=1e-5)


def test_one_process_that_has_all_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes that share experts do, where there is one: the pairs of its experts are all pairs."""
    model, ids = mixtral(experts="eager"), tokens()
    name = "blocks.0.mlp.hook_post"
    with torch.no_grad():
        expected = TransformerBridge(model).run_with_hooks(ids, fwd_hooks=[(name, double)])
        monkeypatch.setattr(ExpertsBridge, "interior", lambda self, sharding: Interior(self.cfg, ALONE, ("expert",)))
        bridge = TransformerBridge(model)
        got = bridge.run_with_hooks(ids, fwd_hooks=[(name, double)])
        assert bridge.attachment.opened["model.layers.0.mlp.experts"].interior.axes == ("expert",)
    assert torch.equal(got, expected)


def test_a_component_says_what_it_does_not_know() -> None:
    call: Any = None
    for kind, does in (
        (ComponentBridge, lambda c: c.inside(call)),
        (OpenAttentionBridge, lambda c: c.attend(call)),
        (OpenNormalizationBridge, lambda c: c.formula(call)),
        (OpenNormalizationBridge, lambda c: c.look(call)),
    ):
        component = kind.__new__(kind)
        with pytest.raises(NotImplementedError, match=f"{kind.__name__} (declares|has to say)"):
            does(component)
    assert issubclass(LayerNormBridge, OpenNormalizationBridge)
