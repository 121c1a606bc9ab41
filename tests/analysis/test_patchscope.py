"""Patchscopes: against hooks written by hand; the identity changes nothing."""

import pytest
import torch

from tests.support import FAMILIES, VOCAB, family
from transformer_lens import TransformerBridge
from transformer_lens.analysis.lenses.patchscope import Patchscope, identity_prompt, stream_name

SOURCE = "When Alice and Tom went to the"
TARGET = "The ball is for Mary. The cup is for John. The ball is for"
MARY = 5


@pytest.fixture(scope="module")
def bridge():
    return TransformerBridge.boot_transformers("tiny-falcon")


@pytest.mark.parametrize("layout", FAMILIES)
def test_the_identity_changes_nothing_bit_for_bit(layout):
    bridge = TransformerBridge(family(layout))
    ids = torch.randint(3, VOCAB, (6,))
    for layer in range(3):
        for position in (0, 3, -1):
            assert torch.equal(Patchscope(bridge, ids, position).logits(ids, layer, position), bridge(ids))


@pytest.mark.parametrize("layout", FAMILIES)
def test_it_equals_bare_pytorch_hooks(layout):
    model = family(layout)
    bridge = TransformerBridge(family(layout))
    bridge.original_model.load_state_dict(model.state_dict())
    source, target = torch.randint(3, VOCAB, (1, 6)), torch.randint(3, VOCAB, (1, 9))
    with torch.no_grad():
        # hidden_states[1] is what enters block 1; it goes in where block 0 is entered.
        stream = model(source, output_hidden_states=True).hidden_states[1][0, 2]

        def write(module, args, kwargs):
            x = (args[0] if args else kwargs["hidden_states"]).clone()
            x[:, 7] = stream
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        blocks = model.base_model.layers if layout == "mixtral" else model.base_model.h
        handle = blocks[0].register_forward_pre_hook(write, with_kwargs=True)
        expected = model(target).logits
        handle.remove()
        found = Patchscope(bridge, target, position=-2, layer=0).logits(source, layer=1, position=2)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(target).logits)


@pytest.mark.parametrize("layer", [None, 0, 2, -1, 4])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_sweep_is_one_run_after_the_other(bridge, layer, batch_size):
    scope = Patchscope(bridge, TARGET, MARY, layer, mapping=lambda x: 1.5 * x)
    together = scope.sweep(SOURCE, position=2, batch_size=batch_size)
    assert together.shape == (5, 735)
    for number in range(5):
        alone = scope.logits(SOURCE, number, position=2)[0, -1]
        torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=1e-4)
    some = scope.sweep(SOURCE, position=2, layers=[3, -3])
    torch.testing.assert_close(some, together[[3, 1]], atol=1e-4, rtol=1e-4)


def test_the_target_says_which_name_the_stream_holds(bridge):
    for position, name in ((2, " Alice"), (4, " Tom")):
        logits = Patchscope(bridge, TARGET, MARY, layer=0).sweep(SOURCE, position=position, layers=[0])
        assert bridge.to_string(logits[0].argmax()) == name
    assert bridge.to_string(bridge(TARGET)[0, -1].argmax()) == " Mary"


def test_a_mapping_and_a_stream_of_ones_own(bridge):
    _, cache = bridge.run_with_cache(SOURCE)
    stream = cache["resid_pre", 2][0, 4]
    scope = Patchscope(bridge, TARGET, MARY, layer=1, mapping=lambda x: -x)
    expected = bridge.run_with_hooks(
        TARGET, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: put(x, MARY, -stream))]
    )
    assert torch.equal(scope.logits(SOURCE, 2, position=4), expected)
    assert torch.equal(scope.logits(stream, 2), expected)


def put(x, position, value):
    x[:, position] = value
    return x


@pytest.mark.parametrize("cached", [True, False])
def test_generation_is_greedy_decoding_of_the_patched_run(bridge, cached):
    scope = Patchscope(bridge, TARGET, MARY, layer=0)
    options = {"max_new_tokens": 4, "stop_at_eos": False, "use_past_kv_cache": cached}
    text = scope.generate(SOURCE, 0, 2, **options)
    ids = bridge.to_tokens(TARGET)
    for _ in range(4):
        logits = Patchscope(bridge, ids, MARY, layer=0).logits(SOURCE, 0, 2)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert text.startswith(TARGET + " Alice")
    if cached:
        assert scope.generate(SOURCE, 0, 2, **options, prefill_chunk_size=4) == text
    as_ids = Patchscope(bridge, bridge.to_tokens(TARGET), MARY, layer=0).generate(SOURCE, 0, 2, **options)
    assert torch.equal(as_ids, ids)


def test_a_few_shot_identity_prompt(bridge):
    prompt = identity_prompt([" book", " ball"], pair="{word}{word}", separator="", placeholder=" cup")
    assert prompt == " book book ball ball cup"
    stream = bridge.run_with_cache(SOURCE)[1]["resid_pre", 0][0, 2]
    expected = bridge.run_with_hooks(
        prompt, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: put(x, -1, stream))]
    )
    assert torch.equal(Patchscope(bridge, prompt).logits(SOURCE, 0, 2), expected)
    # Layer 0 at the last token is the embedding of the word: as if the word stood there.
    assert torch.equal(expected, bridge(prompt.replace("cup", "Alice")))


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda b: Patchscope(b, TARGET, 40), ValueError, "target position: got 40, expected -17 to 16"),
        (lambda b: Patchscope(b, TARGET, "last"), TypeError, "target position: got 'last'"),
        (lambda b: Patchscope(b, TARGET, 0, 5), ValueError, "target layer: got 5, expected -4 to 4"),
        (lambda b: Patchscope(b, [TARGET]), TypeError, "prompt: got a list, expected one text"),
        (lambda b: Patchscope(b, torch.ones(2, 3).long()), TypeError, "the token ids of one text"),
        (lambda b: Patchscope(b, TARGET).logits(SOURCE, 9), ValueError, "layer: got 9"),
        (lambda b: Patchscope(b, TARGET).logits(SOURCE, True), TypeError, "layer: got True"),
        (lambda b: Patchscope(b, TARGET).logits(SOURCE, 0, 30), ValueError, "source position: got 30"),
        (
            lambda b: Patchscope(b, TARGET).logits(torch.ones(3), 0),
            ValueError,
            r"of shape \[3\], expected a stream \[128\]",
        ),
        (
            lambda b: Patchscope(b, TARGET, mapping=lambda x: x[:3]).logits(SOURCE, 0),
            ValueError,
            r"returned .* of shape \[3\]",
        ),
        (lambda b: Patchscope(b, TARGET).sweep(SOURCE, layers=[]), ValueError, "got 0 layers"),
        (lambda b: identity_prompt([]), ValueError, "expected one word or more"),
    ],
)
def test_what_is_refused(bridge, make, error, text):
    with pytest.raises(error, match=text):
        make(bridge)


def test_stream_names(bridge):
    assert [stream_name(bridge, layer) for layer in (0, -1, 4)] == [
        "blocks.0.hook_resid_pre",
        "blocks.3.hook_resid_pre",
        "blocks.3.hook_resid_post",
    ]
