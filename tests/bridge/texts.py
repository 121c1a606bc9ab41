"""A small real tokenizer for the tests."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "and", "John", "Mary", "went", "to", "store"]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def tokenizer(without: tuple[str, ...] = (), **changes) -> PreTrainedTokenizerFast:
    """One token for each word; `without` leaves special tokens without their role."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(SPECIAL.values()))
    special = {name: token for name, token in SPECIAL.items() if name not in without}
    return PreTrainedTokenizerFast(tokenizer_object=words, **{"padding_side": "right", **special, **changes})
