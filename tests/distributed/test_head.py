"""The LM head in parts: the same logits, and never more than one part converted at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.conftest import spans_of
from transformer_lens import TransformerBridge
from transformer_lens.distributed import AutoDistributedModelForCausalLM, DistributedFalconConfig
from transformer_lens.distributed.client.lm_head import FEWEST_POSITIONS, LMHead, has_instructions, parts_are_faster

D_MODEL, D_VOCAB = 96, 735
BITS = {torch.bfloat16: 8, torch.float16: 11}
"""Of a significand, the first one included."""
sixteen = pytest.mark.parametrize("dtype", list(BITS), ids=["bf16", "fp16"])


def head(chunked: bool | str, step: int = 100, dtype: torch.dtype = torch.float32, bias: bool = False) -> LMHead:
    torch.manual_seed(0)
    made = nn.Linear(D_MODEL, D_VOCAB, bias=bias, dtype=dtype)
    LMHead.put(made, DistributedFalconConfig(use_chunked_forward=chunked, chunked_forward_step=step))
    assert isinstance(made, LMHead)
    return made


def stream(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, D_MODEL).to(dtype)


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far apart numbers of this dtype are at these places."""
    lowest = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=torch.float64)
    exponent = exact.abs().maximum(lowest).log2().floor()
    return torch.exp2(exponent - BITS[dtype] + 1)


