"""Generated English with known circuits: indirect objects, repeats, successors and copies.

A seed fixes the text on every machine. Name pairs are split once into training and held-out pairs; `tiny-falcon` and
`tiny-mixtral` never saw a sentence with a held-out pair.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from transformer_lens.data.words import COLORS, DAYS, LETTERS, MONTHS, NAMES, NUMBERS, OBJECTS, PLACES, TEMPLATES

Order = Literal["ABB", "BAB"]
ORDERS: tuple[Order, Order] = ("ABB", "BAB")
Task = Literal["ioi", "successor", "copying"]
HELD_OUT_SHARE = 0.15
_SPLIT_SALT = "tiny-name-pairs"


@dataclass(frozen=True)
class TextExample:
    """A prompt and its completion.

    >>> TextExample("Days: Monday Tuesday", " Wednesday Thursday.").text
    'Days: Monday Tuesday Wednesday Thursday.'
    """

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class IOIExample:
    """An indirect-object sentence without its last word, in order "ABB" (the indirect object first) or "BAB".

    >>> example = ioi_examples(1)[0]
    >>> example.corrupted != example.prompt and example.corrupted.split()[:4] == example.prompt.split()[:4]
    True
    """

    prompt: str
    indirect_object: str
    subject: str
    order: Order
    template: str
    place: str
    thing: str

    @property
    def answer(self) -> str:
        """The indirect object as the next token, with its leading space."""
        return f" {self.indirect_object}"

    @property
    def wrong_answer(self) -> str:
        """The subject, with its leading space."""
        return f" {self.subject}"

    @property
    def corrupted(self) -> str:
        """The prompt with its second subject swapped for the indirect object, so that `wrong_answer` follows."""
        names = (self.indirect_object, self.subject)
        first, second = names if self.order == "ABB" else names[::-1]
        return self.template.format(A=first, B=second, S=self.indirect_object, P=self.place, O=self.thing)


@dataclass(frozen=True)
class IOIPair:
    """A clean prompt, which `answer` follows, and one with its second subject swapped, which `wrong_answer` follows."""

    clean: str
    corrupted: str
    answer: str
    wrong_answer: str


@lru_cache(maxsize=2)
def name_pairs(held_out: bool = False) -> tuple[tuple[str, str], ...]:
    """Every unordered pair of names on one side of the split, which a salted hash of the two decides.

    >>> set(name_pairs(held_out=True)) & set(name_pairs(held_out=False))
    set()
    """

    def drawn(pair: tuple[str, str]) -> float:
        digest = hashlib.sha256("|".join((_SPLIT_SALT, *sorted(pair))).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return tuple(pair for pair in combinations(NAMES, 2) if (drawn(pair) < HELD_OUT_SHARE) == held_out)


def _ordered_pair(rng: Random, held_out: bool) -> tuple[str, str]:
    first, second = rng.choice(name_pairs(held_out))
    return (first, second) if rng.random() < 0.5 else (second, first)


def ioi_example(rng: Random, held_out: bool = False, order: Order | None = None) -> IOIExample:
    """A random indirect-object prompt with a held-out or a training name pair."""
    if order is not None and order not in ORDERS:
        raise ValueError(f"order: got {order!r}, expected one of {', '.join(ORDERS)}")
    drawn: Order = rng.choice(ORDERS) if order is None else order
    first, second = _ordered_pair(rng, held_out)
    indirect_object, subject = (first, second) if drawn == "ABB" else (second, first)
    template, place, thing = rng.choice(TEMPLATES), rng.choice(PLACES), rng.choice(OBJECTS)
    prompt = template.format(A=first, B=second, S=subject, P=place, O=thing)
    return IOIExample(prompt, indirect_object, subject, drawn, template, place, thing)


def ioi_pair(seed: int = 0, held_out: bool = True, order: Order | None = None) -> IOIPair:
    """Clean and corrupted prompts of equal token length for activation patching; only the second subject differs.

    >>> pair = ioi_pair(seed=3, order="BAB")
    >>> pair.clean != pair.corrupted and pair.answer != pair.wrong_answer
    True
    """
    example = ioi_example(Random(seed), held_out, order)
    return IOIPair(example.prompt, example.corrupted, example.answer, example.wrong_answer)


def ioi_examples(count: int, seed: int = 0, held_out: bool = True) -> list[IOIExample]:
    """Indirect-object prompts in alternating orders, by default with held-out name pairs."""
    rng = Random(seed)
    return [ioi_example(rng, held_out, ORDERS[index % 2]) for index in range(count)]


def repeated_random_tokens(
    token_ids: Sequence[int], length: int, batch: int, bos: int, rng: Random | None = None
) -> Tensor:
    """BOS, `length` tokens drawn uniformly from `token_ids`, and the same tokens again: [batch, 1 + 2 * length].

    >>> tokens = repeated_random_tokens(range(10, 90), length=5, batch=2, bos=0)
    >>> tokens.shape, bool((tokens[:, 1:6] == tokens[:, 6:]).all())
    (torch.Size([2, 11]), True)
    """
    if length < 1 or batch < 1:
        raise ValueError(f"length and batch: got {length} and {batch}, expected at least 1 each")
    rng = rng or Random(0)
    halves = [rng.choices(token_ids, k=length) for _ in range(batch)]
    return torch.tensor([[bos, *half, *half] for half in halves])


def padded_prompts(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts with BOS (if there is one), padded on the right, which needs no mask, and the place of each last token."""
    front = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [[*front, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
    padded = [row + [pad] * (width - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor([len(row) - 1 for row in rows])


# The label in front gives every item of the series its leading space, hence its own single token.
_SERIES = (("Days:", DAYS), ("Months:", MONTHS), ("Numbers:", NUMBERS), ("Letters:", LETTERS))


def successor_example(rng: Random) -> TextExample:
    """Days, months, numbers or letters in order from a random start; days and months wrap around."""
    label, items = rng.choice(_SERIES)
    shown, follow = rng.randint(1, 3), rng.randint(2, 4)
    wraps = items in (DAYS, MONTHS)
    start = rng.randrange(len(items) if wraps else len(items) - shown - follow + 1)
    run = [items[(start + step) % len(items)] for step in range(shown + follow)]
    return TextExample(" ".join((label, *run[:shown])), "".join(f" {item}" for item in run[shown:]) + ".")


def copying_example(rng: Random) -> TextExample:
    """A fact stated and then asked for: an owner's object, an object's color, or a list of words."""
    kind = rng.randrange(3)
    if kind == 2:
        words = rng.sample(OBJECTS + PLACES + COLORS, rng.randint(2, 5))
        listed = "".join(f" {word}" for word in words)
        return TextExample(f"List:{listed}. Again:", f"{listed}.")
    if kind == 0:  # only training pairs, so the split holds for all the text
        answers: Sequence[str] = _ordered_pair(rng, held_out=False)
        things, verb = rng.sample(OBJECTS, 2), "is for"
    else:
        count = rng.randint(2, 3)
        things, answers, verb = rng.sample(OBJECTS, count), rng.sample(COLORS, count), "is"
    asked = rng.randrange(len(things))
    facts = " ".join(f"The {thing} {verb} {answer}." for thing, answer in zip(things, answers, strict=True))
    return TextExample(f"{facts} The {things[asked]} {verb}", f" {answers[asked]}.")


def training_example(rng: Random, task: Task) -> TextExample:
    """A random training sentence of a task; indirect-object sentences use training pairs only."""
    if task == "ioi":
        example = ioi_example(rng, held_out=False)
        return TextExample(example.prompt, f"{example.answer}.")
    return successor_example(rng) if task == "successor" else copying_example(rng)


def training_text(count: int, seed: int = 0) -> Iterator[str]:
    """Training sentences of all tasks, for the tokenizer."""
    rng = Random(seed)
    tasks: tuple[Task, ...] = ("ioi", "ioi", "successor", "copying")
    for index in range(count):
        yield training_example(rng, tasks[index % len(tasks)]).text
