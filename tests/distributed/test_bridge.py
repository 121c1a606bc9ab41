"""A bridge over remote blocks equals the bridge in this process, bit for bit: values, edits, gradients."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.distributed.conftest import Pair, make_pair
from tests.support import FAMILIES, family, with_cache
from transformer_lens import HookPoint, TransformerBridge
from transformer_lens.distributed import Edit, Keep
from transformer_lens.distributed.protocol.messages import Limits, unpack_request

INSIDE = ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_mlp_out"]


def same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# -- reading ---------------------------------------------------------------------------------------


def test_hook_tables_are_the_same(pair: Pair) -> None:
    remote, local = (bridge.hook_table().to_dicts() for bridge in pair)
    assert remote == local
    assert list(pair.remote.hook_dict) == list(pair.local.hook_dict)


@pytest.mark.parametrize("grad", [True, False])
def test_logits_and_one_call_for_each_span(pair: Pair, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        logits, expected = (bridge(pair.tokens) for bridge in pair)
    assert torch.equal(logits, expected)
    assert pair.calls() == len(pair.spans)
    assert torch.equal(pair.remote.original_model(pair.tokens).logits, expected)


def test_servers_keep_a_graph_only_where_a_gradient_is_wanted(pair: Pair) -> None:
    model = pair.remote.original_model

    def asked(run: Callable[[], Any], grad: bool) -> set[bool]:
        pair.calls()
        with torch.set_grad_enabled(grad):
            run()
        return {unpack_request(message, Limits()).grad for span in pair.spans for message in span.sent}

    cut = ("hook_embed", lambda tensor, hook: tensor.detach())
    embeddings = torch.zeros(2, 9, 128, requires_grad=True)
    assert asked(lambda: model(pair.tokens), True) == {True}
    assert asked(lambda: pair.remote.run_with_hooks(pair.tokens, fwd_hooks=[cut]), True) == {False}
    assert asked(lambda: model(inputs_embeds=embeddings), False) == {False}
    assert asked(lambda: model(pair.tokens, **with_cache(DynamicCache())), False) == {False}


def test_losses_of_texts_of_several_lengths(pair: Pair) -> None:
    texts = ["Mary and John went to the store", "John gave"]
    for side in ("left", "right"):
        losses = [bridge(texts, return_type="loss", padding_side=side) for bridge in pair]
        assert torch.equal(*losses)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    masked = [bridge(pair.tokens, attention_mask=mask) for bridge in pair]
    assert torch.equal(*masked)
    assert not torch.equal(masked[0], pair.local(pair.tokens))


def test_going_on_from_padded_prompts(pair: Pair) -> None:
    """A cache whose keys are on servers knows its padding, too."""
    for side in ("left", "right"):
        caches = [DynamicCache(), DynamicCache()]
        with torch.no_grad():
            for bridge, cache in zip(pair, caches, strict=True):
                bridge(["Mary and John went", "John gave"], padding_side=side, past_key_values=cache)
            found, wanted = (
                bridge(pair.tokens[:, :2], past_key_values=c) for bridge, c in zip(pair, caches, strict=True)
            )
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            short = torch.cat([pair.local.to_tokens("John gave"), pair.tokens[1:, :2]], 1)
            torch.testing.assert_close(found[1], pair.local(short)[0, -2:], rtol=1e-4, atol=1e-4)  # float32 rounding


def test_the_models_own_call_with_its_own_positions(pair: Pair) -> None:
    positions = torch.arange(9)[None] + 5
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    for given in ({"position_ids": positions * 3}, {"attention_mask": mask}, {"use_cache": False}):
        models = [bridge.original_model for bridge in pair]
        one, other = (model(pair.tokens, **given).logits for model in models)
        assert torch.equal(one, other), given
    assert torch.equal(pair.remote.original_model(pair.tokens, return_dict=False)[0], pair.local(pair.tokens))
    plain = pair.local(pair.tokens)
    assert not torch.equal(pair.remote.original_model(pair.tokens, position_ids=positions * 3).logits, plain)


def test_a_cache_of_everything(pair: Pair) -> None:
    (logits, cache), (expected, local) = (bridge.run_with_cache(pair.tokens) for bridge in pair)
    assert torch.equal(logits, expected)
    assert list(cache) == list(local)
    same(cache, local)
    assert pair.calls() == len(pair.spans)


def test_every_hook_one_by_one(pair: Pair) -> None:
    expected, local = pair.local.run_with_cache(pair.tokens, names_filter=lambda name: True)
    for name in pair.local.hook_dict:
        logits, cache = pair.remote.run_with_cache(pair.tokens, names_filter=[name])
        assert list(cache) == [name]
        assert torch.equal(cache[name], local[name]) and torch.equal(logits, expected), name


def test_only_what_was_asked_for_comes_back(pair: Pair) -> None:
    pair.remote.run_with_cache(pair.tokens, names_filter="blocks.0.attn.hook_q")
    requests = [unpack_request(message, Limits()) for span in pair.spans for message in span.sent]
    assert [(action.name, action.do) for request in requests for action in request.actions] == [
        ("blocks.0.attn.hook_q", "look")
    ]


def test_options_of_the_cache(pair: Pair) -> None:
    options = {"pos_slice": -1, "remove_batch_dim": True, "clone": True}
    caches = [bridge.run_with_cache(pair.tokens[:1], **options)[1] for bridge in pair]
    same(*caches)
    assert caches[0]["q", 1].shape == caches[1]["q", 1].shape


def test_caching_hooks_by_hand(pair: Pair) -> None:
    stores, outputs = [], []
    for bridge in pair:
        names = [name for name in bridge.default_names() if not bridge.hook_dict[name].integer]
        store, forward, backward = bridge.get_caching_hooks(names_filter=names, incl_bwd=True)
        loss = bridge.run_with_hooks(pair.tokens, return_type="loss", fwd_hooks=forward, bwd_hooks=backward)
        loss.backward()
        stores.append(store)
        outputs.append(loss)
    assert torch.equal(*outputs)
    same(*stores)
    assert any(name.endswith("hook_pattern_grad") for name in stores[0])


def test_partial_runs(pair: Pair) -> None:
    last = pair.local.cfg.n_layers
    for start, stop in ((None, 0), (None, 1), (None, last), (1, None), (1, last), (2, 2), (last, None), (0, 1)):
        outputs = []
        for bridge in pair:
            torch.manual_seed(1)
            given = pair.tokens if start is None else torch.randn(2, 9, bridge.cfg.d_model)
            outputs.append(bridge.run_with_cache(given, start_at_layer=start, stop_at_layer=stop, names_filter=None))
        assert torch.equal(outputs[0][0], outputs[1][0]), (start, stop)
        assert list(outputs[0][1]) == list(outputs[1][1])
        same(outputs[0][1], outputs[1][1])


def test_generation_without_a_cache(pair: Pair) -> None:
    for given in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        texts = [
            bridge.original_model.generate(pair.tokens, max_new_tokens=5, use_cache=False, **given) for bridge in pair
        ]
        assert torch.equal(*texts)
        assert texts[0].shape[1] > pair.tokens.shape[1]


# -- edits -----------------------------------------------------------------------------------------


def edits(d_head: int) -> dict[str, tuple[str, Edit]]:
    torch.manual_seed(2)
    return {
        "zero a head": ("blocks.0.attn.hook_z", Edit("zero", heads=[1])),
        "zero all": ("blocks.1.hook_mlp_out", Edit("zero")),
        "set positions": ("blocks.1.attn.hook_q", Edit("set", torch.randn(2, 1, d_head), positions=[0, -1])),
        "set a number": ("blocks.1.attn.hook_k", Edit("set", 0.25, heads=[0], positions=[3])),
        "add a vector": ("blocks.2.hook_resid_pre", Edit("add", torch.randn(128))),
        "scale a pattern": ("blocks.1.attn.hook_pattern", Edit("scale", 0.5, heads=[2, 0], positions=[-2])),
        "project out": ("blocks.2.hook_resid_post", Edit("project_out", torch.randn(128), positions=[1])),
        "inside a norm": ("blocks.0.ln1.hook_normalized", Edit("scale", 2)),
        "scores": ("blocks.2.attn.hook_attn_scores", Edit("add", 1.0, heads=[3])),
        "one head's input": ("blocks.1.hook_q_input", Edit("add", torch.randn(128), heads=[1])),
    }


@pytest.mark.parametrize("case", edits(1))
def test_edits(pair: Pair, case: str) -> None:
    hook = edits(pair.local.cfg.d_head)[case]
    later = f"blocks.{pair.local.cfg.n_layers - 1}.hook_resid_post"
    logits, caches = [], []
    for bridge in pair:
        with bridge.hooks(fwd_hooks=[hook]):
            one, cache = bridge.run_with_cache(pair.tokens, names_filter=[hook[0], later])
        logits.append(one)
        caches.append(cache)
    assert torch.equal(*logits)
    same(*caches)
    assert not torch.equal(logits[0], pair.local(pair.tokens))
    assert torch.equal(pair.remote(pair.tokens), pair.local(pair.tokens))


def test_all_edits_together_and_in_their_order(pair: Pair) -> None:
    hooks = list(edits(pair.local.cfg.d_head).values())
    name = "blocks.1.hook_mlp_out"
    for order in (("scale", "add"), ("add", "scale")):
        many = [*hooks, *((name, Edit(operation, 3.0)) for operation in order)]
        outputs = [bridge.run_with_hooks(pair.tokens, fwd_hooks=many) for bridge in pair]
        assert torch.equal(*outputs)
    seen = []
    for bridge in pair:
        before, between, after = Keep(), Keep(), Keep()
        both = [(name, before), (name, Edit("set", 1.0)), (name, between), (name, Edit("add", 1.0)), (name, after)]
        bridge.run_with_hooks(pair.tokens, fwd_hooks=both)
        seen.append({"before": before.value, "between": between.value, "after": after.value})
    same(*seen)
    assert set(seen[0]["between"].flatten().tolist()) == {1.0}
    assert set(seen[0]["after"].flatten().tolist()) == {2.0}


def test_routing_is_edited_on_the_server() -> None:
    pair = make_pair("tiny-mixtral", (1,), shipped="tiny-mixtral")
    for name, edit in (
        ("blocks.1.mlp.hook_router_logits", Edit("add", 100.0, experts=[3])),
        ("blocks.1.mlp.hook_expert_indices", Edit("set", torch.tensor([0, 2]))),
        ("blocks.2.mlp.hook_expert_weights", Edit("scale", 0.5)),
        ("blocks.0.mlp.hook_expert_out", Edit("zero", positions=[2])),
    ):
        outputs = [bridge.run_with_hooks(pair.tokens, fwd_hooks=[(name, edit)]) for bridge in pair]
        assert torch.equal(*outputs), name
        assert not torch.equal(outputs[0], pair.local(pair.tokens)), name


# -- functions on the client -----------------------------------------------------------------------


def double(tensor: Tensor, hook: HookPoint) -> Tensor:
    return tensor * 2


def test_functions_run_at_the_edges_of_blocks(pair: Pair) -> None:
    for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.0.hook_in", "hook_embed"):
        outputs = [bridge.run_with_hooks(pair.tokens, fwd_hooks=[(name, double)]) for bridge in pair]
        assert torch.equal(*outputs)
        assert not torch.equal(outputs[0], pair.local(pair.tokens))


def test_a_function_cuts_the_call_and_a_capture_does_not(pair: Pair) -> None:
    cuts = [span.blocks.start for span in pair.spans]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(pair.local.cfg.n_layers)]
    pair.remote.run_with_cache(pair.tokens, names_filter=names)
    assert pair.calls() == len(cuts)
    for layer, name in enumerate(names):
        pair.remote.run_with_hooks(pair.tokens, fwd_hooks=[(name, double)])
        assert pair.calls() == len({*cuts, layer})
    pair.remote.run_with_hooks(pair.tokens, fwd_hooks=[("blocks.0.hook_resid_post", double)])
    assert pair.calls() == len({*cuts, 1})


def test_plain_torch_hooks_at_a_block_see_its_stream(pair: Pair) -> None:
    _, cache = pair.local.run_with_cache(pair.tokens)
    seen: dict[str, Tensor] = {}
    block = pair.remote.original_model.blocks[1]
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.__setitem__("in", args[0])),
        block.register_forward_hook(
            lambda module, args, out: seen.__setitem__("out", out if isinstance(out, Tensor) else out[0])
        ),
    ]
    assert torch.equal(pair.remote(pair.tokens), pair.local(pair.tokens))
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["in"], cache["resid_pre", 1]) and torch.equal(seen["out"], cache["resid_post", 1])


@pytest.mark.parametrize("name", [f"blocks.1.{inside}" for inside in INSIDE])
def test_functions_inside_are_refused_and_nothing_stays(pair: Pair, name: str) -> None:
    words = "its block runs on another machine, where no Python of yours runs; use an Edit .* or put the function at"
    for attach in (
        lambda: pair.remote.run_with_hooks(
            pair.tokens, fwd_hooks=[("blocks.0.hook_resid_pre", double), (name, double)]
        ),
        lambda: pair.remote.add_hook(name, double),
        lambda: pair.remote.hook_dict[name].add_hook(double),
    ):
        with pytest.raises(ValueError, match=rf"hook double at '{name}': {words}"):
            attach()
    with pytest.raises(ValueError, match="read gradients with run_with_cache"):
        pair.remote.run_with_hooks(pair.tokens, bwd_hooks=[(name, double)])
    with pytest.raises(TypeError, match="got a Identity in the hook's place, and this block runs in another process"):
        setattr(pair.remote.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], torch.nn.Identity())
    assert not any(point.has_hooks() for point in pair.remote.hook_points())
    assert torch.equal(pair.remote(pair.tokens), pair.local(pair.tokens))


def test_a_refused_partial_is_named_by_its_function(pair: Pair) -> None:
    with pytest.raises(ValueError, match="hook double at 'blocks.1.hook_attn_out'"):
        pair.remote.add_hook("blocks.1.hook_attn_out", partial(double))
    with pytest.raises(ValueError, match="hook _add at 'blocks.1.hook_attn_out'"):
        pair.remote.steer(torch.ones(pair.remote.cfg.d_model), at="blocks.1.hook_attn_out").__enter__()


def test_a_fresh_hook_point_refuses_too(pair: Pair) -> None:
    pair.remote.blocks[0].attn.hook_q = HookPoint()
    with pytest.raises(ValueError, match="hook double"):
        pair.remote.add_hook("blocks.0.attn.hook_q", double)
    _, cache = pair.remote.run_with_cache(pair.tokens, names_filter="blocks.0.attn.hook_q")
    assert cache["q", 0].shape[:2] == (2, 9)


# -- gradients -------------------------------------------------------------------------------------


def test_gradients_at_every_hook_and_at_the_embedding(pair: Pair) -> None:
    results = []
    for bridge in pair:
        everything = lambda name: True  # noqa: E731
        loss, cache = bridge.run_with_cache(pair.tokens, return_type="loss", names_filter=everything, incl_bwd=True)
        table = bridge.original_model.get_input_embeddings().weight.grad
        results.append({"loss": loss.detach(), "table": table, **cache})
    same(*results)
    assert list(results[0]) == list(results[1])
    assert sum(name.endswith("_grad") for name in results[0]) > 60
    assert all(bool(value.abs().sum()) for name, value in results[0].items() if name.endswith("hook_q_grad"))


def test_gradients_at_some_hooks(pair: Pair) -> None:
    for inside in INSIDE:
        names = [f"blocks.1.{inside}", "blocks.0.hook_resid_pre"]
        caches = [
            bridge.run_with_cache(pair.tokens, return_type="loss", names_filter=names, incl_bwd=True)[1]
            for bridge in pair
        ]
        same(*caches)
        assert len(caches[0]) == 4


def test_gradients_to_edit_values(pair: Pair) -> None:
    d_head, gradients = pair.local.cfg.d_head, []
    for bridge in pair:
        torch.manual_seed(3)
        q = torch.randn(2, 1, d_head, requires_grad=True)
        steer = torch.randn(128, requires_grad=True)
        factor = torch.ones(1, requires_grad=True)
        direction = torch.randn(128, requires_grad=True)
        hooks = [
            ("blocks.1.attn.hook_q", Edit("set", q, positions=[0, -1])),
            ("blocks.0.hook_resid_post", Edit("add", steer)),
            ("blocks.2.attn.hook_pattern", Edit("scale", factor, heads=[1])),
            ("blocks.2.hook_mlp_out", Edit("project_out", direction)),
        ]
        loss = bridge.run_with_hooks(pair.tokens, return_type="loss", fwd_hooks=hooks)
        found = torch.autograd.grad(loss, [q, steer, factor, direction])
        gradients.append(dict(zip(("q", "steer", "factor", "direction"), found, strict=True)))
    same(*gradients)
    assert all(bool(gradient.abs().sum()) for gradient in gradients[0].values())


def test_gradients_through_what_is_kept(pair: Pair) -> None:
    gradients = []
    for bridge in pair:
        torch.manual_seed(4)
        steer = torch.randn(128, requires_grad=True)
        pattern, q, out = Keep(), Keep(), Keep()
        hooks = [
            ("blocks.0.hook_resid_pre", Edit("add", steer)),
            ("blocks.1.attn.hook_pattern", pattern),
            ("blocks.1.attn.hook_q", q),
            ("blocks.2.hook_mlp_out", out),
        ]
        logits = bridge.run_with_hooks(pair.tokens, fwd_hooks=hooks)
        kept = {"pattern": pattern.value, "q": q.value, "out": out.value}
        found = [torch.autograd.grad(value.square().sum(), steer, retain_graph=True)[0] for value in kept.values()]
        together = torch.autograd.grad(logits.sum() + q.value.sum(), steer)[0]
        gradients.append({"pattern": found[0], "q": found[1], "out": found[2], "together": together, "logits": logits})
    same(*gradients)
    assert all(bool(gradient.abs().sum()) for gradient in gradients[0].values())


def test_only_gradients_that_exist_are_sent(pair: Pair) -> None:
    used, unused = Keep(), Keep()
    hooks = [("blocks.0.attn.hook_pattern", unused), ("blocks.0.attn.hook_q", used)]
    logits = pair.remote.run_with_hooks(pair.tokens, fwd_hooks=hooks)
    for loss, sent in ((logits.sum(), {"grad.stream"}), (used.value.sum(), {"grad.0"})):  # q comes first
        pair.calls()
        loss.backward(retain_graph=True)
        requests = [unpack_request(message, Limits()) for message in pair.spans[0].sent]
        assert [request.kind for request in requests] == ["backward"]
        assert {name for name in requests[0].tensors if name.startswith("grad")} == sent


def test_gradients_to_embeddings_and_residual_streams(pair: Pair) -> None:
    for start in (None, 1):
        found = []
        for bridge in pair:
            torch.manual_seed(5)
            stream = torch.randn(2, 9, bridge.cfg.d_model, requires_grad=True)
            found.append(torch.autograd.grad(bridge(stream, start_at_layer=start)[:, -1, 5].sum(), stream)[0])
        assert torch.equal(*found)
        assert bool(found[0].abs().sum())


def test_a_backward_function_at_an_edge(pair: Pair) -> None:
    tables = []
    for bridge in pair:
        hooks = [("blocks.1.hook_resid_pre", lambda grad, hook: grad * 3)]
        bridge.run_with_hooks(pair.tokens, return_type="loss", bwd_hooks=hooks).backward()
        tables.append(bridge.original_model.get_input_embeddings().weight.grad)
    assert torch.equal(*tables)


def test_frozen_weights_here_still_give_gradients_at_hooks(pair: Pair) -> None:
    remote = pair.remote.original_model
    frozen = [(p, p.requires_grad_(False)) for p in remote.get_input_embeddings().parameters()]
    names = ["blocks.0.attn.hook_q", "blocks.1.hook_resid_pre"]
    caches = [
        bridge.run_with_cache(pair.tokens, return_type="loss", names_filter=names, incl_bwd=True)[1] for bridge in pair
    ]
    for parameter, _ in frozen:
        parameter.requires_grad_(True)
    same(*caches)


def test_a_gradient_of_a_gradient_is_refused(pair: Pair) -> None:
    steer = torch.zeros(128, requires_grad=True)
    loss = pair.remote.run_with_hooks(
        pair.tokens, return_type="loss", fwd_hooks=[("blocks.0.hook_resid_pre", Edit("add", steer))]
    )
    (first,) = torch.autograd.grad(loss, steer, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# -- other layouts, precisions and attention kernels -----------------------------------------------


@pytest.mark.parametrize("layout", FAMILIES)
def test_every_layout(layout: str, tmp_path) -> None:
    torch.manual_seed(6)
    family(layout, num_hidden_layers=3).save_pretrained(tmp_path)
    pair = make_pair(str(tmp_path), (1,))
    pair.tokens = pair.tokens % 50 + 5
    results = []
    for bridge in pair:
        loss, cache = bridge.run_with_cache(pair.tokens, return_type="loss", incl_bwd=True)
        results.append({"loss": loss.detach(), **cache})
    same(*results)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    assert torch.equal(*(bridge(pair.tokens, attention_mask=mask) for bridge in pair))


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"attn_implementation": "eager"}], ids=["bf16", "eager"]
)
@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_precision_and_kernel(name: str, options: dict[str, Any]) -> None:
    pair = make_pair(name, (1,), shipped=name, **options)
    (logits, cache), (expected, local) = (bridge.run_with_cache(pair.tokens) for bridge in pair)
    assert torch.equal(logits, expected)
    same(cache, local)
    assert logits.dtype == options.get("dtype", torch.float32)


# -- giving back, copying, and what is not there ---------------------------------------------------


def test_detach_leaves_nothing(pair: Pair) -> None:
    model = pair.remote.original_model
    before = [len(block.waiting) for block in model.blocks]
    with TransformerBridge(model) as second:
        _, one = second.run_with_cache(pair.tokens, names_filter="blocks.0.attn.hook_q")
        assert sum(len(block.waiting) for block in model.blocks) > sum(before)
    assert [len(block.waiting) for block in model.blocks] == before
    assert torch.equal(one["q", 0], pair.remote.run_with_cache(pair.tokens)[1]["q", 0])


def test_two_bridges_on_one_model(pair: Pair) -> None:
    name = "blocks.1.hook_mlp_out"
    with TransformerBridge(pair.remote.original_model) as second, second.hooks(fwd_hooks=[(name, Edit("add", 1.0))]):
        edited = pair.remote.run_with_cache(pair.tokens, names_filter=[name])[0]
    with pair.local.hooks(fwd_hooks=[(name, Edit("add", 1.0))]):
        assert torch.equal(edited, pair.local(pair.tokens))


def test_weights_in_the_blocks_are_not_here(pair: Pair) -> None:
    with pytest.raises(ValueError, match="its block runs in another process, where its modules and weights are"):
        pair.remote.blocks[0].attn.W_Q  # noqa: B018
    assert torch.equal(pair.remote.unembed.W_U, pair.local.unembed.W_U)


def test_an_error_on_the_server_reaches_the_caller_and_changes_nothing(pair: Pair) -> None:
    from transformer_lens.distributed import SpanError

    wrong = Edit("add", torch.zeros(7))
    with pytest.raises(SpanError, match=r"got a value of shape \[7\], expected one that broadcasts to"):
        pair.remote.run_with_hooks(pair.tokens, fwd_hooks=[("blocks.1.hook_mlp_out", wrong)])
    with pytest.raises(SpanError, match="no experts"):
        pair.remote.run_with_hooks(pair.tokens, fwd_hooks=[("blocks.1.attn.hook_q", Edit("zero", experts=[0]))])
    assert torch.equal(pair.remote(pair.tokens), pair.local(pair.tokens))


def test_a_hook_may_run_the_model_again(pair: Pair) -> None:
    inner = []

    def again(tensor: Tensor, hook: HookPoint) -> None:
        inner.append(pair.remote(pair.tokens))

    name = "blocks.1.hook_resid_pre"
    logits = pair.remote.run_with_hooks(pair.tokens, fwd_hooks=[("blocks.0.hook_mlp_out", Edit("zero")), (name, again)])
    expected = pair.local.run_with_hooks(pair.tokens, fwd_hooks=[("blocks.0.hook_mlp_out", Edit("zero"))])
    assert torch.equal(logits, expected)
    assert torch.equal(inner[0], pair.local(pair.tokens))


def test_threads_do_not_see_each_others_hooks(pair: Pair) -> None:
    hooks = [
        [("blocks.1.hook_mlp_out", Edit("zero"))],
        [("blocks.1.hook_resid_pre", double)],
        [],
    ]
    expected = [pair.local.run_with_hooks(pair.tokens, fwd_hooks=some) for some in hooks]
    with ThreadPoolExecutor(max_workers=3) as pool:
        for _ in range(4):
            runs = [pool.submit(pair.remote.run_with_hooks, pair.tokens, fwd_hooks=some) for some in hooks]
            assert all(torch.equal(run.result(), wanted) for run, wanted in zip(runs, expected, strict=True))


def test_an_exception_in_a_function_at_an_edge_leaves_nothing(pair: Pair) -> None:
    def fail(tensor: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        pair.remote.run_with_hooks(
            pair.tokens, fwd_hooks=[("blocks.1.attn.hook_q", Edit("zero")), ("blocks.1.hook_resid_post", fail)]
        )
    assert not any(
        point.has_hooks()
        for bridge in (pair.remote, *(s.server.bridge for s in pair.spans))
        for point in bridge.hook_points()
    )
    with pytest.raises(ValueError, match="call the model, not its block"):
        pair.remote.original_model.blocks[0](torch.zeros(1, 2, 128))
    assert torch.equal(pair.remote(pair.tokens), pair.local(pair.tokens))


def test_a_hook_that_was_taken_off_sees_no_gradient(pair: Pair) -> None:
    for bridge in pair:
        store, _, backward = bridge.get_caching_hooks(names_filter="blocks.1.attn.hook_q", incl_bwd=True)
        with bridge.hooks(bwd_hooks=backward):
            loss = bridge(pair.tokens, return_type="loss")
            loss.backward(retain_graph=True)
            assert list(store) == ["blocks.1.attn.hook_q_grad"]
            store.clear()
        loss.backward()
        assert not store
