"""Models in 8 and 4 bits: hooks, captures, seams and weight reads, on bitsandbytes and torchao, on a CPU."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

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


def test_experts_stay_in_full_precision():
    """Mixtral's experts are 3-D parameters and no `nn.Linear`: none of these libraries touches them."""
    for kind in CONFIGS:
        for layer in boot("tiny-mixtral", kind).original_model.model.layers:
            experts, router = layer.mlp.experts, layer.mlp.gate
            for weight in (experts.gate_up_proj, experts.down_proj, router.weight):
                assert type(weight) is nn.Parameter and weight.dtype == torch.float32


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
