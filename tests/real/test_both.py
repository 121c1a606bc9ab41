"""What holds for both real models: the laws, the decomposition of their logits, and their text."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import direct_logit_attribution
from transformer_lens.data import REAL_MODELS, source_of

pytestmark = pytest.mark.real

PROMPTS = ("The capital of France is", "Once upon a time, there was a little girl named")
SIZES = {"smollm2": (30, 9, 3, 576, 134_515_008), "gemma-3-270m": (18, 4, 1, 640, 268_098_176)}


@pytest.fixture
def bridge(name: str, request: pytest.FixtureRequest) -> TransformerBridge:
    found: TransformerBridge = request.getfixturevalue({"smollm2": "smollm2", "gemma-3-270m": "gemma"}[name])
    return found


each = pytest.mark.parametrize("name", REAL_MODELS)


@each
def test_it_is_the_published_model(name: str, bridge: TransformerBridge) -> None:
    cfg = bridge.cfg
    numbers = sum(parameter.numel() for parameter in bridge.parameters())
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_model, numbers) == SIZES[name]
    assert (cfg.model_name, cfg.dtype) == (name, torch.float32)
    loss = float(bridge("The quick brown fox jumps over the lazy dog.", return_type="loss").detach())
    assert loss < 4.5  # random weights are at log(d_vocab), 10.8 and 12.5


@each
def test_verify_passes_within_its_budget(name: str, bridge: TransformerBridge) -> None:
    began = time.process_time()
    report = bridge.verify()
    spent = time.process_time() - began
    assert report.passed, report
    assert not report.not_applicable
    assert len(report.results) > 9_000
    assert spent < 30  # seconds of one thread, whatever else the machine does


@each
def test_a_few_layers_pass_with_each_hook_alone(name: str) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if name != "smollm2" else {}
    few = TransformerBridge.boot_transformers(name, num_hidden_layers=2, **kinds)
    report = few.verify(torch.tensor([[7, 1_000, 2_000, 30_000]]), thorough=True)
    assert report.passed and not report.sampled


@each
@torch.no_grad()
def test_the_bare_model_gives_the_same_logits_and_the_same_text(name: str, bridge: TransformerBridge) -> None:
    bare = AutoModelForCausalLM.from_pretrained(source_of(name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(source_of(name), padding_side="left")
    greedy = {"max_new_tokens": 20, "do_sample": False}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert torch.equal(bridge(ids), bare(ids).logits)
        assert torch.equal(bridge.generate(ids, **greedy), bare.generate(ids, **greedy))
    together = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    expected = bare.generate(**together, **greedy)
    written = bridge.generate(list(PROMPTS), prepend_bos=name != "smollm2", **greedy)
    assert written == tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert bridge.generate(PROMPTS[0], prepend_bos=name != "smollm2", **greedy) == written[0]


@each
@torch.no_grad()
def test_what_the_parts_add_sums_to_the_logits(name: str, bridge: TransformerBridge) -> None:
    prompt = "When Mary and John went to the store, John gave a drink to"
    logits, cache = bridge.run_with_cache(prompt)
    assert bridge.to_string(logits[0, -1].argmax()) == " Mary"
    for parts in ("component", "head"):
        adds = direct_logit_attribution(bridge, cache, " Mary", " John", parts=parts)
        exact = logits[0, -1, bridge.to_single_token(" Mary")] - logits[0, -1, bridge.to_single_token(" John")]
        assert torch.allclose(adds.values.sum(0), exact, atol=1e-3)


@each
@torch.no_grad()
def test_the_last_row_of_the_logit_lens_is_the_model(name: str, bridge: TransformerBridge) -> None:
    logits, cache = bridge.run_with_cache("The Eiffel Tower is in the city of")
    lens = cache.logit_lens(pos_slice=-1)
    assert len(lens) == bridge.cfg.n_layers + 1
    assert torch.allclose(lens[-1].squeeze(), logits[0, -1], atol=1e-3)
    assert bridge.to_string(lens[-1].argmax(-1)) == " Paris"


@each
@torch.no_grad()
def test_folding_the_norms_keeps_the_logits_in_float64(name: str) -> None:
    bridge = TransformerBridge.boot_transformers(name, dtype=torch.float64)
    prompt = "When Mary and John went to the store, John gave a drink to"
    logits = bridge(prompt)
    with bridge.fold_ln():
        assert bridge.blocks[3].ln1.original_component.weight.unique().tolist() == [1.0 if name == "smollm2" else 0.0]
        folded = bridge(prompt)
    # SmolLM2's weights have so few bits that a product of three of them is exact; Gemma's norms work in float32.
    assert (folded - logits).abs().max() <= {"smollm2": 0.0, "gemma-3-270m": 5e-5}[name]
    with bridge.process_weights(center_writing_weights=False):
        processed = bridge(prompt).log_softmax(-1)
    assert (processed - logits.log_softmax(-1)).abs().max() < {"smollm2": 1e-11, "gemma-3-270m": 5e-5}[name]
    assert torch.equal(bridge(prompt), logits)
