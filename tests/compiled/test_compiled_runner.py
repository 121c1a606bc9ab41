"""`bridge.compile` against the bare model, compiled and not, and against plain functions at the same hooks."""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import _dynamo as dynamo
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from tests.support import VOCAB, family, perturbed, tokens, torch_hooks
from transformer_lens import TransformerBridge
from transformer_lens.compiled import CompiledRunner, Read
from transformer_lens.hook_points import Edit
from transformer_lens.hooks.slicing import Slice

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="inductor needs a C++ compiler: install g++ or clang++",
)
STREAM = "blocks.0.hook_resid_post"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dynamo.reset()
    with torch.no_grad():
        yield
    dynamo.reset()


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{"vocab_size": VOCAB, "num_hidden_layers": 2, **sizes, "initializer_range": 0.3, **changes})
    return perturbed(LlamaForCausalLM(config))


def small(name: str, **changes: Any) -> TransformerBridge:
    return TransformerBridge(llama(**changes) if name == "llama" else family(name, **changes))


def ports(bridge: TransformerBridge) -> list[str]:
    """The hooks that the table calls ports."""
    return [
        name
        for row in bridge.hook_table().present()
        if row.kind == "port"
        for layer in row.layers or range(bridge.cfg.n_layers)
        if (name := row.name.replace("{i}", str(layer))) in bridge.hook_dict
    ]


def one_graph() -> Any:
    """Raises where torch would compile again."""
    return dynamo.config.patch(error_on_recompile=True)


def compiled(model: Any, backend: str) -> Any:
    return torch.compile(lambda x: model(x).logits, backend=backend, fullgraph=True)


@pytest.mark.parametrize("name", ["7b", "11b", "40b", "rw", "mixtral", "llama"])
def test_every_port_is_what_run_with_cache_shows(name: str) -> None:
    bridge, x = small(name, num_hidden_layers=2 if name == "7b" else 1), tokens()
    model, names = bridge.original_model, list(dict.fromkeys(ports(bridge)))
    assert len(names) > 12
    bare = compiled(model, "aot_eager")(x)
    logits, expected = bridge.run_with_cache(x, names_filter=names)
    with bridge.compile(reads=[names], backend="aot_eager", tokens=x) as runner:
        with one_graph():
            got, cache = runner.run_with_cache(x)
            assert torch.equal(got, bare)
            assert set(cache) == set(expected) == set(names)
            for hook in names:
                assert cache[hook].dtype == expected[hook].dtype
                torch.testing.assert_close(cache[hook], expected[hook], rtol=0, atol=2e-5)
            other = tokens()
            torch.testing.assert_close(runner(other, return_type="loss"), bridge(other, return_type="loss"))
        assert not torch.equal(cache["resid_post", 0], runner.cache["resid_post", 0])  # the buffers went on
        assert torch.equal(bridge(x), logits)  # other calls are the bare model's
    assert torch_hooks(model) == 0


def half(x: Tensor, where: Any, by: float = 0.5) -> Tensor:
    """A tensor of which a part was multiplied."""
    x = x.clone()
    x[where] *= by
    return x


def removed(x: Tensor, direction: Tensor) -> Tensor:
    unit = direction / direction.norm()
    return x - torch.outer((x @ unit).flatten(), unit).reshape(x.shape)


V, W = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
EVERY = slice(None)
EDITS = {
    "set": (STREAM, Edit("set", V, positions=[1]), lambda x: torch.where(torch.arange(7)[:, None] == 1, V, x)),
    "add": ("blocks.0.hook_mlp_out", Edit("add", V), lambda x: x + V),
    "scale": ("blocks.0.attn.hook_z", Edit("scale", 0.5, heads=[2, 0]), lambda x: half(x, (EVERY, EVERY, [0, 2]))),
    "zero": ("blocks.1.attn.hook_v", Edit("zero", positions=[-1, 2]), lambda x: half(x, (EVERY, [2, 6]), 0)),
    "project_out": ("blocks.1.hook_resid_post", Edit("project_out", W), lambda x: removed(x, W)),
}
"""Operation -> a hook, an edit there, and the same as a function."""


