"""Small tokenizers of the kinds that published models have: LLaMA's in its three forms, and Falcon's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPACE = "▁"
TEXT = "When Mary and John went to the store, John gave a drink to"
WORDS = ["When", "Mary", "and", "John", "went", "to", "the", "store", "gave", "a", "drink", "sat"]
INSIDE = ["Mary", "ing", "er"]
"""Tokens without a space in front, which stand inside words."""
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.:!?'<>|[]/"
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}{% endfor %}"
)
"""Mistral's, in short: it begins with BOS, and `[INST]` are special tokens."""
LLAMA_FORMS = ("normalizer", "first", "always")
"""Where the space in front of a text comes from: a normaliser, or a pre-tokenizer's `prepend_scheme`."""


def _bpe(words: Iterable[Sequence[str]], alphabet: Iterable[str], special: Sequence[str], **options: Any) -> models.BPE:
    """Each of the words is a token, put together from the left."""
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, *alphabet]))}
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    return models.BPE(vocab=vocabulary, merges=list(merges), **options)


def llama(form: str = "normalizer", **changes: Any) -> PreTrainedTokenizerFast:
    """As LLaMA, Mistral and Mixtral have it: `▁` for a space, one in front of a text, bytes for what is unknown.

    >>> llama().tokenize("Mary and")
    ['▁Mary', '▁and']
    """
    found = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*(SPACE + word for word in WORDS), *INSIDE]
    model = _bpe(words, [*found, SPACE, *CHARACTERS], SPECIAL, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    made = Tokenizer(model)
    if form == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=form, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**usual, "chat_template": CHAT_TEMPLATE, **changes})


def falcon(**changes: Any) -> PreTrainedTokenizerFast:
    """As the published Falcons have it: bytes, `Ġ` for a space, an end token, neither BOS nor a pad token.

    >>> falcon().tokenize("Mary and")
    ['Mary', 'Ġand']
    """
    words = [*("Ġ" + word for word in WORDS), *INSIDE, "ĊĊ"]
    made = Tokenizer(_bpe(words, sorted(pre_tokenizers.ByteLevel.alphabet()), ["<|endoftext|>"]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    usual = {"eos_token": "<|endoftext|>", "padding_side": "right"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**usual, **changes})
