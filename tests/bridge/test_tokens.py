"""Text to tokens and back, and padding that changes no row's answer."""

import numpy as np
import pytest
import torch

from tests.bridge.texts import tokenizer
from tests.support import family
from transformer_lens import TransformerBridge

PAD, BOS, EOS, UNK = range(4)
TEXT = "the cat sat on the mat"
LONG, SHORT = "the dog ran on the mat and sat", "John went"


def with_text(name: str = "rw", *, config: dict | None = None, **changes) -> TransformerBridge:
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return TransformerBridge(family(name, **{**special, **(config or {})}), tokenizer(**changes))


@pytest.fixture
def bridge() -> TransformerBridge:
    return with_text()


# -- padding --------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("name", ["40b", "7b", "rw-rope", "rw", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["text", "tokens", "mask"])
def test_every_row_of_a_padded_batch_gives_the_answer_it_gives_alone(name, side, how):
    bridge = with_text(name)
    texts = [SHORT, LONG, "Mary"]
    ids = bridge.to_tokens(texts, padding_side=side)
    if how == "text":
        logits, cache = bridge.run_with_cache(texts, padding_side=side)
    elif how == "tokens":
        logits, cache = bridge.run_with_cache(ids, padding_side=side)
    else:
        logits, cache = bridge.run_with_cache(ids, attention_mask=(ids != PAD).long())
    for row, text in enumerate(texts):
        alone, alone_cache = bridge.run_with_cache(text)
        length = alone.shape[1]
        where = slice(-length, None) if side == "left" else slice(length)
        # A masked attention kernel and another batch size round differently.
        assert torch.allclose(logits[row, where], alone[0], rtol=1e-4, atol=1e-4)
        stream = cache["resid_post", -1][row, where]
        assert torch.allclose(stream, alone_cache["resid_post", -1][0], rtol=1e-4, atol=1e-4)


def test_padding_matters_to_the_model():
    # The test above can fail: without the positions a left-padded row gives another answer.
    bridge = with_text("40b")
    ids = bridge.to_tokens([SHORT, LONG], padding_side="left")
    naive = bridge.original_model(ids).logits
    alone = bridge(SHORT)
    assert (naive[0, -1] - alone[0, -1]).abs().max() > 0.01


def test_the_tokenizer_says_which_side():
    left, right = with_text(padding_side="left"), with_text(padding_side="right")
    ids = [BOS, *right.to_tokens("Mary", prepend_bos=False)[0].tolist()]
    assert left.to_tokens(["Mary", LONG])[0].tolist() == [PAD] * 7 + ids
    assert right.to_tokens(["Mary", LONG])[0].tolist() == ids + [PAD] * 7
    assert left.to_tokens(["Mary", LONG], padding_side="right")[0].tolist() == ids + [PAD] * 7
    assert left.tokenizer.padding_side == "left"


def test_padding_with_the_first_token_gives_every_row_its_answer():
    bridge = with_text("40b", pad_token="<s>", padding_side="left")
    logits = bridge(bridge.to_tokens([SHORT, LONG]))
    assert torch.allclose(logits[0, -3:], bridge(SHORT)[0], rtol=1e-4, atol=1e-4)  # float32 rounding


def test_without_a_pad_token_the_end_token_pads():
    bridge = with_text(without=("pad_token",))
    assert bridge.to_tokens(["Mary", "Mary went"], prepend_bos=False)[0].tolist()[1] == EOS


# -- to_tokens ------------------------------------------------------------------------------------


def test_to_tokens(bridge):
    words = bridge.tokenizer(TEXT)["input_ids"]
    assert bridge.to_tokens(TEXT).tolist() == [[BOS, *words]]
    assert bridge.to_tokens(TEXT, prepend_bos=False).tolist() == [words]
    assert bridge.to_tokens([TEXT]).tolist() == [[BOS, *words]]
    assert bridge.to_tokens(("the", "cat"), prepend_bos=False).shape == (2, 1)
    assert bridge.to_tokens(TEXT).dtype == torch.int64
    assert bridge.to_tokens("unheard").tolist() == [[BOS, UNK]]
    assert bridge.to_tokens("").tolist() == [[BOS]]
    bridge.cfg.default_prepend_bos = False
    assert bridge.to_tokens(TEXT).tolist() == [words]
    assert bridge.to_tokens(TEXT, prepend_bos=True).tolist() == [[BOS, *words]]


def test_the_forward_prepends_as_to_tokens_does(bridge):
    assert torch.equal(bridge(TEXT), bridge(bridge.to_tokens(TEXT)))
    assert torch.equal(bridge(TEXT, prepend_bos=False), bridge(bridge.to_tokens(TEXT, prepend_bos=False)))
    _, cache = bridge.run_with_cache(TEXT, prepend_bos=False)
    assert cache["embed"].shape[1] == 6


def test_truncation_keeps_the_first_tokens():
    bridge = with_text(config={"max_position_embeddings": 4})
    assert bridge.cfg.n_ctx == 4
    whole = bridge.to_tokens(TEXT, truncate=False)
    assert whole.shape == (1, 7)
    with pytest.warns(UserWarning, match="text is cut to its first 4 tokens"):
        assert torch.equal(bridge.to_tokens(TEXT), whole[:, :4])


def test_tokens_go_where_the_model_is(bridge):
    bridge.to("meta")
    assert bridge.to_tokens(TEXT).device.type == "meta"
    assert bridge.to_tokens(TEXT, move_to_device=False).device.type == "cpu"