def hooked(bridge: TransformerBridge, x: Tensor, chosen: dict[str, Any]) -> Tensor:
    """The eager model's logits with functions at hooks."""
    functions = [(hook, lambda value, hook, function=function: function(value)) for hook, function in chosen.items()]
    return bridge.run_with_hooks(x, fwd_hooks=functions)


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_edits_and_their_switches_in_one_graph(name: str) -> None:
    bridge, x = small(name), tokens()
    plain = bridge(x)
    bare = compiled(bridge.original_model, "aot_eager")(x)
    runner = bridge.compile(edits=[(hook, edit) for hook, edit, _ in EDITS.values()], backend="aot_eager", tokens=x)

    def same(got: Tensor, chosen: dict[str, Any]) -> None:
        torch.testing.assert_close(got, hooked(bridge, x, chosen), rtol=0, atol=5e-5)

    with runner, one_graph():
        same(runner(x), {hook: function for hook, _, function in EDITS.values()})
        for edit in runner.edits:
            edit.set(on=False)
        assert torch.equal(runner(x), bare)
        for edit, (hook, _, function) in zip(runner.edits, EDITS.values(), strict=True):
            edit.set(on=True)
            got = runner(x)
            same(got, {hook: function})
            assert float((got - plain).abs().max()) > 1e-3
            edit.set(on=[False, True])
            rows = runner(x)
            same(rows, {hook: lambda value, function=function: torch.stack([value[0], function(value)[1]])})
            torch.testing.assert_close(rows[0], bare[0], rtol=0, atol=1e-5)  # experts take the tokens of all rows
            assert name == "mixtral" or torch.equal(rows[0], bare[0])
            edit.set(on=torch.tensor([False, False]))
        add, scale = runner.edits[1], runner.edits[2]
        each = torch.randn(2, 1, 32)
        add.set(Edit("add", each), on=True)  # a value for each row
        same(runner(x), {"blocks.0.hook_mlp_out": lambda value: value + each})
        add.set(Edit("add", -1, positions=[3]))  # elsewhere
        same(runner(x), {"blocks.0.hook_mlp_out": lambda value: value - (torch.arange(7) == 3)[:, None] * 1.0})
        add.set(on=False)
        by = torch.tensor([2.0, -3.0])[:, None]
        scale.set(Edit("scale", by, heads=[5, 1]), on=True)  # each head its own, in the order of the list
        z = torch.ones(8, 1).index_put((torch.tensor([5, 1]),), by)
        same(runner(x), {"blocks.0.attn.hook_z": lambda value: value * z})


def test_values_at_positions_of_their_own() -> None:
    bridge, x, two = small("7b", num_hidden_layers=1), tokens(), torch.randn(2, 32)
    with bridge.compile(edits=[(STREAM, Edit("set", two, positions=[4, 1]))], backend="eager", tokens=x) as runner:
        places = (slice(None), torch.tensor([4, 1]))
        with one_graph():
            got = runner(x)
        expected = hooked(bridge, x, {STREAM: lambda v: v.index_put((torch.arange(2)[:, None], places[1]), two)})
        assert torch.equal(got, expected)
        short = tokens(2, 3)
        with pytest.raises(ValueError, match=r"positions \[4\] are outside its 3 places"):
            runner(short)


def test_a_routed_token_follows_an_edit_of_its_experts() -> None:
    bridge, x = small("mixtral", num_hidden_layers=1), tokens()
    indices = "blocks.0.mlp.hook_expert_indices"
    expected = hooked(bridge, x, {indices: lambda value: torch.ones_like(value)})
    edit = [(indices, Edit("set", 1))]
    with bridge.compile(reads=["blocks.0.mlp.hook_expert_indices"], edits=edit, backend="eager") as runner:
        torch.testing.assert_close(runner(x), expected, rtol=0, atol=2e-5)
        assert bool((runner.cache[indices] == 1).all())  # reads come after edits


