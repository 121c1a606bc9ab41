"""Models in 8 and 4 bits: hooks, captures, seams and weight reads, on bitsandbytes and torchao, on a CPU."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM, TorchAoConfig

from tests.bridge.test_detach import picture
from transformer_lens import TransformerBridge
from transformer_lens.data import tiny_model_path
from transformer_lens.model_bridge.access.weights import read_weight

CONFIGS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "nf4 twice": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}
CASES = [("tiny-falcon", "nf4"), ("tiny-falcon", "nf4 twice"), ("tiny-falcon", "8-bit")]
CASES += [("tiny-mixtral", kind) for kind in CONFIGS]
every_case = pytest.mark.parametrize("name, kind", CASES)
BITS = {"nf4": 4, "nf4 twice": 4, "8-bit": 8, "torchao": 8}


def boot(name: str, kind: str) -> TransformerBridge:
    return TransformerBridge.boot_transformers(name, quantization_config=CONFIGS[kind]())


def ids() -> torch.Tensor:
    return torch.randint(5, 700, (2, 9))


def projections(bridge: TransformerBridge) -> dict[str, nn.Module]:
    """Every projection that is one matrix: attention's, and a dense MLP's."""
    roles = ("attn.qkv", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.out")
    found = {c.name: c.original_component for c in bridge.components()}
    return {name: module for name, module in found.items() if name.split(".", 2)[-1] in roles}


@every_case
def test_every_projection_is_quantised(name, kind):
    """transformers 5.23 leaves every FalconLinear in full precision; loading through the bridge does not."""
    bridge = boot(name, kind)
    found = projections(bridge)
    assert len(found) == 4 * bridge.cfg.n_layers
    plain = TransformerBridge.boot_transformers(name)
    for path, module in found.items():
        full = projections(plain)[path].weight
        weight = module.weight
        held = weight.nbytes if kind != "torchao" else weight.qdata.nbytes
        assert held == full.numel() * BITS[kind] // 8, path
        assert full.is_floating_point() and full.dtype == torch.float32
    assert bridge.original_model.lm_head.weight.dtype == torch.float32


def test_what_transformers_does_with_falcon_alone():
    """The fault behind `complete_quantisation`: when this fails, transformers sees FalconLinear by itself."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path("tiny-falcon"), quantization_config=CONFIGS["nf4"]())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def stacked(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers]


def test_what_transformers_does_with_experts_alone():
    """They are 3-D parameters and no `nn.Linear`: transformers and torchao leave them whole."""
    for kind in CONFIGS:
        path, config = tiny_model_path("tiny-mixtral"), CONFIGS[kind]()
        for experts in stacked(AutoModelForCausalLM.from_pretrained(path, quantization_config=config)):
            assert {(type(w), w.dtype) for w in experts.parameters()} == {(nn.Parameter, torch.float32)}
    for experts in stacked(boot("tiny-mixtral", "torchao").original_model):
        assert {(type(w), w.dtype) for w in experts.parameters()} == {(nn.Parameter, torch.float32)}


def dequantised(kind: str, path: Path | str = "tiny-mixtral") -> TransformerBridge:
    """The same model with its experts' numbers as ordinary parameters."""
    model = TransformerBridge.boot_transformers(path, quantization_config=CONFIGS[kind]()).original_model
    for experts in stacked(model):
        for name in ("gate_up_proj", "down_proj"):
            numbers = getattr(experts, name).clone()
            remove_parametrizations(experts, name, leave_parametrized=False)
            setattr(experts, name, nn.Parameter(numbers, requires_grad=False))
    return TransformerBridge(model)


