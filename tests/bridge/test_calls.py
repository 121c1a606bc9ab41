"""What a call of the bridge means: inputs, outputs, losses, caches of keys and values, task classes."""

import pytest
import torch
from transformers import (
    FalconForQuestionAnswering,
    FalconForSequenceClassification,
    FalconForTokenClassification,
    FalconModel,
    MixtralForQuestionAnswering,
    MixtralForSequenceClassification,
    MixtralForTokenClassification,
    MixtralModel,
)

from tests.bridge.texts import tokenizer
from tests.support import FAMILIES, MIXTRAL_SMALL, cache_of, falcon_config, family, perturbed, tokens, torch_hooks
from transformer_lens import TransformerBridge

SMALL_VOCAB = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(params=FAMILIES)
def bridge(request) -> TransformerBridge:
    return TransformerBridge(family(request.param))


def with_text(name: str, **changes) -> TransformerBridge:
    return TransformerBridge(family(name, **SMALL_VOCAB), tokenizer(**changes))


# -- the same call --------------------------------------------------------------------------------


@pytest.mark.core
def test_tokens_make_the_call_the_model_makes(bridge):
    x = tokens()
    model = bridge.original_model
    received = []
    original = model.forward

    def spy(*args, **kwargs):
        received.append((args, kwargs))
        output = original(*args, **kwargs)
        received.append(output)
        return output

    plain = model(input_ids=x)
    model.forward = spy
    logits = bridge(x)
    del model.forward
    (args, kwargs), output = received
    assert args == ()
    assert list(kwargs) == ["input_ids"]
    assert kwargs["input_ids"] is x
    assert torch.equal(logits, plain.logits)
    # The default of `use_cache` is the model's: keys and values come back.
    assert cache_of(output).get_seq_length() == cache_of(plain).get_seq_length() == 7


