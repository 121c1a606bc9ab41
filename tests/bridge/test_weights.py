"""Weights of the whole model: circuits, composition, directions, biases; and weights that are elsewhere, or packed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FalconForCausalLM, FalconForSequenceClassification

from tests.families.models import build
from tests.support import FAMILIES, LAYOUTS, falcon_config, family, perturbed, tokens
from transformer_lens import TransformerBridge

F64 = torch.float64


@pytest.fixture(scope="module")
def trained() -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-falcon")


def named(name: str, dtype: torch.dtype = F64, **changes: Any) -> TransformerBridge:
    options = {"experts": "eager"} if name == "mixtral" else {"bias": True}
    return TransformerBridge(family(name, dtype=dtype, **{**options, **changes}))


# -- composition ---------------------------------------------------------------------------------------


@torch.no_grad()
def paper_matrices(bridge: TransformerBridge, layer: int) -> list[tuple[Tensor, Tensor]]:
    """W_QK and W_OV of every query head as the paper has them, acting on columns, from Hugging Face's rows."""
    model: Any = bridge.original_model
    groups = bridge.cfg.n_key_value_heads
    if bridge.cfg.num_experts is None:
        attention = model.transformer.h[layer].self_attention
        rows = attention.query_key_value.weight.reshape(groups, -1, 4, 32)
        q, k, v = rows[:, :-2].reshape(8, 4, 32), rows[:, -2], rows[:, -1]
        out = attention.dense.weight
    else:
        attention = model.model.layers[layer].self_attn
        q, k, v = (
            linear.weight.reshape(-1, 4, 32) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = attention.o_proj.weight
    found = []
    for head in range(8):
        group = head // (8 // groups)
        found.append((q[head].T @ k[group], out[:, 4 * head : 4 * head + 4] @ v[group]))
    return found


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("name", FAMILIES)
def test_composition_scores_are_the_papers_formula(name: str, mode: str) -> None:
    bridge = named(name, num_hidden_layers=3)
    scores = bridge.all_composition_scores(mode)
    assert scores.shape == (3, 8, 3, 8) and scores.dtype == F64
    circuits = [paper_matrices(bridge, layer) for layer in range(3)]
    for first, second in itertools.product(range(3), repeat=2):
        for i, j in itertools.product(range(8), repeat=2):
            (_, W_OV), (QK, OV) = circuits[first][i], circuits[second][j]
            read = {"Q": QK.T, "K": QK, "V": OV}[mode]
            expected = (read @ W_OV).norm() / (read.norm() * W_OV.norm()) if first < second else torch.zeros(())
            assert abs(float(scores[first, i, second, j]) - float(expected)) < 1e-12
    assert not scores.requires_grad


def test_composition_scores_of_half_precision_are_those_of_the_rounded_weights() -> None:
    bridge = named("40b", torch.bfloat16)
    wide = named("40b", torch.float32)
    wide.load_state_dict(bridge.state_dict())
    torch.testing.assert_close(bridge.all_composition_scores("Q"), wide.all_composition_scores("Q"), rtol=1e-5, atol=0)


def test_an_unknown_mode_is_refused(trained: TransformerBridge) -> None:
    with pytest.raises(ValueError) as caught:
        trained.all_composition_scores("q")
    assert str(caught.value) == "mode: got 'q', expected one of 'Q', 'K', 'V'"


def test_labels_name_the_heads_in_the_order_of_flattened_axes(trained: TransformerBridge) -> None:
    labels = trained.all_head_labels
    assert len(labels) == len(set(labels)) == 16
    norms = trained.OV.norm()
    assert labels[int(norms.flatten().argmax())] == "L{}H{}".format(*divmod(int(norms.flatten().argmax()), 4))


def test_circuits_predict_attention_of_the_trained_model(trained: TransformerBridge) -> None:
    """With ALiBi-free scores at the query's own position RoPE turns both alike: the score is x QK x / sqrt(d_head)."""
    _, cache = trained.run_with_cache("Mary and John went to the store")
    for layer in range(4):
        x = cache[f"blocks.{layer}.attn.hook_in"]
        own = torch.stack([((x @ trained.QK[layer, h].AB) * x).sum(-1) for h in range(4)], 1) / 32**0.5
        scores = cache["attn_scores", layer].diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(scores, own, rtol=1e-3, atol=1e-3)
        # What a head adds to the stream is its pattern's average of x OV.
        result = trained.run_with_cache(
            "Mary and John went to the store", names_filter=f"blocks.{layer}.attn.hook_result"
        )
        added = torch.stack([cache["pattern", layer][:, h] @ x @ trained.OV[layer, h].AB for h in range(4)], 2)
        torch.testing.assert_close(result[1]["result", layer], added, rtol=1e-3, atol=1e-3)


# -- directions ------------------------------------------------------------------------------------------


def test_directions_are_columns_of_the_unembedding(trained: TransformerBridge) -> None:
    unembedding: Tensor = trained.original_model.lm_head.weight  # type: ignore[union-attr,assignment]
    mary, john = trained.to_single_token(" Mary"), trained.to_single_token(" John")
    assert mary != john
    for one in (" Mary", mary, torch.tensor(mary)):
        assert torch.equal(trained.tokens_to_residual_directions(one), unembedding[mary])
    both = torch.stack([unembedding[mary], unembedding[john]])
    for two in ([" Mary", " John"], (mary, " John"), torch.tensor([mary, john])):
        assert torch.equal(trained.tokens_to_residual_directions(two), both)
    batch = torch.tensor([[mary, john, mary], [john, john, mary]])
    assert torch.equal(trained.tokens_to_residual_directions(batch), unembedding[batch])
    assert trained.tokens_to_residual_directions(batch[:0]).shape == (0, 3, 128)


def test_a_direction_added_to_the_final_stream_raises_that_logit_most(trained: TransformerBridge) -> None:
    direction = trained.tokens_to_residual_directions(" Mary").detach()

    def add(x: Tensor, hook: Any) -> Tensor:
        return x + direction

    with torch.no_grad():
        prompt = "John went to the store"
        change = trained.run_with_hooks(prompt, fwd_hooks=[("ln_final.hook_out", add)]) - trained(prompt)
    expected = trained.original_model.lm_head.weight @ direction  # type: ignore[union-attr,operator]
    torch.testing.assert_close(change, expected.expand_as(change), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "given, kind, text",
    [
        (735, ValueError, "got token 735, expected 0 to 734"),
        (torch.tensor([3, -1]), ValueError, "got token -1, expected 0 to 734"),
        (torch.tensor([0.5]), TypeError, "got torch.float32, expected token ids"),
        (torch.tensor([True]), TypeError, "got torch.bool, expected token ids"),
        (" Mary and John", ValueError, "is 3 tokens"),
    ],
)
def test_what_is_no_token_is_refused(trained: TransformerBridge, given: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        trained.tokens_to_residual_directions(given)
    assert text in str(caught.value)


def test_a_model_without_an_unembedding_says_so() -> None:
    config = falcon_config()
    config.pad_token_id = 0
    bridge = TransformerBridge(perturbed(FalconForSequenceClassification(config)))
    for read in (lambda: bridge.W_U, lambda: bridge.b_U, lambda: bridge.tokens_to_residual_directions(3)):
        with pytest.raises(ValueError, match="this model class has no unembedding; its output is that of 'score'"):
            read()
    assert bridge.W_E.shape == (61, 32) and bridge.W_Q.shape == (2, 8, 32, 4)


# -- biases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp_biases", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_accumulated_biases_are_the_stream_of_a_model_that_writes_nothing_else(name: str, mlp_biases: bool) -> None:
    """Zero what the weights write, start at zero, run: what is left of the stream are biases."""
    bridge = named(name, num_hidden_layers=3)
    bridge.W_E.data.zero_()
    for block in bridge.blocks:
        block.attn.W_O = torch.zeros_like(block.attn.W_O)
        block.mlp.W_out = torch.zeros_like(block.mlp.W_out)
        if not mlp_biases and name != "mixtral":
            block.mlp.b_out = torch.zeros_like(block.mlp.b_out)
    _, cache = bridge.run_with_cache(tokens())
    if mlp_biases is False and name != "mixtral":
        for block in bridge.blocks:  # they count only if asked for
            block.mlp.b_out = torch.ones_like(block.mlp.b_out)
    for layer in range(4):
        stream = cache["resid_pre", layer] if layer < 3 else cache["resid_post", 2]
        close(bridge.accumulated_bias(layer, include_mlp_biases=mlp_biases), stream)
        if layer < 3:
            close(bridge.accumulated_bias(layer - 3, include_mlp_biases=mlp_biases), stream)
            read = bridge.accumulated_bias(layer, mlp_input=True, include_mlp_biases=mlp_biases)
            close(read, cache["mlp_in", layer])
    assert bool(bridge.accumulated_bias(3).any()) is (name != "mixtral")


def close(bias: Tensor, stream: Tensor) -> None:
    torch.testing.assert_close(bias.expand_as(stream), stream, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "layer, mlp_input, text",
    [
        (3, False, "layer: got 3, expected 0 to 2, or -2 to -1"),
        (-3, False, "layer: got -3, expected 0 to 2, or -2 to -1"),
        (True, False, "layer: got True, expected 0 to 2, or -2 to -1"),
        (2, True, "mlp_input: layer 2 is the stream after the last block, which no MLP reads"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(layer: int, mlp_input: bool, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        named("rw").accumulated_bias(layer, mlp_input)
    assert str(caught.value) == text


# -- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_bytes_are_those_of_the_bare_model(name: str) -> None:
    model = family(name)
    before = {id(p): p.untyped_storage().nbytes() for p in model.parameters()}
    bridge = TransformerBridge(model)
    held = [bridge.W_E, bridge.W_U, *(b.attn.W_Q_grouped for b in bridge.blocks), bridge.W_Q, bridge.QK.svd()]
    after = {id(p): p.untyped_storage().nbytes() for p in bridge.parameters()}
    assert after == before and sum(after.values()) / sum(before.values()) == 1.0
    tensors = [m for module in bridge.modules() for m in vars(module).values() if isinstance(m, Tensor)]
    assert tensors == [] and held


def test_reading_a_view_allocates_nothing() -> None:
    """Only the operations that make views run; a copy would show as one that allocates."""
    bridge = named("7b")
    blocks = bridge.blocks[0]
    with torch.profiler.profile(profile_memory=True) as seen, torch.no_grad():
        for weight in (blocks.attn.W_Q, blocks.attn.W_K, blocks.attn.W_O, blocks.mlp.W_in, bridge.W_U):
            assert weight.numel()
    assert [event.name for event in seen.events() if event.self_cpu_memory_usage > 0] == []
    with torch.profiler.profile(profile_memory=True) as copying, torch.no_grad():
        assert bridge.W_Q.numel()
    assert any(event.self_cpu_memory_usage > 0 for event in copying.events())


# -- weights that are somewhere else, or something else ------------------------------------------------------


def test_weights_on_the_meta_device_are_refused_with_a_reason() -> None:
    with torch.device("meta"):
        model = FalconForCausalLM(falcon_config(**LAYOUTS["40b"], bias=False))
    bridge = TransformerBridge(model)
    with pytest.raises(ValueError, match="the weight of FalconLinear is on the meta device"):
        bridge.blocks[0].attn.W_Q  # noqa: B018
    with pytest.raises(ValueError, match="is no ordinary parameter in memory"):
        bridge.blocks[0].attn.W_O = torch.ones(8, 4, 32)


@pytest.mark.parametrize("name", ["40b", "mixtral"])
def test_offloaded_weights_are_brought_back_to_be_read(name: str) -> None:
    from accelerate import cpu_offload

    model = family(name)
    expected = {
        n: getattr(TransformerBridge(model), n).detach().clone() for n in ("W_Q", "W_V", "W_O", "W_in", "W_out")
    }
    cpu_offload(model, execution_device=torch.device("cpu"))
    bridge = TransformerBridge(model)
    for weight, value in expected.items():
        assert torch.equal(getattr(bridge, weight), value), weight
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="offloaded"):
        bridge.blocks[0].attn.W_O = torch.ones(8, 4, 32)


def test_an_adapter_on_top_is_in_the_weight_that_is_read() -> None:
    from peft import LoraConfig, get_peft_model

    model = family("40b", dtype=F64)
    base = TransformerBridge(model).blocks[0].attn.W_Q.detach().clone()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False))
    bridge = TransformerBridge(model)
    attn = bridge.blocks[0].attn
    assert not torch.allclose(attn.W_Q, base)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens())
        q = torch.einsum("bpm,hmd->bphd", cache["blocks.0.attn.hook_in"], attn.W_Q) + attn.b_Q
    torch.testing.assert_close(q, cache["q", 0], rtol=0, atol=1e-6)  # LoRA's own matrices stay float32
    with pytest.raises(ValueError, match="lies under an adapter"):
        attn.W_Q = base
    attn.W_Q.sum().backward()
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[-3] for name in trained} <= {"lora_A", "lora_B"}
    assert trained


def test_quantised_weights_are_dequantised(tmp_path: Any) -> None:
    family("mixtral", hidden_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    bridge = TransformerBridge(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))
    plain = TransformerBridge(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(bridge.blocks[0].attn.q.original_component).__name__ == "Linear8bitLt"
    read, expected = bridge.W_Q.float().detach(), plain.W_Q.detach()
    assert read.shape == expected.shape
    # Eight bits of the largest entry of each row.
    assert float((read - expected).abs().max() / expected.abs().max()) < 0.01
    with pytest.raises(ValueError, match="quantised"):
        bridge.blocks[0].attn.W_Q = expected[0]


# -- other families ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2, scaled", "qwen2", "qwen3_moe"])
def test_other_families_have_the_same_names(name: str) -> None:
    """GPT-2 keeps its weights as `[in, out]`, and q, k and v as blocks."""
    bridge = TransformerBridge(build(name).double())
    bridge.original_model.config._experts_implementation = "eager"
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens())
        for layer, block in enumerate(bridge.blocks):
            attn, x = block.attn, cache[f"blocks.{layer}.attn.hook_in"]
            for part, W, b in (("q", attn.W_Q, attn.b_Q), ("k", attn.W_K, attn.b_K), ("v", attn.W_V, attn.b_V)):
                torch.testing.assert_close(torch.einsum("bpm,hmd->bphd", x, W) + b, cache[part, layer])
            assert torch.equal(attn.W_Q_grouped.flatten(0, 1), attn.W_Q)
            out = torch.einsum("bphd,hdm->bpm", cache["z", layer], attn.W_O) + attn.b_O
            torch.testing.assert_close(out, cache["attn_out", layer])
            if "moe" in name:
                continue
            inside = cache[f"blocks.{layer}.mlp.hook_in"] @ block.mlp.W_in + block.mlp.b_in
            assert (
                (block.mlp.W_gate is None) is (block.mlp.b_gate is None) is ("llama" not in name and "qwen" not in name)
            )
            if block.mlp.W_gate is None:
                torch.testing.assert_close(inside, cache["pre", layer])
            else:
                torch.testing.assert_close(inside, cache["pre_linear", layer])
                gate = cache[f"blocks.{layer}.mlp.hook_in"] @ block.mlp.W_gate + block.mlp.b_gate
                torch.testing.assert_close(gate, cache["pre", layer])
            torch.testing.assert_close(
                cache["post", layer] @ block.mlp.W_out + block.mlp.b_out, cache["mlp_out", layer]
            )
        if "gpt2" in name:
            places = torch.arange(7)
            assert torch.equal(bridge.pos_embed.W_pos[places], cache["hook_pos_embed"][0])
        torch.testing.assert_close(cache["ln_final.hook_out"] @ bridge.W_U + bridge.b_U, logits)


def test_a_dense_mlp_has_no_gate_and_says_none(trained: TransformerBridge) -> None:
    assert trained.W_gate is None and trained.blocks[0].mlp.W_gate is None
    assert isinstance(trained.blocks[0].attn.original_component, nn.Module)
