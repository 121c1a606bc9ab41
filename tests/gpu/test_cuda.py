"""The laws on CUDA. `make gpu` runs these, and the core suite with every tensor made on the device."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import FAMILIES, LAYOUTS, family, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter

DEVICE = torch.device(os.environ.get("TRANSFORMER_LENS_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(),
        reason="no CUDA device at hand; `make gpu` on a machine with one runs these",
    ),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARALLEL = tuple(name for name in LAYOUTS if LAYOUTS[name].get("parallel_attn", True))
IMPLEMENTATIONS = ("sdpa", "eager")
# A user's hook inside a module may change its rounding; at a port it changes nothing (law 2).
PORTS = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_q", "hook_k", "hook_v", "hook_z")
ALIBI_TWICE = pytest.mark.filterwarnings("ignore:Falcon with ALiBi under eager attention:UserWarning")


def model_on_device(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A small model on the device."""
    return family(name, attn=attn, dtype=dtype).to(DEVICE)


def input_on_device(batch: int = 2, pos: int = 7) -> Tensor:
    """Random token ids on the device."""
    return tokens(batch, pos).to(DEVICE)


def is_port(hook: str) -> bool:
    """Whether a hook reads what a module hands over."""
    return hook.rsplit(".", 1)[-1] in PORTS


@ALIBI_TWICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_wrapping_and_looking_leave_the_logits_bitwise_equal(name: str, attn: str, dtype: torch.dtype) -> None:
    model, ids = model_on_device(name, attn, dtype), input_on_device()
    with torch.no_grad():
        bare = model(ids).logits
        with TransformerBridge(model) as bridge:
            assert torch.equal(bridge(ids), bare)
            looked, cache = bridge.run_with_cache(ids)
            assert torch.equal(looked, bare)
            assert set(cache) == set(bridge.default_names())
            assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(is_port, lambda tensor, hook: None)]), bare)
        assert torch.equal(model(ids).logits, bare)


@pytest.mark.parametrize("name", FAMILIES)
def test_captures_lie_on_the_device_unless_moved(name: str) -> None:
    bridge = TransformerBridge(model_on_device(name))
    ids = input_on_device()
    _, cache = bridge.run_with_cache(ids)
    assert {tensor.device.type for tensor in cache.values()} == {DEVICE.type}
    _, moved = bridge.run_with_cache(ids, device="cpu")
    assert {tensor.device.type for tensor in moved.values()} == {"cpu"}
    for hook, tensor in cache.items():
        assert torch.equal(tensor.cpu(), moved[hook]), hook


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PARALLEL)
def test_mlp_out_is_what_the_mlp_computed(name: str, dtype: torch.dtype) -> None:
    model, ids = model_on_device(name, dtype=dtype), input_on_device()
    kept: list[Tensor] = []
    handle = model.transformer.h[0].mlp.dense_4h_to_h.register_forward_hook(
        lambda _, __, output: kept.append(output.clone())
    )
    with torch.no_grad():
        model(ids)
        handle.remove()
        _, cache = TransformerBridge(model).run_with_cache(ids)
    assert torch.equal(cache["mlp_out", 0], kept[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_zeroed_at_hook_z_equals_a_plain_torch_hook(name: str, dtype: torch.dtype) -> None:
    model, ids = model_on_device(name, dtype=dtype), input_on_device()
    block = model.model.layers[1] if name == "mixtral" else model.transformer.h[1]
    output = block.self_attn.o_proj if name == "mixtral" else block.self_attention.dense
    size = model.config.hidden_size // model.config.num_attention_heads

    def zero_slice(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed[..., 3 * size : 4 * size] = 0
        return (changed,)

    def zero_head(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 3] = 0
        return z

    with torch.no_grad():
        bare = model(ids).logits
        handle = output.register_forward_pre_hook(zero_slice)
        expected = model(ids).logits
        handle.remove()
        shown = TransformerBridge(model).run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", zero_head)])
    assert torch.equal(shown, expected)
    assert not torch.equal(shown, bare)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_at_a_hook_is_autograds(name: str) -> None:
    model, ids = model_on_device(name), input_on_device()
    block = model.model.layers[0] if name == "mixtral" else model.transformer.h[0]
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(keep)
    (expected,) = torch.autograd.grad(model(ids).logits.float().sum(), kept)
    handle.remove()
    seen: list[Tensor] = []
    bridge = TransformerBridge(model)
    logits = bridge.run_with_hooks(
        ids, bwd_hooks=[("blocks.0.hook_resid_post", lambda grad, hook: seen.append(grad.clone()))]
    )
    logits.float().sum().backward()
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PARALLEL)
def test_prepare_model_makes_torchs_own_backward_hooks_work(name: str) -> None:
    model, ids = model_on_device(name), input_on_device()
    bare = model(ids).logits
    preparation = FalconArchitectureAdapter.prepare_model(model)
    seen: list[Tensor] = []
    handle = model.transformer.h[0].mlp.register_full_backward_hook(lambda _, __, grads: seen.append(grads[0]))
    logits = model(ids).logits
    logits.sum().backward()
    assert torch.equal(logits, bare)
    assert len(seen) == 1 and torch.isfinite(seen[0]).all()
    handle.remove()
    preparation.undo()


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_under_a_hook_equals_a_plain_torch_hook(name: str) -> None:
    model, ids = model_on_device(name), input_on_device(batch=1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    block = model.model.layers[0] if name == "mixtral" else model.transformer.h[0]

    def add(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + 1.5, *output[1:]) if isinstance(output, tuple) else output + 1.5

    handle = block.register_forward_hook(add)
    expected = model.generate(ids, **options)
    handle.remove()
    bridge = TransformerBridge(model)
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda resid, hook: resid + 1.5)]):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="asks CUDA's allocator; needs a CUDA device")
@pytest.mark.parametrize("name", FAMILIES)
def test_no_memory_is_kept_and_no_parameter_copied(name: str) -> None:
    model, ids = model_on_device(name), input_on_device()
    with torch.no_grad():
        model(ids)  # cuBLAS's workspace is made by the first call
        TransformerBridge(model).detach()
        before = torch.cuda.memory_allocated(DEVICE)
        bridge = TransformerBridge(model)
        bridge(ids)
        bridge.run_with_cache(ids)
        bridge.run_with_hooks(ids, fwd_hooks=[(lambda _: True, lambda tensor, hook: None)])
        torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(DEVICE) == before