def test_reads_of_some_positions_and_reductions() -> None:
    bridge, x, directions = small("mixtral", num_hidden_layers=1), tokens(), torch.randn(5, 4)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    reads = [
        Read("blocks.0.hook_resid_pre", pos_slice=-1),
        Read("blocks.0.hook_resid_mid", pos_slice=Slice(-1)),
        Read("blocks.0.hook_in", pos_slice=(1, 6, 2), reduce="norm"),
        Read(STREAM, reduce="mean"),
        Read("ln_final.hook_out", pos_slice=[2, 5, 6], reduce="mean"),
        Read("blocks.0.attn.hook_q", pos_slice=torch.arange(7) == 4, reduce="project", directions=directions),
        Read("unembed.hook_out", pos_slice=-1, reduce="top_k", k=3),
    ]
    with bridge.compile(reads=reads, backend="aot_eager") as runner:
        for given in (mask, None):
            logits, cache = runner.run_with_cache(x, attention_mask=given)
            expected_logits, full = bridge.run_with_cache(x, attention_mask=given)
            torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-5)
            text = torch.ones_like(x) if given is None else given
            final, weights = full["ln_final.hook_out"][:, [2, 5, 6]], text[:, [2, 5, 6], None]
            top = full["unembed.hook_out"][:, -1:].sort(dim=-1, descending=True)
            expected = {
                "blocks.0.hook_resid_pre": full["resid_pre", 0][:, -1:],
                "blocks.0.hook_resid_mid": full["resid_mid", 0][:, -1],
                "blocks.0.hook_resid_pre_norm": full["resid_pre", 0][:, 1:6:2].square().sum(-1).sqrt(),
                f"{STREAM}_mean": (full[STREAM] * text[..., None]).sum(1) / text.sum(1, keepdim=True),
                "ln_final.hook_out_mean": (final * weights).sum(1) / weights.sum(1),
                "blocks.0.attn.hook_q_projection": full["q", 0][:, [4]] @ directions.T,
                "unembed.hook_out_top_values": top.values[..., :3],
                "unembed.hook_out_top_indices": top.indices[..., :3],
            }
            assert set(cache) == set(expected)
            for name, value in expected.items():
                torch.testing.assert_close(cache[name], value, rtol=0, atol=2e-5)
        with pytest.raises(IndexError, match=r"got 6, expected -4 to 3"):
            runner(tokens(2, 4))


@torch.enable_grad()
def test_gradients_of_values_embeddings_and_parameters() -> None:
    bridge, x = small("llama"), tokens()
    vector = torch.randn(32, requires_grad=True)
    embedded = bridge.embed(x).detach().requires_grad_()
    edit = Edit("add", vector, positions=[2])
    parameters = list(bridge.original_model.parameters())
    with bridge.compile(reads=[STREAM], edits=[(STREAM, edit)], backend="aot_eager") as runner:
        got = torch.autograd.grad(runner(embedded).square().mean(), [vector, embedded, *parameters], allow_unused=True)
        assert not runner.cache[STREAM].requires_grad
    assert torch_hooks(bridge.original_model) == 0

    def add(value: Tensor) -> Tensor:
        return value + (torch.arange(7) == 2)[:, None] * vector

    loss = hooked(bridge, embedded, {STREAM: add}).square().mean()
    expected = torch.autograd.grad(loss, [vector, embedded, *parameters], allow_unused=True)
    assert float(expected[0].abs().max()) > 1e-3
    assert [one is None for one in got] == [one is None for one in expected]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["7b", "llama"])
def test_prefill_and_decode_with_a_static_cache_and_left_padding(name: str) -> None:
    """Each step shows what one run of the whole text shows in its last column."""
    bridge, text, toward = small(name, num_hidden_layers=1), tokens(2, 10), torch.randn(32)
    mask = torch.ones_like(text)
    mask[1, :2] = 0
    for padding in (None, mask):
        given = (lambda length: None) if padding is None else (lambda length: padding[:, :length])
        functions = [(STREAM, lambda value, hook: value + toward)]
        logits = bridge.run_with_hooks(text, attention_mask=padding, fwd_hooks=functions)
        assert not torch.equal(logits, bridge(text, attention_mask=padding))
        steps = bridge.compile(reads=[STREAM], edits=[(STREAM, Edit("add", toward))], backend="aot_eager")
        with steps as runner:
            cache = StaticCache(config=bridge.original_model.config, max_cache_len=16)
            got = [runner(text[:, :7], past_key_values=cache, attention_mask=given(7))[:, -1]]
            got.append(runner(text[:, 7:8], past_key_values=cache, attention_mask=given(8))[:, -1])
            graphs = dynamo.utils.counters["stats"]["unique_graphs"]
            for at in (8, 9):
                step = runner(text[:, at : at + 1], past_key_values=cache, attention_mask=given(at + 1))
                got.append(step[:, -1])
            assert runner.cache[STREAM].shape == (2, 1, 32)
            assert padding is not None or dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        torch.testing.assert_close(torch.stack(got, 1), logits[:, 6:], rtol=0, atol=5e-5)


