"""LLaMA's and Falcon's kinds of tokenizers: pieces, the token of a text in a text, BOS, chat, what is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedTokenizerFast

from tests.support import family
from tests.tokenizer_models import LLAMA_FORMS, TEXT, falcon, llama
from transformer_lens import TransformerBridge
from transformer_lens.analysis.attribution import direct_logit_attribution
from transformer_lens.analysis.experts import expert_logit_attribution
from transformer_lens.cli.patch import sweep
from transformer_lens.data.generate import padded_prompts
from transformer_lens.model_bridge.calls.tokens import TextReader, ids_after, single_token
from transformer_lens.utilities import test_prompt as scored
from transformer_lens.viz import logit_waterfall

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    **{f"llama {form}": lambda form=form: llama(form) for form in LLAMA_FORMS},
    "falcon": falcon,
}
MARY = {"falcon": "ĠMary"}
"""What the token of " Mary" is called in the vocabulary; LLaMA's is ▁Mary."""
BESIDE = {"falcon": "Mary"}
every_kind = pytest.mark.parametrize("kind", KINDS)
FIRST, SECOND = "When Mary and John went to the store,", " John gave a drink to"
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def made(kind: str) -> TransformerBridge:
    """A random model with a tokenizer of this kind: Falcon's end token is the BOS of its config."""
    torch.manual_seed(0)
    words = KINDS[kind]()
    bos, eos = (0, 0) if kind == "falcon" else (1, 2)
    name = "40b" if kind == "falcon" else "mixtral"
    return TransformerBridge(family(name, vocab_size=len(words), bos_token_id=bos, eos_token_id=eos), words)


@pytest.fixture(scope="module")
def bridges() -> dict[str, TransformerBridge]:
    return {kind: made(kind) for kind in KINDS}


def mary(kind: str, words: PreTrainedTokenizerFast) -> int:
    return words.convert_tokens_to_ids(MARY.get(kind, "▁Mary"))


# -- pieces -----------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        " Mary",
        "Mary",
        "  two  spaces ",
        "\n a\n\nb",
        "é😀 naïve\n",
        "a\ufffd\ufffd😀\ufffd",
        "Maryxyz 12345",
        " ",
    ],
)
def test_pieces_join_to_the_text(bridges, kind, text):
    bridge = bridges[kind]
    assert "".join(bridge.to_str_tokens(text, prepend_bos=False)) == text
    first = "<|endoftext|>" if kind == "falcon" else "<s>"
    assert "".join(bridge.to_str_tokens(text)) == first + text
    assert len(bridge.to_str_tokens(text)) == bridge.to_tokens(text).shape[1]


few = st.one_of(st.sampled_from(" \nMaryé😀\ufffd"), st.characters(exclude_characters="▁", codec="utf-8"))


@every_kind
@settings(max_examples=60, deadline=None)
@given(text=st.text(few, max_size=15))
def test_pieces_of_any_text_join_to_it(bridges, kind, text):
    assert "".join(bridges[kind].to_str_tokens(text, prepend_bos=False)) == text


@every_kind
def test_pieces_of_a_text_that_is_cut(kind):
    bridge, text = made(kind), " Mary and" * 40
    with pytest.warns(UserWarning, match="text is cut to its first 64 tokens, cfg.n_ctx, of"):
        pieces = bridge.to_str_tokens(text)
    ids = bridge.to_tokens(text)  # said once
    assert len(pieces) == ids.shape[1] == 64 and text.startswith("".join(pieces[1:]))


@every_kind
def test_pieces_are_where_the_words_are(bridges, kind):
    pieces = bridges[kind].to_str_tokens("and Mary and John", prepend_bos=False)
    assert pieces[-3:] == [" Mary", " and", " John"] and "".join(pieces[:-3]) == "and"


@pytest.mark.parametrize("form", LLAMA_FORMS)
def test_pieces_of_a_chat(form):
    bridge = TransformerBridge(family("mixtral", vocab_size=len(llama())), llama(form))
    text = "[INST] Mary and[/INST]John went</s>"
    assert "".join(bridge.to_str_tokens("<s>" + text)) == "<s>" + text


