"""Reads and edits inside attention, experts, routers and norms of a compiled graph, against the eager hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import _dynamo as dynamo
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
)

from tests.compiled.test_compiled_runner import close, needs_a_compiler, one_graph, small
from tests.support import VOCAB, mixtral, perturbed, tokens, torch_hooks
from transformer_lens import TransformerBridge
from transformer_lens.compiled import Read
from transformer_lens.hook_points import Edit

SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2},
    **{"intermediate_size": 48, "initializer_range": 0.3},
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
OTHERS = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**GROUPED, "sliding_window": 4}),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "qwen3moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**GROUPED, **EXPERTS}),
}
FAMILIES = ("7b", "40b", "rw", "llama", "mixtral", *OTHERS)
MIXTURES = ("mixtral", "qwen3moe")
PATTERN, SCORES = "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_attn_scores"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dynamo.reset()
    with torch.no_grad():
        yield
    dynamo.reset()


def bridged(name: str) -> TransformerBridge:
    if name not in OTHERS:
        return small(name)
    model, config, more = OTHERS[name]
    return TransformerBridge(perturbed(model(config(**SIZES, **more))))


def inside(bridge: TransformerBridge) -> list[str]:
    """The hooks that the table calls seams or formulas, but those of each head's stream and result."""
    return [
        name
        for row in bridge.hook_table().present()
        if row.kind != "port" and not row.name.endswith(("_input", "hook_attn_in", "hook_result"))
        for layer in row.layers or range(bridge.cfg.n_layers)
        if (name := row.name.replace("{i}", str(layer))) in bridge.hook_dict
    ]


def replaced(model: torch.nn.Module) -> list[str]:
    """The modules whose forward is not their class's."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_value_inside_is_what_run_with_cache_shows(name: str) -> None:
    bridge, x = bridged(name), tokens(2, 9)
    model, names = bridge.original_model, inside(bridge)
    kinds = {hook.rpartition(".")[2] for hook in names}
    assert {"hook_pattern", "hook_attn_scores", "hook_normalized"} <= kinds
    assert ("hook_rot_k" in kinds) == (name != "rw")
    experts = {"hook_router_logits", "hook_pre", "hook_pre_linear", "hook_post", "hook_expert_out"}
    assert name not in MIXTURES or experts <= kinds
    logits, expected = bridge.run_with_cache(x, names_filter=names)
    with bridge.compile(reads=[names], backend="aot_eager", tokens=x) as runner:
        with one_graph():
            got, cache = runner.run_with_cache(x)
            torch.testing.assert_close(got, logits, rtol=0, atol=5e-5)
            assert set(cache) == set(names)
            for hook in names:
                assert cache[hook].dtype == expected[hook].dtype
                torch.testing.assert_close(cache[hook], expected[hook], rtol=1e-5, atol=5e-5)
            other = tokens(2, 9)
            torch.testing.assert_close(runner(other), bridge(other), rtol=0, atol=5e-5)
        assert not torch.equal(cache[PATTERN], runner.cache[PATTERN])  # the buffers went on
        assert torch.equal(bridge(x), logits)  # other calls are the bare model's
    assert torch_hooks(model) == 0 and replaced(model) == []


def moved(value: Tensor) -> Tensor:
    """The first two heads' rows of the pattern, at the last two queries, on the first key."""
    value = value.clone()
    value[:, [0, 1], -2:] = torch.eye(value.shape[-1])[0]
    return value


FIRST_KEY = torch.eye(9)[0]
EDITS: dict[str, tuple[str, Edit, Any]] = {
    "pattern": (PATTERN, Edit("set", FIRST_KEY, heads=[0, 1], positions=[-1, -2]), moved),
    "scores": (SCORES, Edit("scale", 0.5), lambda x: 0.5 * x),
    "rotated keys": ("blocks.1.attn.hook_rot_k", Edit("scale", 3.0), lambda x: 3 * x),
    "rotated queries": (
        "blocks.1.attn.hook_rot_q",
        Edit("zero", heads=[1]),
        lambda x: x * (torch.arange(x.shape[2]) != 1)[:, None],
    ),
    "norm": (
        "blocks.0.ln1.hook_normalized",
        Edit("zero", positions=[0]),
        lambda x: x * (torch.arange(9) != 0)[:, None],
    ),
    "router": (
        "blocks.0.mlp.hook_router_logits",
        Edit("add", -50.0, experts=[2]),
        lambda x: x - 50.0 * (torch.arange(4) == 2),
    ),
    "neurons": ("blocks.1.mlp.hook_post", Edit("add", 1.0), lambda x: x + 1),
    "expert": (
        "blocks.1.mlp.hook_expert_out",
        Edit("zero", positions=[-1]),
        lambda x: x * (torch.arange(9) != 8)[:, None, None],
    ),
}
"""A hook, an edit there, and the same as a function."""


