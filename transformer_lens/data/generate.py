"""Generated English with known circuits: indirect objects, repeats, successors and copies.

Everything is drawn from a `random.Random`, so a seed fixes the text on every machine. Name pairs are split once and for
all into training and held-out pairs; `tiny-falcon` and `tiny-mixtral` never saw a sentence with a held-out pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from random import Random
from typing import Literal

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
    """A prompt and the completion that follows from it.

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
    """An indirect-object sentence without its last word. In order "ABB" the indirect object is named first and the
    subject second and third; in "BAB" the subject comes first.

    >>> example = ioi_example(Random(0), order="ABB")
    >>> example.prompt.count(example.subject), example.prompt.count(example.indirect_object)
    (2, 1)
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
        """The indirect object as the token that follows the prompt: with its leading space."""
        return f" {self.indirect_object}"

    @property
    def wrong_answer(self) -> str:
        """The subject, with its leading space."""
        return f" {self.subject}"


@dataclass(frozen=True)
class IOIPair:
    """A clean prompt and the same prompt with the second subject swapped for the indirect object, so that `answer`
    follows the clean prompt and `wrong_answer` the corrupted one.

    >>> pair = ioi_pair(seed=0)
    >>> len(pair.clean.split()) == len(pair.corrupted.split())
    True
    """

    clean: str
    corrupted: str
    answer: str
    wrong_answer: str


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether the unordered pair of names is kept out of training: decided by a salted hash, so the split does not
    depend on the order or on the rest of the names.

    >>> is_held_out_pair("Mary", "John") == is_held_out_pair("John", "Mary")
    True
    """
    pair = "|".join((_SPLIT_SALT, *sorted((first, second))))
    digest = hashlib.sha256(pair.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


@lru_cache(maxsize=2)
def name_pairs(held_out: bool = False) -> tuple[tuple[str, str], ...]:
    """Every unordered pair of names on one side of the split.

    >>> set(name_pairs(held_out=True)) & set(name_pairs(held_out=False))
    set()
    """
    return tuple(pair for pair in combinations(NAMES, 2) if is_held_out_pair(*pair) == held_out)


def _ordered_pair(rng: Random, held_out: bool) -> tuple[str, str]:
    """A pair from one side of the split, in either order with equal chance."""
    first, second = rng.choice(name_pairs(held_out))
    return (first, second) if rng.random() < 0.5 else (second, first)


def ioi_example(rng: Random, held_out: bool = False, order: Order | None = None) -> IOIExample:
    """One indirect-object prompt, with a name pair from the held-out or the training side.

    >>> ioi_example(Random(1), held_out=True).answer in {f" {name}" for name in NAMES}
    True
    """
    if order is not None and order not in ORDERS:
        raise ValueError(f"order: got {order!r}, expected one of {', '.join(ORDERS)}")
    drawn: Order = rng.choice(ORDERS) if order is None else order
    first, second = _ordered_pair(rng, held_out)
    indirect_object, subject = (first, second) if drawn == "ABB" else (second, first)
    template, place, thing = rng.choice(TEMPLATES), rng.choice(PLACES), rng.choice(OBJECTS)
    prompt = template.format(A=first, B=second, S=subject, P=place, O=thing)
    return IOIExample(prompt, indirect_object, subject, drawn, template, place, thing)


def ioi_pair(seed: int = 0, held_out: bool = True, order: Order | None = None) -> IOIPair:
    """Clean and corrupted prompts of equal token length (every name is one token) for activation patching. Only the
    second mention of the subject differs.

    >>> pair = ioi_pair(seed=3, order="BAB")
    >>> pair.clean != pair.corrupted and pair.answer != pair.wrong_answer
    True
    """
    example = ioi_example(Random(seed), held_out, order)
    first, second = example.indirect_object, example.subject
    if example.order == "BAB":
        first, second = second, first
    filled = {"A": first, "B": second, "S": example.indirect_object, "P": example.place, "O": example.thing}
    corrupted = example.template.format(**filled)
    return IOIPair(example.prompt, corrupted, example.answer, example.wrong_answer)


def ioi_examples(count: int, seed: int = 0, held_out: bool = True) -> list[IOIExample]:
    """A list of indirect-object prompts, by default with unseen name pairs, in alternating orders.

    >>> len(ioi_examples(4))
    4
    """
    rng = Random(seed)
    return [ioi_example(rng, held_out, ORDERS[index % 2]) for index in range(count)]


def held_out_text(count: int = 200, seed: int = 0) -> str:
    """Indirect-object sentences with unseen name pairs as plain text, one a line, answers included.

    >>> held_out_text(2).count("\\n")
    2
    """
    return "".join(f"{example.prompt}{example.answer}.\n" for example in ioi_examples(count, seed))


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


# The label in front gives every item of the series its leading space, hence its own single token.
_SERIES = (("Days:", DAYS), ("Months:", MONTHS), ("Numbers:", NUMBERS), ("Letters:", LETTERS))


def successor_example(rng: Random) -> TextExample:
    """Days, months, numbers or letters counted up from anywhere; days and months wrap around.

    >>> successor_example(Random(0)).prompt.split()[0] in {"Days:", "Months:", "Numbers:", "Letters:"}
    True
    """
    label, items = rng.choice(_SERIES)
    shown, follow = rng.randint(1, 3), rng.randint(2, 4)
    wraps = items in (DAYS, MONTHS)
    start = rng.randrange(len(items) if wraps else len(items) - shown - follow + 1)
    run = [items[(start + step) % len(items)] for step in range(shown + follow)]
    return TextExample(" ".join((label, *run[:shown])), "".join(f" {item}" for item in run[shown:]) + ".")


def copying_example(rng: Random) -> TextExample:
    """A fact stated and asked for again: an owner's object, an object's color, or a list of words.

    >>> copying_example(Random(0)).completion.startswith(" ")
    True
    """
    kind = rng.randrange(3)
    if kind == 0:
        return _owner_example(rng)
    if kind == 1:
        return _color_example(rng)
    words = rng.sample(OBJECTS + PLACES + COLORS, rng.randint(2, 5))
    listed = "".join(f" {word}" for word in words)
    return TextExample(f"List:{listed}. Again:", f"{listed}.")


def _owner_example(rng: Random) -> TextExample:
    """Two owners, one asked about; only training pairs, so the split holds for all the text."""
    owners = _ordered_pair(rng, held_out=False)
    things = rng.sample(OBJECTS, 2)
    asked = rng.randrange(2)
    facts = " ".join(f"The {thing} is for {owner}." for owner, thing in zip(owners, things, strict=True))
    return TextExample(f"{facts} The {things[asked]} is for", f" {owners[asked]}.")


def _color_example(rng: Random) -> TextExample:
    """Two or three colored objects, one asked about."""
    count = rng.randint(2, 3)
    things, colors = rng.sample(OBJECTS, count), rng.sample(COLORS, count)
    asked = rng.randrange(count)
    facts = " ".join(f"The {thing} is {color}." for thing, color in zip(things, colors, strict=True))
    return TextExample(f"{facts} The {things[asked]} is", f" {colors[asked]}.")


def training_example(rng: Random, task: Task) -> TextExample:
    """One training sentence of a task; indirect-object sentences use training pairs only.

    >>> training_example(Random(0), "ioi").completion.endswith(".")
    True
    """
    if task == "ioi":
        example = ioi_example(rng, held_out=False)
        return TextExample(example.prompt, f"{example.answer}.")
    return successor_example(rng) if task == "successor" else copying_example(rng)


def training_text(count: int, seed: int = 0) -> Iterator[str]:
    """Training sentences of all tasks, for the tokenizer.

    >>> len(list(training_text(8)))
    8
    """
    rng = Random(seed)
    tasks: tuple[Task, ...] = ("ioi", "ioi", "successor", "copying")
    for index in range(count):
        yield training_example(rng, tasks[index % len(tasks)]).text