@every_kind
def test_ids_show_each_token_s_own_text(bridges, kind):
    bridge = bridges[kind]
    some = [bridge.to_single_token(word) for word in (" Mary", " and", " John")]
    for ids in (some, torch.tensor(some), torch.tensor([some])):
        assert bridge.to_str_tokens(ids) == [" Mary", " and", " John"]
    assert [bridge.to_string(token) for token in some] == [" Mary", " and", " John"]
    assert [bridge.to_single_str_token(token) for token in some] == [" Mary", " and", " John"]
    # A sequence reads as the tokenizer reads it.
    assert bridge.to_string(some) == bridge.tokenizer.decode(some)
    assert bridge.to_string([some, some[:1]]) == [bridge.tokenizer.decode(some), bridge.tokenizer.decode(some[:1])]


@pytest.mark.parametrize("kind", ["falcon", "llama first"])
def test_a_character_is_held_back_until_it_is_whole(kind):
    words = KINDS[kind]()
    reader = TextReader(words)
    assert [reader.add(token) for token in ids_after(words, "aß!")] == ["a", "", "ß", "!"]
    assert [reader.add(token) for token in ids_after(words, "é")[:1]] + [reader.rest()] == ["", "\ufffd"]
    # No character has more than four bytes: what will never be whole is not kept for ever.
    lone = ids_after(words, "é")[:1]
    assert [reader.add(token) for token in lone * 4] == ["", "", "", "\ufffd" * 4]


# -- the token of a text in the middle of a text -----------------------------------------------------


@every_kind
def test_the_token_of_a_text(bridges, kind):
    bridge = bridges[kind]
    wanted, beside = mary(kind, bridge.tokenizer), bridge.tokenizer.convert_tokens_to_ids("Mary")
    assert bridge.to_single_token(" Mary") == wanted
    assert bridge.to_single_token("Mary") == beside != wanted
    assert bridge.to_tokens(TEXT)[0].tolist().count(wanted) == 1
    assert bridge.to_answer_tokens(" Mary and") == [wanted, bridge.to_single_token(" and")]
    assert single_token(bridge.tokenizer, " Mary") == wanted
    for odd in ("\n", " ", ".", "a"):
        assert bridge.to_string(bridge.to_single_token(odd)) == odd
    with pytest.raises(ValueError, match=r"' Maryxyz' is 4 tokens, \[' Mary', 'x', 'y', 'z'\], expected one"):
        bridge.to_single_token(" Maryxyz")


@every_kind
def test_where_a_token_stands(bridges, kind):
    bridge = bridges[kind]
    text = "Mary and Mary and"
    ids, wanted = bridge.to_tokens(text), mary(kind, bridge.tokenizer)
    places = (ids[0] == wanted).nonzero().flatten().tolist()
    assert bridge.get_token_position(" Mary", text, mode="last") == places[-1] == 3
    assert bridge.get_token_position(" Mary", ids) == bridge.get_token_position(wanted, text) == places[0]
    # In front of everything the word has another form, or the same one without its space.
    assert bridge.get_token_position("Mary", text) == bridge.get_token_position("Mary", text, mode="last") == 1
    with pytest.raises(ValueError, match="' Maryxyz' is 4 tokens"):
        bridge.get_token_position(" Maryxyz", text)
    with pytest.raises(ValueError, match="token ' John' does not occur in"):
        bridge.get_token_position(" John", text)


def of_patch(bridge: TransformerBridge, token: Any) -> torch.Tensor:
    text = token if isinstance(token, str) else bridge.to_single_str_token(token)
    other = " and" if isinstance(token, str) else bridge.to_single_str_token(bridge.to_single_token(" and"))
    return sweep(bridge, FIRST, FIRST.replace("Mary and John", "John and Mary"), text, other).restored


