"""Everything processing did is undone bit for bit, by whichever way, and an error leaves the model as it was."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn

from tests.bridge.test_detach import picture
from tests.support import FAMILIES, family, tokens
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.processing import changes as changes_module
from transformer_lens.model_bridge.processing import methods

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


@pytest.fixture(params=FAMILIES)
def model(request):
    return family(request.param, tie_word_embeddings=True)


def snapshot(model):
    """Every parameter object, its values and its memory, and the config."""
    found = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found[path] = (id(parameter), parameter.data_ptr(), parameter.requires_grad, parameter.detach().clone())
    return found, model.config.to_dict()


def same(model, before):
    found, config = snapshot(model)
    assert config == before[1]
    assert list(found) == list(before[0])
    for path, (*marks, values) in before[0].items():
        assert found[path][:3] == tuple(marks), path
        assert torch.equal(found[path][3], values), path
    return True


def quietly(bridge, **options):
    return bridge.enable_compatibility_mode(disable_warnings=True, **options)


# -- ways back -----------------------------------------------------------------------------------------


def test_detach_gives_the_very_tensors_back(model):
    before, looks = snapshot(model), picture(model)
    bridge = TransformerBridge(model)
    quietly(bridge)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings
    bridge.detach()
    assert same(model, before)
    assert picture(model) == looks
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="this bridge was detached"):
        bridge.fold_ln()


def test_changes_undo_in_reverse_order_alone(model):
    bridge, before = TransformerBridge(model), snapshot(model)
    first = bridge.fold_ln()
    between = snapshot(model)
    second = bridge.center_unembed()
    with pytest.raises(ValueError, match="undo of fold_ln: center_unembed came later and has to be undone first"):
        first.undo()
    assert bridge.processed == ("fold_ln", "center_unembed")
    second.undo()
    second.undo()
    assert same(model, between)
    assert bridge.processed == ("fold_ln",)
    first.undo()
    assert same(model, before)
    assert bridge.processed == ()
    bridge.undo_processing()
    assert same(model, before)


def test_with_blocks_nest_and_survive_errors(model):
    bridge, before = TransformerBridge(model), snapshot(model)

    def fails() -> None:
        with bridge.fold_ln(), bridge.center_unembed():
            assert bridge.processed == ("fold_ln", "center_unembed")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert same(model, before)
    with quietly(bridge):
        steps = bridge.processed
        with quietly(bridge):  # nothing is left to do, so nothing is undone when it ends
            assert bridge.processed == steps
        assert bridge.processed == steps
    assert same(model, before)


def test_parameters_stay_the_objects_they_are(model):
    bridge = TransformerBridge(model)
    objects = {path: id(parameter) for path, parameter in model.named_parameters()}
    quietly(bridge)
    after = {path: id(parameter) for path, parameter in model.named_parameters()}
    assert {path: after[path] for path in objects} == objects
    made = set(after) - set(objects)
    assert all(path == "lm_head.weight" or path.endswith(".bias") for path in made)


def test_only_what_changed_is_kept(model):
    bridge = TransformerBridge(model)
    sizes = {path: parameter.nbytes for path, parameter in model.named_parameters(remove_duplicate=False)}
    values = {path: p.detach().clone() for path, p in model.named_parameters(remove_duplicate=False)}
    changes = bridge.fold_ln()
    now = dict(model.named_parameters(remove_duplicate=False))
    different = {path for path, value in values.items() if not torch.equal(value, now[path])}
    made = set(now) - set(values)
    assert set(changes.changed) - {"config.tie_word_embeddings"} == different | made
    assert not any("o_proj" in path or "down_proj" in path or "4h_to_h.weight" in path for path in changes.changed)
    # Of the tied weight the embedding keeps the original.
    assert changes.bytes_kept == sum(sizes[path] for path in different - {"lm_head.weight"})
    assert repr(changes).startswith("WeightChanges(steps=('fold_ln',), ")


def test_originals_can_be_lent_back(model, tmp_path):
    x = tokens()
    model.save_pretrained(tmp_path)  # it writes into the config, so once before the comparison
    bridge, before = TransformerBridge(model), snapshot(model)
    with bridge.unprocessed():
        assert same(model, before)
    bridge.fold_ln()
    quietly(bridge)
    after, steps = snapshot(model), bridge.processed
    with bridge.unprocessed():
        assert bridge.processed == ()
        assert same(model, before)
        with bridge.unprocessed():
            assert same(model, before)
        for call in (bridge.fold_ln, bridge.undo_processing):
            with pytest.raises(ValueError, match="the weights are lent back; leave it first"):
                call()
        assert same(model, before)
        model.save_pretrained(tmp_path)
    assert same(model, after)
    assert bridge.processed == steps
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, before[0][path][3]) for path, value in again.state_dict().items())

    def fails() -> None:
        with bridge.unprocessed():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert same(model, after)
    bridge.detach()
    assert same(model, before)
    assert again(x).logits.shape == (2, 7, 61)


# -- more than one bridge, copies ------------------------------------------------------------------------


def test_another_bridge_sees_it_refuses_and_may_undo_it(model):
    before = snapshot(model)
    first, second = TransformerBridge(model), TransformerBridge(model)
    first.fold_ln()
    base = TransformerBridge(model.base_model)
    for other in (second, base):
        assert other.processed == ("fold_ln",)
        with pytest.raises(
            ValueError, match="center_unembed: another bridge on these weights has already done fold_ln"
        ):
            other.center_unembed()
    second.detach()
    assert first.processed == ("fold_ln",)
    base.undo_processing()
    assert first.processed == base.processed == ()
    assert same(model, before)
    base.fold_value_biases()
    with pytest.raises(ValueError, match="another bridge on these weights"):
        first.fold_ln()
    first.detach()
    assert base.processed == ("fold_value_biases",)
    base.detach()
    assert same(model, before)


def test_copies_are_processed_and_undone_on_their_own(model):
    x = tokens()
    bridge, before = TransformerBridge(model), snapshot(model)
    quietly(bridge)
    after = snapshot(model)
    twin, lone = copy.deepcopy(bridge), TransformerBridge(copy.deepcopy(model))
    loaded = TransformerBridge(pickle.loads(pickle.dumps(model)))
    for other in (twin, lone, loaded):
        assert other.processed == bridge.processed
        assert torch.equal(other(x), bridge(x))
        other.undo_processing()
        assert other.processed == ()
        found = dict(other.original_model.named_parameters(remove_duplicate=False))
        assert list(found) == list(before[0])
        assert all(torch.equal(value, before[0][path][3]) for path, value in found.items())
        assert other.original_model.lm_head.weight is other.original_model.get_input_embeddings().weight
        assert same(model, after)
    bridge.detach()
    assert same(model, before)


# -- what happens to the model meanwhile -----------------------------------------------------------------


def test_a_model_that_was_cast_meanwhile_gets_its_weights_back_in_its_dtype(model):
    bridge, before = TransformerBridge(model), snapshot(model)
    quietly(bridge)
    bridge.to(torch.float64)
    with bridge.unprocessed():
        assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
        bridge.to(torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    bridge.to(torch.float64)
    bridge.detach()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, before[0][path][3].double())


def test_training_on_processed_weights_is_lost_with_a_warning(model):
    bridge, before = TransformerBridge(model), snapshot(model)
    changes = quietly(bridge)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bridge(tokens(), return_type="loss").backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    optimizer.step()
    with pytest.warns(UserWarning, match="written into since processing; the weights from before it come back"):
        changes.undo()
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(before[0])
    # A tied head goes back to the embedding, which Mixtral's steps leave alone and the training did not.
    for path in (set(changes.changed) & set(now)) - {"lm_head.weight"}:
        assert torch.equal(now[path], before[0][path][3]), path


def test_training_what_was_made_warns_too():
    model = family("7b", tie_word_embeddings=False)
    bridge = TransformerBridge(model)
    bridge.fold_ln()
    with torch.no_grad():
        model.transformer.h[0].self_attention.query_key_value.bias.add_(1)
    with pytest.warns(UserWarning, match=r"^transformer.h.0.self_attention.query_key_value.bias: written into since"):
        bridge.undo_processing()


def test_a_frozen_model_gets_frozen_parameters():
    model = family("7b").requires_grad_(False)
    bridge = TransformerBridge(model)
    quietly(bridge)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.transformer.h[0].self_attention.dense.bias is not None
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("place", ["weight", "bias"])
def test_originals_are_not_put_where_something_else_sits_by_now(place):
    model = family("7b", tie_word_embeddings=False)
    bridge = TransformerBridge(model)
    quietly(bridge)
    linear = model.transformer.h[1].self_attention.query_key_value
    kept = getattr(linear, place)
    setattr(linear, place, nn.Parameter(kept.detach().clone()))
    after = snapshot(model)
    for call in (bridge.undo_processing, bridge.detach):
        with pytest.raises(ValueError, match=f"query_key_value.{place} was replaced by something else since"):
            call()
        assert same(model, after)
    with pytest.raises(ValueError, match="was replaced"), bridge.unprocessed():
        pass
    assert same(model, after)
    setattr(linear, place, kept)
    bridge.detach()


# -- errors half-way -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "nth"), [(kind, n) for kind in ("ValueExchange", "ParameterExchange") for n in (0, 3, 7)]
)
def test_an_error_half_way_through_the_exchange_changes_nothing(monkeypatch, nth, kind):
    model = family("7b", tie_word_embeddings=True)
    bridge, before = TransformerBridge(model), snapshot(model)
    exchange = getattr(changes_module, kind)
    swap, count = exchange.swap, iter(range(99))

    def fails(self):
        if next(count) == nth:
            raise MemoryError("injected")
        swap(self)

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "swap", fails)
        with pytest.raises(MemoryError, match="injected"):
            quietly(bridge)
    assert same(model, before)
    assert bridge.processed == ()
    assert "weight_processing" not in vars(model.base_model)
    quietly(bridge)
    count = iter(range(99))
    after = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "swap", fails)
        with pytest.raises(MemoryError, match="injected"):
            bridge.undo_processing()
    assert same(model, after)
    assert bridge.processed == STEPS
    bridge.detach()
    assert same(model, before)


def test_an_error_while_values_are_computed_changes_nothing(model, monkeypatch):
    bridge, before = TransformerBridge(model), snapshot(model)
    last = methods.STEPS[-1]

    def fails(bridge, draft):
        last.run(bridge, draft)
        raise MemoryError("injected")

    broken = type(last)(last.name, fails, last.inapplicable, last.not_after)
    monkeypatch.setattr(methods, "STEPS", (*methods.STEPS[:-1], broken))
    with pytest.raises(MemoryError, match="injected"):
        quietly(bridge)
    assert same(model, before)
    assert bridge.processed == ()


# -- words -----------------------------------------------------------------------------------------------


def test_a_second_call_does_nothing_and_says_so(model):
    bridge = TransformerBridge(model)
    quietly(bridge)
    after, steps = snapshot(model), bridge.processed
    with pytest.warns(UserWarning, match="fold_ln: already done on this model, so nothing is changed"):
        changes = bridge.fold_ln()
    assert (changes.steps, changes.changed, changes.bytes_kept) == ((), (), 0)
    changes.undo()
    with pytest.warns(UserWarning, match=rf"{', '.join(steps)}: already done"):
        bridge.process_weights(center_writing_weights="center_writing_weights" in steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quietly(bridge)
    assert same(model, after)
    assert bridge.processed == steps


def test_a_warning_that_is_an_error_changes_nothing():
    model = family("mixtral")
    bridge, before = TransformerBridge(model), snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="center_writing_weights is left out: the norms"):
            bridge.process_weights()
    assert same(model, before)
    assert bridge.processed == ()


def test_untying_is_logged_and_only_where_it_happens(caplog):
    with caplog.at_level(logging.WARNING):
        changes = TransformerBridge(family("7b", tie_word_embeddings=True)).center_unembed()
        assert len(caplog.records) == len(changes.notes) == 1
        sentence = "lm_head.weight and transformer.word_embeddings.weight were one tied parameter and are two while"
        assert caplog.messages[0].startswith(sentence)
        assert "which takes 0.0 MB more" in caplog.messages[0]
        caplog.clear()
        assert TransformerBridge(family("7b", tie_word_embeddings=False)).center_unembed().notes == ()
        assert len(quietly(TransformerBridge(family("7b", tie_word_embeddings=True))).notes) == 1
        # Nothing is untied for a step that touches neither end.
        tied = family("7b", tie_word_embeddings=True)
        TransformerBridge(tied).fold_value_biases()
        assert tied.lm_head.weight is tied.get_input_embeddings().weight
        assert caplog.messages == []


def test_centring_alone_leaves_the_tied_head_its_own_values():
    model = family("7b", tie_word_embeddings=True)
    old = model.lm_head.weight.detach().clone()
    bridge = TransformerBridge(model)
    with bridge.center_writing_weights():
        assert torch.equal(model.lm_head.weight, old)
        assert model.get_input_embeddings().weight.mean(-1).abs().max() < 1e-6
        with torch.no_grad():
            model.lm_head.weight.add_(1)  # its own memory: the original that is kept stays
        with pytest.warns(UserWarning, match="^lm_head.weight: written into"):
            bridge.undo_processing()
    assert torch.equal(model.lm_head.weight, old)


def test_nothing_chosen_is_nothing_done(model):
    bridge, before = TransformerBridge(model), snapshot(model)
    assert bridge.enable_compatibility_mode(no_processing=True).steps == ()
    assert bridge.process_weights(False, False, False, False).steps == ()
    assert same(model, before)
    with pytest.raises(TypeError, match="fold_everything"):
        bridge.process_weights(fold_everything=True)


def test_the_order_that_would_bring_value_biases_back_is_refused(model):
    bridge = TransformerBridge(model)
    bridge.fold_value_biases()
    with pytest.raises(ValueError, match="fold_ln has to come before fold_value_biases; call bridge.undo_processing"):
        bridge.fold_ln()
    assert bridge.processed == ("fold_value_biases",)


@pytest.mark.parametrize("step", STEPS)
def test_process_weights_takes_the_steps_that_are_named(step):
    bridge = TransformerBridge(family("7b"))
    bridge.process_weights(**{name: name == step for name in STEPS})
    assert bridge.processed == (step,)
    bridge.undo_processing()
    quietly(bridge, **{name: name == step for name in STEPS})
    assert bridge.processed == (step,)


def test_the_two_names_of_norm_folding():
    bridge = TransformerBridge(family("rw"))
    assert bridge.fold_layer_norm().steps == ("fold_ln",)


def test_originals_are_not_put_where_the_shape_is_another_by_now():
    model = family("rw", tie_word_embeddings=False)
    bridge = TransformerBridge(model)
    bridge.center_unembed()
    kept = model.lm_head.weight.data
    model.lm_head.weight.data = kept[:50]
    with pytest.raises(ValueError, match="^lm_head.weight was replaced by something else since it was processed"):
        bridge.detach()
    assert model.lm_head.weight.shape == (50, 32)
    model.lm_head.weight.data = kept
    bridge.detach()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["rw", "40b", "mixtral"])
def test_a_vocabulary_resized_since_is_not_overwritten(name, tied):
    model = family(name, tie_word_embeddings=tied)
    bridge = TransformerBridge(model)
    bridge.fold_ln()  # of the two ends, only the unembedding
    model.resize_token_embeddings(64, mean_resizing=False)
    after = snapshot(model)
    for call in (bridge.undo_processing, bridge.detach):
        with pytest.raises(
            ValueError,
            match=r"^lm_head.weight was replaced .* \(as resize_token_embeddings does\).*load the model again",
        ):
            call()
        assert same(model, after)
    with pytest.raises(ValueError, match=r"^lm_head.weight was replaced"), bridge.unprocessed():
        pass
    assert same(model, after)
    assert bridge.processed == ("fold_ln",)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["rw", "mixtral"])
def test_a_vocabulary_resized_on_the_models_own_weights_keeps_them(name, tied):
    model, expected = (family(name, tie_word_embeddings=tied) for _ in range(2))
    expected.load_state_dict(model.state_dict())
    bridge = TransformerBridge(model)
    changes = quietly(bridge)
    said = r"replaced while the model's own weights were lent back.*process_weights\(\)"
    with pytest.warns(UserWarning, match=said), bridge.unprocessed():
        model.resize_token_embeddings(40)
    expected.resize_token_embeddings(40)
    assert bridge.processed == () and changes_module.RECORD not in bridge.root.in_place.__dict__
    ids = tokens() % 40
    with torch.no_grad():
        assert torch.equal(bridge(ids), expected(ids).logits)
        changes.undo()  # nothing is left to undo
        assert torch.equal(bridge(ids), expected(ids).logits)
        quietly(bridge)
        torch.testing.assert_close(
            bridge(ids).log_softmax(-1), expected(ids).logits.log_softmax(-1), rtol=1e-4, atol=1e-4
        )
    bridge.undo_processing()
    assert torch.equal(bridge(ids), expected(ids).logits)


def test_a_vocabulary_that_processing_did_not_touch_may_be_resized():
    model = family("rw", tie_word_embeddings=False)
    bridge = TransformerBridge(model)
    bias = model.transformer.h[1].self_attention.query_key_value.bias
    before = bias.detach().clone()
    bridge.fold_value_biases()
    model.resize_token_embeddings(40)
    assert not torch.equal(bias, before)
    bridge.undo_processing()
    assert bridge.processed == () and torch.equal(bias, before)
    assert bridge(tokens() % 40).shape[-1] == 40


def test_an_adapter_that_came_since_stands_around_what_is_put_back():
    from peft import LoraConfig, get_peft_model

    model = family("rw", tie_word_embeddings=False)
    bridge = TransformerBridge(model)
    linear = model.transformer.h[1].self_attention.query_key_value
    before = linear.weight.detach().clone()
    bridge.fold_ln()
    get_peft_model(model, LoraConfig(target_modules=["query_key_value"], r=2))
    assert model.transformer.h[1].self_attention.query_key_value.base_layer is linear
    assert not torch.equal(linear.weight, before)
    bridge.undo_processing()
    assert torch.equal(linear.weight, before)