class Made(TorchDispatchMode):
    """Every tensor of one dtype that an operation gives in memory of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dtype == self.dtype:
                memory = tensor.untyped_storage()
                self.sizes[memory.data_ptr()] = max(memory.nbytes(), self.sizes.get(memory.data_ptr(), 0))
        return result


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_is_the_one_product_bit_for_bit(step: int, bias: bool) -> None:
    parts = head(True, step, bias=bias)
    for shape in ((), (1,), (1, 1), (2, 5), (3, 40), (2, 0)):
        gradients, results = [], []
        for product in (parts, lambda x: F.linear(x, parts.weight, parts.bias)):
            x = stream(*shape).requires_grad_()
            logits = product(x)
            torch.manual_seed(2)
            asked = [x, *parts.parameters()]
            gradients.append(torch.autograd.grad(logits, asked, torch.randn(logits.shape)))
            results.append(logits)
        one, other = results
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(one, other), shape
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), shape


@sixteen
@pytest.mark.parametrize("step", [1, 7, 100, D_VOCAB - 1, D_VOCAB, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype, step: int, bias: bool) -> None:
    parts = head(True, step, dtype, bias)
    for shape in ((), (1,), (2, 0)):
        assert parts(stream(*shape, dtype=dtype)).shape == (*shape, D_VOCAB)
    x = stream(3, 20, dtype=dtype)
    logits = parts(x)
    assert logits.dtype == dtype
    wide = [x.double(), parts.weight.double(), parts.bias.double() if bias else None]
    exact = F.linear(*wide)
    # Sums of D_MODEL products in float32, in any order, and one rounding to the nearest.
    summed = D_MODEL * torch.finfo(torch.float32).eps * F.linear(wide[0].abs(), wide[1].abs(), None)
    off = (logits.double() - exact).abs()
    assert (off <= rounding(exact, dtype) * 0.501 + summed).all()
    assert off.max() > 0
    # So it is at most one step from what a product in 16 bits gives that sums in float32 as well.
    plain = F.linear(x, parts.weight, parts.bias)
    apart = (logits.double() - plain.double()).abs()
    assert (apart <= rounding(exact, dtype) * 1.001 + 2 * summed).all()
    assert (apart == 0).float().mean() > 0.97


@sixteen
def test_gradients_in_sixteen_bits(dtype: torch.dtype) -> None:
    parts = head(True, 100, dtype, bias=True)
    x = stream(2, 6, dtype=dtype).requires_grad_()
    torch.manual_seed(2)
    seed = torch.randn(2, 6, D_VOCAB).to(dtype)
    at_x, at_weight, at_bias = torch.autograd.grad(parts(x), [x, parts.weight, parts.bias], seed)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, parts.weight, parts.bias)]
    exact = torch.autograd.grad(F.linear(*wide), wide, seed.double())
    off = (at_x.double() - exact[0]).abs()
    lengths = D_VOCAB * torch.finfo(torch.float32).eps * (seed.double().abs() @ wide[1].abs())
    assert at_x.dtype == dtype and (off <= rounding(exact[0], dtype) * 0.501 + lengths).all()
    plain = torch.autograd.grad(F.linear(x, parts.weight, parts.bias), [parts.weight, parts.bias], seed)
    assert torch.equal(at_weight, plain[0])
    assert at_bias.dtype == dtype and torch.allclose(at_bias.double(), exact[2], atol=0.05, rtol=0.01)


def test_no_second_derivative_in_silence() -> None:
    x = stream(2, dtype=torch.bfloat16).requires_grad_()
    (gradient,) = torch.autograd.grad(head(True, dtype=torch.bfloat16)(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_what_torch_refuses_or_casts_is_left_to_it() -> None:
    parts = head(True, 100, torch.bfloat16)
    for product in (parts, lambda x: F.linear(x, parts.weight)):
        with pytest.raises(RuntimeError, match="same dtype"):
            product(stream(2))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            product(torch.ones(2, D_MODEL + 1, dtype=torch.bfloat16))
    wide = head(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = wide(stream(2, 3))
        assert logits.dtype == torch.bfloat16 and torch.equal(logits, F.linear(stream(2, 3), wide.weight))
    broken = head(True, dtype=torch.bfloat16)
    with torch.no_grad():
        broken.weight[3] = torch.nan
    assert broken(stream(2, dtype=torch.bfloat16)).isnan().nonzero().tolist() == [[0, 3], [1, 3]]


# -- memory ----------------------------------------------------------------------------------------


@sixteen
def test_one_part_is_converted_at_a_time(dtype: torch.dtype) -> None:
    step = 100
    parts = head(True, step, dtype)
    parts.requires_grad_(False)
    x = stream(2, 3, dtype=dtype).requires_grad_()
    saved: list[Tensor] = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with keeping, Made(torch.float32) as on:
        logits = parts(x)
    with Made(torch.float32) as back:
        logits.sum().backward()
    for made in (on, back):
        sizes = sorted(made.sizes.values(), reverse=True)
        assert sizes[0] == step * D_MODEL * 4
        assert sizes[1] < sizes[0] / 2, "a second part, or the whole weight, was held in float32"
    # Nothing converted waits for the way back.
    assert {tensor.dtype for tensor in saved} == {dtype}
    assert max(tensor.numel() for tensor in saved) == parts.weight.numel()


def test_the_dispatcher_sees_what_is_made() -> None:
    with Made(torch.float32) as made:
        head(False, dtype=torch.bfloat16).weight.float()
    assert max(made.sizes.values()) == D_VOCAB * D_MODEL * 4


# -- what "auto" chooses ---------------------------------------------------------------------------


@sixteen
def test_auto(dtype: torch.dtype) -> None:
    weight = torch.ones(2, 2, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not has_instructions(dtype)
        assert parts_are_faster(weight, FEWEST_POSITIONS) and not parts_are_faster(weight, FEWEST_POSITIONS - 1)
        for long in (weight.float(), weight.double(), weight.to("meta")):
            assert not parts_are_faster(long, 10**6)
        auto = head("auto", dtype=dtype)
        few, many = stream(1, FEWEST_POSITIONS - 1, dtype=dtype), stream(2, FEWEST_POSITIONS // 2, dtype=dtype)
        assert not auto.in_parts(few) and auto.in_parts(many)
        assert not head(False, dtype=dtype).in_parts(many) and head(True, dtype=dtype).in_parts(few)
        assert not head(True).in_parts(many.float())
        assert torch.equal(auto(many), head(True, dtype=dtype)(many))
    if has_instructions(dtype):
        assert not parts_are_faster(weight, 10**6)


# -- in a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-falcon", "tiny-mixtral"])
def test_a_model_and_its_bridge(name: str) -> None:
    local = TransformerBridge.boot_transformers(name)
    spans = spans_of(name, local.cfg.n_layers, (2,))
    options = {"use_chunked_forward": True, "chunked_forward_step": 100}
    model = AutoDistributedModelForCausalLM.from_pretrained(name, spans=spans, **options)
    assert isinstance(model.lm_head, LMHead) and "chunked=True, step=100" in repr(model.lm_head)
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    bridge = TransformerBridge(model, local.tokenizer)
    tokens = torch.randint(3, 700, (2, 9))
    assert torch.equal(bridge(tokens), local(tokens))
    assert torch.equal(bridge.W_U, local.W_U)
    assert bridge.W_U.untyped_storage().data_ptr() == model.lm_head.weight.untyped_storage().data_ptr()
    hooks = [("unembed.hook_out", lambda logits, hook: logits * 2)]
    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=hooks), 2 * local(tokens))
    losses = []
    for one in (bridge, local):
        loss = one(tokens, return_type="loss")
        losses.append([loss, *torch.autograd.grad(loss, [one.original_model.lm_head.weight])])
    assert torch.equal(losses[0][0], losses[1][0])
    if not tied:  # else the embedding's share is in it, which remote blocks round as local ones do
        assert torch.equal(losses[0][1], losses[1][1])
    _, cache = bridge.run_with_cache(tokens, names_filter=["unembed.hook_out", "ln_final.hook_out"])
    assert torch.allclose(cache["ln_final.hook_out"] @ bridge.W_U, cache["unembed.hook_out"], atol=1e-4)


def test_a_changed_weight_is_used() -> None:
    parts = head(True, dtype=torch.bfloat16)
    x = stream(2, dtype=torch.bfloat16)
    before = parts(x)
    with torch.no_grad():
        parts.weight[5] *= 2
    assert torch.equal(parts(x)[:, 5], 2 * before[:, 5])
    other = copy.deepcopy(parts)
    assert isinstance(other, LMHead) and torch.equal(other(x), parts(x))
    assert other.double()(x.double()).dtype == torch.float64


def test_a_tuned_model_in_sixteen_bits() -> None:
    spans = spans_of("tiny-falcon", 4, (2,), dtype=torch.bfloat16)
    tokens, found = torch.randint(3, 700, (2, 9)), []
    for chunked in (True, False):
        torch.manual_seed(0)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            "tiny-falcon",
            spans=spans,
            dtype=torch.bfloat16,
            tuning_mode="ptune",
            pre_seq_len=2,
            use_chunked_forward=chunked,
            chunked_forward_step=64,
        )
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        found.append(model.prompts.embeddings.grad)
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() < 0.05 * found[1].norm()