def test_without_a_first_token():
    bare = with_text("mixtral", without=("bos_token",), config={"bos_token_id": None})
    words = bare.tokenizer(TEXT)["input_ids"]
    assert bare.to_tokens(TEXT).tolist() == [words]
    with pytest.raises(ValueError, match="prepend_bos: neither the tokenizer nor the model's config names"):
        bare.to_tokens(TEXT, prepend_bos=True)
    by_config = with_text("mixtral", without=("bos_token",))
    assert by_config.to_tokens(TEXT).tolist() == [[BOS, *words]]


def test_a_declared_first_token_beyond_the_tokenizer_is_not_used():
    # Published Falcon configs declare token 11 or 1, whatever tokenizer they meet.
    bridge = with_text("mixtral", without=("bos_token",), config={"bos_token_id": 60})
    assert bridge.token_adapter.bos is None


def test_a_list_of_end_tokens_in_the_config():
    bridge = with_text("mixtral", without=("eos_token",), config={"eos_token_id": [EOS, 5]})
    assert bridge.token_adapter.eos == EOS


def test_texts_that_cannot_be_tokenized(bridge):
    with pytest.raises(ValueError, match="texts: got an empty list"):
        bridge.to_tokens([])
    with pytest.raises(TypeError, match="texts: got int in the list, expected strings"):
        bridge.to_tokens(["the", 5])
    with pytest.raises(ValueError, match="padding_side: got 'middle', expected 'left' or 'right'"):
        bridge.to_tokens(TEXT, padding_side="middle")
    with pytest.raises(ValueError, match="texts: they hold no tokens"):
        bridge.to_tokens("", prepend_bos=False)
    nothing = ("pad_token", "eos_token", "bos_token")
    none = with_text("mixtral", without=nothing, config={"bos_token_id": None, "eos_token_id": None})
    with pytest.raises(ValueError, match="texts of different lengths need padding"):
        none.to_tokens(["the", "the cat"])
    assert none.to_tokens(["the", "cat"]).shape == (2, 1)


# -- and back -------------------------------------------------------------------------------------


def test_to_string(bridge):
    ids = bridge.to_tokens(TEXT, prepend_bos=False)
    assert bridge.to_string(ids) == [TEXT]
    assert bridge.to_string(ids[0]) == TEXT
    assert bridge.to_string(ids[0].tolist()) == TEXT
    assert bridge.to_string(ids[0].numpy()) == TEXT
    assert bridge.to_string(list(ids[0])) == TEXT
    # Words stand behind a space, and one number is a token in the middle of a text.
    assert bridge.to_string(int(ids[0, 1])) == bridge.to_string(ids[0, 1]) == " cat"
    assert bridge.to_string(bridge.to_tokens("cat")) == ["<s> cat"]
    assert bridge.to_string(torch.cat([ids, ids])) == [TEXT, TEXT]
    with pytest.raises(ValueError, match=r"to_string: got token ids of shape \[1, 1, 6\], expected one or two axes"):
        bridge.to_string(ids[None])


def test_to_str_tokens(bridge):
    words = ["the", " cat", " sat", " on", " the", " mat"]
    assert bridge.to_str_tokens(TEXT) == ["<s>", *words]
    assert bridge.to_str_tokens(TEXT, prepend_bos=False) == words
    assert bridge.to_str_tokens([TEXT, "Mary"], prepend_bos=False) == [words, ["Mary"]]
    ids = bridge.to_tokens(TEXT, prepend_bos=False)
    for same in (ids, ids[0], ids[0].numpy(), ids[0].tolist(), np.asarray(ids)):
        assert bridge.to_str_tokens(same) == [" the", *words[1:]]
    with pytest.raises(ValueError, match=r"to_str_tokens: got token ids of shape \[2, 6\], expected one sequence"):
        bridge.to_str_tokens(torch.cat([ids, ids]))


def test_to_single_token(bridge):
    assert bridge.to_single_token("Mary") == bridge.tokenizer.convert_tokens_to_ids("Mary")
    assert bridge.to_string(bridge.to_single_token("Mary")) == bridge.to_single_str_token(13) == " Mary"
    with pytest.raises(ValueError, match=r"'the cat' is 2 tokens, \[' the', ' cat'\], expected one"):
        bridge.to_single_token("the cat")


def test_get_token_position(bridge):
    assert bridge.get_token_position("the", TEXT, prepend_bos=False) == 0
    assert bridge.get_token_position("the", TEXT) == 1
    assert bridge.get_token_position("the", TEXT, mode="last", prepend_bos=False) == 4
    ids = bridge.to_tokens(TEXT)
    assert bridge.get_token_position("cat", ids) == bridge.get_token_position(int(ids[0, 2]), ids[0]) == 2
    with pytest.raises(ValueError, match="token 'dog' does not occur in"):
        bridge.get_token_position("dog", TEXT)
    with pytest.raises(ValueError, match="mode: got 'middle', expected 'first' or 'last'"):
        bridge.get_token_position("the", TEXT, mode="middle")


def test_without_a_tokenizer_text_is_refused():
    bridge = TransformerBridge(family("rw"))
    for method in (bridge.to_tokens, bridge.to_str_tokens, bridge.to_single_token):
        with pytest.raises(ValueError, match="this bridge has no tokenizer, so it takes token ids and not text"):
            method(TEXT)
    with pytest.raises(ValueError, match="this bridge has no tokenizer"):
        bridge.to_string([5])


def test_the_tokenizer_is_left_as_it_is():
    words = tokenizer(without=("pad_token",))
    before = (words.pad_token, words.padding_side, len(words), words(TEXT)["input_ids"])
    bridge = TransformerBridge(family("rw"), words)
    bridge.to_tokens([SHORT, LONG], padding_side="left")
    bridge([SHORT, LONG])
    assert (words.pad_token, words.padding_side, len(words), words(TEXT)["input_ids"]) == before