def test_logits_that_the_model_caps_are_a_field_of_its_output() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=VOCAB, num_hidden_layers=1, head_dim=8, initializer_range=0.3, **sizes)
    bridge, x = TransformerBridge(perturbed(Gemma2ForCausalLM(config))), tokens()
    expected = 3 * bridge(x)
    edits = [("hook_logits", Edit("scale", 3.0))]
    with bridge.compile(reads=["hook_logits"], edits=edits, backend="eager") as runner:
        assert torch.equal(runner(x), expected) and torch.equal(runner.cache["hook_logits"], expected)


def test_one_graph_for_many_shapes() -> None:
    bridge = small("7b", num_hidden_layers=1)
    with bridge.compile(reads=[STREAM], backend="eager", dynamic=True) as runner:
        runner(tokens(2, 7))
        first = runner.cache[STREAM]
        with one_graph():
            for rows, length in ((2, 9), (3, 5), (5, 12), (2, 7)):
                x = tokens(rows, length)
                logits, cache = runner.run_with_cache(x)
                expected, full = bridge.run_with_cache(x, names_filter=STREAM)
                assert torch.equal(logits, expected) and torch.equal(cache[STREAM], full[STREAM])
        assert runner.cache[STREAM].data_ptr() == first.data_ptr()  # one shape, one place


def test_more_runners_than_torch_keeps_graphs_of_one_function() -> None:
    bridge, x = small("7b", num_hidden_layers=1), tokens()
    with one_graph(), dynamo.config.patch(recompile_limit=2):
        for name in ports(bridge)[:4]:
            with bridge.compile(reads=[name], backend="eager") as runner:
                runner(x)


def test_two_runners_other_threads_and_an_error_inside() -> None:
    bridge, x = small("7b", num_hidden_layers=1), tokens()
    plain, seen = bridge(x), []
    doubled = hooked(bridge, x, {STREAM: lambda value: 2 * value})
    one = bridge.compile(reads=[STREAM], backend="eager", tokens=x)
    two = bridge.compile(edits=[(STREAM, Edit("scale", 2.0))], backend="eager", tokens=x)
    kept = one.cache[STREAM].clone()

    def in_another_thread(value: Tensor, hook: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: seen.append(bridge.original_model(x).logits))
            other.start()
            other.join()

    one(x)  # another runner's hook at the same module makes torch compile once more
    with one_graph():
        assert torch.equal(two(x), doubled) and torch.equal(one(x), plain) and torch.equal(bridge(x), plain)
        assert torch.equal(one.cache[STREAM], kept)
        with pytest.raises(ValueError, match="got token 99"):
            one(x + 99 - x)
        assert torch.equal(one(x), plain)
    with bridge.hooks([("hook_embed", in_another_thread)]), pytest.warns(UserWarning, match="Python hooks are on"):
        two(x)
    assert torch.equal(seen[0], plain)  # a run of another thread meanwhile is not edited
    one.close()
    assert torch_hooks(bridge.original_model) == 1
    with two, pytest.raises(RuntimeError, match="of mine"):
        raise RuntimeError("of mine")
    assert torch_hooks(bridge.original_model) == 0
    with pytest.raises(ValueError, match="this runner was closed; make another with bridge.compile"):
        two(x)