TOOLS: dict[str, Callable[[TransformerBridge, Any], torch.Tensor]] = {
    "directions": lambda bridge, token: bridge.tokens_to_residual_directions(token),
    "several directions": lambda bridge, token: bridge.tokens_to_residual_directions([token, token]),
    "logit_attrs": lambda bridge, token: (cache := bridge.run_with_cache(TEXT)[1]).logit_attrs(
        cache.decompose_resid(), token
    ),
    "direct": lambda bridge, token: direct_logit_attribution(bridge, bridge.run_with_cache(TEXT)[1], token).values,
    "direct wrong": lambda bridge, token: (
        direct_logit_attribution(bridge, bridge.run_with_cache(TEXT)[1], 5, token).values
    ),
    "experts": lambda bridge, token: expert_logit_attribution(bridge, TEXT, token),
    "waterfall": lambda bridge, token: torch.as_tensor(logit_waterfall(bridge.run_with_cache(TEXT)[1], token).values),
    "patch": of_patch,
}
"""Every tool that is asked about an answer."""


@pytest.mark.core
@every_kind
@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_means_the_same_token(bridges, kind, tool):
    bridge = bridges[kind]
    if tool == "experts" and kind == "falcon":
        return  # a dense model
    by_id = TOOLS[tool](bridge, mary(kind, bridge.tokenizer))
    assert torch.equal(TOOLS[tool](bridge, " Mary"), by_id)
    assert not torch.allclose(TOOLS[tool](bridge, " John"), by_id)
    with pytest.raises(ValueError, match=r"' Maryxyz' is 4 tokens, \[' Mary', 'x', 'y', 'z'\], expected one"):
        TOOLS[tool](bridge, " Maryxyz")


@every_kind
def test_directions_are_columns_of_the_unembedding(bridges, kind):
    bridge = bridges[kind]
    column = bridge.original_model.lm_head.weight[mary(kind, bridge.tokenizer)]
    assert torch.equal(bridge.tokens_to_residual_directions(" Mary"), column)


@every_kind
def test_prompts_are_scored_by_the_token_that_follows(bridges, kind):
    bridge = bridges[kind]
    ids = bridge.to_tokens(FIRST)
    with torch.no_grad():
        chances = bridge.original_model(ids).logits[0, -1].softmax(-1)
    wanted = mary(kind, bridge.tokenizer)
    rank = int((chances > chances[wanted]).sum())
    for answer in ("Mary", " Mary"):
        first = scored(FIRST, answer, bridge).splitlines()[0]
        assert first == f"' Mary': rank {rank}, probability {chances[wanted]:.2%}"
    assert scored(FIRST, "John", bridge) != scored(FIRST, "Mary", bridge)


@every_kind
def test_an_answer_of_several_tokens_is_scored_as_a_sequence(bridges, kind):
    bridge = bridges[kind]
    ids, answer = bridge.to_tokens(FIRST)[0].tolist(), bridge.to_answer_tokens(" Maryx")
    chances = []
    for place, token in enumerate(answer):
        logits = bridge.original_model(torch.tensor([ids + answer[:place]])).logits[0, -1]
        chances.append(float(logits.softmax(-1)[token].detach()))
    lines = scored(FIRST, "Maryx", bridge, top_k=2).splitlines()
    assert len(answer) == 2 and len(lines) == 5
    assert [line.rpartition(" ")[2] for line in lines[:2]] == [f"{chance:.2%}" for chance in chances]
    assert lines[0].startswith("' Mary': rank ") and lines[1].startswith("'x': rank ")
    assert lines[2] == f"' Maryx': 2 tokens, probability of all of them {chances[0] * chances[1]:.2%}"


# -- BOS once, and none in the middle ----------------------------------------------------------------