@pytest.mark.parametrize("kind, share", [("nf4", 0.16), ("nf4 twice", 0.16), ("8-bit", 0.28)])
def test_a_mixture_keeps_few_of_its_bytes(kind, share, tmp_path):
    """All parameters and buffers beside float32, embeddings and router included."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)

    def held(bridge: TransformerBridge) -> int:
        model = bridge.original_model
        states = [p.quant_state for p in model.modules() if hasattr(p, "quant_state")]
        states += [m.weight.quant_state for m in model.modules() if type(m).__name__ == "Linear4bit"]
        constants = sum(state.absmax.nbytes for state in states)
        return sum(w.nbytes for w in (*model.parameters(), *model.buffers())) + constants

    whole = held(TransformerBridge.boot_transformers(tmp_path))
    assert held(TransformerBridge.boot_transformers(tmp_path, quantization_config=CONFIGS[kind]())) <= share * whole


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "8-bit"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_inside_quantised_experts(kind, implementation):
    """Every value, an edit of neurons, outputs and routing, and gradients: those of the model with plain numbers."""
    packed, plain, x = boot("tiny-mixtral", kind), dequantised(kind), ids()
    for bridge in (packed, plain):
        bridge.original_model.set_experts_implementation(implementation)
    for experts in stacked(packed.original_model):
        assert {w.dtype for w in experts.parameters()} == {torch.int8 if kind == "8-bit" else torch.uint8}
    logits, cache = packed.run_with_cache(x)
    expected, plain_cache = plain.run_with_cache(x)
    assert torch.equal(logits, expected) and torch.equal(logits, packed.original_model(x).logits)
    assert [name for name in cache if not torch.equal(cache[name], plain_cache[name])] == []

    def edit(value, hook):
        return value.flip(-1) if hook.name.endswith("logits") else value * 1.5

    for short in ("hook_pre", "hook_post", "hook_expert_out", "hook_router_logits"):
        name, grads = f"blocks.1.mlp.{short}", []
        edited = [bridge.run_with_hooks(x, fwd_hooks=[(name, edit)]) for bridge in (packed, plain)]
        assert torch.equal(*edited) and not torch.allclose(edited[0], logits, atol=1e-2)
        for bridge in (packed, plain):
            with bridge.hooks(bwd_hooks=[(name, lambda grad, hook: grads.append(grad.clone()))]):
                bridge(x, return_type="loss").backward()
        assert torch.equal(*grads) and grads[0].abs().max() > 0
    read = packed.blocks[1].mlp.W_in
    assert torch.equal(read, plain.blocks[1].mlp.W_in) and read.shape == (4, 128, 64)


@pytest.mark.parametrize("kind", ["nf4", "8-bit"])
def test_a_quantised_mixture_comes_back(kind, tmp_path):
    """Its experts are saved as numbers, which loading quantises to the same bits; nothing is left on the model."""
    bridge, x = boot("tiny-mixtral", kind), ids()
    before = {key: value.clone() for key, value in bridge.original_model.state_dict().items()}
    bridge.save_pretrained(tmp_path)
    after = bridge.original_model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    again = TransformerBridge.from_pretrained(tmp_path)
    for old, new in zip(stacked(bridge.original_model), stacked(again.original_model), strict=True):
        assert all(map(torch.equal, old.parameters(), new.parameters())) and len([*new.parameters()]) == 2
    with torch.no_grad():  # a scale of 8 bits is rounded once more
        torch.testing.assert_close(again(x), bridge(x), rtol=0, atol=0 if kind == "nf4" else 1e-4)


def test_what_cannot_be_done_with_quantised_experts():
    bridge = boot("tiny-mixtral", "nf4")
    with pytest.raises(ValueError, match="cannot be written: the gate_up_proj of .* is read as a copy"):
        bridge.blocks[0].mlp.W_in = bridge.blocks[0].mlp.W_in
    with pytest.raises(ValueError, match="weights cannot be processed"):
        bridge.fold_layer_norm()


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "8-bit"])
def test_experts_numbers_are_near_those_of_the_checkpoint(kind):
    """Half a step of the code book, of the largest weight, as for projections; in 8 bits of each row's largest."""
    plain = stacked(TransformerBridge.boot_transformers("tiny-mixtral").original_model)
    for packed, full in zip(stacked(boot("tiny-mixtral", kind).original_model), plain, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            numbers, weight = read_weight(packed, name), getattr(full, name)
            largest = weight.abs().amax(-1, keepdim=True) if kind == "8-bit" else weight.abs().max()
            share = 1 / 254 + 2**-11 if kind == "8-bit" else 1 / 6
            assert ((numbers - weight).abs() <= share * largest).all() and not torch.equal(numbers, weight)


def test_experts_that_are_to_be_skipped_are():
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["experts", "lm_head"])
    bridge = TransformerBridge.boot_transformers("tiny-mixtral", quantization_config=config)
    assert all(w.dtype == torch.float32 for experts in stacked(bridge.original_model) for w in experts.parameters())
    assert bridge.original_model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


@every_case
def test_verify_passes(name, kind):
    report = boot(name, kind).verify()
    assert report.passed, str(report)


@every_case
def test_weight_reads_give_the_numbers_that_the_module_multiplies_by(name, kind):
    """One-hot rows through the module itself give its matrix, column by column."""
    for path, module in projections(boot(name, kind)).items():
        read = read_weight(module)
        assert read.dtype == torch.float32
        rows = torch.eye(module.in_features)
        bias = 0 if module.bias is None else module.bias
        with torch.no_grad():
            own = (module(rows) - bias).T
        # 8-bit kernels round what they return to half precision.
        torch.testing.assert_close(read, own, rtol=1e-3 if kind == "8-bit" else 1e-6, atol=1e-6, msg=path)