def test_a_padded_batch_passes_a_mask_and_positions():
    bridge = with_text("40b", padding_side="left")
    received = []
    original = bridge.original_model.forward
    bridge.original_model.forward = lambda **kwargs: received.append(kwargs) or original(**kwargs)
    bridge(["the cat", "the cat sat on the mat"])
    bridge(["the cat", "the dog"])
    del bridge.original_model.forward
    assert list(received[0]) == ["input_ids", "attention_mask", "position_ids"]
    assert received[0]["position_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]
    assert received[0]["attention_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [1] * 7]
    assert list(received[1]) == ["input_ids"]


def test_a_row_of_tokens_is_a_batch_of_one(bridge):
    x = tokens(1, 5)
    assert torch.equal(bridge(x[0]), bridge(x))
    assert torch.equal(bridge(x.int()), bridge(x))


def test_unknown_keywords_are_refused(bridge):
    x = tokens()
    for run in (bridge, bridge.run_with_hooks, bridge.run_with_cache):
        with pytest.raises(TypeError, match="unexpected keyword argument 'output_attentionss'"):
            run(x, output_attentionss=True)
    assert torch_hooks(bridge.original_model) == 0


# -- return types ---------------------------------------------------------------------------------


def cross_entropy(logits, ids, mask):
    """Next-token cross entropy in float32, one prediction at a time."""
    losses = []
    for row in range(ids.shape[0]):
        for pos in range(ids.shape[1] - 1):
            if mask[row, pos] and mask[row, pos + 1]:
                scores = logits[row, pos].float()
                losses.append(torch.logsumexp(scores, 0) - scores[ids[row, pos + 1]])
    return torch.stack(losses)


def test_the_loss_is_the_cross_entropy(bridge):
    x = tokens()
    logits = bridge(x)
    expected = cross_entropy(logits, x, torch.ones_like(x))
    # float32 sums in another order
    assert torch.allclose(bridge(x, return_type="loss"), expected.mean(), rtol=1e-6, atol=0)
    per_token = bridge(x, return_type="loss", loss_per_token=True)
    assert per_token.shape == (2, 6)
    assert torch.allclose(per_token.flatten(), expected, rtol=1e-5, atol=1e-6)
    both = bridge(x, return_type="both")
    assert torch.equal(both.logits, logits)
    assert torch.equal(both.loss, bridge(x, return_type="loss"))
    assert torch.equal(both[1], both.loss)
    assert bridge(x, return_type=None) is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["text", "tokens", "mask"])
def test_the_loss_leaves_padding_out(side, how):
    bridge = with_text("rw", padding_side=side)
    texts = ["the cat", "the dog ran on the mat and sat"]
    ids = bridge.to_tokens(texts)
    mask = ids != 0
    logits = bridge(ids, attention_mask=mask.long())
    expected = cross_entropy(logits, ids, mask)
    arguments = {
        "text": {"input": texts},
        "tokens": {"input": ids},
        "mask": {"input": ids, "attention_mask": mask.long()},
    }[how]
    loss = bridge(**arguments, return_type="loss")
    # Masked and unmasked attention kernels round differently.
    assert torch.allclose(loss, expected.mean(), rtol=1e-5, atol=0)
    per_token = bridge(**arguments, return_type="loss", loss_per_token=True)
    counts = mask[:, 1:] & mask[:, :-1]
    assert torch.allclose(per_token[counts], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(per_token[~counts], torch.zeros(int((~counts).sum())))


def test_the_loss_of_half_precision_is_computed_in_float32():
    bridge = TransformerBridge(family("7b", dtype=torch.bfloat16))
    x = tokens()
    expected = cross_entropy(bridge(x), x, torch.ones_like(x)).mean()
    loss = bridge(x, return_type="loss")
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected, rtol=1e-6, atol=0)


# -- keys and values kept -------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("cut", [1, 4, 6])
def test_continuing_from_a_cache_equals_the_whole_run(bridge, cut):
    x = tokens()
    whole, whole_cache = bridge.run_with_cache(x)
    kept = cache_of(bridge.original_model(x[:, :cut]))
    rest, cache = bridge.run_with_cache(x[:, cut:], past_key_values=kept)
    # Another number of queries takes another path through the kernels: float32 rounding.
    assert torch.allclose(rest, whole[:, cut:], rtol=1e-4, atol=1e-5)
    for name in ("hook_embed", "blocks.0.attn.hook_q", "blocks.1.attn.hook_k", "blocks.1.hook_resid_post"):
        assert cache[name].shape[1] == 7 - cut
        assert torch.allclose(cache[name], whole_cache[name][:, cut:], rtol=1e-4, atol=1e-5)
    assert kept.get_seq_length() == 7


def test_continuing_with_hooks_edits_new_positions_only(bridge):
    x = tokens()
    kept = cache_of(bridge.original_model(x[:, :4]))
    seen = []

    def edit(tensor, hook):
        seen.append(tensor.shape[1])
        tensor.zero_()

    bridge.run_with_hooks(x[:, 4:], fwd_hooks=[("blocks.1.hook_mlp_out", edit)], past_key_values=kept)
    assert seen == [3]


@pytest.mark.parametrize("name", ["40b", "rw", "mixtral"])
def test_continuing_a_left_padded_batch(name):
    bridge = TransformerBridge(family(name))
    x = tokens(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    whole = bridge(x, attention_mask=mask)
    positions = (mask[:, :5].cumsum(-1) - 1).clamp(min=0)
    cache = cache_of(bridge.original_model(x[:, :5], attention_mask=mask[:, :5], position_ids=positions))
    rest = bridge(x[:, 5:], attention_mask=mask, past_key_values=cache)
    assert torch.allclose(rest, whole[:, 5:], rtol=1e-4, atol=1e-5)  # float32 rounding, as above
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 1\], expected \[2, 8\]"):
        bridge(x[:, :1], attention_mask=mask[:, :1], past_key_values=cache)


def test_pad_tokens_among_new_tokens_do_not_hide_what_is_kept():
    # One row has ended and is fed pad tokens while the other goes on, as in generation.
    bridge = with_text("40b", padding_side="left")
    x = tokens(2, 5)
    new = torch.tensor([[0, 5], [6, 7]])
    kept = cache_of(bridge.original_model(x))
    rest = bridge(new, past_key_values=kept)
    alone = bridge(torch.cat([x[1:], new[1:]], 1))
    assert torch.allclose(rest[1], alone[0, 5:], rtol=1e-4, atol=1e-5)


# -- embeddings -----------------------------------------------------------------------------------


@pytest.mark.core
def test_embeddings_as_input(bridge):
    x = tokens()
    embedded = bridge.original_model.get_input_embeddings()(x)
    output, cache = bridge.run_with_cache(embedded)
    assert torch.equal(output, bridge.original_model(inputs_embeds=embedded).logits)
    assert torch.equal(cache["embed"], embedded)
    assert list(cache) == list(bridge.run_with_cache(x)[1])
    assert torch.equal(bridge(embedded[0]), bridge(embedded[:1]))
    hooks = [("hook_embed", lambda tensor, hook: 2 * tensor)]
    edited = bridge.run_with_hooks(embedded, fwd_hooks=hooks)
    assert torch.equal(edited, bridge(2 * embedded))
    assert torch.equal(edited, bridge.run_with_hooks(x, fwd_hooks=hooks))
    with pytest.raises(ValueError, match="needs token ids, and the input was embeddings"):
        bridge(embedded, return_type="loss")


def test_hook_embed_fires_once_however_the_model_is_called(bridge):
    x = tokens()
    model = bridge.original_model
    fired = []
    bridge.add_hook("hook_embed", lambda tensor, hook: fired.append(tensor))
    bridge(x)
    model(x)
    model(inputs_embeds=model.get_input_embeddings().weight[x])
    assert len(fired) == 3
    assert torch.equal(fired[0], fired[2])


# -- inputs that make no sense --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (1, 2, 3), ()])
def test_token_ids_of_a_wrong_shape(bridge, shape):
    with pytest.raises(ValueError, match=r"expected token ids \[batch, pos\] with at least one row and one position"):
        bridge(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 3, 31), (1, 2, 3, 32), (32,), ()])
def test_embeddings_of_a_wrong_shape(bridge, shape):
    with pytest.raises(ValueError, match=r"expected \[batch, pos, 32\]"):
        bridge(torch.zeros(shape))