@pytest.mark.parametrize("name", FAMILIES)
def test_edits_inside_and_no_other_graph_for_other_values(name: str) -> None:
    bridge, x = bridged(name), tokens(2, 9)
    edits = [entry for entry in EDITS.values() if entry[0] in bridge.hook_dict]
    assert len(edits) == {"rw": 4, "mixtral": 8, "qwen3moe": 8}.get(name, 6)
    plain = bridge(x)

    def same(got: Tensor, chosen: list[tuple[str, Any]]) -> None:
        functions = [(hook, lambda value, hook, f=function: f(value)) for hook, function in chosen]
        torch.testing.assert_close(got, bridge.run_with_hooks(x, fwd_hooks=functions), rtol=1e-4, atol=1e-4)

    declared = [(hook, edit) for hook, edit, _ in edits]
    with bridge.compile(edits=declared, backend="aot_eager", tokens=x) as runner, one_graph():
        same(runner(x), [(hook, function) for hook, _, function in edits])
        for edit in runner.edits:
            edit.set(on=False)
        torch.testing.assert_close(runner(x), plain, rtol=0, atol=5e-5)
        for edit, (hook, _, function) in zip(runner.edits, edits, strict=True):
            edit.set(on=True)
            got = runner(x)
            same(got, [(hook, function)])
            assert float((got - plain).abs().max()) > 1e-3
            edit.set(on=[False, True])
            same(runner(x), [(hook, lambda value, f=function: torch.stack([value[0], f(value)[1]]))])
            edit.set(on=False)
        scores = runner.edits[1]
        scores.set(Edit("scale", 4.0, heads=[0], positions=[3]), on=True)

        def other(value: Tensor) -> Tensor:
            value = value.clone()
            value[:, 0, 3] *= 4
            return value

        same(runner(x), [(SCORES, other)])


@torch.enable_grad()
@pytest.mark.parametrize("name", ["7b", "llama", "mixtral"])
def test_gradients_of_values_inside_and_of_parameters(name: str) -> None:
    bridge, x = bridged(name), tokens(2, 9)
    by = torch.tensor(1.5, requires_grad=True)
    names = [hook for hook, _, _ in EDITS.values() if hook in bridge.hook_dict and hook != PATTERN]
    edits = [(hook, Edit("scale", by)) for hook in names]
    parameters = [by, *bridge.original_model.parameters()]
    with bridge.compile(reads=[SCORES], edits=edits, backend="aot_eager") as runner:
        got = torch.autograd.grad(runner(x).square().mean(), parameters, allow_unused=True)
    loss = bridge.run_with_hooks(x, fwd_hooks=edits).square().mean()
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert float(expected[0].abs()) > 1e-3
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["7b", "40b", "llama", "gemma2", "qwen3moe"])
def test_patterns_while_decoding_with_a_static_cache_and_left_padding(name: str) -> None:
    """Each step shows the last row of what one eager run of the whole text shows, and no key at an empty place."""
    bridge, text = bridged(name), tokens(2, 10)
    mask = torch.ones_like(text)
    mask[1, :2] = 0
    names = [
        PATTERN,
        *(hook for hook in ("blocks.1.attn.hook_rot_k", "blocks.0.attn.hook_rot_q") if hook in bridge.hook_dict),
    ]
    edit = (PATTERN, Edit("scale", 0.5, heads=[0]))
    with bridge.hooks([edit]):
        logits, full = bridge.run_with_cache(text, attention_mask=mask, names_filter=names)
    with bridge.compile(reads=[names], edits=[edit], backend="aot_eager") as runner:
        cache = StaticCache(config=bridge.original_model.config, max_cache_len=16)
        for start, stop in ((0, 7), (7, 8), (8, 9), (9, 10)):
            got = runner(text[:, start:stop], past_key_values=cache, attention_mask=mask[:, :stop])
            torch.testing.assert_close(got[:, -1], logits[:, stop - 1], rtol=0, atol=1e-4)
            pattern = runner.cache[PATTERN]
            keys = pattern.shape[-1]
            expected = full[PATTERN][:, :, start:stop]
            if name == "gemma2":  # a window of four keys, of which the last step's ends at its own
                assert keys in (4, 7) and float((pattern.sum(-1)[:, 1:] - 1).abs().max()) < 1e-5
                continue
            assert keys == 16
            torch.testing.assert_close(pattern[..., :stop], expected[..., :stop], rtol=0, atol=1e-5)
            assert not bool(pattern[..., stop:].any())
            for hook in names[1:]:
                torch.testing.assert_close(runner.cache[hook], full[hook][:, start:stop], rtol=0, atol=5e-5)
    assert "update" not in cache.__dict__