@every_kind
def test_a_text_that_begins_with_bos_gets_no_other(bridges, kind):
    bridge = bridges[kind]
    first = "<|endoftext|>" if kind == "falcon" else "<s>"
    bos = bridge.token_adapter.bos
    for prepend in (None, True, False):
        assert bridge.to_tokens(first + TEXT, prepend_bos=prepend)[0].tolist().count(bos) == 1
    ids = torch.tensor([bridge.tokenizer(first + TEXT, add_special_tokens=False)["input_ids"]])
    assert torch.equal(bridge.to_tokens(first + TEXT), ids)
    assert torch.equal(bridge(first + TEXT), bridge.original_model(ids).logits)
    assert torch.equal(bridge.generate(first + TEXT, return_type="tokens", **GREEDY)[:, : ids.shape[1]], ids)
    both = bridge.to_tokens([first + "Mary", "Mary"], padding_side="left")
    assert both[0].tolist().count(bos) == 1 and both[1].tolist().count(bos) == 1 + (both.shape[1] - 2) * (
        kind == "falcon"
    )


@pytest.mark.core
@every_kind
def test_the_second_half_of_a_text_goes_on_from_the_first(bridges, kind):
    bridge = bridges[kind]
    whole = bridge.to_tokens(FIRST + SECOND)
    cache = DynamicCache(config=bridge.original_model.config)
    begun = bridge(FIRST, past_key_values=cache)
    rest = bridge(SECOND, past_key_values=cache)
    expected = bridge.original_model(whole).logits
    assert begun.shape[1] + rest.shape[1] == whole.shape[1]
    torch.testing.assert_close(torch.cat([begun, rest], 1), expected, rtol=1e-4, atol=1e-4)  # float32 kernels
    # A cache that holds nothing yet is the beginning, and whoever asks for BOS gets it.
    assert torch.equal(bridge(FIRST, past_key_values=DynamicCache()), bridge(FIRST))
    assert bridge(SECOND, past_key_values=cache, prepend_bos=True).shape[1] > rest.shape[1]


MESSAGES = [{"role": "user", "content": "When Mary went"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "to John"}]


@pytest.mark.core
@pytest.mark.parametrize("form", LLAMA_FORMS)
def test_chat_templates(bridges, form):
    bridge = bridges[f"llama {form}"]
    text = bridge.tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    ids = torch.tensor([bridge.tokenizer.apply_chat_template(MESSAGES, tokenize=True)["input_ids"]])
    assert ids[0].tolist().count(1) == 1 and text.startswith("<s>[INST]")
    assert torch.equal(bridge.to_tokens(text), ids) and torch.equal(bridge.to_tokens(MESSAGES), ids)
    assert torch.equal(bridge(MESSAGES), bridge.original_model(ids).logits)
    assert bridge.to_str_tokens(MESSAGES) == bridge.to_str_tokens(text)
    out = bridge.generate(MESSAGES, **GREEDY)
    assert out == bridge.generate(text, **GREEDY) and out.startswith(text)
    assert "".join(bridge.generate_stream(MESSAGES, **GREEDY)) == out[len(text) :]
    two = bridge.to_tokens([MESSAGES, ANSWERED], padding_side="right")
    answered = bridge.tokenizer.apply_chat_template(ANSWERED, tokenize=True)["input_ids"]
    assert two[0, : ids.shape[1]].tolist() == ids[0].tolist() and two[1].tolist() == answered
    assert isinstance(bridge.generate([MESSAGES], **GREEDY), list)


def test_a_template_says_whether_there_is_a_bos_and_how_an_answer_begins():
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    words = llama("first", chat_template=template)
    bridge = TransformerBridge(family("mixtral", vocab_size=len(words)), words)
    for messages, text in (
        (MESSAGES, "user: When Mary went\nassistant:"),
        (ANSWERED, "user: When Mary went\nassistant: to John\n"),
    ):
        ids = words(text, add_special_tokens=False)["input_ids"]
        assert bridge.to_tokens(messages)[0].tolist() == ids
        assert bridge.to_tokens(messages, prepend_bos=True)[0].tolist() == [1, *ids]