def test_other_inputs(bridge):
    with pytest.raises(ValueError, match="got text, and this bridge has no tokenizer"):
        bridge("the cat")
    with pytest.raises(TypeError, match="got int, expected a string, a list of strings, token ids or embeddings"):
        bridge(5)
    with pytest.raises(ValueError, match=r"torch.bool"):
        bridge(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 6\], expected \[2, 7\]"):
        bridge(tokens(), attention_mask=torch.ones(2, 6))


# -- task classes ---------------------------------------------------------------------------------


def build(kind):
    if kind.__name__.startswith("Falcon"):
        config = falcon_config(num_labels=5, pad_token_id=0)
    else:
        config = kind.config_class(**MIXTRAL_SMALL, num_labels=5, pad_token_id=0)
    return perturbed(kind(config))


CLASSIFIERS = [
    (FalconForSequenceClassification, (2, 5)),
    (MixtralForSequenceClassification, (2, 5)),
    (FalconForTokenClassification, (2, 7, 5)),
    (MixtralForTokenClassification, (2, 7, 5)),
]


@pytest.mark.core
@pytest.mark.parametrize(("kind", "shape"), CLASSIFIERS)
def test_classifiers(kind, shape):
    model = build(kind)
    x = tokens()
    plain = model(x).logits
    bridge = TransformerBridge(model)
    output, cache = bridge.run_with_cache(x)
    assert output.shape == shape
    assert torch.equal(output, plain)
    assert cache["head.hook_out"].shape == (2, 7, 5)
    assert bridge.cfg.d_vocab_out == 5
    edited = bridge.run_with_hooks(x, fwd_hooks=[("head.hook_out", lambda tensor, hook: 2 * tensor)])
    assert torch.equal(edited, 2 * plain)
    with pytest.raises(ValueError, match=f"return_type='loss': {kind.__name__} predicts no next token"):
        bridge(x, return_type="loss")
    with pytest.raises(KeyError, match=r"'unembed.hook_out' is absent in this model: this model class has no unembed"):
        bridge.run_with_cache(x, names_filter="unembed.hook_out")


@pytest.mark.parametrize("kind", [FalconForQuestionAnswering, MixtralForQuestionAnswering])
def test_question_answering(kind):
    model = build(kind)
    x = tokens()
    plain = model(x)
    bridge = TransformerBridge(model)
    output, cache = bridge.run_with_cache(x)
    assert torch.equal(output, torch.stack([plain.start_logits, plain.end_logits], -1))
    assert torch.equal(output, cache["head.hook_out"])
    assert torch.equal(bridge(bridge(x, stop_at_layer=1), start_at_layer=1), output)


@pytest.mark.parametrize("kind", [FalconModel, MixtralModel])
def test_the_base_model(kind):
    model = build(kind)
    x = tokens()
    bridge = TransformerBridge(model)
    output, cache = bridge.run_with_cache(x)
    assert torch.equal(output, model(x).last_hidden_state)
    assert torch.equal(output, cache["ln_final.hook_out"])
    assert torch.equal(bridge(bridge(x, stop_at_layer=1), start_at_layer=1), output)
    for name in ("unembed.hook_out", "head.hook_out"):
        with pytest.raises(KeyError, match="its output is the final stream"):
            bridge.run_with_cache(x, names_filter=name)


# -- the model behind it --------------------------------------------------------------------------


def test_parameters_and_state_are_the_models(bridge):
    model = bridge.original_model
    assert [id(p) for p in bridge.parameters()] == [id(p) for p in model.parameters()]
    assert [name for name, _ in bridge.named_parameters()] == [name for name, _ in model.named_parameters()]
    state = bridge.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in model.state_dict().items())
    x = tokens()
    clean = bridge(x)
    saved = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(bridge(x), clean)
    bridge.load_state_dict(saved)
    assert torch.equal(bridge(x), clean)
    with pytest.raises(RuntimeError, match="missing: "):
        bridge.load_state_dict({})


def test_moving_and_casting(bridge):
    assert bridge.to(torch.bfloat16) is bridge
    assert bridge.cfg.dtype == next(bridge.original_model.parameters()).dtype == torch.bfloat16
    x = tokens()
    assert bridge(x).dtype == torch.bfloat16
    bridge.float()
    assert bridge.cfg.dtype == bridge(x).dtype == torch.float32
    bridge.half()
    assert bridge.cfg.dtype == torch.float16
    bridge.to("cpu", dtype=torch.float32)
    assert bridge.cfg.dtype == torch.float32
    bridge.to("meta")
    assert bridge.cfg.device.type == "meta"
    assert next(bridge.original_model.parameters()).device.type == "meta"


def test_modes_and_gradients_reach_the_model(bridge):
    bridge.train()
    assert bridge.original_model.training
    bridge.eval()
    assert not any(module.training for module in bridge.original_model.modules())
    bridge.requires_grad_(False)
    assert not any(p.requires_grad for p in bridge.original_model.parameters())
    bridge.requires_grad_(True)
    bridge(tokens(), return_type="loss").backward()
    bridge.zero_grad()
    assert all(p.grad is None for p in bridge.original_model.parameters())
