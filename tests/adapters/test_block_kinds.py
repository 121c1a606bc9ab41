"""Blocks with multipliers, with norms behind alone, with three branches, and layers that differ: real small models.

Granite, OLMo 2, Falcon-H1, LFM2 and Ernie 4.5, against values of the bare models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.block_kinds import KINDS, build
from tests.support import falcon, tokens
from transformer_lens.analysis.attribution.edge_graph import EdgeGraph
from transformer_lens.analysis.svd import SVDInterpreter
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    PARALLEL_ONE_NORM,
    SEQUENTIAL,
    BlockBridge,
    Branch,
    Part,
    Stages,
)
from transformer_lens.model_bridge.generalized_components.block import absent_of, hooks_of
from transformer_lens.model_bridge.loading.info import layout_in_words
from transformer_lens.model_bridge.supported_architectures import ADAPTERS, adapter_class
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.llama import GATED, ROTATED

every_kind = pytest.mark.parametrize("name", KINDS)
MIXER_ALONE: Stages = ((Branch("ln1", "mixer"),),)
BARE: Stages = ((Branch("", "attn"), Branch("", "mlp")),)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(ADAPTERS)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


def added(name: str, layer: Any) -> list[tuple[str, Any, float]]:
    """Hook, module and multiplier of what a Hugging Face layer adds to its stream, from the modeling files."""
    if name == "olmo2":
        return [("attn", layer.post_attention_layernorm, 1.0), ("mlp", layer.post_feedforward_layernorm, 1.0)]
    if name == "falcon_h1":
        branches = [("mixer", layer.mamba, 1.3), ("attn", layer.self_attn, 0.7)]
        return [*branches, ("mlp", layer.feed_forward, 1.0)]
    if name == "lfm2":
        mixer = ("attn", layer.self_attn, 1.0) if layer.is_attention_layer else ("mixer", layer.conv, 1.0)
        return [mixer, ("mlp", layer.feed_forward, 1.0)]
    scale = 0.22 if name == "granite" else 1.0
    return [("attn", layer.self_attn, scale), ("mlp", layer.mlp, scale)]


def first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


# -- the laws ------------------------------------------------------------------------------------------


@every_kind
def test_looking_changes_nothing_and_every_hook_fires_with_its_shape(name: str) -> None:
    model, ids = build(name), tokens()
    bare = model(ids).logits
    bridge = TransformerBridge(model)
    table, sizes = bridge.hook_table(), {"batch": 2, "pos": 7, "query_pos": 7, "key_pos": 7, "1": 1}
    fired: list[str] = []

    def see(tensor: Tensor, hook: Any) -> None:
        fired.append(hook.name)
        assert tuple(tensor.shape) == tuple(sizes.get(str(size), size) for size in table.row(hook.name).shape)

    looked, cache = bridge.run_with_cache(ids, names_filter=list(bridge.hook_dict))
    assert torch.equal(looked, bare) and set(cache) == set(bridge.hook_dict)
    bridge.run_with_hooks(ids, fwd_hooks=[(list(bridge.hook_dict), see)])
    assert sorted(fired) == sorted(bridge.hook_dict)
    written = bridge.run_with_hooks(ids, fwd_hooks=[(hook, lambda x, hook: x.clone()) for hook in added_hooks(name)])
    assert torch.equal(written, bare)
    bridge.detach()
    assert torch.equal(model(ids).logits, bare)


MIXERS = {"falcon_h1": (("mixer", "attn"), ("mixer", "attn")), "lfm2": (("mixer",), ("attn",))}
"""What is before the MLP in the first two layers, where that is not attention alone."""


def mixers(name: str, layer: int) -> tuple[str, ...]:
    return MIXERS[name][layer] if name in MIXERS else ("attn",)


def added_hooks(name: str) -> list[str]:
    return [f"blocks.{layer}.hook_{mixer}_out" for layer in range(2) for mixer in (*mixers(name, layer), "mlp")]


@every_kind
def test_captures_are_what_the_modules_return_times_the_multiplier(name: str) -> None:
    model, ids = build(name), tokens()
    seen: dict[str, Tensor] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        for mixer, module, scale in added(name, layer):

            def keep(module: Any, args: Any, output: Any, at: str = f"{i}{mixer}", scale: float = scale) -> None:
                seen[at] = first(output) * scale

            handles.append(module.register_forward_hook(keep))
    model(ids)
    for handle in handles:
        handle.remove()
    _, cache = TransformerBridge(model).run_with_cache(ids)
    assert all(torch.equal(cache[f"{at[1:]}_out", int(at[0])], value) for at, value in seen.items())
    assert len(seen) == len(model.model.layers) * (3 if name == "falcon_h1" else 2)


@every_kind
def test_a_block_adds_its_branches_stage_by_stage(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    _, cache = bridge.run_with_cache(ids)
    for layer in range(2):
        beside = sum(cache[f"{mixer}_out", layer] for mixer in mixers(name, layer))
        assert torch.equal(cache["resid_pre", layer] + beside, cache["resid_mid", layer])
        assert torch.equal(cache["resid_mid", layer] + cache["mlp_out", layer], cache["resid_post", layer])
        assert torch.equal(cache["mlp_in", layer], cache["resid_mid", layer])
    stack, labels = cache.decompose_resid(return_labels=True)
    torch.testing.assert_close(stack.sum(0), cache["resid_post", -1], rtol=1e-5, atol=1e-6)
    assert ("0_mixer_out" in labels) == (name in MIXERS)


@every_kind
def test_what_is_written_is_what_is_added(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    for hook in added_hooks(name):
        new = torch.randn(2, 7, 32)
        with bridge.hooks([(hook, lambda x, hook, new=new: new)]):
            _, cache = bridge.run_with_cache(ids)
        layer = int(hook.split(".")[1])
        others = [other for other in added_hooks(name) if other != hook and f".{layer}." in other]
        total = cache["resid_pre", layer] + new + sum(cache[other] for other in others)
        # A written value is divided by the multiplier, and multiplied again by the model.
        torch.testing.assert_close(cache["resid_post", layer], total, rtol=1e-5, atol=1e-6)


@every_kind
def test_a_written_middle_stream_goes_on_both_ways(name: str) -> None:
    model, ids = build(name), tokens()
    bridge, middle = TransformerBridge(model), torch.randn(2, 7, 32)
    with bridge.hooks([("blocks.1.hook_resid_mid", lambda x, hook: middle)]):
        _, cache = bridge.run_with_cache(ids)
    layer = model.model.layers[1]
    norms = {"falcon_h1": "pre_ff_layernorm", "olmo2": "", "lfm2": "ffn_norm"}
    norm = norms.get(name, "post_attention_layernorm")
    entering = layer.get_submodule(norm)(middle) if norm else middle
    mlp = layer.feed_forward if name in MIXERS else layer.mlp
    out = mlp(entering)
    (_, last, scale) = added(name, layer)[-1]
    out = last(out) if name == "olmo2" else out * scale
    assert torch.equal(cache["mlp_in", 1], middle)
    assert torch.equal(cache["resid_post", 1], middle + out)


@every_kind
def test_gradients_at_what_is_added_are_those_of_the_stream_behind_it(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    names = [*added_hooks(name), *(f"blocks.{i}.hook_resid_{at}" for i in range(2) for at in ("mid", "post"))]
    with torch.enable_grad():
        _, cache = bridge.run_with_cache(ids, return_type="loss", incl_bwd=True, names_filter=names)
    for hook in added_hooks(name):
        behind = "post" if "mlp" in hook else "mid"
        expected = cache[f"blocks.{hook.split('.')[1]}.hook_resid_{behind}_grad"]
        torch.testing.assert_close(cache[f"{hook}_grad"], expected, rtol=1e-5, atol=1e-7)


@every_kind
def test_verify_passes(name: str) -> None:
    report = TransformerBridge(build(name)).verify(tokens())
    assert report.passed, report


@every_kind
def test_a_stream_written_for_every_head_enters_through_the_norm_and_its_number(name: str) -> None:
    model, ids, stream = build(name), tokens(), torch.randn(2, 7, 32)
    bridge, layer = TransformerBridge(model), model.model.layers[1]
    norms = {"olmo2": "", "lfm2": "operator_norm"}
    norm = norms.get(name, "input_layernorm")
    entering = layer.get_submodule(norm)(stream) if norm else stream
    entering = entering * 0.9 if name == "falcon_h1" else entering
    outs = []
    for hook, value in (("hook_attn_in", stream[:, :, None].expand(-1, -1, 8, -1)), ("attn.hook_in", entering)):
        with bridge.hooks([(f"blocks.1.{hook}", lambda x, hook, value=value: value)]):
            outs.append(bridge.run_with_cache(ids, names_filter="blocks.1.hook_attn_out")[1]["attn_out", 1])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)


def test_a_block_knows_what_enters_a_mixer() -> None:
    model, stream = build("falcon_h1"), torch.randn(2, 7, 32)
    block, layer = [*TransformerBridge(model).blocks][1], model.model.layers[1]
    assert torch.equal(block.entering("attn")(stream), layer.input_layernorm(stream) * 0.9)
    assert torch.equal(block.entering("mixer")(stream), layer.input_layernorm(stream))
    bare = [*TransformerBridge(build("olmo2")).blocks][1]
    assert torch.equal(bare.entering("attn")(stream), stream)


# -- what follows from the branches ----------------------------------------------------------------------


@every_kind
def test_the_whole_stream_as_heads_neurons_and_biases(name: str) -> None:
    bridge, ids = TransformerBridge(build(name)), tokens()
    _, cache = bridge.run_with_cache(ids)
    for layer, mlp_input in ((None, False), (1, True), (1, False)):
        stack, labels = cache.get_full_resid_decomposition(layer, mlp_input, return_labels=True)
        after = "resid_post" if layer is None else "resid_mid" if mlp_input else "resid_pre"
        expected = cache[after, -1 if layer is None else layer]
        torch.testing.assert_close(stack.sum(0), expected, rtol=1e-4, atol=1e-5)
        assert ("L0H0" in labels) == (name != "lfm2") and ("0_mixer_out" in labels) == (name in MIXERS)


def test_neurons_and_experts_of_layers_that_differ() -> None:
    bridge, ids = TransformerBridge(build("ernie")), tokens()
    _, cache = bridge.run_with_cache(ids)
    stack, labels = cache.stack_neuron_results(2, return_labels=True)
    assert len(labels) == 24 + 4 * 12 and labels[23:25] == ["L0N23", "L1E0N0"]
    torch.testing.assert_close(stack[:24].sum(0), cache["mlp_out", 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stack[24:].sum(0), cache["mlp_out", 1], rtol=1e-4, atol=1e-6)
    experts, labels = cache.stack_expert_results(return_labels=True)
    assert labels == [f"L{layer}E{expert}" for layer in (1, 2) for expert in range(4)]
    torch.testing.assert_close(experts[4:].sum(0), cache["mlp_out", 2], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"W_in: it is \[32, 24\] in layer 0 and \[4, 32, 12\] in layer 1"):
        bridge.W_in  # noqa: B018


def test_layers_without_attention() -> None:
    bridge, ids = TransformerBridge(build("lfm2")), tokens()
    _, cache = bridge.run_with_cache(ids)
    cache.compute_head_results()
    assert [name for name in cache if name.endswith("hook_result")] == ["blocks.1.attn.hook_result"]
    torch.testing.assert_close(
        cache.cache_dict["blocks.1.attn.hook_result"].sum(2), cache["attn_out", 1], rtol=1e-4, atol=1e-6
    )
    assert cache.stack_head_results(2, return_labels=True)[1] == [f"L1H{h}" for h in range(8)]
    with pytest.raises(ValueError, match=r"blocks\.0 has no 'attn'; its branches are mixer, mlp"):
        bridge.W_Q  # noqa: B018
    with pytest.raises(KeyError, match="this block has no attention"):
        bridge.run_with_cache(ids, names_filter="blocks.0.hook_attn_out")
    row = bridge.hook_table().row("blocks.1.hook_attn_out")
    assert row.layers == (1,) and row.cells()[2] == "port, layer 1"


def test_accumulated_biases_are_multiplied_as_the_branches_are() -> None:
    model = build("granite")
    layers, bridge = model.model.layers, TransformerBridge(model)
    expected = 0.22 * layers[0].self_attn.o_proj.bias + 0.22 * layers[0].mlp.down_proj.bias
    torch.testing.assert_close(bridge.accumulated_bias(1), expected)
    with_attention = expected + 0.22 * layers[1].self_attn.o_proj.bias
    torch.testing.assert_close(bridge.accumulated_bias(1, mlp_input=True), with_attention)


def test_a_bias_before_a_norm_is_no_constant() -> None:
    bridge = TransformerBridge(build("olmo2", attention_bias=True))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn has a bias, and ln1_post comes after it"):
        bridge.accumulated_bias(1)
    assert not TransformerBridge(build("olmo2")).accumulated_bias(2).any()


def test_the_norm_before_a_layer_that_has_none() -> None:
    _, cache = TransformerBridge(build("olmo2")).run_with_cache(tokens())
    with pytest.raises(ValueError, match=r"the norm before layer 1: blocks\.1\.attn reads the stream with none"):
        cache.accumulated_resid(layer=1, apply_ln=True)


def test_edges_go_from_stage_to_stage() -> None:
    graph = EdgeGraph.of(TransformerBridge(build("falcon_h1")))
    assert [one.label for one in graph.senders[:4]] == ["embed", "0_mixer_out", "0_attn_out", "0_mlp_out"]
    assert not graph.has_edge("0_mixer_out", "L0H0.q") and not graph.has_edge("0_attn_out", "0_mixer_in")
    assert graph.has_edge("0_mixer_out", "0_mlp_in") and graph.has_edge("0_mlp_out", "1_mixer_in")
    ernie = [one.label for one in EdgeGraph.of(TransformerBridge(build("ernie"))).senders]
    assert ernie[1:10] == [*(f"L0H{head}" for head in range(8)), "0_mlp_out"] and ernie[18:20] == ["L1E0", "L1E1"]


@pytest.mark.parametrize("name", ["granite", "olmo2", "ernie"])
def test_folded_norms_change_nothing(name: str) -> None:
    model, ids = build(name).double(), tokens()
    model.config._experts_implementation = "eager"  # grouped_mm has no float64
    before = model(ids).logits.log_softmax(-1)
    bridge = TransformerBridge(model)
    with bridge.fold_ln():
        after = bridge(ids).log_softmax(-1)
        ones = bridge.blocks[0].ln1.original_component.weight if name != "olmo2" else torch.ones(1)
        assert bool((ones == 1).all())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # these norms compute in float32


def test_a_mixer_that_does_not_say_what_it_reads_is_not_folded_into() -> None:
    with pytest.raises(ValueError, match="MixerBridge does not say which of its weights read the stream"):
        TransformerBridge(build("falcon_h1")).fold_ln()


def test_writing_is_not_centred_where_a_branch_reads_the_mean() -> None:
    class BareFalcon(FalconArchitectureAdapter):
        def components(self) -> Any:
            parts = super().components()
            return {**parts, "blocks": replace(parts["blocks"], stages=BARE)}

    ADAPTERS["falcon"] = BareFalcon
    with pytest.raises(ValueError, match=r"blocks\.0\.attn reads the stream with no norm in front"):
        TransformerBridge(falcon()).center_writing_weights()


def test_singular_vectors_have_the_weight_of_the_norm_in_front() -> None:
    model = build("olmo2")
    svd = SVDInterpreter(TransformerBridge(model))
    values = svd.singular_vectors("w_in", 0, num_vectors=3).values
    torch.testing.assert_close(values, torch.linalg.svdvals(model.model.layers[0].mlp.up_proj.weight)[:3])
    model = build("granite")
    svd = SVDInterpreter(TransformerBridge(model))
    layer = model.model.layers[0]
    read = layer.mlp.up_proj.weight * layer.post_attention_layernorm.weight
    torch.testing.assert_close(
        svd.singular_vectors("w_in", 0, num_vectors=3).values, torch.linalg.svdvals(read.detach())[:3]
    )


# -- the table -------------------------------------------------------------------------------------------


def test_rows_of_layers_that_differ_say_which_they_hold_for() -> None:
    table = TransformerBridge(build("ernie")).hook_table()
    rows = [row for row in table if row.name == "blocks.{i}.mlp.hook_post"]
    assert [(row.layers, row.shape) for row in rows] == [
        ((0,), ("batch", "pos", 24)),
        ((1, 2), ("batch", "pos", 2, 12)),
    ]
    assert [row.cells()[2] for row in rows] == ["port, layer 0", "seam, layers 1-2"]
    assert table.row("blocks.0.mlp.hook_post") is rows[0] and table.row("blocks.2.mlp.hook_post") is rows[1]
    assert table.row("blocks.2.hook_attn_out").layers == () and table.row("hook_embed").where() == ""
    absent = {(row.name, row.layers): row.absent for row in table.absent()}
    assert "this MLP is dense" in absent["blocks.{i}.mlp.hook_expert_out", (0,)]
    with pytest.raises(KeyError, match=r"got 'blocks\.0\.nothing', expected the full name of a hook; the nearest are"):
        table.row("blocks.0.nothing")


def test_steering_knows_the_width_of_each_layer() -> None:
    bridge = TransformerBridge(build("ernie"))
    bridge.steer(torch.randn(24), "blocks.0.mlp.hook_post")
    with pytest.raises(ValueError, match=r"\[2, 12\]"):
        bridge.steer(torch.randn(24), "blocks.1.mlp.hook_post")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("granite", "sequential: attention, then MLP each with a norm; RoPE"),
        ("olmo2", "sequential: attention, then MLP each with a norm after; RoPE"),
        (
            "lfm2",
            "layer 0: sequential: mixer, then MLP each with a norm; layer 1: sequential: attention, then MLP each",
        ),
        ("falcon_h1", "sequential: mixer and attention, then MLP each with a norm; RoPE"),
        (
            "ernie",
            "layer 0: sequential: attention, then MLP each with a norm; layers 1-2: sequential: attention, then 4 exp",
        ),
    ],
)
def test_layouts_in_words(name: str, words: str) -> None:
    assert words in layout_in_words(TransformerBridge(build(name)).adapter)


# -- names by hand ---------------------------------------------------------------------------------------

STREAM_OF_HEADS = ["hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"]


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        (SEQUENTIAL, [*STREAM_OF_HEADS, "hook_attn_out", "hook_resid_mid", "hook_mlp_in", "hook_mlp_out"]),
        (PARALLEL_ONE_NORM, [*STREAM_OF_HEADS, "hook_attn_out", "hook_mlp_in", "hook_mlp_out"]),
        (MIXER_ALONE, ["hook_mixer_in", "hook_mixer_out"]),
        (BARE, [*STREAM_OF_HEADS, "hook_attn_out", "hook_mlp_in", "hook_mlp_out"]),
    ],
)
def test_hooks_of_some_blocks(stages: Stages, names: list[str]) -> None:
    assert [hook.name for hook in hooks_of(stages)] == ["hook_resid_pre", *names, "hook_resid_post"]
    assert not set(names) & set(absent_of(stages))


def test_why_names_are_absent() -> None:
    alone = absent_of(MIXER_ALONE)
    assert alone["hook_resid_mid"] == "mixer is all there is in this block, so the stream has no middle"
    assert alone["hook_mlp_out"] == alone["ln2.hook_scale"] == "this block has no MLP"
    assert alone["hook_q_input"] == "this block has no attention"
    assert absent_of(SEQUENTIAL) == {}
    bare = absent_of(BARE)
    assert bare["ln1.hook_scale"] == "attention reads the stream as it is, with no norm in front"
    assert absent_of(PARALLEL_ONE_NORM)["ln2.hook_scale"] == "one norm feeds attention and MLP: read ln1.hook_scale"


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Branch: got mixer='ffn', expected one of 'attn', 'mlp', 'mixer'"):
        Branch("ln1", "ffn")
    with pytest.raises(
        ValueError, match=r"Part at 'layers': its branches name ln1, ln2, expected roles of its parts: attn"
    ):
        Part(BlockBridge, "layers", {"attn": ROTATED, "mlp": GATED}, SEQUENTIAL)
    with pytest.raises(ValueError, match="has no port"):
        hooks_of(((Branch("ln1", "attn"), Branch("ln1", "mixer", scale_in=2.0)),))

    granite: Any = adapter_class("granite")

    class NoBranches(granite):
        def branches(self, layer: int) -> Stages:
            return ()

    ADAPTERS["granite"] = NoBranches
    with pytest.raises(ValueError, match=r"blocks\.0: its Part has no branches; say which"):
        TransformerBridge(build("granite"))


def test_a_block_knows_its_branches() -> None:
    block = TransformerBridge(build("falcon_h1")).blocks[0]
    assert [branch.mixer for branch in block.branches] == ["mixer", "attn", "mlp"]
    assert [branch.mixer for branch in block.before("mlp")] == ["mixer", "attn"] and block.before("attn") == ()
    assert block.feeds == {"ln1": ("mixer", "attn"), "ln2": ("mlp",)}
    block = TransformerBridge(build("granite")).blocks[0]
    with pytest.raises(ValueError, match=r"blocks\.0 has no 'mixer'; its branches are attn, mlp"):
        block.branch("mixer")
