"""Tuned lens: the logit lens at first, nearer to the model after training, and only with the model it was made for."""

import json

import pytest
import torch

from tests.support import FAMILIES, VOCAB, falcon, family, mixtral, tokens
from transformer_lens import TransformerBridge
from transformer_lens.analysis.lenses import TunedLens
from transformer_lens.analysis.lenses.tuned_lens import divergence
from transformer_lens.data.generate import training_text

TRAINING = list(training_text(64, seed=7))
HELD_OUT = list(training_text(32, seed=8))


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.fixture(scope="module")
def trained(bridge):
    lens = TunedLens(bridge)
    lens.fit(TRAINING, epochs=3, lr=5e-3)
    return lens


@pytest.mark.parametrize("layout", FAMILIES)
def test_at_first_it_is_the_logit_lens_exactly(layout):
    bridge = TransformerBridge(family(layout))
    _, cache = bridge.run_with_cache(tokens())
    lens = TunedLens(bridge)
    assert torch.equal(lens.logits(cache), cache.logit_lens())
    assert torch.equal(lens.logits(cache, pos_slice=-1), cache.logit_lens(pos_slice=-1))
    torch.testing.assert_close(lens.logits(cache["resid_pre", 1], 1), cache.logit_lens()[1])


@pytest.mark.parametrize("layout", ["40b", "rw", "mixtral"])
def test_the_formula(layout):
    bridge = TransformerBridge(family(layout))
    lens = TunedLens(bridge)
    W, b = torch.randn(32, 32), torch.randn(32)
    with torch.no_grad():
        lens.translators[1].weight.copy_(W)
        lens.translators[1].bias.copy_(b)
        _, cache = bridge.run_with_cache(tokens())
        x = cache["resid_pre", 1]
        # Through the model's own modules: the block is skipped and the norm reads what the lens says.
        model = bridge.original_model
        norm = model.model.norm if layout == "mixtral" else model.transformer.ln_f
        expected = model.lm_head(norm(x + x @ W.T + b))
        torch.testing.assert_close(lens.logits(x, 1), expected, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(lens.logits(cache)[1], expected, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(lens.logits(cache)[-1], cache["unembed.hook_out"], atol=1e-3, rtol=1e-4)


def test_the_divergence_is_pytorchs_and_the_sum_by_hand():
    p, q = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    found = divergence(p.log_softmax(-1), q)
    builtin = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(found, builtin)
    a, b = p.softmax(-1), q.softmax(-1)
    by_hand = [sum(float(x) * float((x / y).log()) for x, y in zip(a[i], b[i], strict=True)) for i in range(5)]
    torch.testing.assert_close(found, torch.tensor(by_hand).double())


def held_out_scores(bridge, lens):
    """KL(model || lens) and loss by a loop over texts, with bare softmaxes in float64."""
    kl, loss, count, predicted = torch.zeros(5), torch.zeros(5), 0, 0
    for text in HELD_OUT:
        ids = bridge.to_tokens(text)
        _, cache = bridge.run_with_cache(ids)
        p = cache["unembed.hook_out"][0].double().log_softmax(-1)
        with torch.no_grad():
            q = lens.logits(cache)[:, 0].double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(-1).sum(-1).float()
        loss -= q[:, :-1].gather(-1, ids[0, 1:].expand(5, -1)[..., None])[..., 0].sum(-1).float()
        count, predicted = count + ids.shape[1], predicted + ids.shape[1] - 1
    return kl / count, loss / predicted


def test_training_brings_every_layer_nearer_to_the_model(bridge, trained):
    kl, loss = held_out_scores(bridge, trained)
    plain_kl, plain_loss = held_out_scores(bridge, TunedLens(bridge))
    assert (kl[:4] < 0.7 * plain_kl[:4]).all() and (loss[:4] < plain_loss[:4]).all()
    assert kl[4].abs() < 1e-5
    scores = trained.evaluate(HELD_OUT, batch_size=5, tokens_at_once=17)
    for found, expected in (
        (scores.kl, kl),
        (scores.kl_logit_lens, plain_kl),
        (scores.cross_entropy, loss),
        (scores.cross_entropy_logit_lens, plain_loss),
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert "0_pre" in str(scores) and "<table>" in scores._repr_html_()


def test_muon_trains_too(bridge):
    lens = TunedLens(bridge)
    losses = lens.fit(TRAINING, epochs=2, optimizer="muon")
    scores = lens.evaluate(HELD_OUT)
    assert losses.shape == (16, 4) and (scores.kl[:4] < scores.kl_logit_lens[:4]).all()


def test_the_first_step_goes_down_the_gradient(bridge):
    """A step of AdamW from zero moves each number by lr against the sign of the KL's gradient."""
    batch = bridge.to_tokens(TRAINING[0])
    lens = TunedLens(bridge)
    losses = lens.fit(batch, batch_size=1, lr=1e-3, tokens_at_once=3)
    _, cache = bridge.run_with_cache(batch)
    p = cache["unembed.hook_out"][0].log_softmax(-1)
    for layer in range(4):
        W = torch.zeros(128, 128, requires_grad=True)
        x = cache["resid_pre", layer][0]
        q = bridge.original_model.lm_head(bridge.original_model.transformer.ln_f(x + x @ W.T)).log_softmax(-1)
        loss = (p.exp() * (p - q)).sum(-1).mean()
        loss.backward()
        assert float(losses[0, layer]) == pytest.approx(float(loss.detach()), rel=1e-4)
        clear = W.grad.abs() > 1e-4
        assert int(clear.sum()) > 1000
        moved = lens.translators[layer].weight.detach()
        torch.testing.assert_close(moved[clear], -1e-3 * W.grad[clear].sign(), atol=2e-6, rtol=2e-3)
    bridge.original_model.zero_grad()


def test_the_steps_grow_smaller_by_equal_amounts(bridge):
    """Four steps the same way go 1 + 3/4 + 1/2 + 1/4 = 2.5 times as far as one; four equal ones would go 4 times."""
    lens = TunedLens(bridge)
    lens.fit(bridge.to_tokens(TRAINING[0]), batch_size=1, epochs=4, lr=1e-5)
    assert 2.3e-5 < float(lens.translators[2].weight.detach().abs().quantile(0.9)) < 2.7e-5


def test_training_leaves_the_model_alone_and_is_repeatable(bridge):
    before = {name: value.clone() for name, value in bridge.original_model.state_dict().items()}
    first, second = TunedLens(bridge), TunedLens(bridge)
    a = first.fit(TRAINING[:16], batch_size=4, seed=3)
    b = second.fit(TRAINING[:16], batch_size=4, seed=3)
    other = TunedLens(bridge).fit(TRAINING[:16], batch_size=4, seed=4)
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert torch.equal(first.translators[2].weight, second.translators[2].weight)
    assert all(torch.equal(value, before[name]) for name, value in bridge.original_model.state_dict().items())
    assert all(parameter.grad is None for parameter in bridge.original_model.parameters())
    assert not any(point.has_hooks() for point in bridge.hook_points())


def test_padding_counts_for_nothing(bridge):
    texts = ["Mary and John went", "Mary and John went to the store, and Mary"]
    together = TunedLens(bridge).evaluate(texts, batch_size=2)
    alone = [TunedLens(bridge).evaluate([text]) for text in texts]
    lengths = torch.tensor([float(bridge.to_tokens(text).shape[1]) for text in texts])
    expected = sum(n * scores.kl for n, scores in zip(lengths, alone, strict=True)) / lengths.sum()
    torch.testing.assert_close(together.kl, expected, atol=1e-4, rtol=1e-4)
    expected = sum((n - 1) * s.cross_entropy for n, s in zip(lengths, alone, strict=True)) / (lengths - 1).sum()
    torch.testing.assert_close(together.cross_entropy, expected, atol=1e-4, rtol=1e-4)


def test_after_a_failure_the_lens_is_as_it_was(bridge, trained):
    before = {name: value.clone() for name, value in trained.translators.state_dict().items()}
    calls = []

    def poison(x, hook):
        calls.append(0)
        if len(calls) > 1:
            x[:] = torch.nan

    with pytest.raises(ValueError, match="the loss is"), bridge.hooks([("blocks.1.hook_resid_pre", poison)]):
        trained.fit(TRAINING[:16], batch_size=4)
    assert len(calls) == 2
    assert all(torch.equal(value, before[name]) for name, value in trained.translators.state_dict().items())
    assert all(parameter.grad is None for parameter in trained.translators.parameters())


def test_half_precision():
    bridge = TransformerBridge(falcon(dtype=torch.bfloat16, **{"new_decoder_architecture": True, "num_kv_heads": 2}))
    lens = TunedLens(bridge)
    ids = torch.randint(3, VOCAB, (8, 9))
    losses = lens.fit(ids, batch_size=2, epochs=6, lr=1e-2)
    assert (losses[-4:].mean(0) < losses[:4].mean(0)).all() and lens.translators[0].weight.dtype == torch.float32
    _, cache = bridge.run_with_cache(ids)
    assert torch.equal(TunedLens(bridge).logits(cache), cache.logit_lens())


# -- files ---------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(bridge, trained, tmp_path):
    trained.save(tmp_path / "lens")
    loaded = TunedLens.load(tmp_path / "lens", TransformerBridge.boot_transformers("tiny-falcon"))
    _, cache = bridge.run_with_cache("Mary and John")
    assert torch.equal(loaded.logits(cache), trained.logits(cache))
    assert sorted(path.name for path in (tmp_path / "lens").iterdir()) == ["lens.json", "lens.safetensors"]
    half = TunedLens.load(tmp_path / "lens", TransformerBridge.boot_transformers("tiny-falcon", dtype=torch.bfloat16))
    assert torch.equal(half.translators[1].weight, trained.translators[1].weight)


def test_a_lens_of_another_model_is_refused(bridge, trained, tmp_path):
    trained.save(tmp_path)
    with pytest.raises(ValueError, match="with n_layers=4, and this model has n_layers=3"):
        TunedLens.load(tmp_path, TransformerBridge.boot_transformers("tiny-mixtral"))
    twin = TransformerBridge.boot_transformers("tiny-falcon")
    with torch.no_grad():
        twin.original_model.lm_head.weight.copy_(torch.randn_like(twin.original_model.lm_head.weight))
    with pytest.raises(ValueError, match="are not this model's"):
        TunedLens.load(tmp_path, twin)
    twin = TransformerBridge.boot_transformers("tiny-falcon")
    with torch.no_grad():
        twin.original_model.transformer.ln_f.weight.mul_(1.5)
    with pytest.raises(ValueError, match="are not this model's"):
        TunedLens.load(tmp_path, twin)
    processed = TransformerBridge.boot_transformers("tiny-falcon")
    processed.process_weights()
    with pytest.raises(ValueError, match="processed or not"):
        TunedLens.load(tmp_path, processed)


def test_broken_files(bridge, trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no lens\.safetensors there"):
        TunedLens.load(tmp_path, bridge)
    trained.save(tmp_path)
    with pytest.raises(ValueError, match="lens.json' is a file, expected a directory"):
        trained.save(tmp_path / "lens.json" / "below")
    about = json.loads((tmp_path / "lens.json").read_text())
    (tmp_path / "lens.json").write_text(json.dumps({**about, "format": "other"}))
    with pytest.raises(ValueError, match="not of the format"):
        TunedLens.load(tmp_path, bridge)
    for name in ("lens.json", "lens.safetensors"):
        trained.save(tmp_path / f"broken {name}")
        (tmp_path / f"broken {name}" / name).write_text("{oops")
        with pytest.raises(ValueError, match="its files are not those of a tuned lens any more"):
            TunedLens.load(tmp_path / f"broken {name}", bridge)
    other = TunedLens(TransformerBridge(mixtral()))
    other.save(tmp_path / "small")
    (tmp_path / "small" / "lens.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="not those of this model's lens"):
        TunedLens.load(tmp_path / "small", bridge)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda lens: lens.fit([]), "got 0 texts"),
        (lambda lens: lens.fit(TRAINING, lr=0.0), "lr: got 0, expected a finite number above 0$"),
        (lambda lens: lens.fit(TRAINING, epochs=0), "epochs: got 0, expected 1 or more"),
        (lambda lens: lens.fit(TRAINING, optimizer="sgd"), "optimizer: got 'sgd'"),
        (lambda lens: lens.evaluate([]), "got 0 texts"),
        (lambda lens: lens.evaluate(torch.tensor([[5]])), "no text has two tokens"),
        (lambda lens: lens.logits(torch.ones(3), 0), r"stream: got .* of shape \[3\], expected a tensor \[..., 128\]"),
        (lambda lens: lens.logits(torch.ones(128), 5), "layer: got 5, expected -4 to 4 in a model of 4 layers"),
        (lambda lens: lens.logits(torch.ones(128)), "expected its layer"),
    ],
)
def test_what_is_refused(bridge, call, text):
    lens = TunedLens(bridge)
    with pytest.raises(ValueError, match=text):
        call(lens)
    assert not lens.translators[0].weight.any()


def test_one_text_is_not_taken_for_its_letters(bridge):
    for call in (TunedLens(bridge).fit, TunedLens(bridge).evaluate):
        with pytest.raises(TypeError, match="texts: got 'Mary and John'"):
            call("Mary and John")


def test_a_cache_and_a_layer(bridge):
    _, cache = bridge.run_with_cache("Mary")
    with pytest.raises(ValueError, match="a cache gives every layer"):
        TunedLens(bridge).logits(cache, 1)