def test_some_queries_and_what_is_made_of_them() -> None:
    bridge, x = bridged("llama"), tokens(2, 9)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    reads = [Read(PATTERN, pos_slice=-1), Read(SCORES.replace("0", "1"), pos_slice=(2, 5), reduce="top_k", k=2)]
    reads.append(Read("blocks.1.attn.hook_pattern", reduce="mean"))
    with bridge.compile(reads=reads, backend="aot_eager") as runner:
        runner(x, attention_mask=mask)
        full = bridge.run_with_cache(x, attention_mask=mask)[1]
        torch.testing.assert_close(runner.cache[PATTERN], full["pattern", 0][:, :, -1:], rtol=0, atol=1e-5)
        top = full["attn_scores", 1][:, :, 2:5].topk(2).values
        torch.testing.assert_close(runner.cache["blocks.1.attn.hook_attn_scores_top_values"], top, rtol=0, atol=1e-5)
        weights = mask[:, None, :, None]
        mean = (full["pattern", 1] * weights).sum(2) / weights.sum(2)
        torch.testing.assert_close(runner.cache["blocks.1.attn.hook_pattern_mean"], mean, rtol=0, atol=1e-5)


def test_python_hooks_at_the_same_places_run_eagerly_with_those_of_the_runner() -> None:
    bridge, x, seen = bridged("llama"), tokens(), []
    with bridge.compile(reads=[PATTERN], edits=[(PATTERN, Edit("scale", 0.5))], backend="eager", tokens=x) as runner:
        looking = bridge.hooks([(PATTERN, lambda value, hook: seen.append(value.clone()))])
        with looking, pytest.warns(UserWarning, match="so the runner calls it eagerly"):
            logits, cache = runner.run_with_cache(x)
        expected = bridge.run_with_hooks(x, fwd_hooks=[(PATTERN, lambda value, hook: 0.5 * value)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
        assert torch.equal(cache[PATTERN], seen[0])
    assert replaced(bridge.original_model) == []


def test_two_runners_inside_one_module() -> None:
    bridge, x = bridged("mixtral"), tokens()
    plain = bridge(x)
    one = bridge.compile(reads=["blocks.0.mlp.hook_router_logits"], backend="eager", tokens=x)
    two = bridge.compile(
        edits=[("blocks.0.mlp.hook_router_logits", Edit("zero", experts=[0]))], backend="eager", tokens=x
    )
    one(x)
    with one_graph():
        assert not torch.equal(two(x), plain)
        torch.testing.assert_close(one(x), plain, rtol=0, atol=2e-5)
    one.close()
    assert len(replaced(bridge.original_model)) == 1
    two.close()
    assert replaced(bridge.original_model) == []


def test_what_no_graph_can_show_inside() -> None:
    bridge = TransformerBridge(mixtral(experts="eager"))
    with pytest.raises(ValueError, match=r"'blocks.0.mlp.hook_post' is inside experts that run one after the other.*"):
        bridge.compile(reads=["blocks.0.mlp.hook_post"])
    for name, instead in (("hook_q_input", "hook_resid_pre or attn.hook_q"), ("attn.hook_result", "attn.hook_z")):
        for wrong in ({"reads": [f"blocks.0.{name}"]}, {"edits": [(f"blocks.0.{name}", Edit("scale", 2.0))]}):
            with pytest.raises(ValueError, match=f"computes whole, so no graph can show it; declare {instead}"):
                bridge.compile(**wrong)
    assert replaced(bridge.original_model) == [] and bridge.attachment.runners == []


@needs_a_compiler
def test_inductor_with_patterns_routers_and_experts() -> None:
    bridge, x = bridged("mixtral"), tokens()
    names = [PATTERN, "blocks.0.mlp.hook_router_logits", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_rot_k"]
    edit = (SCORES, Edit("scale", 0.5))
    with bridge.compile(reads=[names], edits=[edit]) as runner:
        logits, cache = runner.run_with_cache(x)
        with one_graph():
            runner.edits[0].set(on=False)
            close(runner(x), bridge(x))
    with bridge.hooks([edit]):
        expected, full = bridge.run_with_cache(x, names_filter=names)
    close(logits, expected)
    for name in names:
        close(cache[name], full[name])