def test_python_hooks_make_it_eager_and_nothing_is_ignored() -> None:
    bridge, x, seen = small("mixtral", num_hidden_layers=1), tokens(), []
    edit = ("blocks.0.hook_mlp_out", Edit("scale", 3.0))
    with bridge.compile(reads=[STREAM], edits=[edit], backend="eager", tokens=x) as runner:

        def pattern(value: Tensor, hook: Any) -> Tensor:
            seen.append(hook.name)
            return value.flip(1)

        expected = bridge.run_with_hooks(
            x,
            fwd_hooks=[
                ("blocks.0.hook_mlp_out", lambda value, hook: 3 * value),
                ("blocks.0.attn.hook_pattern", lambda value, hook: value.flip(1)),
            ],
        )
        with bridge.hooks([("blocks.0.attn.hook_pattern", pattern)]):
            with pytest.warns(UserWarning, match="Python hooks are on this model, so the runner calls it eagerly") as w:
                logits, cache = runner.run_with_cache(x)
            assert len(w) == 1
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
        assert seen == ["blocks.0.attn.hook_pattern"]
        with bridge.hooks([edit]):
            assert torch.equal(cache[STREAM], bridge.run_with_cache(x, names_filter=STREAM)[1][STREAM]) is False
        with one_graph():
            torch.testing.assert_close(runner(x), bridge.run_with_hooks(x, fwd_hooks=[edit]), rtol=0, atol=2e-5)


def test_a_module_exchanged_meanwhile_a_copy_and_a_detached_bridge() -> None:
    bridge, x = small("7b", num_hidden_layers=1), tokens()
    other = copy.deepcopy(bridge.blocks[0].mlp.original_component)
    runner = bridge.compile(reads=["blocks.0.mlp.hook_in"], backend="eager", tokens=x)
    with pytest.raises(TypeError, match="a compiled runner cannot be copied or saved: close it before"):
        copy.deepcopy(bridge)
    bridge.blocks[0].mlp = other
    with pytest.raises(ValueError, match="0 of 1 declared hooks fired: a module of the model was exchanged since"):
        runner(x)
    runner.close()
    again = bridge.compile(reads=[STREAM], backend="eager", tokens=x)
    model = bridge.detach()
    assert torch_hooks(model) == 0 and "forward" not in model.__dict__
    with pytest.raises(ValueError, match="this bridge was detached"):
        again(x)


def test_in_inference_mode_and_out_of_it() -> None:
    bridge, x = small("7b", num_hidden_layers=1), tokens()
    with bridge.compile(reads=[STREAM], edits=[(STREAM, Edit("scale", 2.0))], backend="eager") as runner:
        with torch.inference_mode():
            inside = runner(x).clone()
        assert torch.equal(runner(x), inside)
        assert torch.equal(inside, hooked(bridge, x, {STREAM: lambda value: 2 * value}))
        runner.edits[0].set(Edit("scale", torch.tensor(3.0, requires_grad=True)))
        assert torch.equal(runner(x), hooked(bridge, x, {STREAM: lambda value: 3 * value}))
        assert not runner.edits[0].value.requires_grad  # under no_grad it is a number like any other


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"reads": ["blocks.0.hook_resid_pots"]}, KeyError, "no hook is named 'blocks.0.hook_resid_pots'"),
        ({"reads": STREAM}, TypeError, f"reads: got '{STREAM}', expected a list"),
        ({"reads": [STREAM, Read("blocks.0.hook_out")]}, ValueError, f"{STREAM} would be kept twice; leave one"),
        ({"edits": [(STREAM, lambda value, hook: value)]}, TypeError, "no Python runs in a compiled graph"),
        ({"edits": [STREAM]}, TypeError, r"expected a list of \(name, function\) pairs"),
        ({"reads": [Read(STREAM, reduce="top_k", k=33)]}, ValueError, "k: got 33, expected 1 to 32, the last axis of"),
        (
            {"reads": [Read(STREAM, reduce="project", directions=torch.ones(2, 3))]},
            ValueError,
            r"got directions of shape \[2, 3\], expected \[several, 32\]",
        ),
        (
            {"reads": [Read(STREAM, Slice(-1), reduce="mean")]},
            ValueError,
            "reduce='mean' has no use, for it is one position; pass a pos_slice that keeps the axis",
        ),
        (
            {"reads": [Read("blocks.0.mlp.hook_expert_indices", reduce="norm")]},
            ValueError,
            "reduce='norm' has no use, for it holds integers",
        ),
        ({"edits": [(STREAM, Edit("add", torch.ones(3)))], "tokens": tokens()}, ValueError, "expected one that broad"),
        ({"edits": [(STREAM, Edit("zero", heads=[0]))], "tokens": tokens()}, ValueError, "and no heads"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], kind: type[Exception], text: str) -> None:
    bridge = small("mixtral", num_hidden_layers=1)
    with pytest.raises(kind, match=text):
        bridge.compile(**wrong, backend="eager")
    assert torch_hooks(bridge.original_model) == 0 and bridge.attachment.runners == []


