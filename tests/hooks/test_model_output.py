"""`hook_logits`: a hook on what the whole model returns, in families that cap or scale what their head returns."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model, LlamaConfig, LlamaForCausalLM

from transformer_lens import TransformerBridge

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
CAP = 0.5


@pytest.fixture(scope="module")
def bridge():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=CAP)).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return TransformerBridge(model)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def test_logits_are_capped_and_the_heads_output_is_not(bridge, tokens):
    logits, cache = bridge.run_with_cache(tokens)
    head = cache["unembed.hook_out"]
    assert torch.equal(cache["hook_logits"], logits)
    torch.testing.assert_close(logits, CAP * torch.tanh(head / CAP), atol=1e-6, rtol=0)
    assert head.abs().max() > 2 * CAP


def test_what_is_written_is_what_the_model_returns(bridge, tokens):
    def favour(logits, hook):
        logits[..., 7] = 100.0

    logits, loss = bridge.run_with_hooks(tokens, return_type="both", fwd_hooks=[("hook_logits", favour)])
    assert bool((logits.argmax(-1) == 7).all())
    torch.testing.assert_close(loss, 100.0 - logits[:, :-1].gather(-1, tokens[:, 1:, None]).mean())
    assert bridge.generate(tokens, max_new_tokens=3, fwd_hooks=[("hook_logits", favour)])[0, -3:].tolist() == [7, 7, 7]


def test_a_generation_knows_its_step_there(bridge, tokens):
    steps = []
    bridge.generate(
        tokens, max_new_tokens=3, fwd_hooks=[("hook_logits", lambda x, hook: steps.append(hook.generation))]
    )
    assert [(step.step, step.is_prompt) for step in steps] == [(0, True), (1, False), (2, False)]


def test_the_gradient_is_that_of_the_loss(bridge, tokens):
    weight = bridge.original_model.get_input_embeddings().weight.requires_grad_(True)
    _, cache = bridge.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter="hook_logits")
    weight.requires_grad_(False).grad = None
    logits = cache["hook_logits"].clone().requires_grad_()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(cache["hook_logits_grad"], logits.grad)


def test_runs_that_end_before_have_none_and_runs_from_a_layer_do(bridge, tokens):
    with pytest.raises(ValueError, match="never fired: 'hook_logits'"):
        bridge.run_with_cache(tokens, stop_at_layer=1, names_filter=["hook_logits"])
    stream = bridge(tokens, stop_at_layer=1)
    logits, cache = bridge.run_with_cache(stream, start_at_layer=1, names_filter=["hook_logits"])
    assert torch.equal(cache["hook_logits"], logits)


def test_calls_in_which_a_write_would_come_too_late_are_refused(bridge, tokens):
    with bridge.hooks([("hook_logits", lambda x, hook: x * 0)]):
        with pytest.raises(ValueError, match="loss was computed before"):
            bridge.original_model(tokens, labels=tokens)
        with pytest.raises(ValueError, match="return_dict=False"):
            bridge.original_model(tokens, return_dict=False)
    with bridge.hooks([("hook_logits", lambda x, hook: None)]):
        assert torch.equal(bridge.original_model(tokens, labels=tokens).logits, bridge(tokens))


def test_absent_with_its_reason(bridge):
    llama = TransformerBridge(LlamaForCausalLM(LlamaConfig(**SIZES)))
    with pytest.raises(KeyError, match="what the head returns, at unembed.hook_out"):
        llama.run_with_cache(torch.ones(1, 2, dtype=torch.long), names_filter="hook_logits")
    headless = TransformerBridge(Gemma2Model(bridge.original_model.config))
    assert headless.absent_names["hook_logits"] == headless.absent_names["unembed.hook_out"]


def test_what_other_hooks_on_the_model_see_was_written(bridge, tokens):
    seen = []
    handle = bridge.original_model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    bridge.run_with_hooks(tokens, fwd_hooks=[("hook_logits", lambda x, hook: torch.zeros_like(x))])
    handle.remove()
    assert not seen[0].any()