@every_case
def test_dequantised_weights_are_near_those_of_the_checkpoint(name, kind):
    """Half a step of the code book, of the largest weight: 1/6 in 4-bit NormalFloat, 1/254 in 8 bits, which
    bitsandbytes takes from weights rounded to float16."""
    plain = projections(TransformerBridge.boot_transformers(name))
    for path, module in projections(boot(name, kind)).items():
        full, read = plain[path].weight, read_weight(module)
        share = 1 / 6 if BITS[kind] == 4 else 1 / 254 + 2**-11
        assert (read - full).abs().max() <= share * full.abs().max()
        assert not torch.equal(read, full)


@every_case
def test_results_of_heads_sum_to_what_attention_adds(name, kind):
    """Computed from the dequantised weight; 8-bit layers also quantise their input, a step of 1/127."""
    bridge, x = boot(name, kind), ids()
    names = [f"blocks.{i}.{short}" for i in range(2) for short in ("attn.hook_result", "hook_attn_out")]
    logits, cache = bridge.run_with_cache(x, names_filter=names)
    assert torch.equal(logits, bridge(x))
    for layer in range(2):
        out = cache[f"blocks.{layer}.hook_attn_out"]
        summed = cache[f"blocks.{layer}.attn.hook_result"].sum(2)
        assert (summed - out).abs().max() <= (0.03 if kind == "8-bit" else 1e-5) * out.abs().max()


@every_case
def test_a_write_changes_everything_downstream(name, kind):
    """Removing head 1 at `hook_z` and at `hook_result` is the same edit."""
    bridge, x = boot(name, kind), ids()

    def silence(value, hook):
        value[:, :, 1] = 0

    plain = bridge(x)
    z, result = (
        bridge.run_with_hooks(x, fwd_hooks=[(f"blocks.0.attn.{hook}", silence)]) for hook in ("hook_z", "hook_result")
    )
    moved = (z - plain).abs().max()
    assert moved > 0.02
    assert (z - result).abs().max() <= (0.5 if kind == "8-bit" else 1e-3) * moved


@every_case
def test_gradients_pass_through_quantised_layers(name, kind):
    """Also after a forward without gradients: bitsandbytes would pack its weights for a kernel that has none."""
    bridge, x = boot(name, kind), ids()
    with torch.no_grad():
        bridge(x)
    hooks = ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.attn.hook_pattern"]
    _, cache = bridge.run_with_cache(x, names_filter=hooks, incl_bwd=True, return_type="loss")
    for hook in hooks:
        assert cache[f"{hook}_grad"].abs().max() > 0


@pytest.mark.parametrize("name, kind", [("tiny-falcon", "nf4"), ("tiny-mixtral", "torchao")])
def test_looking_and_detaching_leave_the_model_as_it_was(name, kind):
    bridge, x = boot(name, kind), ids()
    model = bridge.detach()
    before, logits = picture(model), model(x).logits
    bridge = TransformerBridge(model)
    bridge.run_with_cache(x, names_filter=lambda name: True)
    assert torch.equal(bridge(x), logits)
    assert picture(bridge.detach()) == before


@pytest.mark.parametrize("name, kind", [("tiny-falcon", "8-bit"), ("tiny-mixtral", "nf4")])
def test_what_is_inside_has_the_dtype_of_the_model(name, kind):
    """bitsandbytes' 8-bit weights dequantise to float32 whatever the model's dtype."""
    bridge = TransformerBridge.boot_transformers(name, dtype=torch.bfloat16, quantization_config=CONFIGS[kind]())
    x, hooks = ids(), ["blocks.0.attn.hook_result", "blocks.0.hook_q_input"]
    logits, cache = bridge.run_with_cache(x, names_filter=hooks)
    assert torch.equal(logits, bridge(x))
    assert all(value.dtype == torch.bfloat16 for value in cache.values())
    halved = [(hook, lambda value, hook: 0.5 * value) for hook in hooks]
    assert not torch.equal(bridge.run_with_hooks(x, fwd_hooks=halved), logits)


def test_torchao_with_falcon_is_refused_at_boot():
    with pytest.raises(ValueError, match="which multiplies in a way that torchao's tensors do not support"):
        boot("tiny-falcon", "torchao")


@pytest.mark.parametrize("name, kind", [("tiny-falcon", "nf4"), ("tiny-falcon", "8-bit"), ("tiny-mixtral", "torchao")])
def test_processing_refuses(name, kind):
    bridge = boot(name, kind)
    x = ids()
    before = bridge(x)
    with pytest.raises(ValueError, match="weights cannot be processed: .*quantised or sharded"):
        bridge.enable_compatibility_mode()
    assert torch.equal(bridge(x), before)


def test_a_packed_weight_is_refused():
    """A 4-bit model that was loaded without the bridge packs its weights on some CPUs; a read says so."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path("tiny-mixtral"), quantization_config=CONFIGS["nf4"]())
    layer = model.model.layers[0].self_attn.o_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="packed this 4-bit weight for its CPU kernel"):
        read_weight(layer)
    gc.collect()