def test_messages_that_are_refused(bridges):
    with pytest.raises(ValueError, match="messages: this tokenizer has no chat template; set bridge.tokenizer.chat"):
        bridges["falcon"].to_tokens(MESSAGES)
    bridge = bridges["llama first"]
    with pytest.raises(ValueError, match="the tokenizer's chat template refuses them: roles are user and assistant"):
        bridge([*MESSAGES, {"role": "judge", "content": "no"}])
    with pytest.raises(ValueError, match="messages: number 1 is {'content': 'Mary'}, expected"):
        bridge.to_tokens([*MESSAGES, {"content": "Mary"}])
    for wrong in ([MESSAGES, "Mary"], [MESSAGES, []], [*MESSAGES, "Mary"]):
        with pytest.raises(ValueError, match="messages: (got|number 1 is) ('Mary'|\\[\\]), expected"):
            bridge.generate(wrong)
    with pytest.raises(TypeError, match="input: got BatchEncoding, expected a string, a list of strings, token ids"):
        bridge(bridge.tokenizer("Mary"))


def test_evaluation_reads_any_tokenizer():
    for words in (llama(), falcon()):
        tokens, last = padded_prompts(words, ["Mary", TEXT])
        front = [] if words.bos_token_id is None else [words.bos_token_id]
        assert tokens[0, : last[0] + 1].tolist() == front + words("Mary", add_special_tokens=False)["input_ids"]
        assert last[1] == tokens.shape[1] - 1


# -- what is generated -------------------------------------------------------------------------------


@every_kind
def test_a_prompt_comes_back_as_it_was_written(bridges, kind):
    bridge = bridges[kind]
    special = "<|endoftext|>" if kind == "falcon" else "[INST] Mary[/INST]</s>"
    prompts = ["Mary", " Mary ", f"{special} and John", "é😀"]
    for prompt, out in zip(prompts, bridge.generate(prompts, **GREEDY), strict=True):
        alone = bridge.generate(prompt, **GREEDY)
        assert out.startswith(prompt) and alone.startswith(prompt)
        assert "".join(bridge.generate_stream(prompt, **GREEDY)) == alone[len(prompt) :]


@pytest.mark.core
@every_kind
def test_what_is_added_is_the_text_of_the_new_tokens(bridges, kind):
    bridge = bridges[kind]
    bare, words = bridge.original_model, bridge.tokenizer
    ids = bridge.to_tokens(FIRST)
    new = bare.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0, ids.shape[1] :]
    # What the tokenizer itself makes of the whole text; the prompt ends in a plain token.
    read = [words.decode(some, skip_special_tokens=True) for some in (ids[0], torch.cat([ids[0], new]))]
    assert read[0] == FIRST and read[1].startswith(FIRST)
    assert bridge.generate(FIRST, **GREEDY) == read[1]
    assert bridge.generate(ids, return_type="str", **GREEDY) == read[1]


@every_kind
def test_special_tokens_are_left_out_of_what_is_added_alone(bridges, kind):
    bridge = bridges[kind]
    eos = bridge.token_adapter.eos

    def favour(logits, hook):
        logits[..., eos] = 1e4

    special = "<|endoftext|>" if kind == "falcon" else "</s>"
    with bridge.hooks([("unembed.hook_out", favour)]):
        out = bridge.generate(f"Mary{special} and", **{**GREEDY, "max_new_tokens": 2})
    assert out == f"Mary{special} and"


# -- a tokenizer that changes ------------------------------------------------------------------------


def test_another_tokenizer_takes_effect_at_once():
    bridge = made("llama first")
    size, other = len(bridge.tokenizer), falcon()
    before = bridge.to_tokens(TEXT)
    bridge.tokenizer = other
    ids = other(TEXT)["input_ids"]
    assert bridge.tokenizer is other and bridge.to_tokens(TEXT, prepend_bos=False)[0].tolist() == ids
    assert torch.equal(bridge(TEXT, prepend_bos=False), bridge.original_model(torch.tensor([ids])).logits)
    bridge.tokenizer = None
    assert bridge.token_adapter is None
    with pytest.raises(ValueError, match="this bridge has no tokenizer"):
        bridge.to_tokens(TEXT)
    with pytest.raises(ValueError, match="input: got text, and this bridge has no tokenizer"):
        bridge(TEXT)
    bridge.tokenizer = llama("first")
    assert torch.equal(bridge.to_tokens(TEXT), before) and len(bridge.tokenizer) == size