def test_what_makes_no_sense_is_refused_later_too() -> None:
    bridge, x = small("7b", num_hidden_layers=1), tokens()
    for wrong in ({"reduce": "median"}, {"reduce": "project"}, {"k": 3}, {"reduce": "norm", "directions": V[None]}):
        with pytest.raises(ValueError, match="reduce"):
            Read(STREAM, **wrong)
    with bridge.compile(edits=[(STREAM, Edit("add", V))], backend="eager") as runner:
        (edit,) = runner.edits
        with pytest.raises(ValueError, match=r"expected an Edit\('add'\); declare both to bridge.compile"):
            edit.set(Edit("zero"))
        with pytest.raises(TypeError, match="expected a bool, or one for each row"):
            edit.set(on=[1.0])
        edit.set(on=[True])
        with pytest.raises(ValueError, match="got on for 1 rows, and a batch of 2"):
            runner(x)
        with pytest.raises(TypeError, match="stop_at_layer"):
            runner(x, stop_at_layer=1)
        assert isinstance(runner, CompiledRunner) and len(runner.cache) == 0
    with (
        bridge.hooks([(STREAM, lambda value, hook: None)]),
        pytest.raises(ValueError, match=r"Python hooks are on the model; take them off \(bridge.reset_hooks\(\)\)"),
    ):
        bridge.compile(reads=[STREAM])


@needs_a_compiler
def test_inductor() -> None:
    """Real kernels: the logits of the compiled bare model, bit for bit, with every port read and a steering vector."""
    in_real_kernels(small("7b", num_hidden_layers=1))


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("mixtral", "float32"), ("llama", "bfloat16"), ("40b", "bfloat16")])
def test_inductor_more(name: str, dtype: str) -> None:
    in_real_kernels(small(name), getattr(torch, dtype))


def in_real_kernels(bridge: TransformerBridge, dtype: torch.dtype = torch.float32) -> None:
    bridge.original_model.to(dtype)
    x, names, toward = tokens(), list(dict.fromkeys(ports(bridge))), (10 * V).to(dtype)
    # In half precision a kernel that stores a value rounds it, and one that does not goes on without, unless told.
    options = {} if dtype == torch.float32 else {"options": {"emulate_precision_casts": True}}
    model, expected = bridge.original_model, bridge.run_with_cache(x, names_filter=names)[1]
    bare = torch.compile(lambda x: model(x).logits, fullgraph=True, **options)(x)
    with bridge.compile(reads=[names], edits=[(STREAM, Edit("add", toward))], **options) as runner:
        runner.edits[0].set(on=False)
        logits, cache = runner.run_with_cache(x)
        assert torch.equal(logits, bare)
        for name in names:
            close(cache[name], expected[name])
        with one_graph():
            runner.edits[0].set(on=True)
            close(runner(x), hooked(bridge, x, {STREAM: lambda value: value + toward}))
            assert float((runner(x) - bare).abs().max()) > 1


def close(got: Tensor, expected: Tensor) -> None:
    """Within rounding: 2e-6 of the whole in float32, 2% in bfloat16 (2^-8 for each of some steps)."""
    off = (got.double() - expected.double()).norm() / expected.double().norm()
    assert float(off) <= (2e-6 if expected.dtype == torch.float32 else 0.02)