@pytest.mark.parametrize("wrong", ["gpt2", 5, llama().backend_tokenizer])
def test_what_is_no_tokenizer_is_refused(wrong):
    bridge = made("falcon")
    before = bridge.tokenizer
    with pytest.raises(TypeError, match=f"tokenizer: got {type(wrong).__name__}, expected one of transformers' tok"):
        bridge.tokenizer = wrong
    with pytest.raises(TypeError, match="tokenizer: got "):
        TransformerBridge(bridge.original_model, wrong)
    assert bridge.tokenizer is before


@pytest.mark.core
def test_special_tokens_are_read_when_they_are_needed():
    words = llama("first")
    bridge = TransformerBridge(family("mixtral", vocab_size=len(words), bos_token_id=1, eos_token_id=2), words)
    adapter = bridge.token_adapter
    assert (adapter.bos, adapter.eos, adapter.pad) == (1, 2, 2)
    assert bridge.to_tokens(["Mary", "Mary and"], padding_side="right")[0, -1] == 2
    words.pad_token, words.bos_token, words.eos_token = "<unk>", "[INST]", "[/INST]"
    assert (adapter.bos, adapter.eos, adapter.pad) == (3, 4, 0)
    ids = bridge.to_tokens(["Mary", "Mary and"], padding_side="right")
    assert ids[0].tolist() == [3, mary("llama", words), 0]
    # And so the padding is known as padding: each row gives the answer it gives alone.
    torch.testing.assert_close(bridge(ids)[0, :2], bridge("Mary")[0], rtol=1e-4, atol=1e-4)
    left = bridge.to_tokens(["Mary", "Mary and"], padding_side="left")
    torch.testing.assert_close(bridge(left, padding_side="left")[0, 1:], bridge("Mary")[0], rtol=1e-4, atol=1e-4)
    words.eos_token = None
    assert adapter.eos == bridge.original_model.config.eos_token_id == 2
    bridge.original_model.config.eos_token_id = 3
    assert adapter.eos == 3


def test_an_ordinary_token_that_a_config_declares_is_no_bos():
    """Falcon's configs say 1 or 11, whatever those are in the tokenizer."""
    bridge = TransformerBridge(family("7b", vocab_size=len(falcon()), bos_token_id=1, eos_token_id=0), falcon())
    assert (bridge.token_adapter.bos, bridge.token_adapter.eos) == (None, 0)
    assert bridge.to_tokens(TEXT)[0].tolist() == bridge.tokenizer(TEXT)["input_ids"]
    assert "".join(bridge.to_str_tokens(TEXT)) == TEXT


def test_a_tokenizer_of_another_model_is_refused():
    bridge = TransformerBridge(family("mixtral"), llama())
    with pytest.raises(ValueError, match="the tokenizer makes token .* of them, and the model has 61 tokens"):
        bridge("Mary and John")


# -- what is no text and no token --------------------------------------------------------------------

REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("to_tokens", 5, TypeError, "input: got int, expected"),
    ("to_tokens", None, TypeError, "input: got NoneType, expected"),
    ("to_tokens", [], ValueError, "texts: got an empty list"),
    ("to_tokens", ["Mary", None], TypeError, "texts: got NoneType in the list"),
    ("to_tokens", b"Mary", TypeError, "input: got bytes"),
    ("to_tokens", torch.tensor([5]), TypeError, "input: got Tensor"),
    ("to_string", "Mary", TypeError, "to_string: got str, expected token ids"),
    ("to_string", None, TypeError, "to_string: got NoneType, expected token ids"),
    ("to_string", [1.5], TypeError, "to_string: got a list of float, expected token ids"),
    ("to_string", torch.ones(2), TypeError, "to_string: got torch.float32, expected token ids"),
    ("to_string", torch.ones(2, dtype=torch.bool), TypeError, "to_string: got torch.bool"),
    ("to_string", [-1], ValueError, "tokens: got -1, expected 0 to"),
    ("to_string", 10**9, ValueError, "tokens: got 1000000000, expected 0 to"),
    ("to_string", [[[5], [6]]], ValueError, r"to_string: got token ids of shape \[2, 1\], expected one sequence"),
    ("to_str_tokens", 5, ValueError, r"to_str_tokens: got token ids of shape \[\], expected one sequence"),
    ("to_str_tokens", [[5, 6], [7]], ValueError, "to_str_tokens: got rows of different lengths"),
    ("to_str_tokens", [5, "Mary"], TypeError, "to_str_tokens: got a list of int, expected token ids"),
    ("to_str_tokens", {"prepend_bos": "yes"}, TypeError, "prepend_bos: got 'yes', expected True, False or None"),
    ("to_str_tokens", {"padding_side": "up"}, ValueError, "padding_side: got 'up', expected 'left' or 'right'"),
    ("to_tokens", {"prepend_bos": 1}, TypeError, "prepend_bos: got 1, expected True, False or None"),
    ("to_single_token", 5, TypeError, "got int, expected the text of a token"),
    ("to_single_token", None, TypeError, "got NoneType, expected the text of a token"),
    ("to_single_token", "", ValueError, "'' holds no token"),
    ("to_single_str_token", [5, 6], ValueError, "to_single_str_token: got 2 token ids, expected one"),
    ("to_single_str_token", " Mary", TypeError, "to_single_str_token: got str, expected token ids"),
    ("to_answer_tokens", ["Mary"], TypeError, "got list, expected the text of a token"),
    ("token_ids", [5, None], TypeError, "tokens: got a list of int, expected token ids"),
    ("token_ids", True, TypeError, "tokens: got bool, expected token ids"),
    ("token_ids", [[5], [6, 7]], ValueError, "tokens: got rows of different lengths"),
    ("token_ids", 10**6, ValueError, "tokens: got token 1000000, expected 0 to 370"),
]


@pytest.mark.parametrize(("method", "given", "kind", "message"), REFUSED)
def test_wrong_input_gets_a_sentence(bridges, method, given, kind, message):
    call, options = getattr(bridges["llama first"], method), given if isinstance(given, dict) else {}
    with pytest.raises(kind, match=message):
        call(*([TEXT] if options else [given]), **options)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ((5, "Mary"), TypeError, "prompt: got 5, expected a str"),
        ((["a", "b"], "Mary"), TypeError, r"prompt: got \['a', 'b'\], expected a str"),
        ((TEXT, None), TypeError, "answer: got None, expected a str"),
    ],
)
def test_scoring_wrong_input_gets_a_sentence(bridges, given, kind, message):
    with pytest.raises(kind, match=message):
        scored(*given, bridges["falcon"])
    with pytest.raises(ValueError, match="top_k: got 0, expected 1 or more"):
        scored(TEXT, "Mary", bridges["falcon"], top_k=0)
    with pytest.raises(ValueError, match="'' holds no token"):
        scored(TEXT, "", bridges["falcon"], prepend_space_to_answer=False)


def test_positions_of_what_is_no_token(bridges):
    bridge = bridges["llama first"]
    for wrong, kind in ((None, TypeError), (1.5, TypeError), ([5, 6], ValueError), ("", ValueError)):
        with pytest.raises(kind):
            bridge.get_token_position(wrong, TEXT)
    with pytest.raises(ValueError, match="get_token_position: got token ids of shape"):
        bridge.get_token_position(5, torch.ones(2, 3, dtype=torch.long))
    bare = TransformerBridge(family("7b"))
    assert bare.get_token_position(7, torch.tensor([[5, 7]])) == 1
    with pytest.raises(ValueError, match=r"token 9 does not occur in \[5, 7\]"):
        bare.get_token_position(9, [5, 7])


def test_empty_ids(bridges):
    bridge = bridges["llama first"]
    assert bridge.to_string([]) == "" and bridge.to_str_tokens([]) == []
    assert bridge.to_string([[], [5]])[0] == ""
